"""Steering vectors of other tools, read into ours: steering-lite, persona vectors, subliminal distillation.

The layer convention is the whole difficulty. Ours: `layer{i}.v` is added to the output of 0-based block i.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shl import __version__
from shl.core import strict
from shl.core.defaults import VectorConfig
from shl.core.errors import InputError, ShlError
from shl.core.locate import parse_layers
from shl.core.provenance import KEY, digest_file, read_safetensors
from shl.core.vectors import Vector

_ADDED = ("mean_diff", "pca", "random")  # methods of steering-lite that add coeff * v at every position


def from_torch(path: Path | str, layers: str = VectorConfig.layers, model: str | None = None) -> Vector:
    """A vector from a `.pt` file of persona vectors or of subliminal distillation, at the blocks that `layers` names.

    The first is a tensor [blocks + 1, hidden], the second a dictionary that holds one as `raw`. Row 0 belongs to the
    embeddings and row i + 1 to block i, but the last row was read behind the final norm, which no block gives. The
    file is read by the loader that builds tensors and plain values only; one that holds more is refused.
    """
    held = _tensors_only(path)
    raw = held.get("raw") if isinstance(held, dict) else held
    if not isinstance(raw, Tensor) or raw.ndim != 2 or not raw.is_floating_point() or len(raw) < 3:
        shape = f"a tensor of shape {tuple(raw.shape)}" if isinstance(raw, Tensor) else f"a {type(raw).__name__}"
        raise InputError(
            f"holds {shape}, not one row for the embeddings and one for each block", where=str(path),
            hint="persona vectors save [blocks + 1, hidden], subliminal distillation a dictionary with it as `raw`",
        )  # fmt: skip
    blocks = len(raw) - 1
    chosen = parse_layers(layers, blocks)
    if blocks - 1 in chosen:
        raise ShlError(
            f"the row of block {blocks - 1} was read behind the final norm, so it is no direction of that block",
            hint=f"choose --layers below {blocks - 1}",
        )
    found = {i: raw[i + 1].float().clone() for i in chosen}
    return _made(path, found, "persona-vectors" if held is raw else "subliminal-distillation", model)


def _tensors_only(path: Path | str) -> Any:
    if not Path(path).is_file():
        raise InputError("there is no such file", where=str(path))
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged archive leads the loader into
        if type(error).__name__ == "UnpicklingError":
            raise InputError(
                "holds more than tensors and plain values, so reading it could run code", where=str(path),
                hint="where you trust it, load it and save the tensor alone: torch.save(tensor, 'v.pt')",
            ) from None  # fmt: skip
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise InputError(f"is not a file of torch.save, or a damaged one ({reason})", where=str(path)) from None


def from_steering_lite(path: Path | str, model: str | None = None) -> Vector:
    """A vector from steering-lite's file, its `coeff` multiplied in, so that our coefficient 1 steers as it does."""
    tensors, metadata = read_safetensors(path)
    if KEY in metadata:
        raise InputError("is a vector of shl already", where=str(path), hint="use it as it is: --vec FILE")
    cfg = _config(path, metadata)
    from safetensors.torch import load_file

    held = load_file(path)
    layers = {}
    for name in tensors:
        block, _, kind = name.removeprefix("layer").partition(".")
        if not name.startswith("layer") or not block.isdecimal() or kind != "v" or held[name].ndim != 1:
            raise InputError("is not layer<number>.v, a row", where=f"{path}: tensor {name}")
        layers[int(block)] = cfg["coeff"] * held[name].float()
    return _made(path, layers, "steering-lite", model, cfg=cfg)


def _config(path: Path | str, metadata: dict[str, str]) -> dict[str, Any]:
    """The part of steering-lite's settings that says how its tensors act, refused where they do more than add."""
    try:
        cfg = strict.loads(metadata["cfg"])
        kept = {name: cfg[name] for name in ("method", "coeff")}
        plain = cfg.get("target", "residual") == "residual" and cfg.get("target_submodule") is None
        if not strict.is_number(kept["coeff"]):
            raise ValueError("its coeff is no number")
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"is neither a vector of shl nor one of steering-lite ({error})", where=str(path),
            hint="steering-lite keeps its settings as JSON under the metadata key cfg",
        ) from None  # fmt: skip
    if kept["method"] not in _ADDED or not plain:
        raise ShlError(
            f"{path} does more than add a direction to the output of blocks: its method is {kept['method']!r}",
            hint=f"methods that can be read: {', '.join(_ADDED)}, at the residual stream",
        )
    return kept


def _made(path: Path | str, layers: dict[int, Tensor], tool: str, model: str | None, **facts: Any) -> Vector:
    """The vector, with what is known of it: neither the model's revision, nor chain, nor template."""
    for block, direction in layers.items():
        if not torch.isfinite(direction).all():
            raise InputError(f"holds numbers that are not finite for block {block}", where=str(path))
    if len({len(direction) for direction in layers.values()}) != 1:
        raise InputError("holds no directions, or some of different lengths", where=str(path))
    meta: dict[str, Any] = {
        "method": tool,
        "layers": sorted(layers),
        **({"model": model} if model else {}),
        "source": {"digest": digest_file(path), **facts},
        "version": __version__,
    }
    vector = Vector(dict(sorted(layers.items())), meta)
    vector.meta["norms"] = {str(block): norm for block, norm in vector.norms.items()}
    return vector
