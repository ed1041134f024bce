"""The healing loss, nll + lam * relu(agg(KL) - tau), in one chunked pass over the vocabulary, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shl.core.errors import ShlError
from shl.core.head import Head

CHUNK = 1 << 24  # most logits of one kind held at once, in numbers: 64 MiB in float32
EPS = 1e-12  # inside the square root, so that its gradient at a divergence of exactly zero is finite
REGS = ("nll", "kl_fwd", "kl_rev")
AGGS = ("mean", "rmse", "p95", "max")


class _TokenLosses(torch.autograd.Function):
    """Surprise and divergence of each position.

    Each depends on its own hidden state alone, so the forward pass can keep the finished gradients [n, hidden] of
    both, and no logits outlive their chunk, however the positions are aggregated later.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, head: Head, ref: Tensor | None, ref_head: Head, reg: str
    ) -> tuple[Tensor, Tensor]:
        nll = torch.empty(len(targets), device=hidden.device)
        kl = torch.zeros_like(nll)
        wanted = ctx.needs_input_grad[0]
        by_nll = torch.empty_like(hidden) if wanted else hidden.new_empty(0)
        by_kl = torch.zeros_like(hidden) if wanted and ref is not None else hidden.new_empty(0)
        size = max(1, CHUNK // head.weight.shape[0])
        for at in range(0, len(targets), size):
            part = slice(at, at + size)
            logits = head.logits(hidden[part])
            log_p = logits.log_softmax(-1)
            nll[part] = -log_p.gather(1, targets[part, None]).squeeze(1)
            p = log_p.exp()
            if ref is not None:
                log_q = ref_head.logits(ref[part]).log_softmax(-1)
                kl[part], grad = _divergence(log_p, p, log_q, reg, wanted)
                if grad is not None:
                    by_kl[part] = head.back(logits, grad)
            if wanted:
                p[torch.arange(len(p), device=p.device), targets[part]] -= 1
                by_nll[part] = head.back(logits, p)
        ctx.save_for_backward(by_nll, by_kl)
        return nll, kl

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        by_nll, by_kl = ctx.saved_tensors
        total = by_nll * grads[0][:, None]
        if by_kl.numel():
            total = total + by_kl * grads[1][:, None]
        return total.to(by_nll.dtype), None, None, None, None, None


def _divergence(log_p: Tensor, p: Tensor, log_q: Tensor, reg: str, wanted: bool) -> tuple[Tensor, Tensor | None]:
    """KL of each position, student p and reference q, and its gradient at the student's logits."""
    if reg == "kl_fwd":  # KL(reference || student)
        q = log_q.exp()
        return (q * (log_q - log_p)).sum(-1), p - q if wanted else None
    ratio = log_p - log_q  # KL(student || reference)
    kl = (p * ratio).sum(-1)
    return kl, p * (ratio - kl[:, None]) if wanted else None


def token_losses(
    hidden: Tensor, targets: Tensor, head: Head, ref: Tensor | None = None, ref_head: Head | None = None, reg: str = ""
) -> tuple[Tensor, Tensor]:
    """nll and KL of each position, from final hidden states; KL is zero without reference states."""
    return _TokenLosses.apply(hidden, targets, head, ref, ref_head or head, reg)


def aggregate(kl: Tensor, agg: str) -> Tensor:
    """One number for the divergences along a sequence."""
    if agg == "mean":
        return kl.mean()
    if agg == "rmse":
        return (kl.square().mean() + EPS).sqrt()
    if agg == "p95":
        return kl.quantile(0.95)
    if agg == "max":
        return kl.max()
    raise ShlError(f"unknown aggregation {agg!r}", hint=f"use one of {', '.join(AGGS)}")


class Losses(NamedTuple):
    """The parts of a batch's loss, each a mean over its sequences, and the number of barriers that fired."""

    nll: Tensor
    barrier: Tensor
    fired: int


def combine(nll: Tensor, kl: Tensor, lengths: Sequence[int], reg: str, agg: str, lam: float, tau: float) -> Losses:
    """Per sequence: mean nll, and the hinge on its aggregated divergence. Then means over sequences."""
    per_nll = torch.stack([one.mean() for one in nll.split(list(lengths))])
    if reg == "nll":
        return Losses(per_nll.mean(), nll.new_zeros(()), 0)
    excess = torch.stack([aggregate(one, agg) for one in kl.split(list(lengths))]) - tau
    return Losses(per_nll.mean(), lam * excess.relu().mean(), int((excess > 0).sum()))
