"""A steering vector as a GGUF control vector, the file that llama.cpp and repeng read, and back.

In both formats a direction belongs to a 0-based block and is added to that block's output at every position. GGUF
carries no coefficient, so it is multiplied in, and no direction for block 0.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shl import __version__
from shl.core.console import warn
from shl.core.errors import InputError, ShlError
from shl.core.files import atomic_file, refuse_existing
from shl.core.vectors import Vector

ARCHITECTURE = "controlvector"
_NAME = re.compile(r"direction\.([0-9]+)")


def to_gguf(
    vector: Vector, out: Path | str, model_type: str, coeff: float = 1.0, *, drop_block_0: bool = False,
    force: bool = False,
) -> list[int]:  # fmt: skip
    """Write coeff * vector; returns the blocks written. `model_type` is the model's own, as in its config.json."""
    gguf = _library()
    layers = dict(vector.layers)
    if 0 in layers and not drop_block_0:
        raise ShlError(
            "the vector steers block 0, for which a GGUF control vector has no place",
            hint="leave that block out with --drop-block-0, or make the vector with other --layers",
        )
    layers.pop(0, None)
    if not layers:
        raise ShlError("no block is left to export", hint="make the vector with other --layers")
    refuse_existing(out, force)
    with tempfile.TemporaryDirectory() as folder:  # the package writes to a path only
        path = Path(folder) / "v.gguf"
        writer = gguf.GGUFWriter(path, ARCHITECTURE)
        writer.add_string(f"{ARCHITECTURE}.model_hint", model_type)
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(layers))
        for layer, direction in sorted(layers.items()):
            writer.add_tensor(f"direction.{layer}", (coeff * direction.double()).float().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with atomic_file(out, force, mode="wb") as handle:
            handle.write(path.read_bytes())
    return sorted(layers)


def from_gguf(path: Path | str, model: str | None = None) -> Vector:
    """Read a control vector. It says neither for which model nor with which template it was made.

    Files of llama.cpp's cvector-generator are shifted by one block and of length one; nothing in a file tells, so
    nothing is corrected here.
    """
    gguf = _library()
    if not Path(path).is_file():
        raise InputError("there is no such file", where=str(path))
    try:
        with open(path, "rb") as handle:
            _walk(handle.read(_HEADER))  # the library believes what a damaged header says about its lengths
        reader = gguf.GGUFReader(path)
        kind, hint = (
            field.contents() if (field := reader.get_field(name)) is not None else None
            for name in ("general.architecture", f"{ARCHITECTURE}.model_hint")
        )
        named = [(one.name, one) for one in reader.tensors]
    except (ValueError, IndexError, OSError, KeyError, TypeError, OverflowError) as error:
        raise InputError(f"is not a GGUF file, or a damaged one ({error})", where=str(path)) from None
    if kind != ARCHITECTURE:
        raise InputError("is GGUF but not a control vector", where=str(path))
    layers = {_block(name, path): _direction(one, path) for name, one in named}
    if not layers:
        raise InputError("holds no direction", where=str(path))
    if len({len(direction) for direction in layers.values()}) > 1:
        raise InputError("holds directions of different lengths", where=str(path))
    warn("a GGUF control vector names no model revision, chain or template, so none can be checked")
    meta = {
        "method": "gguf",
        "layers": sorted(layers),
        "model_type": hint if isinstance(hint, str) else None,
        **({"model": model} if model else {}),
        "version": __version__,
    }
    vector = Vector(dict(sorted(layers.items())), meta)
    vector.meta["norms"] = {str(layer): norm for layer, norm in vector.norms.items()}
    return vector


_HEADER = 64 << 20  # bytes in which all but the tensors' values must lie
_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # of GGUF's plain types
_STRING, _ARRAY = 8, 9


def _walk(data: bytes) -> None:
    """Step over the keys of a header. Raises ValueError where a length leads out of it, so that no reader runs on."""
    if data[:4] != b"GGUF" or _number(data, 4, 4) & 0xFFFF == 0:
        raise ValueError("no little-endian GGUF")
    at = 24
    for _ in range(_count(data, _number(data, 16, 8))):
        at = _past_string(data, at)
        at = _past_value(data, at + 4, _number(data, at, 4), 0)
    _count(data, _number(data, 8, 8))


def _past_value(data: bytes, at: int, kind: int, depth: int) -> int:
    """The offset behind one value."""
    if kind in _WIDTHS:
        return at + _WIDTHS[kind]
    if kind == _STRING:
        return _past_string(data, at)
    if kind != _ARRAY or depth > 3:
        raise ValueError("a value of an unknown kind")
    inner, count = _number(data, at, 4), _count(data, _number(data, at + 4, 8))
    at += 12
    if inner in _WIDTHS:
        return at + count * _WIDTHS[inner]
    for _ in range(count):
        at = _past_value(data, at, inner, depth + 1)
    return at


def _past_string(data: bytes, at: int) -> int:
    return at + 8 + _count(data, _number(data, at, 8))


def _number(data: bytes, at: int, width: int) -> int:
    if at + width > len(data):
        raise ValueError("cut short")
    return int.from_bytes(data[at : at + width], "little")


def _count(data: bytes, number: int) -> int:
    """A number of things, each of which takes a byte at least."""
    if number > len(data):
        raise ValueError(f"a count of {number} in {len(data)} bytes")
    return number


def _block(name: str, path: Path | str) -> int:
    match = _NAME.fullmatch(name)
    if not match:
        raise InputError("is not direction.N", where=f"{path}: tensor {name}")
    return int(match[1])


def _direction(tensor: Any, path: Path | str) -> torch.Tensor:
    values = np.array(tensor.data)
    if values.dtype != np.float32 or values.ndim != 1:
        shape = "x".join(map(str, values.shape))
        raise InputError(
            f"is {values.dtype} of shape {shape}, not a float32 row", where=f"{path}: tensor {tensor.name}"
        )
    if not np.isfinite(values).all():
        raise InputError("holds values that are not finite", where=f"{path}: tensor {tensor.name}")
    return torch.from_numpy(values.copy())


def _library() -> Any:
    try:
        import gguf
    except ImportError:
        raise ShlError("GGUF files need the package gguf", hint="pip install 'shl[gguf]'") from None
    return gguf
