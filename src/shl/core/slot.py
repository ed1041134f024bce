"""The forced slot: log-probabilities of the seven digits after a prefilled answer, for many prompts at once.

What is read does not depend on the batch: prompts are padded on the right, behind everything that is read, and
probabilities are over the full vocabulary in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from shl.core.batches import right_pad
from shl.core.beginning import Beginning
from shl.core.console import progress
from shl.core.decode import Sampling, decode
from shl.core.errors import ShlError
from shl.core.format import DIGITS, PREFILL
from shl.core.head import Head
from shl.core.memory import batched
from shl.core.models import Loaded
from shl.core.stats import Array

if TYPE_CHECKING:
    from torch import Tensor

# Positions at and behind index `seam` of a context lie `size` further on: how some protocols leave padding between.
Gap = tuple[int, int]
LEAST_SHARED = 16  # tokens that all contexts must begin with before they are computed once


@dataclass(frozen=True)
class Slot:
    """The tokens of the prefill, and for each digit the token that answers after it."""

    prefill: list[int]
    digits: list[int]


@dataclass(frozen=True)
class Reading:
    """One row a prompt: log-probabilities of the digits in their own order, and mean nll of the prefill's tokens."""

    logp: Array
    nll: Array


def find_slot(loaded: Loaded, text: str = PREFILL) -> Slot:
    """The slot in this tokenizer: digits as they follow the prefill, unless the two would merge into one token."""
    prefill = loaded.encode_completion(text, end=False)
    whole = [loaded.encode_completion(text + digit, end=False) for digit in DIGITS]
    if all(ids[: len(prefill)] == prefill and len(ids) > len(prefill) for ids in whole):
        digits = [ids[len(prefill)] for ids in whole]
    else:
        digits = [loaded.encode_completion(digit, end=False)[0] for digit in DIGITS]
    if len(set(digits)) < len(digits):
        raise ShlError(
            f"the tokenizer of {loaded.ref.id} gives the digits 0 to {len(digits) - 1} no distinct tokens",
            hint="the moral reading needs a tokenizer that writes each digit with a token of its own",
        )
    return Slot(prefill, digits)


def read_slot(
    loaded: Loaded, contexts: Sequence[list[int]], slot: Slot, batch_size: int, gaps: Sequence[Gap] | None = None
) -> Reading:
    """Read the slot after every context, in the order of the contexts; rows of like length share a batch.

    What all contexts begin with, such as a system text, is computed once. `gaps` moves positions, see `Gap`.
    """
    import torch

    logp = np.zeros((len(contexts), len(slot.digits)))
    nll = np.zeros(len(contexts))
    order = sorted(range(len(contexts)), key=lambda i: -len(contexts[i]))
    with torch.inference_mode(), progress("forced choice", len(contexts)) as bar:
        head = Head.of(loaded)
        head.check(loaded, contexts[0])
        start = Beginning()
        if not gaps:
            body = partial(loaded.body, use_cache=True)
            start = Beginning.of(loaded, contexts, [1] * len(contexts), LEAST_SHARED, body)
        read_so_far: list[int] = []

        def read(rows: Sequence[int]) -> tuple[Array, Array]:
            asked = [contexts[i] for i in rows]
            states = _states(loaded, asked, slot, start, [gaps[i] for i in rows] if gaps else None)
            return _answers(head, states, slot, len(rows))

        for rows, found in batched(loaded, order, batch_size, read, "reading answers"):
            logp[rows], nll[rows] = found
            read_so_far += rows
            bar.advance(len(rows), answer_mass=float(np.exp(logp[read_so_far]).sum(1).mean()))
    if not (np.isfinite(logp).all() and np.isfinite(nll).all()):
        raise ShlError(
            f"{loaded.ref.id} gives log-probabilities that are not finite",
            hint="the weights or the steering overflow: try --dtype float32 or a smaller --coeff",
        )
    return Reading(logp, nll)


def _states(
    loaded: Loaded,
    contexts: list[list[int]],
    slot: Slot,
    start: Beginning,
    gaps: Sequence[Gap] | None,
) -> Tensor:
    """Final hidden states that predict the prefill and the answer, [rows, prefill + 1, hidden].

    Rows are padded on the right, where causality hides it, so that positions and windows are each row's own.
    """
    import torch

    skip, cache = start.length, start.spread(len(contexts))
    ids = right_pad([context[skip:] + slot.prefill for context in contexts], loaded.device)
    positions = torch.arange(skip, skip + ids.shape[1], device=loaded.device).expand(len(ids), -1)
    extra: dict[str, Any] = {}
    if cache is not None:
        extra = {"past_key_values": cache}
    if gaps:
        moved = [[size * (at >= seam) for at in range(ids.shape[1])] for seam, size in gaps]
        positions = positions + torch.tensor(moved, device=loaded.device)
        extra["attention_mask"] = torch.ones_like(ids)  # without one, a jump reads as the start of another text
    hidden = loaded.body(input_ids=ids, position_ids=positions, use_cache=cache is not None, **extra)
    first = torch.tensor([len(context) - skip - 1 for context in contexts], device=loaded.device)
    columns = first[:, None] + torch.arange(len(slot.prefill) + 1, device=loaded.device)
    return hidden.last_hidden_state[torch.arange(len(ids), device=loaded.device)[:, None], columns]


def _answers(head: Head, states: Tensor, slot: Slot, n: int) -> tuple[Array, Array]:
    """Log-probabilities of the digits, and the mean nll of the prefill, over the full vocabulary in float32."""
    import torch

    target = torch.tensor(slot.prefill, device=states.device)[:, None]
    logp, nll = np.zeros((n, len(slot.digits))), np.zeros(n)
    for i, row in enumerate(states):  # one row at a time, so that a large vocabulary never stands for the whole batch
        logs = torch.log_softmax(head.logits(row), dim=-1)
        logp[i] = logs[-1, slot.digits].double().cpu().numpy()
        nll[i] = float(-logs[:-1].gather(-1, target).mean())
    return logp, nll


def think_first(
    loaded: Loaded, prompts: Sequence[list[dict[str, str]]], budget: int, batch_size: int
) -> list[list[int]]:
    """The prompts as token ids; with a budget, each followed by a greedy think span that is closed in any case."""
    if budget == 0:
        return [loaded.encode_prompt(messages) for messages in prompts]
    opened = [_opened(loaded, messages) for messages in prompts]
    closing_id = loaded.encode_completion("</think>", end=False)
    until = frozenset(closing_id if len(closing_id) == 1 else ())  # what follows would not be read
    sampling = Sampling(max_new_tokens=budget, greedy=True, until=until)
    spans = decode(loaded, opened, seeds=[0] * len(opened), sampling=sampling, batch_size=batch_size)
    closing = [span.text.partition("</think>")[0].rstrip() + "\n</think>\n\n" for span in spans]
    return [ids + loaded.encode_completion(text, end=False) for ids, text in zip(opened, closing, strict=True)]


def _opened(loaded: Loaded, messages: list[dict[str, str]]) -> list[int]:
    """The prompt up to the inside of a think span, which some templates open themselves."""
    ids = loaded.encode_prompt(messages, think=True)
    if loaded.render(messages, think=True).rstrip().endswith("<think>"):
        return ids
    return ids + loaded.encode_completion("<think>\n", end=False)
