"""What many rows of tokens begin with, such as a persona: computed once, and copied for every batch of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from shl.core.cache import keeps_tokens, new_cache
from shl.core.models import Loaded

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import DynamicCache


class Beginning:
    """The first `length` tokens, which all rows share, and their states; 0 and none where they are not worth a pass."""

    def __init__(self, length: int = 0, cache: DynamicCache | None = None) -> None:
        self.length, self._cache = length, cache

    @classmethod
    def of(
        cls, loaded: Loaded, rows: Sequence[list[int]], own: Sequence[int], least: int, run: Callable[..., Any]
    ) -> Beginning:
        """Read what the rows share, by `run(input_ids=…, past_key_values=…)`, when that is `least` tokens or more.

        `own` says how many of its last tokens each row keeps for itself, at the least. A model with a running state
        instead of a cache of tokens shares nothing.
        """
        import torch

        length = _shared(rows, own)
        if length < least or not keeps_tokens(cache := new_cache(loaded)):
            return cls()
        ids: Tensor = torch.tensor([rows[0][:length]], device=loaded.device)
        run(input_ids=ids, past_key_values=cache)
        return cls(length, cache)

    def spread(self, n: int) -> DynamicCache | None:
        """The states for each of n rows; a pass writes into its own copy."""
        if self._cache is None:
            return None
        cache = copy.deepcopy(self._cache)
        cache.batch_repeat_interleave(n)
        return cache


def _shared(rows: Sequence[list[int]], own: Sequence[int]) -> int:
    """How many tokens all rows begin with, leaving each its own; 0 for a single row."""
    if len(rows) < 2:
        return 0
    ends = zip(min(rows), max(rows), strict=False)  # whatever the first and the last in order share, all do
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], ends))
    return min(common, *(len(row) - kept for row, kept in zip(rows, own, strict=True)))
