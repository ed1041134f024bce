"""Weights that stay on the CPU while the model runs on a GPU: laid there by accelerate, and copied at every pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from shl.core.console import warn
from shl.core.errors import ShlError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from shl.core.locate import ModelRef
    from shl.core.models import Loaded


def is_away(weight: Tensor) -> bool:
    """Whether a weight is a name only, whose numbers accelerate brings when they are needed."""
    return weight.is_meta


def check_places(ref: ModelRef, places: Sequence[Any]) -> None:
    """Say what does not fit the GPUs; refuse what does not fit the memory of the machine either."""
    away = [str(place) for place in places if str(place) in ("cpu", "disk")]
    if "disk" in away:
        raise ShlError(
            f"{ref.id} does not fit this machine: parts of it would lie on the disk",
            hint="use --dtype bfloat16, more GPUs, or a machine with more memory",
        )
    if away:
        warn(f"{len(away)} of {len(places)} parts of {ref.id} lie on the CPU and are copied at every pass: slow")


def refuse_away(loaded: Loaded, what: str, hint: str) -> None:
    """What needs the weights themselves cannot be done with a model that is partly on the CPU."""
    if any(is_away(weight) for weight in loaded.model.parameters()):
        raise ShlError(f"parts of {loaded.ref.id} lie on the CPU, so {what}", hint=hint)


def at_hand(module: nn.Module, name: str, where: Any) -> Tensor | None:
    """A module's weight or bias; when it is away, a copy on the device `where`. None when it has none of that name."""
    found = dict(module.named_parameters(recurse=False)).get(name)
    if found is None or not is_away(found):
        return None if found is None else found.data
    hook: Any = module._hf_hook
    return hook.weights_map[name].to(where, found.dtype)
