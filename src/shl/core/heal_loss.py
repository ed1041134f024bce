"""The healing loss, nll + lam * relu(agg(KL) - tau), from one pass over the vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from shl.core.errors import ShlError
from shl.core.head import Head
from shl.core.vocabulary import Read, Reference

EPS = 1e-12  # inside the square root, so that its gradient at a divergence of exactly zero is finite
GATHERED = 1 << 24  # most numbers of the head held at once for the likeliest tokens
REST = 1e-7  # least share of all tokens that are not told apart: what float32 can tell from none
REGS = ("nll", "kl_fwd", "kl_rev")
AGGS = ("mean", "rmse", "p95", "max")


def token_losses(
    hidden: Tensor,
    targets: Tensor,
    head: Head,
    ref: Reference | None = None,
    reg: str = "",
    eager: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """nll and KL of each position, from final hidden states; KL is zero without a reference.

    `eager` [n] marks the positions whose divergence will probably have a gradient; it only saves time.
    """
    whole = ref if ref is not None and ref.top is None else None
    lse, kl = Read.apply(hidden, head, whole, reg, eager)
    nll = lse - head.logits_of(hidden, targets[:, None]).squeeze(1)
    if ref is not None and whole is None:
        kl = _coarse(head, hidden, lse, ref, reg)
    return nll, kl


def _coarse(head: Head, hidden: Tensor, lse: Tensor, ref: Reference, reg: str) -> Tensor:
    """KL between the distributions over the reference's likeliest tokens and "any other token".

    Merging outcomes never raises a divergence, so this is a lower bound of the whole one.
    """
    assert ref.top is not None and ref.log_q is not None
    size = max(1, GATHERED // (ref.top.shape[1] * hidden.shape[1]))
    # rows of the head are gathered anew in the backward pass instead of being kept
    pieces = zip(hidden.split(size), ref.top.split(size), strict=True)
    near = [checkpoint(head.logits_of, states, ids, use_reentrant=False) for states, ids in pieces]
    log_p, log_q = _with_rest(torch.cat(near) - lse[:, None]), _with_rest(ref.log_q)
    if reg == "kl_fwd":
        return (log_q.exp() * (log_q - log_p)).sum(1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


def _with_rest(log_p: Tensor) -> Tensor:
    """Log-probabilities of the tokens, and of all others together."""
    rest = (1 - log_p.exp().sum(1, keepdim=True)).clamp_min(REST)
    return torch.cat([log_p, rest.log()], 1)


def aggregate(kl: Tensor, agg: str, shortest: int = 1) -> Tensor:
    """One number for the divergences along a sequence; means are over `shortest` positions at least.

    One word that says the trait is all of a short completion, and a few percent of a long one: with `shortest` the
    barrier lets the one word change as much as it lets one of many.
    """
    n = max(len(kl), shortest)
    if agg == "mean":
        return kl.sum() / n
    if agg == "rmse":
        return (kl.square().sum() / n + EPS).sqrt()
    if agg == "p95":
        return kl.quantile(0.95)
    if agg == "max":
        return kl.max()
    raise ShlError(f"unknown aggregation {agg!r}", hint=f"use one of {', '.join(AGGS)}")


class Losses(NamedTuple):
    """The parts of a batch's loss, each a mean over its sequences, and which of their barriers fired."""

    nll: Tensor
    barrier: Tensor
    fired: list[bool]


def combine(
    nll: Tensor, kl: Tensor, lengths: Sequence[int], reg: str, agg: str, lam: float, tau: float,
    shortest: int = 1,
) -> Losses:  # fmt: skip
    """Per sequence: mean nll, and the hinge on its aggregated divergence. Then means over sequences."""
    per_nll = torch.stack([one.mean() for one in nll.split(list(lengths))])
    if reg == "nll":
        return Losses(per_nll.mean(), nll.new_zeros(()), [False] * len(lengths))
    excess = torch.stack([aggregate(one, agg, shortest) for one in kl.split(list(lengths))]) - tau
    return Losses(per_nll.mean(), lam * excess.relu().mean(), (excess > 0).tolist())
