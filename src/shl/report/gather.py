"""A run folder as the plain data that a page shows. Whatever is missing or damaged becomes a note."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shl import __version__
from shl.core.errors import InputError, ShlError
from shl.core.provenance import read_header
from shl.core.records import read_lines
from shl.core.runs import REFERENCES, Round, Scored, rounds
from shl.plot import FLOOR
from shl.report.artifacts import read_artifacts
from shl.report.diary import Diary, read_answers
from shl.report.drops import account, read_filtered
from shl.report.headline import headline
from shl.report.notes import Notes
from shl.report.scores import Row, columns, described, read_scores, traits
from shl.report.training import read_told, read_training
from shl.report.words import MISSING, REASONS, number, text

_EXPECTED = ("v.safetensors", "completions.jsonl", "keep.jsonl", "adapter", "eval.json", "samples.jsonl")


def gather(folder: Path | str) -> dict[str, Any]:
    """Everything that the page shows, as JSON values. Raises InputError for a folder that is no run."""
    root = Path(folder)
    found = _rounds(root)
    notes = Notes(root)
    arms = list(dict.fromkeys(one.arm for one in found))
    _missing(root, found, notes)
    rows = read_scores(root, notes)
    diary, drops = _said(root, found, rows, notes)
    persona = _persona(found, rows, notes)
    names = traits(rows, persona.get("axis"))
    says = diary.typical(arms)
    shown = columns(rows, names)
    return {
        "run": root.resolve().name,
        "version": __version__,
        "model": next((row["model"] for row in rows if row["model"]), ""),
        "persona": persona,
        "seeds": sorted({row["seed"] for row in rows if isinstance(row["seed"], int)}),
        "settings": _settings(rows),
        "arms": arms,
        "headline": headline(rows, names, says, arms),
        "typical": says,
        "traits": names,
        "floor": FLOOR,
        "columns": shown,
        "metrics": described(shown),
        "scores": [_shown(row, notes) for row in rows],
        "prompts": diary.prompts,
        "says": diary.says,
        "drops": drops,
        "reasons": REASONS,
        "training": [entry for one in found if (entry := read_training(one, notes))],
        "told": read_told(root, found, notes),
        "artifacts": read_artifacts(root, found, notes),
        "notes": notes.rows,
    }


def _rounds(root: Path) -> list[Round]:
    """The rounds; an error when the folder is no run at all."""
    hint = "a run folder is what shl new makes: shl new myrun && make -C myrun"
    if not root.is_dir():
        raise InputError("is no folder" if root.exists() else "no such folder", where=str(root), hint=hint)
    found = rounds(root)
    if not found and not any((root / f"{name}.json").is_file() for name in REFERENCES):
        raise InputError("is no run folder: it has neither base.json nor any ARM/r0/", where=str(root), hint=hint)
    return found


def _missing(root: Path, found: list[Round], notes: Notes) -> None:
    """Note each part that a run usually has and this one lacks; what comes after a gap is not listed again."""
    for name in REFERENCES:
        for part in (f"{name}.json", f"{name}.samples.jsonl"):
            if not (root / part).is_file():
                _lacks(root / part, part, notes)
                break
    for one in found:
        # a pipe leaves what its filter wrote, which is as much
        spared = {"completions.jsonl": bool(one.said), "v.safetensors": _vectorless(one)}
        gap = next((part for part in _EXPECTED if not spared.get(part) and not (one.folder / part).exists()), None)
        if gap is not None:
            _lacks(one.folder / gap, gap, notes)
        if (one.folder / "adapter").is_dir() and not (one.folder / "adapter" / "log.jsonl").is_file():
            _lacks(one.folder / "adapter" / "log.jsonl", "adapter/log.jsonl", notes)


def _vectorless(one: Round) -> bool:
    """Whether no vector speaks in a round's text, as its first completion says, if that can be read."""
    try:
        first = next((row for _, row in read_lines(str(one.said[0]))), {}) if one.said else {}
    except (ShlError, OSError):
        return False
    return first.get("vector", "") is None


def _lacks(path: Path, part: str, notes: Notes) -> None:
    what, hint = MISSING[part]
    notes.add(path, what, hint.format(file=path.name))


def _said(root: Path, found: list[Round], rows: list[Row], notes: Notes) -> tuple[Diary, list[dict[str, Any]]]:
    """The diary and the filter accounting: references first, then each arm round by round."""
    diary, drops = Diary(), []
    scored = {(row["arm"], row["round"], row["kind"]): row["file"] for row in rows}
    for name in REFERENCES:
        _answers(Scored(root / f"{name}.json", name, None, name), diary, notes)
    for one in found:
        if (filtered := read_filtered(one, notes)) is not None:
            diary.add_completions(one, filtered.records, filtered.judged)
            drops.append(account(one, filtered))
        for kind, stem in (("steered", "steered"), ("healed", "eval")):
            file = scored.get((one.arm, one.number, kind), one.folder / f"{stem}.json")
            _answers(Scored(file, one.arm, one.number, kind), diary, notes)
    return diary, drops


def _answers(scored: Scored, diary: Diary, notes: Notes) -> None:
    """Answers are shown whether or not the evaluation itself can be read."""
    if (answers := read_answers(scored, notes)) is not None:
        diary.add_answers(scored, answers)


def _settings(rows: list[Row]) -> dict[str, Any]:
    """What the head of the page says about how everything was measured."""
    first = rows[0] if rows else {"settings": {}, "n": None}
    return {"split": text(first["settings"].get("split")), "n": number(first["n"])}


def _persona(found: list[Round], rows: list[Row], notes: Notes) -> dict[str, Any]:
    """The persona as the first vector records it, else as the prompted row was given it."""
    for one in found:
        path = one.folder / "v.safetensors"
        header = notes.attempt(path, read_header) if path.is_file() else None
        if header is not None and isinstance(header.get("personas"), dict):
            return {name: text(header["personas"].get(name)) for name in ("name", "axis", "pos", "neg")}
    system = next((row["system"] for row in rows if row["kind"] == "prompted"), None)
    return {"name": None, "axis": None, "pos": system} if system else {}  # of the other side nothing is known


def _shown(row: Row, notes: Notes) -> dict[str, Any]:
    """An evaluation as the page needs it."""
    names = ("arm", "round", "kind", "metrics", "ci", "why", "retain", "delta", "verdict", "coeff", "n", "seed")
    return {"file": notes.name(row["file"])} | {name: row[name] for name in names}
