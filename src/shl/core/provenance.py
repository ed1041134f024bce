"""Where an artifact came from: canonical JSON, digests, headers, and reading a safetensors file without torch."""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from shl import __version__
from shl.core import strict
from shl.core.errors import InputError

KEY = "shl"  # the metadata key of our safetensors files
VOLATILE = ("adapter_paths", "argv", "commit", "created", "digest", "version")  # left out of digests
_CHUNK = 1 << 20
_MAX_HEADER = 100_000_000  # the format's own limit
_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
         "F64": 64, "I64": 64, "U64": 64}  # fmt: skip
_AGAIN = "it is damaged, or is something else: copy it or make it again"
# what a vector's header may hold where code relies on it; None is a key that may be null
_NULL = type(None)
_FIELDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("model", "model_digest", "template", "method", "digest"), (str,)),
    **dict.fromkeys(("revision", "model_type"), (str, _NULL)),
    **dict.fromkeys(("adapters", "adapter_paths", "layers"), (list,)),
    **dict.fromkeys(("norms", "residual_norms", "agreement"), (dict,)),
    "personas": (dict, _NULL),
}


class TensorInfo(NamedTuple):
    """What a safetensors header says about one tensor."""

    dtype: str
    shape: tuple[int, ...]
    start: int  # offsets from the beginning of the file
    end: int


def canonical(obj: Any) -> str:
    """The one JSON text of a value: sorted keys, no spaces, ASCII, no NaN."""
    return json.dumps(obj, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest_bytes(data: bytes) -> str:
    """The digest of some bytes as "sha256:…"."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def digest_of(obj: Any) -> str:
    """The digest of a JSON value, whatever the order of its keys."""
    return digest_bytes(canonical(obj).encode())


def digest_file(path: Path | str) -> str:
    """The digest of a file, read in chunks."""
    with open(path, "rb") as handle:
        return "sha256:" + hashlib.file_digest(handle, "sha256").hexdigest()


def digest_files(paths: Iterable[Path | str]) -> str:
    """One digest of several files: their names and contents, in the order of their names."""
    return digest_of(sorted([Path(path).name, digest_file(path)] for path in paths))


def header(step: str, config: Mapping[str, Any], parents: Iterable[Any] = ()) -> dict[str, Any]:
    """What every artifact says about its making. The volatile keys do not enter digests."""
    return {
        "step": step,
        "config": dict(config),
        "parents": list(parents),
        "version": __version__,
        "commit": commit(),
        "argv": argv(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def argv() -> list[str]:
    """The line that runs, without the place where the program happens to be installed."""
    name = Path(sys.argv[0]).name
    return ["shl" if name == "__main__.py" else name, *sys.argv[1:]]


def stable(meta: Mapping[str, Any]) -> dict[str, Any]:
    """A header without what changes from run to run: the part that digests cover."""
    return {name: value for name, value in meta.items() if name not in VOLATILE}


@functools.cache
def commit() -> str | None:
    """The git commit of the checkout this package runs from, marked when it has changes; None when installed."""
    package = Path(__file__).resolve().parents[1]
    root = package.parents[1]
    # a virtual environment inside somebody's repository must not borrow that repository's commit
    if package != root / "src" / "shl" or not (root / ".git").exists() or shutil.which("git") is None:
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def read_safetensors(path: Path | str) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors and the metadata that a safetensors file declares. Reads the header only, and checks all of it."""
    path = Path(path)
    if not path.is_file():
        raise InputError("no such file", where=str(path))
    size = path.stat().st_size
    with open(path, "rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 or length > min(_MAX_HEADER, size - 8):
            raise InputError("is not a safetensors file, or is cut short", where=str(path), hint=_AGAIN)
        try:
            declared = strict.loads(handle.read(length).decode("utf-8"))
            metadata = declared.pop("__metadata__", None) or {}
            if not all(isinstance(text, str) for text in metadata.values()):
                raise ValueError("its metadata holds more than text")
            tensors = {name: _tensor_info(name, entry, 8 + length) for name, entry in sorted(declared.items())}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"is not a safetensors file: {error}", where=str(path), hint=_AGAIN) from error
    _check_extent(path, tensors, 8 + length, size)
    return tensors, metadata


def _tensor_info(name: str, entry: dict[str, Any], base: int) -> TensorInfo:
    (start, end), shape, dtype = entry["data_offsets"], entry["shape"], entry["dtype"]
    if not (isinstance(dtype, str) and isinstance(shape, list)):
        raise ValueError(f"tensor {name!r} has no dtype or no shape")
    if any(type(number) is not int or number < 0 for number in (start, end, *shape)):
        raise ValueError(f"tensor {name!r} has sizes that are no counts")
    if dtype in _BITS and (end - start) * 8 != math.prod(shape) * _BITS[dtype]:
        raise ValueError(f"tensor {name!r} has {end - start} bytes, which is not what {dtype} {shape} takes")
    return TensorInfo(dtype, tuple(shape), base + start, base + end)


def _check_extent(path: Path, tensors: Mapping[str, TensorInfo], start: int, size: int) -> None:
    """The tensors fill the file, one behind the other, without gaps: nothing is missing and nothing is hidden."""
    for info in sorted(tensors.values(), key=lambda info: (info.start, info.end)):
        if info.start != start or info.end < start:
            raise InputError("has tensors that overlap or leave gaps", where=str(path), hint=_AGAIN)
        start = info.end
    if start != size:
        what = "is cut short" if start > size else f"has {size - start} bytes behind its last tensor"
        raise InputError(what, where=str(path), hint="copy or make it again")


def read_header(path: Path | str) -> dict[str, Any]:
    """The shl header of a vector, checked: types of what code relies on, blocks, and the digest that it records."""
    if not Path(path).is_file():
        what = "is a directory, not a vector" if Path(path).is_dir() else "no such vector"
        hint = "make one with: shl vector --persona authority -o v.safetensors"
        raise InputError(what, where=str(path), hint=hint)
    tensors, metadata = read_safetensors(path)
    if KEY not in metadata:
        raise InputError(
            "was not written by shl: it has no shl header",
            where=str(path),
            hint="make a vector with: shl vector --pos TEXT --neg TEXT -o v.safetensors",
        )
    try:
        meta = strict.loads(metadata[KEY])
    except ValueError as error:
        raise InputError(f"has a broken shl header: {error}", where=str(path), hint=_AGAIN) from error
    if not isinstance(meta, dict):
        raise InputError("has a shl header that is not an object", where=str(path), hint=_AGAIN)
    _check_fields(path, meta)
    held = sorted(int(name[5:-2]) for name in tensors if re.fullmatch(r"layer(0|[1-9][0-9]{0,5})\.v", name))
    if "layers" in meta and meta["layers"] != held:
        raise InputError(f"declares blocks {meta['layers']} and holds {held}", where=str(path), hint=_AGAIN)
    if "digest" in meta and digest_tensors(path, meta) != meta["digest"]:
        raise InputError(
            "was changed after it was written: its digest differs",
            where=str(path),
            hint="copy or make it again; if the change is yours, take `digest` out of its shl header",
        )
    return meta


def _check_fields(path: Path | str, meta: Mapping[str, Any]) -> None:
    for name, kinds in _FIELDS.items():
        if name in meta and not isinstance(meta[name], kinds):
            raise InputError(f"is not of type {kinds[0].__name__}", where=f"{path}: header: {name}")
    for name in ("adapters", "adapter_paths"):
        if not all(isinstance(one, str) for one in meta.get(name, ())):
            raise InputError("is not a list of strings", where=f"{path}: header: {name}")
    for name, text in (meta.get("personas") or {}).items():
        if not isinstance(text, str | None):
            raise InputError("is not a string", where=f"{path}: header: personas.{name}")


def digest_tensors(path: Path | str, meta: Mapping[str, Any] | None = None) -> str:
    """The digest of what a safetensors file means: names, types, shapes, values, and the stable part of a header.

    The order of tensors in the file and the volatile part of its header do not matter.
    """
    tensors, _ = read_safetensors(path)
    total = hashlib.sha256(canonical(stable(meta or {})).encode())
    with open(path, "rb") as handle:
        for name, info in tensors.items():
            total.update(canonical([name, info.dtype, info.shape, info.end - info.start]).encode())
            _feed(total, handle, info)
    return "sha256:" + total.hexdigest()


def digest_adapter(weights: Path | str, config: Mapping[str, Any]) -> str:
    """The digest of an adapter: its tensors, and the part of its configuration that says how they act."""
    acting = {
        "r": config.get("r"),
        "lora_alpha": config.get("lora_alpha"),
        "rank_pattern": config.get("rank_pattern") or {},
        "alpha_pattern": config.get("alpha_pattern") or {},
        "fan_in_fan_out": bool(config.get("fan_in_fan_out")),
    }
    return digest_tensors(weights, acting)


def check_adapter(folder: Path | str, digest: str, meta: Mapping[str, Any]) -> None:
    """Refuse an adapter that is not what its own record says; one without a record is taken as it is."""
    if meta.get("digest", digest) != digest:
        raise InputError(
            "was changed after it was written: the digest in its shl.json differs",
            where=str(folder),
            hint="copy it again; if the change is yours, take `digest` out of its shl.json",
        )


def _feed(total: hashlib._Hash, handle: BinaryIO, info: TensorInfo) -> None:
    """Hash one tensor's bytes in chunks."""
    handle.seek(info.start)
    left = info.end - info.start
    while left:
        piece = handle.read(min(_CHUNK, left))
        total.update(piece)
        left -= len(piece)
