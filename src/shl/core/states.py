"""Hidden states of prompts, block by block: at their last token, or averaged over an answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shl.core.batches import right_pad
from shl.core.beginning import Beginning
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
        ids_of, own = [span.ids for span in spans], [span.read for span in spans]
        begun = Beginning.of(loaded, ids_of, own, SHORTEST, capture.run)

        def read(rows: Sequence[int]) -> dict[int, Tensor]:
            ids = right_pad([ids_of[i][begun.length :] for i in rows], loaded.device)
            return capture.run(input_ids=ids, past_key_values=begun.spread(len(rows)))

        for rows, found in batched(loaded, order, batch_size, read, "reading hidden states"):
            for layer in blocks:
                for i, hidden in zip(rows, found[layer], strict=True):
                    end = len(ids_of[i]) - begun.length
                    states[layer][i] = hidden[end - own[i] : end].float().mean(0).cpu()
            if bar is not None:
                bar.advance(len(rows))
    return states
