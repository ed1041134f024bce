"""Vignettes from outside: files in the format of the package tinymfv, one JSON object a line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from shl.core import strict
from shl.core.errors import InputError
from shl.core.format import FOUNDATIONS
from shl.core.records import read_lines

# How the package calls the two tellings, and the foundations' own columns there: Care … Liberty, SocialNorms.
CONDITIONS = {"third": "other_violate", "first": "self_violate"}
COLUMNS = {name: "SocialNorms" if name == "social" else name.capitalize() for name in FOUNDATIONS}
_NAMES = {column.lower(): name for name, column in COLUMNS.items()} | {"social norms": "social", "social": "social"}
_SHAPE = 'a line is {"id": "x1", "foundation_coarse": "Care", "text": "You see …"}'


class Item(NamedTuple):
    """One vignette as it is asked: `human` is how people answered, shares in the foundations' order, where known."""

    id: str
    foundation: str
    text: str
    human: tuple[float, ...] | None = None


def read(path: Path | str, condition: str) -> list[Item]:
    """The vignettes of a file; one that holds both tellings gives the one asked for."""
    found = [item_of(row, condition, where) for where, row in read_lines(path)]
    if not found:
        raise InputError("holds no vignettes", where=str(path), hint=_SHAPE)
    if len({one.id for one in found}) < len(found):
        twice = next(one.id for i, one in enumerate(found) if one.id in {other.id for other in found[:i]})
        raise InputError(f"has the id {twice!r} twice", where=str(path), hint="every vignette needs an id of its own")
    return found


def item_of(row: Mapping[str, Any], condition: str, where: str) -> Item:
    """A row of the package's format: `text`, or `other_violate` and `self_violate`; `human_*` in percent."""
    text = row.get(CONDITIONS.get(condition, "")) or row.get("text")
    named = row.get("foundation_coarse") or row.get("foundation")
    for name, value in (("text", text), ("id", row.get("id")), ("foundation_coarse", named)):
        if not isinstance(value, str) or not value.strip():
            raise InputError("is no string, or is missing", where=f"{where}: {name}", hint=_SHAPE)
    foundation = _NAMES.get(str(named).strip().lower())
    if foundation is None:
        raise InputError(
            f"{named!r} is no foundation",
            where=f"{where}: foundation_coarse",
            hint=f"use: {', '.join(COLUMNS.values())}",
        )
    return Item(str(row["id"]), foundation, str(text), _shares(row, where))


def _shares(row: Mapping[str, Any], where: str) -> tuple[float, ...] | None:
    """Percentages of raters as shares that sum to 1; None unless all seven are there."""
    values = [row.get(f"human_{column}") for column in COLUMNS.values()]
    if any(value is None for value in values):
        return None
    numbers = [float(value) for value in values if strict.is_number(value) and value >= 0]  # type: ignore[arg-type, operator]
    if len(numbers) < len(values) or not sum(numbers):
        raise InputError("are not seven percentages", where=f"{where}: human_*")
    return tuple(number / sum(numbers) for number in numbers)
