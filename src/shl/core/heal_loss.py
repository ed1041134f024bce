"""The healing loss, nll + lam * relu(agg(KL) - tau), in one chunked pass over the vocabulary, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shl.core.batches import right_pad
from shl.core.errors import ShlError
from shl.core.models import Loaded

CHUNK = 1 << 24  # most logits of one kind held at once, in numbers: 64 MiB in float32
EPS = 1e-12  # inside the square root, so that its gradient at a divergence of exactly zero is finite
REGS = ("nll", "kl_fwd", "kl_rev")
AGGS = ("mean", "rmse", "p95", "max")


@dataclass(frozen=True)
class Head:
    """The map from final hidden states to logits, with what some families do to logits afterwards."""

    weight: Tensor
    bias: Tensor | None
    factor: float
    cap: float | None

    @classmethod
    def of(cls, loaded: Loaded) -> Head:
        """The head under the weights that are active now; it stays with them when they are swapped."""
        values = loaded.text_config.to_dict()
        layer = loaded.model.get_output_embeddings()
        factor = (values.get("logit_scale") or 1.0) / (values.get("logits_scaling") or 1.0)
        bias = dict(layer.named_parameters()).get("bias")
        cap = values.get("final_logit_softcapping")
        return cls(layer.weight.data, None if bias is None else bias.data, factor, cap)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [n, vocabulary] in float32."""
        logits = torch.nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias).float()
        if self.factor != 1:
            logits = logits * self.factor
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def back(self, logits: Tensor, grad: Tensor) -> Tensor:
        """The gradient at the hidden states, from that at the logits; overwrites `grad`."""
        if self.cap is not None:
            grad *= 1 - (logits / self.cap) ** 2
        if self.factor != 1:
            grad *= self.factor
        return grad.to(self.weight.dtype) @ self.weight

    @torch.no_grad()
    def check(self, loaded: Loaded, ids: Sequence[int]) -> None:
        """Fail when this is not what the model itself does."""
        tokens = torch.tensor([list(ids[:8])], device=loaded.device)
        whole = loaded.model(input_ids=tokens, use_cache=False).logits[0].float()
        mine = self.logits(final_states(loaded, tokens)[0])
        if not torch.allclose(whole, mine, rtol=1e-2, atol=1e-2 * float(whole.abs().max())):
            raise ShlError(
                f"{type(loaded.model).__name__} does something to its logits that is not known here",
                hint="please report the model",
            )


def final_states(loaded: Loaded, ids: Tensor) -> Tensor:
    """Hidden states behind the last norm, for rows padded on the right."""
    return loaded.model.base_model(input_ids=ids, use_cache=False).last_hidden_state


def completion_states(loaded: Loaded, rows: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """For (prompt, completion) rows: the states that predict the completion tokens, row after row, and those tokens."""
    ids = right_pad([prompt + completion for prompt, completion in rows], loaded.device)
    hidden = final_states(loaded, ids)
    row = [k for k, (_, completion) in enumerate(rows) for _ in completion]
    column = [len(prompt) + t for prompt, completion in rows for t in range(len(completion))]
    where = torch.tensor([row, column], device=ids.device)
    return hidden[where[0], where[1] - 1], ids[where[0], where[1]]


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
