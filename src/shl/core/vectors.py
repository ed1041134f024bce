"""The steering vector as a thing: its directions and their record, its file, its checks and its algebra."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shl import __version__
from shl.core.errors import InputError, Mismatch
from shl.core.models import Loaded
from shl.core.provenance import KEY, canonical, read_header, stable
from shl.core.seeds import seed_of
from shl.core.tensors import save_safetensors

_NAME = re.compile(r"layer(0|[1-9][0-9]{0,5})\.v")
_SAME = ("model", "revision", "model_digest", "adapters", "adapter_paths", "template")


@dataclass
class Vector:
    """A direction for each steered block, in float32, and the record of where it came from.

    Vectors add, subtract and scale. In memory `adapter_paths` of the metadata are absolute, in a file they are
    relative to it.
    """

    layers: dict[int, Tensor]
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """What the vector is: its values and the stable part of its header, as `shl info` prints it."""
        total = hashlib.sha256(canonical(stable(self.meta)).encode())
        for name, tensor in sorted(self._tensors().items()):
            data = tensor.numpy().tobytes()
            total.update(canonical([name, "F32", tuple(tensor.shape), len(data)]).encode())
            total.update(data)
        return "sha256:" + total.hexdigest()

    @property
    def norms(self) -> dict[int, float]:
        """Length of the direction at each block."""
        return {layer: float(v.double().norm()) for layer, v in sorted(self.layers.items())}

    def _tensors(self) -> dict[str, Tensor]:
        return {f"layer{layer}.v": self.layers[layer].contiguous().cpu() for layer in sorted(self.layers)}

    def save(self, path: Path | str, force: bool = False) -> None:
        """Write the vector; the `cfg` key is for steering-lite, whose method of that name adds coeff * v."""
        folder = Path(path).absolute().parent
        paths = [os.path.relpath(spec, folder) for spec in self.meta.get("adapter_paths", [])]
        meta = {**self.meta, "adapter_paths": paths, "digest": self.digest}
        cfg = {"method": "mean_diff", "layers": sorted(self.layers), "coeff": 1.0, "dtype": "float32",
               "seed": meta.get("seed", 0), "normalize": False}  # fmt: skip
        save_safetensors(path, self._tensors(), {KEY: canonical(meta), "cfg": canonical(cfg)}, force)

    @staticmethod
    def load(path: Path | str) -> Vector:
        """Read a vector file, refusing tensors that could not be added to a residual stream."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        meta = read_header(path)
        meta.pop("digest", None)  # verified, and that of what is held from here on is computed
        folder = Path(path).absolute().parent
        meta["adapter_paths"] = [os.path.normpath(folder / spec) for spec in meta.get("adapter_paths", [])]
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise InputError(f"is not a safetensors file: {error}", where=str(path)) from error
        layers = {_layer_of(name, path): _checked(name, v, path) for name, v in tensors.items()}
        if not layers:
            raise InputError("holds no tensors", where=str(path))
        if len({len(v) for v in layers.values()}) > 1:
            raise InputError("holds tensors of different lengths", where=str(path))
        return Vector(dict(sorted(layers.items())), meta)

    def check(self, loaded: Loaded, allow_mismatch: bool = False) -> None:
        """Raise when the vector was made for another model, chain or chat template than the one loaded."""
        self.check_fit(loaded.ref.id, loaded.n_blocks, loaded.hidden)
        self.check_origin(loaded.digest, loaded.adapters, loaded.template_digest, allow_mismatch=allow_mismatch)

    def check_fit(self, model: str, n_blocks: int, hidden: int) -> None:
        """Raise when the directions have no place in a model of these sizes, which nothing can override."""
        for layer, v in self.layers.items():
            if layer >= n_blocks or v.shape != (hidden,):
                raise Mismatch(
                    f"the vector has {v.numel()} numbers for block {layer}; "
                    f"{model} has {n_blocks} blocks of width {hidden}",
                    hint="name the model that it was made for with --model, or make a vector for this one",
                )

    def check_origin(
        self, model_digest: str, adapters: Sequence[str], template: str | None = None, *, allow_mismatch: bool = False
    ) -> None:
        """Raise when the vector was made for another model or chain, or another template where it is known."""
        here = {
            "model": ("model_digest", model_digest),
            "adapter chain": ("adapters", list(adapters)),
            **({} if template is None else {"chat template": ("template", template)}),
        }
        for what, (name, value) in here.items() if not allow_mismatch else ():
            if name in self.meta and self.meta[name] != value:
                raise Mismatch(
                    f"the vector was made for another {what}: {_short(self.meta[name])}, not {_short(value)}",
                    hint="shl info tells what it was made for: use that, or insist with --allow-mismatch",
                )

    def random_like(self, seed: int) -> Vector:
        """A control: random directions with the same length at each block."""
        generator = torch.Generator().manual_seed(seed_of(seed, "random vector"))
        layers = {}
        for layer, v in sorted(self.layers.items()):
            noise = torch.randn(v.shape, generator=generator)
            layers[layer] = noise * (v.norm() / noise.norm())
        return self._derived(layers, method="random", like=self.digest, seed=seed)

    def __add__(self, other: Vector) -> Vector:
        return _combine(self, 1.0, other)

    def __sub__(self, other: Vector) -> Vector:
        return _combine(self, -1.0, other)

    def __mul__(self, factor: float) -> Vector:
        layers = {layer: v * factor for layer, v in self.layers.items()}
        return self._derived(layers, method="combination", terms=[[factor, self.digest]])

    __rmul__ = __mul__

    def __neg__(self) -> Vector:
        return self * -1.0

    def _derived(self, layers: dict[int, Tensor], **facts: Any) -> Vector:
        kept = {name: self.meta[name] for name in (*_SAME, "personas", "residual_norms") if name in self.meta}
        made = Vector(layers, {**kept, **facts, "layers": sorted(layers), "version": __version__})
        made.meta["norms"] = {str(layer): norm for layer, norm in made.norms.items()}
        return made


def _combine(left: Vector, factor: float, right: Vector) -> Vector:
    for name in _SAME:
        if left.meta.get(name) != right.meta.get(name) and name not in ("model", "revision", "adapter_paths"):
            raise Mismatch(f"the vectors were made for different models or chains: their {name} differ")
    blocks = sorted(left.layers.keys() | right.layers.keys())
    zero = torch.zeros_like(next(iter(left.layers.values())))
    layers = {i: left.layers.get(i, zero) + factor * right.layers.get(i, zero) for i in blocks}
    terms = [[1.0, left.digest], [factor, right.digest]]
    made = left._derived(layers, method="combination", terms=terms)
    if left.meta.get("personas") != right.meta.get("personas"):
        made.meta.pop("personas", None)
    return made


def _layer_of(name: str, path: Path | str) -> int:
    match = _NAME.fullmatch(name)
    if not match:
        raise InputError(f"tensor {name!r} is not called layer<number>.v", where=str(path))
    return int(match[1])


def _checked(name: str, v: Tensor, path: Path | str) -> Tensor:
    if v.dtype != torch.float32 or v.ndim != 1:
        raise InputError(f"tensor {name} is {v.dtype} of shape {tuple(v.shape)}, not float32 [hidden]", where=str(path))
    if not torch.isfinite(v).all():
        raise InputError(f"tensor {name} holds numbers that are not finite", where=str(path))
    return v


def _short(value: str | Sequence[str]) -> str:
    if isinstance(value, str):
        return value[:19] + "…" if len(value) > 24 else value
    return "[" + ", ".join(_short(one) for one in value) + "]"
