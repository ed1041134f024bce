"""An evaluation on disk: read, and checked before anybody computes with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shl.core import strict
from shl.core.errors import InputError

# what a row of --per-row may be: a vignette, a free answer, a choice of answers, or one of the competence questions
ROW_KINDS = ("vignette", "free", "agree", "facts", "sums")
_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("suite", "model", "model_digest", "verdict"), (str,)),
    **dict.fromkeys(("metrics", "settings", "profile", "ci", "missing"), (dict,)),
    **dict.fromkeys(("n", "seed"), (int,)),
    "adapters": (list,),
}


def is_per_row(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether these are the items of an evaluation. A free answer is a completion record but for its coefficient."""
    return bool(rows) and all(row.get("kind") in ROW_KINDS and "coeff" not in row for row in rows)


def read_evaluation(path: Path | str) -> dict[str, Any]:
    """The object that `shl eval` wrote; anything else is refused with the field that is wrong."""
    value = strict.read_object(path, f"make it with: shl eval -o {path}")
    if "metrics" not in value:
        raise InputError("is not an evaluation", where=str(path), hint="make one with: shl eval -o base.json")
    for name, kinds in _KINDS.items():
        if name in value and (not isinstance(value[name], kinds) or isinstance(value[name], bool)):
            raise InputError(f"is not of type {kinds[0].__name__}", where=f"{path}: {name}")
    for part in ("metrics", "delta", "retain"):
        for name, number in (value.get(part) or {}).items():
            if number is not None and not strict.is_number(number):
                raise InputError("is neither a number nor null", where=f"{path}: {part}.{name}")
    return value
