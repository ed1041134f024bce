"""One pass over the vocabulary, a stretch of it at a time: normaliser, divergence, and their gradients.

With logits z = W h and p = softmax(z), everything that healing needs from the vocabulary is an expectation under p, so
that one pass gathers it with a running maximum, as flash attention does (arXiv 2205.14135): the logits of a stretch are
used for all sums and forgotten. The gradient of the normaliser is E_p[W]. Where both models share a linear head,

    KL(p || q) = (h - h_ref) . E_p[W] - lse + lse_ref
    KL(q || p) = (h_ref - h) . E_q[W] - lse_ref + lse

so that a divergence costs no logits of the reference, and the gradient of KL(q || p) is E_p[W] - E_q[W]. Only the
gradient of KL(p || q) needs a second product, sum_v p_v (z_v - z_ref_v) W_v, and only where the barrier has fired.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shl.core.head import Head, wide

CHUNK = {"cpu": 1 << 21, "cuda": 1 << 27}  # logits of one kind held at once: what a core's cache holds, half a GiB


class Sums(NamedTuple):
    """What one pass gathers at each position."""

    lse: Tensor  # [n] log of the sum of exp(logits)
    mean: Tensor  # [n, hidden] its gradient at the hidden states
    gap: Tensor | None = None  # [n] expectation of the logits' difference to the reference's, under p or q
    pull: Tensor | None = None  # [n, hidden] the same, each difference weighted with its token's row of the head


def scan(
    head: Head,
    hidden: Tensor,
    ref_head: Head | None = None,
    ref: Tensor | None = None,
    ref_lse: Tensor | None = None,
    gradient: bool = True,
) -> Sums:
    """Normaliser and its gradient; with reference states also their difference, under p, or under q given `ref_lse`."""
    n, size = len(hidden), head.weight.shape[0]
    like = wide(hidden)
    top, total = like.new_full((n, 1), -torch.inf), like.new_zeros(n, 1)
    mean, gap, pull = torch.zeros_like(like), like.new_zeros(n, 1), torch.zeros_like(like)
    step = max(1, CHUNK["cuda" if hidden.is_cuda else "cpu"] // max(1, n))
    for at in range(0, size, step):
        tokens = slice(at, min(at + step, size))
        logits = head.part(hidden, tokens)
        highest = torch.maximum(top, logits.amax(1, keepdim=True))
        kept, top = (top - highest).exp_(), highest
        weights = logits.sub_(top).exp_() if ref is None and head.linear else (logits - top).exp_()
        total.mul_(kept).add_(weights.sum(1, keepdim=True))
        if gradient:
            mean.mul_(kept).add_(head.pull(weights, logits, tokens))
        if ref is not None and ref_head is not None:
            other = ref_head.part(ref, tokens)
            if ref_lse is None:  # under p, whose normaliser is not known yet
                gap.mul_(kept), pull.mul_(kept)
                weights.mul_(logits - other)
                gap.add_(weights.sum(1, keepdim=True))
            else:
                weights = (other - ref_lse[:, None]).exp_()
                gap.add_((weights * (other - logits)).sum(1, keepdim=True))
            pull.add_(head.pull(weights, logits, tokens))
    lse, mean = (top + total.log()).squeeze(1), mean.div_(total)
    if ref is None:
        return Sums(lse, mean)
    if ref_lse is None:
        gap, pull = gap.div_(total), pull.div_(total)
    return Sums(lse, mean, gap.squeeze(1), pull)


@dataclass(frozen=True)
class Reference:
    """What is remembered of the reference at completion positions, so that it is run once for a whole round."""

    head: Head
    lse: Tensor  # [n]
    states: Tensor  # [n, hidden] behind the last norm
    mean: Tensor | None = None  # [n, hidden] E_q[W], for KL(q || p) through a shared linear head
    top: Tensor | None = None  # [n, k] its likeliest tokens, when only those are told apart
    log_q: Tensor | None = None  # [n, k] their log-probabilities

    @classmethod
    @torch.no_grad()
    def of(cls, head: Head, states: Tensor, reg: str = "kl_rev", top: int = 0) -> Reference:
        """Read the reference's final states; with `top` its likeliest tokens as well."""
        sums = scan(head, states, gradient=reg == "kl_fwd" and not top)
        if not top:
            return cls(head, sums.lse, states, sums.mean if reg == "kl_fwd" else None)
        ids = _likeliest(head, states, min(top, head.weight.shape[0] - 1))
        return cls(head, sums.lse, states, None, ids, head.logits_of(states, ids) - sums.lse[:, None])

    def split(self, lengths: Sequence[int]) -> list[Reference]:
        """One for each sequence, on the CPU."""
        parts = [[one.cpu().clone() for one in value.split(list(lengths))] if isinstance(value, Tensor) else
                 [value] * len(lengths) for value in self._fields()]  # fmt: skip
        return [Reference(self.head, *row) for row in zip(*parts, strict=True)]

    @staticmethod
    def join(parts: Sequence[Reference], device: torch.device) -> Reference:
        """One behind the other."""
        columns = zip(*(one._fields() for one in parts), strict=True)
        joined = [None if column[0] is None else torch.cat(column).to(device) for column in columns]
        return Reference(parts[0].head, *joined)  # type: ignore[arg-type]

    def _fields(self) -> tuple[Tensor | None, ...]:
        return self.lse, self.states, self.mean, self.top, self.log_q


def _likeliest(head: Head, states: Tensor, k: int) -> Tensor:
    """Ids [n, k] of the largest logits, gathered a stretch of the vocabulary at a time."""
    best = ids = None
    step = max(k, CHUNK["cuda" if states.is_cuda else "cpu"] // max(1, len(states)))
    for at in range(0, head.weight.shape[0], step):
        logits = head.part(states, slice(at, at + step))
        found, where = logits.topk(min(k, logits.shape[1]), dim=1)
        where = where + at
        if best is not None and ids is not None:
            found, where = torch.cat([best, found], 1), torch.cat([ids, where], 1)
            found, chosen = found.topk(min(k, found.shape[1]), dim=1)
            where = where.gather(1, chosen)
        best, ids = found, where
    assert ids is not None
    return ids


class Read(torch.autograd.Function):
    """Normaliser and divergence of each position [n], with gradients of one's own.

    Each depends on its own hidden state alone. Where the barrier will be open is not known before the sequence is
    summed up, so the gradient of KL(p || q) is taken in the forward pass for the rows in `eager` (those that are
    expected to need it), and in the backward pass for others that turn out to.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Head, ref: Reference | None, reg: str, eager: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.head, ctx.ref, ctx.dtype, ctx.rows = head, ref, hidden.dtype, hidden.detach()
        if ref is None:
            sums = scan(head, hidden)
            kl, slope, known = torch.zeros_like(sums.lse), torch.zeros_like(sums.mean), None
        elif not _shared(head, ref, hidden):
            sums, slope = _both(head, hidden, ref, reg)
            kl, known = _gap(sums, ref, reg), None
        elif reg == "kl_fwd":
            sums, known = scan(head, hidden), None
            assert ref.mean is not None
            kl = ((ref.states - hidden) * ref.mean).sum(1) + sums.lse - ref.lse
            slope = sums.mean - ref.mean
        else:
            sums, slope, known = _some(head, hidden, ref, eager)
            kl = ((hidden - ref.states) * sums.mean).sum(1) - sums.lse + ref.lse
        ctx.mean, ctx.slope, ctx.known = sums.mean, slope, known
        return sums.lse, kl.clamp_(min=0)  # no divergence is negative, but for rounding

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.known is not None and (rows := (grads[1] != 0) & ~ctx.known).any():
            ctx.slope[rows] = _both(ctx.head, ctx.rows[rows], _rows(ctx.ref, rows), "kl_rev")[1]
            ctx.known = ctx.known | rows
        total = ctx.mean * grads[0][:, None] + ctx.slope * grads[1][:, None]
        return total.to(ctx.dtype), None, None, None, None


def _shared(head: Head, ref: Reference, hidden: Tensor) -> bool:
    """Whether divergences follow from expectations of the head's rows: one linear head, and no short floats, in which
    they would be small differences of rounded numbers."""
    same = head.weight.data_ptr() == ref.head.weight.data_ptr() and head.bias is ref.head.bias
    return same and head.linear and hidden.dtype == wide(hidden).dtype == head.weight.dtype


def _rows(ref: Reference, rows: Tensor) -> Reference:
    return Reference(ref.head, ref.lse[rows], ref.states[rows])


def _both(head: Head, hidden: Tensor, ref: Reference, reg: str) -> tuple[Sums, Tensor]:
    """All sums, and the gradient of the divergence."""
    sums = scan(head, hidden, ref.head, ref.states, ref.lse if reg == "kl_fwd" else None)
    assert sums.gap is not None and sums.pull is not None
    return sums, sums.mean - sums.pull if reg == "kl_fwd" else sums.pull - sums.gap[:, None] * sums.mean


def _gap(sums: Sums, ref: Reference, reg: str) -> Tensor:
    assert sums.gap is not None
    return sums.gap + (sums.lse - ref.lse) * (1 if reg == "kl_fwd" else -1)


def _some(head: Head, hidden: Tensor, ref: Reference, eager: Tensor | None) -> tuple[Sums, Tensor, Tensor]:
    """Sums of all rows, the gradient of KL(p || q) at those in `eager`, and which those are."""
    known = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device) if eager is None else eager.clone()
    lse, mean = wide(hidden).new_empty(len(hidden)), torch.empty_like(wide(hidden))
    slope = torch.zeros_like(mean)
    if known.any():
        sums, slope[known] = _both(head, hidden[known], _rows(ref, known), "kl_rev")
        lse[known], mean[known] = sums.lse, sums.mean
    if not known.all():
        sums = scan(head, hidden[~known])
        lse[~known], mean[~known] = sums.lse, sums.mean
    return Sums(lse, mean), slope, known
