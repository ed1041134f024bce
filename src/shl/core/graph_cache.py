"""A cache of fixed size, a slot for each row with its tokens at the left, and the attention of one token over it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from shl.core.fused import compiles
from shl.core.models import Loaded

_NAME = "shl_slots"  # of this attention among those of transformers


class Slot(DynamicLayer):
    """The states of one layer, [slots, kv heads, capacity, width]; a pass over n rows takes the first n slots."""

    def __init__(self, keys: Tensor, values: Tensor, read: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.read = keys, values, read
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write one token of each row behind those that it has read; all of the slots."""
        n = len(key_states)
        keys, values, read = self.keys[:n], self.values[:n], self.read[:n]
        if compiles(key_states.device):
            from shl.core.kernels import put

            put(key_states, value_states, keys, values, read)
        else:
            rows = torch.arange(n, device=read.device)
            keys[rows, :, read], values[rows, :, read] = key_states[:, :, 0], value_states[:, :, 0]
        return keys, values


class SlotCache(Cache):
    """Slots for every layer, of the kind that some first states show; `read` tells how many tokens are in each."""

    def __init__(self, states: DynamicCache, slots: int, capacity: int, read: Tensor) -> None:
        def like(found: Tensor) -> Tensor:
            return found.new_zeros(slots, found.shape[1], capacity, found.shape[3])

        super().__init__([Slot(like(layer.keys), like(layer.values), read) for layer in states.layers])

    def fill(self, slots: Tensor, states: DynamicCache) -> None:
        """Put states at the left of some slots."""
        for layer, fresh in zip(self.layers, states.layers, strict=True):
            width = fresh.keys.shape[2]
            layer.keys[slots, :, :width], layer.values[slots, :, :width] = fresh.keys, fresh.values

    @property
    def tensors(self) -> list[Tensor]:
        """Keys and values of every layer."""
        return [tensor for layer in self.layers for tensor in (layer.keys, layer.values)]


@contextmanager
def attention(loaded: Loaded, read: Tensor) -> Iterator[None]:
    """Within this context the model's layers attend to what slots hold, in passes of one token a row."""
    config = loaded.model.config
    before = config._attn_implementation
    ALL_ATTENTION_FUNCTIONS[_NAME] = partial(_attend, read)
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        del ALL_ATTENTION_FUNCTIONS[_NAME]


def _attend(
    read: Tensor, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: object, scaling: float | None = None,
    sliding_window: int | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention in the form that transformers asks for. There is no mask: a row sees what it has read, and itself."""
    read = read[: len(query)]
    scale = scaling or query.shape[-1] ** -0.5
    if compiles(query.device):
        from shl.core.kernels import attend

        return attend(query, key, value, read, scale, sliding_window, _splits(key)), None
    column = torch.arange(key.shape[2], device=key.device)
    seen = (column <= read[:, None]) & (column > read[:, None] - (sliding_window or key.shape[2]))
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=seen[:, None, None], scale=scale, enable_gqa=True
    )
    return out.transpose(1, 2).contiguous(), None


def _splits(key: Tensor) -> int:
    """Among how many programs the tokens of a row are shared out: enough for all processors of the device, twice."""
    busy = torch.cuda.get_device_properties(key.device).multi_processor_count * 2
    splits = 1
    while splits * key.shape[0] * key.shape[1] < busy and splits * 128 < key.shape[2]:
        splits *= 2
    return splits
