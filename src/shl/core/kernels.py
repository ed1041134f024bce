"""Triton kernels: attention of one token over slots and writing into them, RMS norm, rotary positions of one token.

Imported on CUDA devices only. Each does in one launch what a model's own code does in up to ten; see core/fused.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

_FEW = 16  # the least number of rows that a product of tiles takes
Launch = TypeVar("Launch", bound=Callable[..., Any])


def _there(launch: Launch) -> Launch:
    """Launched on the device of the first tensor, which need not be the current one."""

    @wraps(launch)
    def run(first: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.cuda.device_of(first):
            return launch(first, *args, **kwargs)

    return run  # type: ignore[return-value]


@_there
def attend(q: Tensor, k: Tensor, v: Tensor, read: Tensor, scale: float, window: int | None, splits: int) -> Tensor:
    """One query for each row over the first `read` + 1 tokens of its slot, or the last `window` of them.

    q: [rows, heads, 1, width]; k, v: [rows, kv heads, capacity, width]; read: [rows], int64. Returns [rows, 1, heads,
    width]. With several splits the tokens of a row are shared out among programs, whose results are then joined
    (flash decoding, Dao et al. 2023).
    """
    rows, heads, _, width = q.shape
    kv_heads, capacity = k.shape[1:3]
    group = heads // kv_heads
    out = q.new_empty(rows, 1, heads, width)
    single = splits == 1
    part = out if single else torch.empty(rows, heads, splits, width, dtype=torch.float32, device=q.device)
    stats = out if single else torch.empty(rows, heads, splits, 2, dtype=torch.float32, device=q.device)
    wide = triton.next_power_of_2(width)
    block = max(16, min(64, 16384 // (wide * q.element_size())))  # a tile of keys takes 16 KB
    _attend[(rows, kv_heads, splits)](
        q, k, v, read, out, part, stats, scale, window or capacity,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), k.stride(2), v.stride(0), v.stride(1), v.stride(2),
        HEADS=heads, GROUP=group, GROUP_P=max(_FEW, triton.next_power_of_2(group)), WIDTH=width, WIDTH_P=wide,
        BLOCK=block, SPLITS=splits, num_warps=4,
    )  # fmt: skip
    if not single:
        _join[(rows, heads)](part, stats, out, HEADS=heads, WIDTH=width, WIDTH_P=wide, SPLITS=splits)
    return out


@triton.jit
def _attend(
    q, k, v, read, out, part, stats, scale, window,
    q_row, q_head, k_row, k_head, k_token, v_row, v_head, v_token,
    HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_P: tl.constexpr, WIDTH: tl.constexpr, WIDTH_P: tl.constexpr,
    BLOCK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    row, kv, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    end = (tl.load(read + row) + 1).to(tl.int32)
    begin = tl.maximum(end - window, 0)
    share = tl.cdiv(tl.cdiv(end - begin, SPLITS), BLOCK) * BLOCK
    first = begin + split * share
    last = tl.minimum(first + share, end)
    member = tl.arange(0, GROUP_P)
    head = kv * GROUP + member
    dims = tl.arange(0, WIDTH_P)
    real = (member < GROUP)[:, None] & (dims < WIDTH)[None, :]
    asked = tl.load(q + row * q_row + head[:, None] * q_head + dims[None, :], mask=real, other=0.0)
    top = tl.full([GROUP_P], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_P], tl.float32)
    found = tl.zeros([GROUP_P, WIDTH_P], tl.float32)
    for at in range(first, last, BLOCK):
        token = at + tl.arange(0, BLOCK)
        inside = token < last
        here = inside[None, :] & (dims < WIDTH)[:, None]
        keys = tl.load(k + row * k_row + kv * k_head + token[None, :] * k_token + dims[:, None], mask=here, other=0.0)
        score = tl.dot(asked, keys, input_precision="ieee") * scale
        score = tl.where(inside[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        weight = tl.exp(score - higher[:, None])
        shrink = tl.exp(top - higher)
        there = inside[:, None] & (dims < WIDTH)[None, :]
        values = tl.load(
            v + row * v_row + kv * v_head + token[:, None] * v_token + dims[None, :], mask=there, other=0.0
        )
        total = total * shrink + tl.sum(weight, 1)
        found = found * shrink[:, None] + tl.dot(weight.to(values.dtype), values, input_precision="ieee")
        top = higher
    if SPLITS == 1:
        place = (row * HEADS + head[:, None]) * WIDTH + dims[None, :]
        tl.store(out + place, (found / total[:, None]).to(out.dtype.element_ty), mask=real)
    else:
        place = (row * HEADS + head) * SPLITS + split
        tl.store(part + place[:, None] * WIDTH + dims[None, :], found, mask=real)
        tl.store(stats + place * 2, top, mask=member < GROUP)
        tl.store(stats + place * 2 + 1, total, mask=member < GROUP)


@triton.jit
def _join(part, stats, out, HEADS: tl.constexpr, WIDTH: tl.constexpr, WIDTH_P: tl.constexpr, SPLITS: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * HEADS + tl.program_id(1)
    split, dims = tl.arange(0, SPLITS), tl.arange(0, WIDTH_P)
    top = tl.load(stats + (place * SPLITS + split) * 2)
    total = tl.load(stats + (place * SPLITS + split) * 2 + 1)
    weight = tl.exp(top - tl.max(top, 0))  # a split without tokens has a top of -inf
    real = (dims < WIDTH)[None, :] & (split >= 0)[:, None]
    found = tl.load(part + (place * SPLITS + split)[:, None] * WIDTH + dims[None, :], mask=real, other=0.0)
    joined = tl.sum(found * weight[:, None], 0) / tl.sum(total * weight, 0)
    tl.store(out + place * WIDTH + dims, joined.to(out.dtype.element_ty), mask=dims < WIDTH)


@_there
def put(k: Tensor, v: Tensor, room_k: Tensor, room_v: Tensor, read: Tensor) -> None:
    """Write the states of one token, [rows, kv heads, 1, width], into each row's slot behind its `read` tokens."""
    rows, heads, _, width = k.shape
    _put[(rows, heads)](
        k, v, room_k, room_v, read, k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        room_k.stride(0), room_k.stride(1), room_k.stride(2), WIDTH=width, WIDTH_P=triton.next_power_of_2(width),
    )  # fmt: skip


@triton.jit
def _put(
    k, v, room_k, room_v, read, k_row, k_head, v_row, v_head, row_stride, head_stride, token_stride,
    WIDTH: tl.constexpr, WIDTH_P: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dims = tl.arange(0, WIDTH_P)
    real = dims < WIDTH
    place = row * row_stride + head * head_stride + tl.load(read + row) * token_stride + dims
    tl.store(room_k + place, tl.load(k + row * k_row + head * k_head + dims, mask=real), mask=real)
    tl.store(room_v + place, tl.load(v + row * v_row + head * v_head + dims, mask=real), mask=real)


@_there
def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, rounded: bool) -> Tensor:
    """x / rms(x) * (weight + offset) over the last axis; `rounded`: to the precision of x before the product."""
    flat = x.reshape(-1, x.shape[-1])
    out = torch.empty_like(flat)
    _rms_norm[(len(flat),)](
        flat, weight, out, eps, offset, ROUNDED=rounded, WIDTH=flat.shape[1],
        WIDTH_P=triton.next_power_of_2(flat.shape[1]), num_warps=8 if flat.shape[1] > 1024 else 1,
    )  # fmt: skip
    return out.view(x.shape)


@triton.jit
def _rms_norm(x, weight, out, eps, offset, ROUNDED: tl.constexpr, WIDTH: tl.constexpr, WIDTH_P: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, WIDTH_P)
    real = dims < WIDTH
    values = tl.load(x + row * WIDTH + dims, mask=real, other=0.0).to(tl.float32)
    normed = values * tl.rsqrt(tl.sum(values * values, 0) / WIDTH + eps)
    if ROUNDED:
        normed = normed.to(out.dtype.element_ty).to(tl.float32)
    gain = tl.load(weight + dims, mask=real, other=0.0).to(tl.float32) + offset
    tl.store(out + row * WIDTH + dims, (normed * gain).to(out.dtype.element_ty), mask=real)


class Norm(torch.autograd.Function):
    """`rms_norm` with the gradient at x; the weight has none. Of the forward pass only x is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float, rounded: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.offset = eps, offset
        return rms_norm(x, weight, eps, offset, rounded)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return _pulled(x, weight, grads[0], ctx.eps, ctx.offset), None, None, None, None


@_there
def _pulled(x: Tensor, weight: Tensor, grad: Tensor, eps: float, offset: float) -> Tensor:
    """The gradient at x of `rms_norm`, from that at its result."""
    flat = x.reshape(-1, x.shape[-1])
    out = torch.empty_like(flat)
    _rms_norm_back[(len(flat),)](
        flat, weight, grad.reshape(flat.shape), out, eps, offset, WIDTH=flat.shape[1],
        WIDTH_P=triton.next_power_of_2(flat.shape[1]), num_warps=8 if flat.shape[1] > 1024 else 1,
    )  # fmt: skip
    return out.view(x.shape)


@triton.jit
def _rms_norm_back(x, weight, grad, out, eps, offset, WIDTH: tl.constexpr, WIDTH_P: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, WIDTH_P)
    real = dims < WIDTH
    values = tl.load(x + row * WIDTH + dims, mask=real, other=0.0).to(tl.float32)
    gain = tl.load(weight + dims, mask=real, other=0.0).to(tl.float32) + offset
    pulled = tl.load(grad + row * WIDTH + dims, mask=real, other=0.0).to(tl.float32) * gain
    scale = tl.rsqrt(tl.sum(values * values, 0) / WIDTH + eps)
    along = tl.sum(pulled * values, 0) / WIDTH * scale * scale
    tl.store(out + row * WIDTH + dims, ((pulled - values * along) * scale).to(out.dtype.element_ty), mask=real)


@_there
def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Rotary positions for one token a row, as `apply_rotary_pos_emb` of the models has them: halves of a head pair up.

    q, k: [rows, heads, 1, width]; cos, sin: [rows, 1, width].
    """
    rows, heads, _, width = q.shape
    kv_heads = k.shape[1]
    new_q, new_k = q.new_empty(q.shape), k.new_empty(k.shape)
    _rotate[(rows, heads + kv_heads)](
        q, k, cos, sin, new_q, new_k, q.stride(0), q.stride(1), k.stride(0), k.stride(1), cos.stride(0), sin.stride(0),
        HEADS=heads, KV_HEADS=kv_heads, HALF=width // 2, HALF_P=triton.next_power_of_2(width // 2), num_warps=1,
    )  # fmt: skip
    return new_q, new_k


@triton.jit
def _rotate(
    q, k, cos, sin, new_q, new_k, q_row, q_head, k_row, k_head, cos_row, sin_row,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, HALF_P: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dims = tl.arange(0, HALF_P)
    real = dims < HALF
    cos_1 = tl.load(cos + row * cos_row + dims, mask=real).to(tl.float32)
    cos_2 = tl.load(cos + row * cos_row + HALF + dims, mask=real).to(tl.float32)
    sin_1 = tl.load(sin + row * sin_row + dims, mask=real).to(tl.float32)
    sin_2 = tl.load(sin + row * sin_row + HALF + dims, mask=real).to(tl.float32)
    if head < HEADS:
        source = q + row * q_row + head * q_head
        target = new_q + (row * HEADS + head) * HALF * 2
    else:
        source = k + row * k_row + (head - HEADS) * k_head
        target = new_k + (row * KV_HEADS + head - HEADS) * HALF * 2
    first = tl.load(source + dims, mask=real).to(tl.float32)
    second = tl.load(source + HALF + dims, mask=real).to(tl.float32)
    tl.store(target + dims, (first * cos_1 - second * sin_1).to(new_q.dtype.element_ty), mask=real)
    tl.store(target + HALF + dims, (second * cos_2 + first * sin_2).to(new_q.dtype.element_ty), mask=real)
