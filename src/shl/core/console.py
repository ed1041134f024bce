"""Everything shl says to a person: notes, warnings, tables and progress, all of it on stderr."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rich.progress import ProgressColumn
    from rich.table import Table

# what a terminal obeys instead of showing: control characters, and marks that turn the order of letters round
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def plain(text: str, lines: bool = False) -> str:
    """Text of anybody's that a terminal shows and never obeys; on one line unless `lines`."""
    shown = _OBEYED.sub(lambda match: _escape(match.group()), text)
    return shown if lines else shown.replace("\n", "\\n").replace("\t", "\\t")


def _escape(letter: str) -> str:
    code = ord(letter)
    return "\\r" if letter == "\r" else f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


class _Level:
    """How talkative this process is; set once by the command line."""

    quiet = False
    verbose = 0


class Progress(Protocol):
    """What a step may do with a progress bar, whether or not one is shown."""

    total: int | None

    def advance(self, n: int = 1, **fields: object) -> None: ...


def set_level(quiet: bool = False, verbose: int = 0) -> None:
    """Choose what is said: `quiet` leaves warnings and errors only, `verbose` adds details."""
    _Level.quiet, _Level.verbose = quiet, verbose


def say(message: str) -> None:
    """Write one message to stderr. Looked up at call time, so that a live progress bar can step aside."""
    sys.stderr.write(plain(message, lines=True) + "\n")
    sys.stderr.flush()


def note(message: str) -> None:
    """Tell the user what happened, unless -q."""
    if not _Level.quiet:
        say(message)


def warn(message: str) -> None:
    """Tell the user what may be wrong; shown even with -q."""
    say(f"shl: warning: {message}")


def detail(message: str) -> None:
    """Tell the user more, with -v only."""
    if _Level.verbose and not _Level.quiet:
        say(message)


def live() -> bool:
    """Whether somebody watches: progress is shown on a terminal, unless -q."""
    return not _Level.quiet and sys.stderr.isatty()


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], caption: str = "") -> None:
    """Show a table on stderr; the caption explains its columns."""
    if _Level.quiet:
        return
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        console.width = 120
    console.print(_grid(title, columns, rows))
    if caption:  # not rich's own, which is as narrow as the table
        console.print(plain(caption), markup=False)


def _grid(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    # narrow gaps, and headings that break where their words do, so that nine numbers stand side by side in 80 columns
    grid = Table(title=Text(plain(title)), box=box.SIMPLE, title_justify="left", padding=(0, 1, 0, 0))
    for position, column in enumerate(columns):
        grid.add_column(Text(plain(column).replace("_", " ")), justify="left" if position == 0 else "right")
    for row in rows:
        grid.add_row(*(Text(_cell(value)) for value in row))
    return grid


_AROUND = 8  # lines of a watched table that are no rows: title, headings of two lines, rules, the bar, one spare


@contextmanager
def watch(title: str, columns: Sequence[str], total: int) -> Iterator[Watch]:
    """A table that grows row by row over a progress bar, on a terminal; nothing of it stays, so print it at the end."""
    if not live():
        yield Watch(_Silent(total))
        return
    from rich.console import Console, Group
    from rich.live import Live
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    bars = Bars(*_bar_columns(), console=console)
    bar = _Shown(bars, bars.add_task(title, total=total, shown=""), total)
    rows: list[list[object]] = []

    def shown() -> Group:
        last = rows[-max(1, console.height - _AROUND) :]  # the bar under them must not fall off the screen
        return Group(_grid(title, columns, last), bars)

    # as for progress: what a caller prints to stdout is not ours to move
    with Live(get_renderable=shown, console=console, redirect_stdout=False, transient=True, refresh_per_second=4):
        yield Watch(bar, columns, rows)


class Watch:
    """What a step tells while it is watched: how far it is, and finished rows of its table."""

    def __init__(self, bar: Progress, columns: Sequence[str] = (), rows: list[list[object]] | None = None) -> None:
        self._bar, self._columns, self._rows = bar, columns, rows
        self.advance = bar.advance

    def row(self, values: Mapping[str, object]) -> None:
        """One more row of the table, by column name."""
        if self._rows is not None:
            self._rows.append([values.get(name) for name in self._columns])


@contextmanager
def progress(description: str, total: int | None = None) -> Iterator[Progress]:
    """A progress bar on stderr while the block runs; silent with -q or when stderr is not a terminal."""
    if not live():
        yield _Silent(total)
        return
    from rich.console import Console
    from rich.progress import Progress as Bars

    # redirect_stdout would send records that a caller prints to stderr when stdout is a file
    with Bars(*_bar_columns(), console=Console(stderr=True), redirect_stdout=False, transient=True) as bars:
        yield _Shown(bars, bars.add_task(description, total=total, shown=""), total)


def _bar_columns() -> tuple[ProgressColumn, ...]:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    return (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),  # what is said behind it matters more
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[shown]}", markup=False),
    )


class Rate:
    """Tokens a second since it was made."""

    def __init__(self) -> None:
        self.begun, self.tokens = time.monotonic(), 0

    def count(self, tokens: int) -> dict[str, Any]:
        """Add some tokens; what a progress bar shows of it."""
        self.tokens += tokens
        return {"tokens/s": self.tokens / max(time.monotonic() - self.begun, 1e-9)}


def _cell(value: object) -> str:
    """A value as a table cell: missing values as a dash, floats with four significant digits."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else plain(str(value))


class _Silent:
    """The bar that is not shown."""

    def __init__(self, total: int | None) -> None:
        self.total = total

    def advance(self, n: int = 1, **fields: object) -> None:
        """Nothing to show."""


class _Shown:
    """A rich progress bar behind the small interface that steps use."""

    def __init__(self, bars, task, total: int | None) -> None:  # type: ignore[no-untyped-def]
        self._bars, self._task, self._total = bars, task, total
        self._fields: dict[str, object] = {}

    @property
    def total(self) -> int | None:
        return self._total

    @total.setter
    def total(self, value: int | None) -> None:
        self._total = value
        self._bars.update(self._task, total=value)

    def advance(self, n: int = 1, **fields: object) -> None:
        """Move on by n, and show the fields, such as a loss, behind the bar until they change."""
        self._fields |= fields
        shown = "  ".join(f"{name.replace('_', ' ')} {_cell(value)}" for name, value in self._fields.items())
        self._bars.update(self._task, advance=n, shown=shown)
