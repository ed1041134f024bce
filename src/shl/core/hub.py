"""Names on the hub: found in the cache, or asked for once, so that a hub that is not there is told at once."""

from __future__ import annotations

import re
from pathlib import Path

from shl.core.console import note
from shl.core.errors import ShlError
from shl.core.locate import ModelRef

PATIENCE = 5.0  # seconds for one question
_COMMIT = re.compile(r"[0-9a-f]{40}")


def cache_only(ref: ModelRef) -> bool:
    """Whether a model on the hub is to be read from the cache alone. Raises when it cannot be had.

    With HF_HUB_OFFLINE, and for a commit that is in the cache, nothing is asked. Else the hub is asked once, without
    retries; when it cannot be reached, the cache serves if it can, and that is said.
    """
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    held = isinstance(try_to_load_from_cache(ref.path, "config.json", revision=ref.revision), str)
    if constants.is_offline_mode():
        if not held:
            raise ShlError(
                f"{_named(ref)} is no folder here and not in the cache, and HF_HUB_OFFLINE is set", hint=_HINT
            )
        return True
    if held and _COMMIT.fullmatch(ref.revision or ""):
        return True
    try:
        HfApi().model_info(ref.path, revision=ref.revision, timeout=PATIENCE)
    except GatedRepoError:
        raise ShlError(
            f"{ref.id} is gated", hint="accept its terms on its page, then log in with `hf auth login` or set HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise ShlError(f"{ref.id} has no revision {ref.revision}", hint="name a branch, a tag or a commit") from None
    except RepositoryNotFoundError:
        raise ShlError(
            f"{ref.id} is no folder here and no model on the hub that you may read",
            hint=f"check the name; a folder is written ./{ref.id}; a private model needs HF_TOKEN",
        ) from None
    except Exception as error:  # whatever the network and its library come up with
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        if not held:
            raise ShlError(
                f"{_named(ref)} is no folder here, and the hub cannot be asked: {reason}", hint=_HINT
            ) from None
        note(f"the hub cannot be asked ({reason}): {ref.id} is read from the cache")
        return True
    return False


def commit_of(ref: ModelRef) -> str | None:
    """The commit that a model in the cache is of, once its configuration has been read."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(ref.path, "config.json", revision=ref.revision)
    return Path(path).parent.name if isinstance(path, str) else None


_HINT = "give a folder, as ./NAME or a full path, or fetch the model where there is a network: hf download NAME"


def _named(ref: ModelRef) -> str:
    return ref.id if ref.revision is None else f"{ref.id} at {ref.revision}"
