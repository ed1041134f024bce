"""How likely texts are under a model, and the scores that a completion record carries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from shl.core.below import Below
from shl.core.head import Head, completion_states
from shl.core.memory import batched
from shl.core.models import Loaded

_CHUNK = 1 << 25  # most logits held at once, in numbers: 128 MiB in float32
TAIL_SHARE = 0.25
TAIL_MIN = 8


def nll_per_token(
    loaded: Loaded,
    prompt_ids: Sequence[list[int]],
    completion_ids: Sequence[list[int]],
    batch_size: int = 32,
    below: Below | None = None,
) -> list[Tensor]:
    """Surprise in nats of every completion token given what precedes it, in float32, in the order given.

    Whatever weights and hooks are active count. Logits exist for one chunk of positions at a time. Rows of which
    `below` has the states, under their numbers, begin above them.
    """
    rows = list(zip(prompt_ids, completion_ids, strict=True))
    out: list[Tensor] = [torch.zeros(0)] * len(rows)
    order = sorted((i for i, row in enumerate(rows) if row[1]), key=lambda i: -len(rows[i][0]) - len(rows[i][1]))
    if order:
        Head.of(loaded).check(loaded, rows[order[0]][0] + rows[order[0]][1])
    known = {i for i in order if below is not None and below.has(i, rows[i][0] + rows[i][1])}

    def read(chosen: Sequence[int]) -> list[Tensor]:
        if below is not None and chosen[0] in known:
            below.use(chosen)
        return _batch(loaded, [rows[i] for i in chosen])

    for there in (False, True):
        part = [i for i in order if (i in known) is there]
        with torch.inference_mode(), below.standing_in() if there and below is not None else nullcontext():
            for chosen, found in batched(loaded, part, batch_size, read, "scoring"):
                for i, nll in zip(chosen, found, strict=True):
                    out[i] = nll
    return out


def _batch(loaded: Loaded, rows: list[tuple[list[int], list[int]]]) -> list[Tensor]:
    head = Head.of(loaded)
    hidden, targets = completion_states(loaded, rows)
    size = max(1, _CHUNK // loaded.text_config.vocab_size)
    parts = []
    for states, wanted in zip(hidden.split(size), targets.split(size), strict=True):
        logits = head.logits(states)
        parts.append(logits.logsumexp(-1) - logits.gather(-1, wanted[:, None]).squeeze(-1))
    return list(torch.cat(parts).cpu().split([len(completion) for _, completion in rows]))


def score(
    loaded: Loaded,
    prompts: Sequence[list[dict[str, Any]]],
    completions: Sequence[str],
    batch_size: int = 32,
    below: Below | None = None,
) -> list[dict[str, Any]]:
    """Scores of completions as texts: perplexity under the base model, without chain, and repetition.

    The texts are tokenised anew, so that a record's scores follow from the record alone; states in `below` are used
    where the tokens are the same.
    """
    from shl.core.text import distinct_n, repetition

    asked = [loaded.encode_prompt(messages) for messages in prompts]
    answered = [loaded.encode_completion(text, end=False) for text in completions]
    with loaded.base():
        surprises = nll_per_token(loaded, asked, answered, batch_size, below)
    return [
        {
            **_summary(nll),
            "rep": _round(repetition(text)),
            "distinct": _round(distinct_n(text, 3)),
        }
        for nll, text in zip(surprises, completions, strict=True)
    ]


def _summary(nll: Tensor) -> dict[str, Any]:
    """Perplexities of one completion: whole, last quarter, and its most surprising token. Null when it is empty."""
    n = len(nll)
    if n == 0:
        return {"ppl": None, "ppl_tail": None, "max_nll": None, "n_tokens": 0}
    tail = nll[-max(TAIL_MIN, math.ceil(TAIL_SHARE * n)) :]
    return {
        "ppl": perplexity(nll),
        "ppl_tail": perplexity(tail),
        "max_nll": _round(nll.max().item()),
        "n_tokens": n,
    }


def perplexity(nll: Tensor) -> float | None:
    """exp of the mean nll of some tokens, to the digits that batches agree on; null without any, or beyond floats."""
    return _round(_exp(nll.double().mean().item())) if len(nll) else None


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _round(value: float) -> float | None:
    """Six significant digits, as many as are the same across batch sizes; null for what JSON cannot hold."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
