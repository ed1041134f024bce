"""The forced slot: log-probabilities of the seven digits after a prefilled answer, for many prompts at once.

What is read does not depend on the batch: prompts are padded on the left, positions count from each row's first token,
and probabilities are over the full vocabulary in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shl.core.batches import left_pad, positions_of
from shl.core.console import progress
from shl.core.decode import Sampling, decode
from shl.core.errors import ShlError
from shl.core.format import DIGITS, PREFILL
from shl.core.memory import batched
from shl.core.models import Loaded
from shl.core.stats import Array


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


def find_slot(loaded: Loaded) -> Slot:
    """The slot in this tokenizer: digits as they follow the prefill, unless the two would merge into one token."""
    prefill = loaded.encode_completion(PREFILL, end=False)
    whole = [loaded.encode_completion(PREFILL + digit, end=False) for digit in DIGITS]
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


def read_slot(loaded: Loaded, contexts: Sequence[list[int]], slot: Slot, batch_size: int) -> Reading:
    """Read the slot after every context, in the order of the contexts; rows of like length share a batch."""
    import torch

    logp = np.zeros((len(contexts), len(slot.digits)))
    nll = np.zeros(len(contexts))
    order = sorted(range(len(contexts)), key=lambda i: -len(contexts[i]))
    with torch.inference_mode(), progress("forced choice", len(contexts)) as bar:
        for rows, found in batched(
            loaded,
            order,
            batch_size,
            lambda rows: _read_batch(loaded, [contexts[i] + slot.prefill for i in rows], slot),
            "reading answers",
        ):
            logp[rows], nll[rows] = found
            bar.advance(len(rows))
    if not (np.isfinite(logp).all() and np.isfinite(nll).all()):
        raise ShlError(
            f"{loaded.ref.id} gives log-probabilities that are not finite",
            hint="the weights or the steering overflow: try --dtype float32 or a smaller --coeff",
        )
    return Reading(logp, nll)


def _read_batch(loaded: Loaded, rows: list[list[int]], slot: Slot) -> tuple[Array, Array]:
    import torch

    ids, mask = left_pad(rows, loaded.device)
    keep = len(slot.prefill) + 1
    logits = loaded.model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions_of(mask),
        use_cache=False,
        logits_to_keep=keep,
    ).logits
    target = torch.tensor(slot.prefill, device=logits.device)[:, None]
    logp, nll = [], []
    for row in logits:  # one row at a time, so that a large vocabulary never stands in float32 for the whole batch
        logs = torch.log_softmax(row.float(), dim=-1)
        logp.append(logs[-1, slot.digits])
        nll.append(-logs[:-1].gather(-1, target).mean())
    return torch.stack(logp).double().cpu().numpy(), torch.stack(nll).double().cpu().numpy()


def think_first(
    loaded: Loaded, prompts: Sequence[list[dict[str, str]]], budget: int, batch_size: int
) -> list[list[int]]:
    """The prompts as token ids; with a budget, each followed by a greedy think span that is closed in any case."""
    if budget == 0:
        return [loaded.encode_prompt(messages) for messages in prompts]
    opened = [_opened(loaded, messages) for messages in prompts]
    sampling = Sampling(max_new_tokens=budget, greedy=True)
    spans = decode(loaded, opened, seeds=[0] * len(opened), sampling=sampling, batch_size=batch_size)
    closing = [span.text.partition("</think>")[0].rstrip() + "\n</think>\n\n" for span in spans]
    return [ids + loaded.encode_completion(text, end=False) for ids, text in zip(opened, closing, strict=True)]


def _opened(loaded: Loaded, messages: list[dict[str, str]]) -> list[int]:
    """The prompt up to the inside of a think span, which some templates open themselves."""
    ids = loaded.encode_prompt(messages, think=True)
    if loaded.render(messages, think=True).rstrip().endswith("<think>"):
        return ids
    return ids + loaded.encode_completion("<think>\n", end=False)
