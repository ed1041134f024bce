"""What a model looks like inside: where its decoder blocks are, what it cannot be, and how far it can read."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from shl.core.errors import ShlError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

# Where decoder blocks live, most specific first: nets with a vision tower hold other stacks of the same name.
_BLOCK_PATHS = (
    "model.language_model.layers",
    "language_model.model.layers",
    "model.layers",
    "model.decoder.layers",
    "transformer.h",
    "transformer.blocks",
    "gpt_neox.layers",
)
_NOT_TEXT = ("vision", "visual", "image", "audio", "speech", "encoder")  # parts of paths to stacks of other kinds


def sizes(config: PreTrainedConfig) -> tuple[int, int]:
    """Number of decoder blocks and width of the residual stream, of the text part where a model has several."""
    text = config.get_text_config()
    found = [getattr(text, name, None) for name in ("num_hidden_layers", "hidden_size")]
    if not all(isinstance(value, int) for value in found):
        raise ShlError(
            f"the configuration of {config.model_type} tells no number of blocks",
            hint="looked for num_hidden_layers and hidden_size; use a decoder of text",
        )
    return found[0], found[1]  # type: ignore[return-value]


def blocks(model: PreTrainedModel, n: int) -> tuple[str, list[nn.Module]]:
    """The list of n decoder blocks, and where in the model it lies.

    Looked for where known families have it, then anywhere: one list of that length which no other holds.
    """
    from torch import nn

    lists = {path: part for path, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part) == n}
    for path in _BLOCK_PATHS:
        if path in lists:
            return path, list(lists[path])
    outer = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists)]
    text = [path for path in outer if not any(word in path for word in _NOT_TEXT)]
    if len(text) == 1:
        return text[0], list(lists[text[0]])
    raise ShlError(
        f"cannot find the {n} decoder blocks of {type(model).__name__}",
        hint=f"looked for one list of {n} blocks at {', '.join(_BLOCK_PATHS)}, then anywhere; "
        f"lists of that length: {', '.join(outer) or 'none'}",
    )


def check_decoder(model: PreTrainedModel) -> None:
    """Refuse what cannot be decoded token by token from a cache of keys and values."""
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        raise ShlError(
            f"{type(model).__name__} is no decoder with a cache of keys and values",
            hint="use a causal language model with attention; docs/models.md lists what is tested",
        )


def learned_positions(body: nn.Module, config: PreTrainedConfig) -> int | None:
    """How many positions a table of learned ones has; None where they are computed and have no such end."""
    from torch import nn

    tables = [path for path, part in body.named_modules() if isinstance(part, nn.Embedding)]
    found = any("pos" in (name := path.rpartition(".")[2]) or name == "wpe" for path in tables)
    return getattr(config, "max_position_embeddings", None) if found else None


def guard_positions(model: PreTrainedModel, body: nn.Module, config: PreTrainedConfig) -> None:
    """Let a text longer than a table of learned positions be one clear error."""
    limit = learned_positions(body, config)
    if limit is None:
        return

    def check(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        places, cache = kwargs.get("position_ids"), kwargs.get("past_key_values")
        if places is not None:
            length = int(places.max()) + 1
        else:
            length = ids.shape[-1] + (0 if cache is None else cache.get_seq_length())
        if length > limit:
            raise ShlError(
                f"a text of {length} tokens does not fit the {limit} positions of {type(model).__name__}",
                hint="shorten the prompts, or lower --max-new-tokens or --max-len",
            )

    body.register_forward_pre_hook(check, with_kwargs=True)
