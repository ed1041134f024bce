"""JSON from outside, read strictly: no NaN, no infinity, no key twice, no bottomless nesting, no endless file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from shl.core.errors import InputError

DEEPEST = 100  # lists and objects within each other
LARGEST = 64 << 20  # bytes of a JSON file that is read whole
AGAIN = "the file is damaged, or is something else: copy it or make it again"
_DIGITS = 308  # an integer with more has no float


def loads(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError with a reason that can be shown."""
    if isinstance(text, bytes):
        text = text.decode("utf-8-sig")
    try:
        value = json.loads(
            text, parse_constant=_constant, parse_float=_float, parse_int=_integer, object_pairs_hook=_unique
        )
    except RecursionError:
        raise ValueError(f"it is nested more than {DEEPEST} deep") from None
    # brackets bound the depth, so that nearly every text is settled by counting them
    if text.count("[") + text.count("{") > DEEPEST and _deep(value):
        raise ValueError(f"it is nested more than {DEEPEST} deep")
    return value


def read_object(path: Path | str, hint: str = "") -> dict[str, Any]:
    """The JSON object in a file; anything else is refused with what is wrong with it."""
    path = Path(path)
    if not path.is_file():
        what = "is a directory, not a file" if path.is_dir() else "no such file"
        raise InputError(what, where=str(path), hint=hint)
    again = hint or AGAIN
    if path.stat().st_size > LARGEST:
        raise InputError(f"is larger than {LARGEST >> 20} MiB, so it is none of ours", where=str(path), hint=again)
    try:
        value = loads(path.read_bytes())
    except UnicodeDecodeError as error:
        raise InputError(f"is not UTF-8 at byte {error.start}", where=str(path), hint=again) from None
    except ValueError as error:
        raise InputError(f"is not JSON: {error}", where=str(path), hint=again) from None
    if not isinstance(value, dict):
        raise InputError("is not a JSON object", where=str(path), hint=again)
    return value


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number that arithmetic can use; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:24]} is too large for a number")
    return value


def _integer(text: str) -> int:
    if len(text) > _DIGITS:
        raise ValueError(f"{text[:24]}… is too large for a number")
    return int(text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; of a key that stands twice nobody knows which value is meant."""
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice")
    return value


def _deep(value: Any) -> bool:
    level = [value]
    for _ in range(DEEPEST):
        inner = [one for outer in level for one in (outer.values() if isinstance(outer, dict) else outer)]
        level = [one for one in inner if isinstance(one, dict | list)]
        if not level:
            return False
    return True
