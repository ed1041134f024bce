"""The ledger, `results.tsv`: one line a finished run, safe under concurrent writers, and tables grouped by arm."""

from __future__ import annotations

import datetime
import math
import os
import re
import shlex
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shl import __version__
from shl.core.best import BOLD, NO_BOLD, arms, best
from shl.core.console import plain, warn
from shl.core.errors import InputError
from shl.core.files import atomic_file, default_mode
from shl.core.metrics import finite
from shl.core.provenance import argv, canonical, commit

Row = dict[str, str]

METRICS = ("auth_nats", "care_nats", "p_ans_any", "json_is_valid", "ppx_json", "free_ppl_p90", "top1")
SECTION = ("model", "model_digest", "suite", "settings", "n")  # rows that differ here are never averaged or compared
_WHEN = ("time", "version", "commit")
_ESCAPES = {"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r", "\0": "\\0"}
_UNESCAPES = {"\\": "\\", "t": "\t", "n": "\n", "r": "\r", "0": "\0"}
# a spreadsheet runs a cell that begins like a formula, some of them in wide letters or behind spaces too
_RISKY = ("=", "+", "-", "@", "'", "\uff1d", "\uff0b", "\uff0d", "\uff20")
_OWN = "mend or take out that line; an editor may have cut tabs at its end"
_SURROGATES = re.compile("[\ud800-\udfff]")  # what an argument that is no UTF-8 leaves behind


def cell(value: Any) -> str:
    """A value as a cell: one line, no tabs, nothing a spreadsheet would run. None is the empty cell."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value) if math.isfinite(value) else ""
    text = value if isinstance(value, str) else canonical(value)
    text = "".join(_ESCAPES.get(letter, letter) for letter in _SURROGATES.sub("\ufffd", text))
    return "'" + text if text.lstrip().startswith(_RISKY) else text


def uncell(text: str) -> str:
    """The text of a cell, as it was before `cell`."""
    if text.startswith("'"):
        text = text[1:]
    parts, letters = [], iter(text)
    for letter in letters:
        parts.append(_UNESCAPES.get(follow := next(letters, ""), "\\" + follow) if letter == "\\" else letter)
    return "".join(parts)


def append_row(path: Path | str, row: Mapping[str, Any]) -> None:
    """Add one row. A new column widens the file: it is rewritten aside and renamed, under the same lock."""
    from filelock import FileLock

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(path.name + ".lock"), mode=default_mode()):
        columns, lines = _load(path)
        grown = columns + [name for name in row if name not in columns]
        fresh = [cell(row.get(name)) for name in grown]
        if grown == columns:
            _add_line(path, "\t".join(fresh) + "\n")
            return
        with atomic_file(path, force=True) as handle:
            handle.write("\t".join(cell(name) for name in grown) + "\n")
            for line in [*lines, fresh]:
                handle.write("\t".join(line + [""] * (len(grown) - len(line))) + "\n")


def _add_line(path: Path, line: str) -> None:
    """Append one line; when the disk cannot take all of it, it takes none."""
    with open(path, "ab", buffering=0) as handle:
        before = handle.seek(0, os.SEEK_END)
        data = line.encode()
        try:
            while data:
                data = data[handle.write(data) :]
            os.fsync(handle.fileno())
        except BaseException:
            handle.truncate(before)
            raise


def _load(path: Path) -> tuple[list[str], list[list[str]]]:
    """Columns and raw cells of a ledger, once a line that a kill left torn is mended."""
    if not path.exists() or not path.stat().st_size:
        return [], []
    _mend(path)
    return _split(path)


def _split(path: Path, torn: bool = False) -> tuple[list[str], list[list[str]]]:
    """Columns, and the raw cells of each line; every line has a cell for every column, as it was written.

    With `torn` a last line without its end is left out, since appending mends it.
    """
    parts = []
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if torn and b"\n" in data:
        data = data[: data.rindex(b"\n") + 1]
    for number, line in enumerate(data.removesuffix(b"\n").split(b"\n"), 1):
        if b"\0" in line:
            raise InputError("holds NUL, so it is damaged", where=f"{path}:{number}", hint=_OWN)
        try:
            parts.append(line.removesuffix(b"\r").decode().split("\t"))
        except UnicodeDecodeError as error:
            raise InputError(f"is not UTF-8: {error}", where=f"{path}:{number}", hint=_OWN) from None
    header, *lines = parts
    columns = [uncell(name) for name in header]
    if twice := [name for name in columns if columns.count(name) > 1]:
        raise InputError(f"names the column {twice[0]!r} twice", where=f"{path}:1", hint=_OWN)
    for number, cells in enumerate(lines, 2):
        if len(cells) != len(columns):
            raise InputError(f"has {len(cells)} cells for {len(columns)} columns", where=f"{path}:{number}", hint=_OWN)
    return columns, lines


def _mend(path: Path) -> None:
    """Finish a last line that lacks only its newline, and cut one that is torn, so that no two rows are glued."""
    data = path.read_bytes()
    if not data or data.endswith(b"\n"):
        return
    body, _, last = data.rpartition(b"\n")
    whole = last.count(b"\t") == data.partition(b"\n")[0].count(b"\t")
    warn(f"{path}: " + ("its last line had no end; look at its last cell" if whole else "dropped a torn last line"))
    with open(path, "r+b") as handle:
        handle.truncate(len(data) if whole else len(body) + 1)
        if whole:
            handle.seek(0, os.SEEK_END)
            handle.write(b"\n")


def refuse_unfit(path: Path | str) -> None:
    """Fail early where a row could not be added: before an evaluation, not after it."""
    path = Path(path)
    if path.is_dir():
        raise InputError("is a folder, not a ledger", where=str(path), hint="name a file: --append results.tsv")
    if path.is_file() and path.stat().st_size and "arm" not in _split(path, torn=True)[0]:
        raise InputError(
            "is not a ledger: it has no column arm", where=str(path), hint="name another file: --append results.tsv"
        )


def read_rows(path: Path | str) -> list[Row]:
    """Every row of a ledger as text."""
    path = Path(path)
    if not path.is_file():
        raise InputError("no such ledger", where=str(path), hint=f"add rows with: shl eval --append {path}")
    if not path.stat().st_size:
        raise InputError("is empty", where=str(path), hint=f"add rows with: shl eval --append {path}")
    columns, lines = _split(path)
    return [dict(zip(columns, map(uncell, line), strict=True)) for line in lines]


def row_of(
    result: Mapping[str, Any], trained: Mapping[str, Any] | None = None, labels: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The ledger row of one evaluation: what was measured, how, by what line and which code.

    `trained` is the training configuration of the newest adapter; labels come last, so they may rename anything.
    """
    adapters = result.get("adapters") or []
    arm = _arm(result)
    row: dict[str, Any] = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "arm": arm,
        "reg": regulariser(trained) if trained else None,
        "round": len(adapters) - (arm == "healed") if arm in ("healed", "steered") else None,  # counted from 0
        **{name: result.get(name) for name in ("model", "model_digest", "suite", "settings", "n", "seed")},
        "adapters": " ".join(adapters),
        **{name: result.get(name) for name in ("vector", "coeff", "system")},
        **result["metrics"],
        **{f"retain.{name}": value for name, value in (result.get("retain") or {}).items()},
        "verdict": result.get("verdict"),
        "train": trained,
        "argv": shlex.join(argv()),
        "version": __version__,
        "commit": commit(),
    }
    return row | dict(labels or {})


def regulariser(config: Mapping[str, Any]) -> str:
    """The short name of what held a training back: nll, wd, kl_rev, kl_rev+wd, …"""
    knobs = [name for name, key in (("wd", "weight_decay"), ("spectral", "spectral")) if config.get(key)]
    loss = str(config.get("reg", "?"))
    return "+".join(knobs if loss == "nll" and knobs else [loss, *knobs])


def _arm(result: Mapping[str, Any]) -> str:
    """What kind of run this is when no label says so."""
    if result.get("system"):
        return "prompted"
    if result.get("vector") and result.get("coeff"):
        return "steered"
    return "healed" if result.get("adapters") else "base"


def group(rows: Iterable[Row], by: Sequence[str]) -> dict[tuple[str, ...], dict[tuple[str, ...], list[Row]]]:
    """Rows by section (one model digest, suite, settings and n each), and within it by the named columns."""
    sections: dict[tuple[str, ...], dict[tuple[str, ...], list[Row]]] = {}
    for row in rows:
        section = sections.setdefault(tuple(row.get(name, "") for name in SECTION), {})
        section.setdefault(tuple(row.get(name, "") or "-" for name in by), []).append(row)
    return sections


def markdown(rows: Sequence[Row], by: Sequence[str] = ("arm",), metrics: Sequence[str] = METRICS) -> str:
    """Tables in markdown, one a section: mean ± standard deviation over rows, n, seeds and the command lines."""
    known = {name for row in rows for name in row}
    for name in (*by, *(metrics if metrics is not METRICS else ())):
        if name not in known:
            raise InputError(f"no column {name!r}", where="results", hint=f"columns: {_listed(known)}")
    rows = distinct(rows)
    shown = [name for name in metrics if any(row.get(name) for row in rows)]
    parts = [_section(key, groups, by, shown) for key, groups in group(rows, by).items()]
    return "\n".join(parts)


def _listed(names: Iterable[str], most: int = 600) -> str:
    """Names for a hint; what is no ledger has names of any length."""
    text = ", ".join(sorted(names))
    return text if len(text) <= most else text[:most] + " …"


def distinct(rows: Iterable[Row]) -> list[Row]:
    """Rows that say the same but for when and by which code, once: a line run again is no second sample.

    An evaluation that is killed between its row and its file leaves such rows.
    """
    found: dict[tuple[tuple[str, str], ...], Row] = {}
    for row in rows:
        found.setdefault(tuple(sorted((k, v) for k, v in row.items() if k not in _WHEN)), row)
    return list(found.values())


def _section(
    key: tuple[str, ...], groups: dict[tuple[str, ...], list[Row]], by: Sequence[str], metrics: Sequence[str]
) -> str:
    """One table with its heading and, below it, the lines that made its rows."""
    model, digest, suite, settings, n = key
    columns = [*by, *metrics, "n", "seeds"]
    title = ", ".join((f"{_text(model or '?')} ({_text(_short(digest))})", _text(suite or "?"), _text(n or "?")))
    lines = [f"### {title} items", ""]
    if settings:
        lines += [f"Settings: {_code(settings)}", ""]
    lines += ["| " + " | ".join(map(_text, columns)) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    leaders = {metric: best(groups, metric) for metric in metrics}
    for name, rows in groups.items():
        seeds = sorted({row.get("seed", "") for row in rows} - {""}, key=lambda seed: (len(seed), seed))
        told = [_text(spread([row.get(m, "") for row in rows])) for m in metrics]
        told = [f"**{cell}**" if leaders[m] == name else cell for m, cell in zip(metrics, told, strict=True)]
        lines.append("| " + " | ".join([*map(_text, name), *told, str(len(rows)), _text(",".join(seeds))]) + " |")
    if len(arms(groups)) > 1:
        lines += ["", BOLD if any(leaders.values()) else NO_BOLD]
    lines += ["", *(f"- {_text(', '.join(name))}: {_code(line)}" for name, line in _lines(groups)), ""]
    return "\n".join(lines)


def _text(text: str) -> str:
    """Anybody's text in a markdown table: no HTML, no link, no code, no end of the cell."""
    return re.sub(r"([|`[])", r"\\\1", plain(text)).replace("<", "&lt;")


def _code(text: str) -> str:
    """Anybody's text as code, in a fence longer than any that it holds."""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    gap = " " if len(fence) > 1 else ""
    return f"{fence}{gap}{plain(text)}{gap}{fence}"


def _lines(groups: dict[tuple[str, ...], list[Row]]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Each command line of each group once."""
    for name, rows in groups.items():
        for line in dict.fromkeys(row["argv"] for row in rows if row.get("argv")):
            yield name, line


def spread(cells: Sequence[str]) -> str:
    """Mean ± standard deviation of the numbers among some cells, and how many are missing."""
    numbers = [value for value in map(finite, cells) if value is not None]
    if not numbers:
        return "-"
    mean = f"{statistics.fmean(numbers):.3f}"
    deviation = f" ± {statistics.stdev(numbers):.3f}" if len(numbers) > 1 else ""
    missing = f" ({len(cells) - len(numbers)} missing)" if len(numbers) < len(cells) else ""
    return mean + deviation + missing


def _short(digest: str) -> str:
    return digest.removeprefix("sha256:")[:12] or "no digest"
