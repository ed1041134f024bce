"""Damage of every kind: to bytes, to lines, to JSON values, to safetensors headers, to folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

from fuzz.seeds import Blob

NASTY = [
    b"\0", b"\xff", b"\xed\xa0\x80", b"\xc0\xaf", b"\xef\xbb\xbf", b"\x1e", b"\xc2\x85", b"\xe2\x80\xa8",
    b"\xe2\x80\xae", b"\x1b[2J\x1b]0;x\x07", b"NaN", b"-Infinity", b"1e999", b"null", b"[" * 3000, b'{"a":' * 3000,
    b"9" * 5000, b"\r", b"\n", b"\t", b'"', b"\\ud800", b"\\u0000", b"{", b"}", b"]",
    b"=cmd|' /C calc'!A0", b"<script>alert(1)</script>",
    "\U0001f468\u200d\U0001f469 ﷺ z\u0351\u036b ".encode(), "𝕌ñî¢öδé".encode(), b"-0", b",", b"'",
]  # fmt: skip
RAW = "@raw:"  # a string that begins like this is written as what follows it, whether that is JSON or not
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 1.5, -2.5, 1e308, 5e-324, 2**63, 10**400, "", "x", "7", "\ud800", "\0", "\x1b[31m",
    "a" * 3000, "\u202e", "../../x", [], [[]], ["x"], [1], [None], {}, {"a": 1}, {"": None}, [1, 2, 3], {"path": ".."},
    f"{RAW}NaN", f"{RAW}Infinity", f"{RAW}1e999", f"{RAW}-1e999", f"{RAW}{'[' * 200}{']' * 200}", f"{RAW}01",
    f"{RAW}{'7' * 400}", f"{RAW}1.0", f"{RAW}-0.0", "(a+)+$", "[", ".*.*.*.*.*.*x", "(?P<n>x)", "é", "layer1.v",
]  # fmt: skip
SIZES = [0, 1, 7, 8, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 99_999_999, 100_000_001]


def damage(kind: str, blob: Blob, rng: Random) -> Blob:
    """A copy of an artifact with one to three kinds of damage."""
    blob = dict(blob)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        name = rng.choice(sorted(blob))
        way = rng.choice(_ways(kind, name))
        try:
            blob[name] = way(blob[name], rng)
        except (ValueError, IndexError, KeyError, TypeError, AttributeError, RecursionError):
            blob[name] = _bytes(blob[name], rng)  # too damaged already for anything finer
    return blob


def _ways(kind: str, name: str) -> list[Callable[[bytes, Random], bytes]]:
    if kind in ("vector", "training") or name.endswith(".safetensors"):
        return [_bytes, _safetensors, _safetensors, _safetensors]
    if kind in ("ledger", "plain"):
        return [_bytes, _lines, _cells, _cells]
    if kind == "gguf":
        return [_bytes]
    return [_bytes, _lines, _json, _json, _json]


def _bytes(data: bytes, rng: Random) -> bytes:
    """Flipped bits, holes, cuts, copies, and what never belongs into a text."""
    at, end = sorted((rng.randint(0, len(data)), rng.randint(0, len(data))))
    way = rng.randrange(9)
    if way == 0 and data:
        out = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
        return bytes(out)
    if way == 1:
        return data[:at]
    if way == 2:
        return data[:at] + data[min(end, at + rng.randint(1, 40)) :]
    if way == 3:
        return data[:end] + data[at:]
    if way == 4:
        return data[:at] + rng.randbytes(rng.randint(1, 16)) + data[at:]
    if way == 5:
        return rng.choice((b"", b"\n", b" ", b"\xef\xbb\xbf", b"\0" * 64, rng.randbytes(40), data * 2))
    if way == 6:
        return data[:at] + b"\0" * (end - at) + data[end:]  # what a crash leaves of blocks that were never written
    return data[:at] + rng.choice(NASTY) + data[at:]


def _lines(data: bytes, rng: Random) -> bytes:
    """Lines lost, doubled, swapped, torn, glued, or very long."""
    lines = data.split(b"\n")
    i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
    way = rng.randrange(7)
    if way == 0:
        del lines[i]
    elif way == 1:
        lines.insert(i, lines[j])
    elif way == 2:
        lines[i], lines[j] = lines[j], lines[i]
    elif way == 3:
        lines[i] = lines[i][: rng.randint(0, len(lines[i]))]
    elif way == 4 and i + 1 < len(lines):
        lines[i : i + 2] = [lines[i] + lines[i + 1]]
    elif way == 5:
        lines[i] = lines[i] * rng.choice((2, 50)) if rng.random() < 0.9 else b"x" * (17 << 20)
    else:
        lines.insert(i, rng.choice(NASTY))
    return b"\n".join(lines)


def _cells(data: bytes, rng: Random) -> bytes:
    """Cells lost, added, or filled with what does not belong there."""
    lines = [line.split(b"\t") for line in data.split(b"\n")]
    line = lines[rng.randrange(len(lines))]
    i = rng.randrange(len(line))
    way = rng.randrange(4)
    if way == 0:
        del line[i]
    elif way == 1:
        line.insert(i, rng.choice(NASTY))
    elif way == 2:
        line[i] = line[rng.randrange(len(line))]
    else:
        line[i] = rng.choice(NASTY)
    return b"\n".join(b"\t".join(cells) for cells in lines)


def _json(data: bytes, rng: Random) -> bytes:
    """One value of one line replaced, lost, renamed, doubled or wrapped."""
    if not data.strip().count(b"\n") or data.startswith(b"{\n"):
        return write(_change(json.loads(data), rng)).encode("utf-8", "surrogatepass")
    lines = data.split(b"\n")
    i = rng.choice([i for i, line in enumerate(lines) if line.strip()])
    lines[i] = write(_change(json.loads(lines[i]), rng)).encode("utf-8", "surrogatepass")
    return b"\n".join(lines)


def _change(value: Any, rng: Random) -> Any:
    """Walk down at random, and change what is found there."""
    outer: Any = [value]
    key: Any = 0
    while isinstance(outer[key], dict | list) and outer[key] and rng.random() < 0.8:
        outer = outer[key]
        key = rng.choice(list(outer)) if isinstance(outer, dict) else rng.randrange(len(outer))
    if outer[key] is value:
        return rng.choice(ODD)
    way = rng.randrange(6)
    if way == 0:
        del outer[key]
    elif way == 1 and isinstance(outer, dict):
        outer[rng.choice(("", "id", "x" * 20, "__metadata__", f"{key}x"))] = outer.pop(key)
    elif way == 2 and isinstance(outer, dict):
        return Twice(value, key)
    elif way == 3:
        outer[key] = [outer[key]] if rng.random() < 0.5 else {"x": outer[key]}
    else:
        outer[key] = rng.choice(ODD)
    return value


class Twice:
    """An object whose key stands twice, which a dict cannot hold."""

    def __init__(self, value: Any, key: Any) -> None:
        self.value, self.key = value, key


def write(value: Any) -> str:
    """JSON, or nearly: raw tokens stand as they are, keys may stand twice, surrogates are not escaped."""
    if isinstance(value, Twice):
        text = write(value.value)
        name = json.dumps(value.key) + ":"
        at = text.find(name)
        return text if at < 0 else text[:at] + name + "0," + text[at:]
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(str(k), ensure_ascii=False)}:{write(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(write, value)) + "]"
    if isinstance(value, str) and value.startswith(RAW):
        return value.removeprefix(RAW)
    return json.dumps(value, ensure_ascii=False)


def _safetensors(data: bytes, rng: Random) -> bytes:
    """A header that lies: about its length, its tensors, its metadata, or inside the JSON that we keep there."""
    length = int.from_bytes(data[:8], "little")
    body = data[8 + length :]
    way = rng.randrange(6)
    if way == 0:
        return rng.choice(SIZES).to_bytes(8, "little") + data[8:]
    if way == 1:
        return data + rng.randbytes(rng.randint(1, 64))
    if way == 2 and body:
        at = rng.randrange(len(body))
        return data[: 8 + length] + body[:at] + bytes([body[at] ^ (1 << rng.randrange(8))]) + body[at + 1 :]
    head = json.loads(data[8 : 8 + length])
    if way == 3 and head.get("__metadata__", {}).get("shl"):
        inner = _change(json.loads(head["__metadata__"]["shl"]), rng)
        head["__metadata__"]["shl"] = write(inner)
    elif way == 4:
        name = rng.choice([name for name in head if name != "__metadata__"])
        part = rng.choice(("dtype", "shape", "data_offsets"))
        head[name][part] = rng.choice([*ODD, [0, 2**62], [2**62, 0], [-8, 32], [0], "F64", "F4", "BF16", [2**40], [-8]])
    else:
        head = _change(head, rng)
    text = write(head).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + body
