"""From hidden states on the two sides of a contrast to one direction, as long as the shift between the sides."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from shl.core.defaults import METHODS
from shl.core.errors import ShlError

Method = Callable[[Tensor, Tensor], Tensor]


def mean_difference(above: Tensor, below: Tensor) -> Tensor:
    """Mean of `above` minus `below`, [pairs, hidden] -> [hidden] (CAA, arXiv 2312.06681)."""
    return (above - below).mean(0)


def principal(above: Tensor, below: Tensor) -> Tensor:
    """The axis along which the pairs differ most, about zero: the first right singular vector of their differences.

    Representation engineering (arXiv 2310.01405) with the sign and length of the mean difference along it.
    """
    axis = torch.linalg.svd(above - below, full_matrices=False).Vh[0]
    return _as_long(axis, above, below)


def probe(above: Tensor, below: Tensor) -> Tensor:
    """The normal of a logistic regression that tells the sides apart, as long as the mean difference along it.

    Inference-time intervention (arXiv 2306.03341), with the probe read from the residual stream. States are
    standardised, and the weights pay half of their squared length beside the summed loss.
    """
    states = torch.cat([above, below])
    side = torch.cat([torch.ones(len(above)), torch.zeros(len(below))]).to(states)
    spread = states.std(0).clamp_(min=1e-6 * float(states.std()) + 1e-30)
    scaled = (states - states.mean(0)) / spread
    # inference tensors, and modes, know no gradient
    with torch.inference_mode(False), torch.enable_grad():
        scaled, side = scaled.clone(), side.clone()
        weight, bias = (torch.zeros(n, dtype=scaled.dtype, requires_grad=True) for n in (scaled.shape[1], 1))
        fit = torch.optim.LBFGS([weight, bias], max_iter=200, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            fit.zero_grad()
            wrong = torch.nn.functional.binary_cross_entropy_with_logits(scaled @ weight + bias, side, reduction="sum")
            total = wrong + weight.square().sum() / 2
            total.backward()
            return total

        fit.step(loss)
        return _as_long(weight.detach() / spread, above, below)


def _as_long(axis: Tensor, above: Tensor, below: Tensor) -> Tensor:
    """The direction of `axis`, signed and scaled to the mean difference along it."""
    unit = axis / axis.norm()
    return unit * ((above - below) @ unit).mean()


_COMBINE: dict[str, Method] = {
    "mean-diff": mean_difference,
    "response": mean_difference,  # of states read over answers
    "pca": principal,
    "probe": probe,
}


def method(name: str) -> Method:
    """The method of this name."""
    if name not in _COMBINE:
        raise ShlError(f"no method {name!r}", hint=f"use one of {', '.join(METHODS)}")
    return _COMBINE[name]
