"""Lists of token ids as padded tensors: left padding, its mask, and the positions that belong to it."""

from __future__ import annotations

import torch
from torch import Tensor


def left_pad(rows: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask of rows padded on the left, so that every row ends at the last column."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(width) >= (width - lengths)[:, None]
    return ids.to(device), mask.long().to(device)


def right_pad(rows: list[list[int]], device: torch.device) -> Tensor:
    """Ids of rows padded on the right. Under causal attention no real token sees the padding, so it needs no mask."""
    width = max(len(row) for row in rows)
    return torch.tensor([row + [0] * (width - len(row)) for row in rows]).to(device)


def positions_of(mask: Tensor) -> Tensor:
    """Positions counted from each row's first real token."""
    return (mask.cumsum(-1) - 1).clamp_(min=0)
