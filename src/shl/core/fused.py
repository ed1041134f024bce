"""Kernels in the place of a model's own small operations on a GPU, each compared with the model's own first.

A norm of ten launches costs ten times its one, which in decoding is half of a step, and in training keeps its input
once more in float32. What a model's norms and rotary positions compute is not asked from its name but tried: on random
numbers the kernel has to give what the module gives, or the module stays.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from shl.core.console import warn
from shl.core.models import Loaded

_NORMS = ((0.0, True), (0.0, False), (1.0, False))  # what is added to the weight, and whether x is rounded before


@cache
def compiles(device: torch.device) -> bool:
    """Whether kernels run on a device: on CUDA, where Triton is installed and finds a compiler. Tried once."""
    if device.type != "cuda":
        return False
    try:
        from shl.core.kernels import rms_norm

        one = torch.ones(1, 16, device=device)
        return torch.allclose(rms_norm(one, one[0], 0.0, 0.0, False), one)
    except Exception as error:  # of Triton, of its compiler, or that one is missing
        lines = str(error).strip().splitlines() or [""]
        warn(f"decoding without kernels of its own, more slowly: {type(error).__name__}: {lines[0]}")
        return False


@contextmanager
def fused(loaded: Loaded) -> Iterator[None]:
    """Within this context norms, and rotary positions of one token a row, run as one kernel each, where they can."""
    with ExitStack() as stack:
        if not compiles(loaded.device):
            yield
            return
        styles: dict[type, tuple[float, bool] | None] = {}
        module: Any
        for module in loaded.body.modules():
            if not _looks_like_norm(module):
                continue
            if type(module) not in styles:
                styles[type(module)] = _style(module)
            if (style := styles[type(module)]) is not None:
                stack.enter_context(_replaced(module, "forward", partial(_norm, module.weight, _eps(module), *style)))
        source = sys.modules[type(loaded.blocks[0]).__module__]
        own = getattr(source, "apply_rotary_pos_emb", None)
        if own is not None and _rotates(own, loaded):
            stack.enter_context(_replaced(source, "apply_rotary_pos_emb", partial(_rotate, own)))
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: object) -> Iterator[None]:
    """An attribute for a while, put back or taken away afterwards."""
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def _looks_like_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    named = type(module).__name__.endswith("RMSNorm") and _eps(module) is not None
    return named and isinstance(weight, Tensor) and not weight.requires_grad


def _eps(module: Any) -> Any:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def _norm(weight: Tensor, eps: float, offset: float, rounded: bool, x: Tensor) -> Tensor:
    from shl.core.kernels import Norm, rms_norm

    if torch.is_grad_enabled() and x.requires_grad:
        return Norm.apply(x, weight, eps, offset, rounded)
    return rms_norm(x, weight, eps, offset, rounded)


def _style(module: Any) -> tuple[float, bool] | None:
    """Which of the known norms a module computes; none when it is another."""
    weight = module.weight
    x = _random((4, len(weight)), weight) * 3
    wanted = module(x)
    if wanted.dtype != x.dtype:  # one that widens what it gets
        return None
    errors = {style: _far(_norm(weight, _eps(module), *style, x), wanted) for style in _NORMS}
    best = min(errors, key=errors.__getitem__)
    return best if errors[best] <= 1 else None


def _rotate(own: Callable[..., tuple[Tensor, Tensor]], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any,
            **kwargs: Any) -> tuple[Tensor, Tensor]:  # fmt: skip
    from shl.core.kernels import rotate

    one = q.dim() == 4 and q.shape[2] == 1 and cos.dim() == 3 and cos.shape == sin.shape == (len(q), 1, q.shape[-1])
    if not one or args or kwargs or q.stride(-1) != 1 or k.stride(-1) != 1:
        return own(q, k, cos, sin, *args, **kwargs)
    return rotate(q, k, cos, sin)


def _rotates(own: Callable[..., tuple[Tensor, Tensor]], loaded: Loaded) -> bool:
    """Whether the model's rotary positions turn halves of a head against each other, as the kernel does."""
    weight = next(loaded.body.parameters())
    q, k = _random((2, 4, 1, 32), weight), _random((2, 2, 1, 32), weight)
    turn = _random((2, 1, 16), weight).float()
    cos, sin = (torch.cat([f(turn)] * 2, -1).to(weight.dtype) for f in (torch.cos, torch.sin))
    try:
        wanted = own(q, k, cos, sin)
    except TypeError:  # takes something else
        return False
    return all(_far(found, like) <= 1 for found, like in zip(_rotate(own, q, k, cos, sin), wanted, strict=True))


def _random(shape: tuple[int, ...], like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(like.device, like.dtype)


def _far(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, in steps of what the precision can tell apart near the largest value."""
    step = 4 * torch.finfo(wanted.dtype).eps * float(wanted.abs().max())
    return float((found.float() - wanted.float()).abs().max()) / max(step, 1e-30)
