"""Safetensors files with the same bytes for the same content, published atomically and with plain modes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from shl.core.files import atomic_file

if TYPE_CHECKING:
    from torch import Tensor


def _pieces(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> tuple[bytes, memoryview]:
    """The safetensors header and data of some tensors.

    The library writes metadata keys in a random order, so the header is written again with sorted keys.
    """
    from safetensors.torch import save

    plain = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    data = save(plain)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    if metadata:
        header = {"__metadata__": dict(sorted(metadata.items())), **header}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data to eight bytes
    return len(text).to_bytes(8, "little") + text, memoryview(data)[8 + length :]


def save_safetensors(
    path: Path | str,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    force: bool = False,
) -> None:
    """Write tensors and metadata to a file that appears complete or not at all."""
    pieces = _pieces(tensors, metadata)
    with atomic_file(path, force, mode="wb") as handle:
        handle.writelines(pieces)
