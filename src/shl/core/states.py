"""Hidden states of prompts, block by block: at their last token, or averaged over an answer."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from shl.core.batches import right_pad
from shl.core.cache import new_cache, replaceable
from shl.core.console import Progress
from shl.core.hooks import Capture
from shl.core.memory import batched
from shl.core.models import Loaded

SHORTEST = 8  # tokens of a common beginning that are worth a pass of their own


class Span(NamedTuple):
    """Tokens, and over how many of the last of them the state is averaged."""

    ids: list[int]
    read: int = 1


def read_states(
    loaded: Loaded, spans: Sequence[Span], blocks: Sequence[int], batch_size: int, bar: Progress | None = None
) -> dict[int, Tensor]:
    """Residual stream behind each of the blocks, [rows, hidden], float32 on the CPU, averaged over each row's span.

    Rows of like length are read together, padded on the right, where causal attention sees no padding. What all rows
    begin with, such as a persona, is read once. No block above the last one asked for is computed, nor the head.
    """
    states = {layer: torch.empty(len(spans), loaded.hidden) for layer in blocks}
    order = sorted(range(len(spans)), key=lambda i: -len(spans[i].ids))
    with torch.inference_mode(), Capture(loaded, blocks, "all", early_exit=True) as capture:
        shared = _shared(spans) if replaceable(new_cache(loaded)) else 0
        begun = _begin(loaded, capture, spans[0].ids[:shared])

        def read(rows: Sequence[int]) -> dict[int, Tensor]:
            ids = right_pad([spans[i].ids[shared:] for i in rows], loaded.device)
            return capture.run(input_ids=ids, past_key_values=_spread(begun, len(rows)))

        for rows, found in batched(loaded, order, batch_size, read, "reading hidden states"):
            for layer in blocks:
                for i, hidden in zip(rows, found[layer], strict=True):
                    end = len(spans[i].ids) - shared
                    states[layer][i] = hidden[end - spans[i].read : end].float().mean(0).cpu()
            if bar is not None:
                bar.advance(len(rows))
    return states


def _shared(spans: Sequence[Span]) -> int:
    """How many tokens all rows begin with, leaving each the span that is read; 0 when they are not worth a pass."""
    if len(spans) < 2:
        return 0
    first, last = min(span.ids for span in spans), max(span.ids for span in spans)  # whatever these two share, all do
    common = next((k for k, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    common = min(common, *(len(span.ids) - span.read for span in spans))
    return common if common >= SHORTEST else 0


def _begin(loaded: Loaded, capture: Capture, ids: list[int]) -> DynamicCache | None:
    """The cache behind the common beginning."""
    if not ids:
        return None
    cache = new_cache(loaded)
    capture.run(input_ids=torch.tensor([ids], device=loaded.device), past_key_values=cache)
    return cache


def _spread(begun: DynamicCache | None, rows: int) -> DynamicCache | None:
    """The states of the common beginning, for each row of a batch; a pass writes into its own copy."""
    if begun is None:
        return None
    cache = copy.deepcopy(begun)
    cache.batch_repeat_interleave(rows)
    return cache
