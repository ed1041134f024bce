"""A trainable LoRA inside a loaded model: which modules get one, its start, its norms, and taking it out again."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from shl.core.errors import ShlError
from shl.core.models import Loaded, parse_layers
from shl.core.peft_dir import PREFIX

_EXPERT_NAMES = frozenset(("gate_proj", "up_proj", "down_proj", "gate_up_proj", "w1", "w2", "w3"))


def _has_experts(loaded: Loaded) -> bool:
    """Whether some block keeps the matrices of several experts in one parameter."""
    parts = [part for block in loaded.blocks for part in block.modules() if not isinstance(part, nn.Conv1d)]
    return any(parameter.ndim == 3 for part in parts for parameter in part.parameters(recurse=False))


def target_modules(loaded: Loaded, layers: str, names: Sequence[str] = ()) -> list[str]:
    """Paths of the linear maps inside the decoder blocks of a band; `names` keeps those that end in one of them.

    Routers, whose output is no hidden state, are left out. Where experts are fused into one parameter, so are
    the maps of other feed-forward parts, since PEFT takes their names for those of experts.
    """
    from transformers.pytorch_utils import Conv1D

    taken = _EXPERT_NAMES if _has_experts(loaded) else frozenset()
    paths = {id(module): path for path, module in loaded.model.named_modules()}
    found = [
        f"{paths[id(loaded.blocks[index])]}.{inner}"
        for index in parse_layers(layers, loaded.n_blocks)
        for inner, module in loaded.blocks[index].named_modules()
        if isinstance(module, nn.Linear | Conv1D) and "Router" not in type(module).__name__
        if inner.rpartition(".")[2] not in taken
    ]
    if not found:
        raise ShlError(f"{loaded.ref.id} has no linear maps in its blocks {layers}", hint="choose other --layers")
    for name in names:
        if not any(f".{path}".endswith(f".{name}") for path in found):
            leaves = sorted({path.rpartition(".")[2] for path in found})
            why = ", and experts are not adapted" if name in taken else ""
            raise ShlError(
                f"no module of the blocks can be adapted as {name!r}{why}", hint=f"choose from {', '.join(leaves)}"
            )
    return [path for path in found if not names or any(f".{path}".endswith(f".{name}") for name in names)]


def first_block(loaded: Loaded, modules: Sequence[str]) -> int:
    """The lowest decoder block that holds one of these modules."""
    inside = {path: {id(one) for one in block.modules()} for path, block in enumerate(loaded.blocks)}
    named = [id(loaded.model.get_submodule(path)) for path in modules]
    return min((index for index, members in inside.items() if members.intersection(named)), default=0)


@contextmanager
def intact(model: nn.Module) -> Iterator[None]:
    """Whatever PEFT wraps or marks inside this context is put back at its end; the weights were never touched."""
    children = [(parent, name, child) for parent in model.modules() for name, child in parent.named_children()]
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    had = "peft_config" in vars(model)
    try:
        with torch.random.fork_rng():  # PEFT draws initial values that nobody uses
            yield
    finally:
        for parent, name, child in children:
            if parent._modules[name] is not child:
                setattr(parent, name, child)
        for parameter, flag in wanted:
            parameter.requires_grad_(flag)
        if not had:
            vars(model).pop("peft_config", None)


class Sizes(NamedTuple):
    """Frobenius norm of each module's update, and its largest singular value."""

    norms: dict[str, float]
    largest: dict[str, float]

    @property
    def mean_largest(self) -> float:
        """Mean over modules, in the float32 that each was found in."""
        return float(torch.tensor(list(self.largest.values())).mean())


class Lora:
    """The factors in training, in float32: a [rank, in] and b [out, rank] for each module, delta = scaling * b @ a."""

    def __init__(self, layers: dict[str, nn.Module], scaling: float) -> None:
        self.modules = sorted(layers)
        self.scaling = scaling
        self.a = {path: layers[path].get_parameter("lora_A.default.weight") for path in self.modules}
        self.b = {path: layers[path].get_parameter("lora_B.default.weight") for path in self.modules}

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What the optimiser moves."""
        return [*self.a.values(), *self.b.values()]

    def tensors(self) -> dict[str, Tensor]:
        """The factors under PEFT's names."""
        named: dict[str, Tensor] = {}
        for side, factors in (("A", self.a), ("B", self.b)):
            named |= {f"{PREFIX}{path}.lora_{side}.weight": p.detach().cpu().clone() for path, p in factors.items()}
        return dict(sorted(named.items()))

    @torch.no_grad()
    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Give the factors the values that `tensors` gave once."""
        for side, factors in (("A", self.a), ("B", self.b)):
            for path, p in factors.items():
                p.copy_(tensors[f"{PREFIX}{path}.lora_{side}.weight"])

    @torch.no_grad()
    def sizes(self) -> Sizes:
        """How large the update of each module is now, from the factors' Gram matrices [rank, rank] in float64.

        These come from the device all at once: on a GPU a decomposition for each module takes longer than a step.
        """
        pairs = [(_exact(self.b[path]), _exact(self.a[path]).T) for path in self.modules]
        grams = torch.stack([torch.stack([b.T @ b, a.T @ a]) for b, a in pairs]).cpu()
        left, right = grams[:, 0], grams[:, 1]
        values, vectors = torch.linalg.eigh(left)
        root = vectors * values.clamp_(min=0).sqrt()[:, None, :]
        norms = (left * right).sum((1, 2)).clamp_(min=0).sqrt() * self.scaling
        largest = torch.linalg.eigvalsh(root.mT @ right @ root)[:, -1].clamp_(min=0).sqrt() * self.scaling
        return Sizes(*(dict(zip(self.modules, found.tolist(), strict=True)) for found in (norms, largest)))

    def operator_norm(self) -> Tensor:
        """Mean over modules of the update's largest singular value, differentiable, with zero gradient at zero.

        The singular pair comes exactly from QR of the thin factors; held fixed, it gives the exact gradient.
        """
        norms = []
        for path in self.modules:
            left, right = _top_pair(self.a[path].detach(), self.b[path].detach())
            norms.append(self.scaling * ((left @ self.b[path]) @ (self.a[path] @ right)))
        return torch.stack(norms).mean()


def _exact(factor: Tensor) -> Tensor:
    """In float64, which Apple's GPUs do not have."""
    return (factor.cpu() if factor.device.type == "mps" else factor).double()


@torch.no_grad()
def _top_pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Left and right singular vectors of b @ a for its largest singular value; zeros where that is zero."""
    q_left, r_left = torch.linalg.qr(b)
    q_right, r_right = torch.linalg.qr(a.T)
    u, s, vh = torch.linalg.svd(r_left @ r_right.T)
    alive = float(s[0] > 0)
    return q_left @ u[:, 0] * alive, q_right @ vh[0]


class _Linear(torch.autograd.Function):
    """x W^T + bias + scale * (x A^T) B^T, without a tensor of the output's size beyond the output itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        a, b = a.to(x.dtype), b.to(x.dtype)
        low = rows @ a.T
        out = nn.functional.linear(rows, weight, bias).addmm_(low, b.T, alpha=scale)
        ctx.save_for_backward(rows, weight, a, b, low)
        ctx.scale, ctx.shape = scale, x.shape
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, a, b, low = ctx.saved_tensors
        grad = grads[0].reshape(-1, weight.shape[0])
        up = (grad @ b).mul_(ctx.scale)
        by_a, by_b = (up.T @ rows).float(), (grad.T @ low).mul_(ctx.scale).float()
        by_x = (grad @ weight).addmm_(up, a).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return by_x, None, None, by_a, by_b, None


def _fuse(layer: Any, scale: float) -> None:
    """Give a LoRA layer of PEFT over a plain linear map one kernel for both, with the same result.

    PEFT adds the adapter's output, its scaling and its sum as tensors of their own. Any other kind of base layer,
    such as a quantised one, keeps PEFT's way.
    """
    base = layer.get_base_layer()
    if type(base) is not nn.Linear:
        return
    a, b = layer.get_parameter("lora_A.default.weight"), layer.get_parameter("lora_B.default.weight")

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _Linear.apply(x, base.weight, base.bias, a, b, scale)

    layer.forward = forward


@contextmanager
def injected(loaded: Loaded, config: dict[str, Any], generator: torch.Generator) -> Iterator[Lora]:
    """A fresh LoRA by PEFT inside the model, in float32, zero at the start; gone at the end of the context."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    with intact(loaded.model):
        try:
            inject_adapter_in_model(LoraConfig(**{**config, "inference_mode": False}), loaded.model)
        except ValueError as error:  # it refuses some maps of some families
            raise ShlError(f"PEFT does not adapt this model so: {error}", hint="choose modules with --target") from None
        layers = {p: m for p, m in loaded.model.named_modules() if isinstance(m, LoraLayer)}
        missing = sorted(set(config["target_modules"]) - layers.keys())
        if missing:
            raise ShlError(f"PEFT did not adapt {missing[0]}", hint="choose other modules with --target")
        lora = Lora(layers, config["lora_alpha"] / config["r"])
        for path in lora.modules:
            _start(lora.a[path], lora.b[path], generator)
            _fuse(layers[path], lora.scaling)
        yield lora


@torch.no_grad()
def _start(a: nn.Parameter, b: nn.Parameter, generator: torch.Generator) -> None:
    """Uniform A as a linear layer starts, and B at zero, so that the model begins as it was."""
    bound = 1 / math.sqrt(a.shape[1])
    a.data = ((torch.rand(a.shape, generator=generator) * 2 - 1) * bound).to(a.device)
    b.data = torch.zeros(b.shape, device=b.device)
    a.requires_grad_(True)
    b.requires_grad_(True)
