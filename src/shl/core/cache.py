"""The key-value cache of decoding and the masks that fit it, kept cheap: nothing is copied or built anew per step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

from shl.core.errors import ShlError
from shl.core.models import Loaded

# Model types whose masks per decoding step are slices of the padding mask; the tests compare each with the library's.
_SLICED = {"llama", "mistral", "qwen2", "qwen3", "gemma3_text"}


class GrowingLayer(DynamicLayer):
    """A full-attention cache layer that writes into spare room instead of copying all of itself at each token."""

    step = 64

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Start without room; the first update makes it."""
        super().lazy_initialization(key_states, value_states)
        self._room_k, self._room_v = key_states[:, :, :0], value_states[:, :, :0]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append states and return all of them, as views of the room."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        used = self.get_seq_length()
        need = used + key_states.shape[-2]
        if need > self._room_k.shape[-2]:
            self._room_k = self._grow(self._room_k, key_states, used, need)
            self._room_v = self._grow(self._room_v, value_states, used, need)
        self._room_k[:, :, used:need] = key_states
        self._room_v[:, :, used:need] = value_states
        self.keys, self.values = self._room_k[:, :, :need], self._room_v[:, :, :need]
        return self.keys, self.values

    def _grow(self, room: Tensor, states: Tensor, used: int, need: int) -> Tensor:
        size = max(need + self.step, need * 5 // 4)
        new = states.new_empty(*states.shape[:2], size, states.shape[-1])
        new[:, :, :used] = room[:, :, :used]
        return new

    def cut(self, n: int) -> None:
        """Forget the first n columns; their memory goes with the next growth."""
        if self.is_initialized:
            used = self.get_seq_length() - n
            self._room_k, self._room_v = self._room_k[:, :, n:], self._room_v[:, :, n:]
            self.keys, self.values = self._room_k[:, :, :used], self._room_v[:, :, :used]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row; the room ends with the states, and grows when more come."""
        super().batch_repeat_interleave(repeats)
        if self.is_initialized:
            self._room_k, self._room_v = self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows only."""
        if self.is_initialized:
            used = self.get_seq_length()
            self._room_k, self._room_v = self._room_k[indices], self._room_v[indices]
            self.keys, self.values = self._room_k[:, :, :used], self._room_v[:, :, :used]


def unreplaceable(cache: DynamicCache) -> set[str]:
    """The kinds of its layers whose rows cannot be replaced, such as those with a running state instead of tokens."""
    return {type(layer).__name__ for layer in cache.layers} - {"GrowingLayer", "DynamicSlidingWindowLayer"}


def check_replaceable(cache: DynamicCache) -> None:
    """Refuse a cache whose rows cannot be replaced."""
    if odd := unreplaceable(cache):
        raise ShlError(f"rows of a cache with {', '.join(sorted(odd))} cannot be rewound", hint="leave --backtrack out")


def replace_rows(cache: DynamicCache, rows: Tensor, part: DynamicCache) -> None:
    """Put the states of a shorter cache in the place of some rows, at their right end, and zeros before them.

    Columns are aligned at the newest token, as left padding has it; a sliding layer holds the last of them.
    """
    for layer, fresh in zip(cache.layers, part.layers, strict=True):
        if not layer.is_initialized:  # one that reads the states of another
            continue
        layer.keys[rows] = layer.values[rows] = 0
        if fresh.is_initialized:
            n = min(layer.keys.shape[2], fresh.keys.shape[2])
            layer.keys[rows, :, -n:] = fresh.keys[:, :, -n:]
            layer.values[rows, :, -n:] = fresh.values[:, :, -n:]


def cut_columns(cache: DynamicCache, n: int) -> None:
    """Forget the first n columns of a cache whose rows can be replaced: no row has a token there any more."""
    for layer in cache.layers:
        if isinstance(layer, GrowingLayer):
            layer.cut(n)
        elif layer.is_initialized:
            layer.cumulative_length -= n
            held = min(layer.keys.shape[2], layer.cumulative_length)
            layer.keys, layer.values = layer.keys[:, :, -held:], layer.values[:, :, -held:]


def keeps_tokens(cache: DynamicCache) -> bool:
    """Whether all layers hold states of tokens, and none a running state, which cannot be copied out for many rows."""
    return not any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers)


def select_rows(cache: DynamicCache, rows: Tensor) -> None:
    """Keep these rows only. Layers with a running state can reorder rows, which leaves out the others as well."""
    for layer in cache.layers:
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            layer.reorder_cache(rows)
        else:
            layer.batch_select_indices(rows.to(layer.keys.device) if layer.is_initialized else rows)


def new_cache(loaded: Loaded) -> DynamicCache:
    """An empty cache in the layout that the model asks for."""
    cache = DynamicCache(config=loaded.model.config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def windows(loaded: Loaded) -> dict[str, int] | int | None:
    """The window of each kind of layer (0: no window), or None where slices of a mask are not known to be right."""
    config = loaded.text_config
    if config.model_type not in _SLICED or config._attn_implementation != "sdpa":
        return None
    values = config.to_dict()
    window = values.get("sliding_window") or 0
    if "layer_types" not in values:
        return window
    return {kind: window if kind == "sliding_attention" else 0 for kind in sorted(set(values["layer_types"]))}


class DecodeMasks:
    """The attention mask of each decoding step, as slices of one mask that is made once.

    The library builds its masks anew at each step. With one query per row they are but slices of the padding mask:
    all of it for full attention, the last columns for a sliding window. Model types for which no test has shown
    that get the padding mask, from which the library builds its own.
    """

    def __init__(self, loaded: Loaded, mask: Tensor, steps: int) -> None:
        self.plan = windows(loaded)
        self.seen = mask.shape[1]
        self.full = torch.cat([mask, mask.new_ones(len(mask), steps)], 1).bool()
        self._pads()

    def _pads(self) -> None:
        """How many leading columns hold padding in some row; a slice that starts after them needs no mask."""
        self.pad = int((~self.full).sum(1).max())

    def keep(self, rows: Tensor) -> None:
        """Drop rows."""
        self.full = self.full[rows]
        self._pads()

    def shorten(self, rows: Tensor, lengths: Tensor) -> None:
        """Let only the last columns of some rows hold tokens: `lengths` of those seen so far."""
        columns = torch.arange(self.seen, device=self.full.device)
        self.full[rows, : self.seen] = columns >= self.seen - lengths[:, None]
        self._pads()

    def cut(self, n: int, steps: int) -> None:
        """Forget the first n columns, and be ready for so many more steps."""
        seen = self.full[:, n : self.seen]
        self.full = torch.cat([seen, seen.new_ones(len(seen), steps)], 1)
        self.seen -= n
        self._pads()

    def step(self) -> Any:
        """The mask for one more token in every row: what the model's forward takes as `attention_mask`."""
        self.seen += 1
        if self.plan is None:
            return self.full[:, : self.seen].long()
        if isinstance(self.plan, dict):
            return {kind: self._slice(window) for kind, window in self.plan.items()}
        return self._slice(self.plan)

    def _slice(self, window: int) -> Tensor | None:
        start = max(0, self.seen - window) if window else 0
        return self.full[:, None, None, start : self.seen] if start < self.pad else None
