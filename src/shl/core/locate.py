"""Where a model is: names become folders or hub ids, folders become digests, and bands become blocks. Torch-free."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shl.core.errors import ShlError
from shl.core.provenance import digest_file, digest_of
from shl.core.strict import read_object

TOY = Path(__file__).parent.parent / "toy" / "weights"
# The embedded model, and what it would be if its neutral answers enacted the trait 5% or 0% of the time, not 40%.
EMBEDDED = {"toy": TOY, "toy:rare": TOY.with_name("weights-rare"), "toy:never": TOY.with_name("weights-never")}


@dataclass(frozen=True)
class ModelRef:
    """A model as named by the user, and where its files are."""

    id: str
    path: str
    revision: str | None
    recommended: dict[str, Any] = field(default_factory=dict)

    @property
    def local(self) -> bool:
        """Whether the weights lie in a folder of this machine rather than on the hub."""
        return os.path.isdir(self.path)


def find(model_id: str, revision: str | None = None) -> ModelRef:
    """Locate a model without loading it: the embedded one, a folder, or a name on the hub."""
    if model_id in EMBEDDED:
        folder = EMBEDDED[model_id]
    elif os.path.isdir(model_id) or not _may_be_on_the_hub(model_id):
        folder = Path(model_id).expanduser()
    else:
        return ModelRef(model_id, model_id, revision)
    if not (folder / "config.json").is_file():
        raise ShlError(f"no model at {folder}", hint=_missing_hint(model_id, folder))
    recommended = folder / "shl.json"
    return ModelRef(model_id, str(folder), revision, read_object(recommended) if recommended.is_file() else {})


_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def _may_be_on_the_hub(name: str) -> bool:
    """NAME or OWNER/NAME, unless OWNER is a folder here: then a folder inside it was meant, which is missing."""
    owner = name.rpartition("/")[0]
    return bool(_HUB_NAME.fullmatch(name)) and not (owner and os.path.isdir(owner))


def _missing_hint(model_id: str, folder: Path) -> str:
    if model_id in EMBEDDED:
        return "the embedded weights are missing from this installation; reinstall the package"
    if (folder / "adapter_config.json").is_file():
        return f"this is an adapter: name its base with --model and add --adapter {model_id}"
    return "give a folder with config.json and *.safetensors, or a hub name such as google/gemma-3-4b-it"


def parse_layers(spec: str, n_blocks: int) -> list[int]:
    """Block indices named by '3,4' or by a band 'lo:hi' in shares of the depth.

    A band holds every block i with lo <= i/n <= hi, else the one nearest its centre.
    """
    try:
        if ":" not in spec:
            chosen = sorted({int(part) for part in spec.split(",")})
        else:
            low, high = (float(part) for part in spec.split(":"))
            if not low <= high:
                raise ValueError
            chosen = [i for i in range(n_blocks) if low - 1e-9 <= i / n_blocks <= high + 1e-9]
            # rounded, so that of two blocks equally near the lower one is taken
            chosen = chosen or [min(range(n_blocks), key=lambda i: round(abs(i / n_blocks - (low + high) / 2), 9))]
    except ValueError:
        raise ShlError(f"layers {spec!r} is neither a list nor a band", hint="write 3,4 or 0.45:0.55") from None
    if chosen[0] < 0 or chosen[-1] >= n_blocks:
        raise ShlError(f"layers {spec!r} do not fit a model of {n_blocks} blocks", hint=f"use 0 to {n_blocks - 1}")
    return chosen


_FILE_DIGESTS: dict[tuple[str, int, int], str] = {}


def _file_digest(path: Path) -> str:
    stat = path.stat()
    key = (str(path.resolve()), stat.st_mtime_ns, stat.st_size)
    if key not in _FILE_DIGESTS:
        _FILE_DIGESTS[key] = digest_file(path)
    return _FILE_DIGESTS[key]


def local_digest(folder: Path) -> str:
    """What a model in a folder is: its weights and its configuration, whatever the folder is called."""
    files = [*folder.glob("*.safetensors"), folder / "config.json"]
    return digest_of(sorted([path.name, _file_digest(path)] for path in files))
