"""What a report could not find or read: told on the page, never a crash."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from shl.core.errors import ShlError
from shl.core.records import Record, read_lines

Found = TypeVar("Found")


class Notes:
    """Problems by file, in the order in which they were met, each told once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.rows: list[dict[str, str]] = []

    def name(self, path: Path) -> str:
        """A path as the page writes it: from the run folder on."""
        return path.relative_to(self.root).as_posix()

    def add(self, path: Path, what: str, hint: str = "") -> None:
        """Tell a problem of one file."""
        row = {"file": self.name(path), "what": what, "hint": hint}
        if row not in self.rows:
            self.rows.append(row)

    def attempt(self, path: Path, read: Callable[[Path], Found]) -> Found | None:
        """What reading a file gives; None, and a note, when it cannot be read."""
        try:
            return read(path)
        except ShlError as error:
            self.add(path, str(error).replace(str(path), self.name(path)), error.hint)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            self.add(path, f"cannot be read: {type(error).__name__}: {error}")
        return None

    def lines(self, path: Path, check: Callable[[Record], None] | None = None) -> list[Record] | None:
        """The objects of a JSON Lines file up to the first that is wrong; None when there is no such file."""
        if not path.is_file():
            return None
        rows: list[Record] = []

        def read(source: Path) -> None:
            for _, row in read_lines(source):
                if check is not None:
                    check(row)
                rows.append(row)

        self.attempt(path, read)
        return rows
