"""The conditions of `shl filter --where`: a dotted field, an operator and a JSON literal, over any record."""

import json
import operator
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from shl.core.errors import ShlError

COMPARE = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}

_SHAPE = re.compile(r"\s*([\w.-]+)\s*(>=|<=|==|!=|>|<)\s*(.+?)\s*", re.DOTALL)


@dataclass(frozen=True)
class Where:
    """One `--where` condition: a dotted field, an operator, a JSON literal."""

    path: str
    symbol: str
    value: Any

    def holds(self, record: dict[str, Any]) -> bool:
        """Does the record meet the condition? Null meets no ordering."""
        found: Any = record
        for key in self.path.split("."):
            if isinstance(found, list) and key.isdigit() and int(key) < len(found):
                found = found[int(key)]
            elif isinstance(found, dict) and key in found:
                found = found[key]
            else:
                raise ShlError(f"--where: record {record['id']!r} has no field {self.path!r}", hint=_fields(record))
        if self.symbol not in ("==", "!=") and (found is None or self.value is None):
            return False
        try:
            return bool(COMPARE[self.symbol](found, self.value))
        except TypeError:
            raise ShlError(
                f"--where: {self.path} of record {record['id']!r} is {json.dumps(found)}, "
                f"which does not compare with {json.dumps(self.value)}"
            ) from None


@cache
def parse(condition: str) -> Where:
    """Read a condition such as `scores.judge>=50` or `finish=="stop"`."""
    match = _SHAPE.fullmatch(condition)
    if not match:
        raise ShlError(f"--where {condition!r} is not FIELD OPERATOR VALUE", hint="like: --where 'scores.judge>=50'")
    path, symbol, literal = match.groups()
    try:
        return Where(path, symbol, json.loads(literal, parse_constant=_refuse))
    except ValueError:
        raise ShlError(
            f"--where {condition!r}: {literal} is not a JSON value",
            hint=f"a string needs double quotes: --where '{path}{symbol}{json.dumps(literal)}'",
        ) from None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _fields(record: dict[str, Any]) -> str:
    names = [name for name in record if name not in ("prompt", "completion")]
    names += [f"scores.{name}" for name in record.get("scores", {})]
    return f"it has: {', '.join(names)}"
