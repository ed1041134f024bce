"""From logits to tokens: the filtered draw with each row's own noise, and how surprising a token is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. A top_k, top_p or min_p of 0 (1 for top_p) leaves that filter out.

    Tokens in `until` end a completion as an end of turn does; those in `banned` are never drawn. An `endless`
    completion goes on, whatever it says, to its full length.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 64
    top_p: float = 0.95
    min_p: float = 0.0
    greedy: bool = False
    until: frozenset[int] = frozenset()
    banned: frozenset[int] = frozenset()
    endless: bool = False

    def ends(self, stop_ids: frozenset[int]) -> frozenset[int]:
        """The tokens that end a completion of a model whose turns end with `stop_ids`."""
        return frozenset() if self.endless else stop_ids | self.until


def noise(seeds: list[int], sampling: Sampling, steps: int, device: torch.device) -> Tensor:
    """One uniform number for each row and step, from a generator of the row's own, drawn on the CPU."""
    steps = 0 if sampling.greedy else steps
    rows = [torch.rand(steps, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows).to(device)


def draw(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """Tokens by inverse distribution function over the filtered softmax, most likely tokens first.

    `uniform` is [rows, 1]. Filters act in the order top-k, top-p, min-p and keep a head of the sorted tokens.
    """
    if sampling.temperature <= 0:
        return logits.argmax(-1)
    scaled = logits.float() / sampling.temperature
    width = scaled.shape[-1]
    k = min(sampling.top_k or width, width)
    top, index = torch.topk(scaled, k, dim=-1)
    probs = torch.softmax(top, dim=-1)
    cumulative = probs.cumsum(-1)
    kept = _head_length(probs, cumulative, sampling)
    target = uniform * cumulative.gather(-1, kept - 1)
    chosen = (cumulative <= target).sum(-1, keepdim=True)
    return index.gather(-1, torch.minimum(chosen, kept - 1)).squeeze(-1)


def _head_length(probs: Tensor, cumulative: Tensor, sampling: Sampling) -> Tensor:
    """How many of the sorted tokens the filters keep, [rows, 1]; at least one."""
    inside = cumulative - probs < sampling.top_p if sampling.top_p < 1 else torch.ones_like(probs, dtype=torch.bool)
    if sampling.min_p > 0:
        inside &= probs >= sampling.min_p * probs[:, :1]
    return inside.sum(-1, keepdim=True).clamp_(min=1)


def surprises(logits: Tensor, tokens: Tensor) -> Tensor:
    """-ln p of each row's token, and the same less the entropy of p, in nats and float32: [2, rows]."""
    logp = torch.log_softmax(logits.float(), -1).clamp_(min=-1e4)  # 0 * inf is no number
    surprise = -logp.gather(-1, tokens[:, None]).squeeze(-1)
    return torch.stack([surprise, surprise + (logp.exp() * logp).sum(-1)])
