"""Models with quantised weights: which can be loaded, and a chain that acts beside weights that it cannot enter."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from shl.core.errors import Mismatch, ShlError
from shl.core.offload import is_away

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedConfig

    from shl.core.locate import ModelRef
    from shl.core.models import Loaded


def check_loadable(ref: ModelRef, config: PreTrainedConfig) -> bool:
    """Whether the model is quantised; refused, before its weights are opened, where that cannot be read here."""
    stored = getattr(config, "quantization_config", None)
    if not stored:
        return False
    told = stored if isinstance(stored, dict) else stored.to_dict()
    named = told.get("quant_method")
    method = str(getattr(named, "value", named))
    if method != "bitsandbytes":
        raise ShlError(
            f"{ref.id} is quantised by {method}, which shl does not know",
            hint="use the model's own weights, or a copy quantised by bitsandbytes",
        )
    if find_spec("bitsandbytes") is None:
        raise ShlError(
            f"{ref.id} is quantised by bitsandbytes, which is not installed",
            hint="pip install bitsandbytes, or use the model's own weights",
        )
    return True


def is_quantised(weight: Tensor) -> bool:
    """Whether a weight is codes instead of numbers."""
    return not weight.dtype.is_floating_point


def is_sealed(weight: Tensor) -> bool:
    """Whether nothing can be merged into a weight: it is codes, or it is elsewhere."""
    return is_quantised(weight) or is_away(weight)


def put_beside(loaded: Loaded, path: str, a: Tensor, b: Tensor) -> None:
    """Have a linear map add x (b a)^T to its output, except within `Loaded.base`, and leave its weights alone.

    a [rank, in] and b [out, rank] are the whole chain's, in float32.
    """
    module: Any = loaded.model.get_submodule(path)
    if (getattr(module, "out_features", None), getattr(module, "in_features", None)) != (b.shape[0], a.shape[1]):
        raise Mismatch(
            f"the adapter changes {path}, which {loaded.ref.id} does not have in that shape",
            hint="give the model that it was trained on with --model",
        )
    factors = [a.to(loaded.device), b.to(loaded.device)]

    def add(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        if loaded.at_base:
            return output
        factors[:] = [factor.to(output.device) for factor in factors]  # once, where the model is over several devices
        low = args[0].to(output.device, factors[0].dtype) @ factors[0].T
        return output + (low @ factors[1].T).to(output.dtype)

    loaded.beside[path] = module.register_forward_hook(add)


def take_away(loaded: Loaded) -> None:
    """Leave the modules as they were before the chain was put beside them."""
    for handle in loaded.beside.values():
        handle.remove()
    loaded.beside.clear()
