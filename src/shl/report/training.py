"""Training diagnostics of a run: what log.jsonl and the adapter's header say, and the lines a person was told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shl.core.runs import Round
from shl.core.strict import read_object
from shl.report.notes import Notes
from shl.report.words import number, text

TOLD = ("SHOULD:", "shl: warning:")  # what is worth repeating from a log of what the commands said
_LONGEST, _MOST = 400, 200  # characters of a line, lines of a log
CURVES = ("epoch", "step", "nll", "holdout_nll", "kl_p95", "holdout_kl_p95", "holdout_kl_max", "barrier_active",
          "pressure", "grad_norm", "update_norm", "holdout_kl_mean", "own_kl_mean")  # fmt: skip
OPTIONS = ("lam", "tau", "rank", "lr")


def read_training(one: Round, notes: Notes) -> dict[str, Any] | None:
    """One round's training: options, counts and the log; None without an adapter."""
    adapter = one.folder / "adapter"
    if not adapter.is_dir():
        return None
    header = (notes.attempt(adapter / "shl.json", read_object) if (adapter / "shl.json").exists() else None) or {}
    config = header["config"] if isinstance(header.get("config"), dict) else {}
    log = notes.lines(adapter / "log.jsonl") or []
    return {
        "arm": one.arm,
        "round": one.number,
        "reg": text(config.get("reg")),
        "options": {name: number(config.get(name)) for name in OPTIONS},
        "n_train": number(header.get("n_train")),
        "n_holdout": number(header.get("n_holdout")),
        "should": _should(log),
        "log": [{name: number(row.get(name)) for name in CURVES} for row in log],
    }


def _should(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What should be so after this training, whether it is, and what else is the case: told in the log's last row."""
    told = log[-1].get("should") if log else None
    return [
        {"should": one["should"], "else": text(one.get("else")) or "", "holds": one["holds"]}
        for one in (told if isinstance(told, list) else ())
        if isinstance(one, dict) and isinstance(one.get("should"), str) and isinstance(one.get("holds"), bool)
    ]


def read_told(root: Path, rounds: list[Round], notes: Notes) -> list[dict[str, Any]]:
    """SHOULD lines and warnings from any *.log beside the run's files, where somebody kept what the commands said."""
    folders = [root, *dict.fromkeys(one.folder.parent for one in rounds), *(one.folder for one in rounds)]
    found = []
    for file in (file for folder in folders for file in sorted(folder.glob("*.log"))):
        if lines := notes.attempt(file, _told):
            found.append({"file": notes.name(file), "lines": lines})
    return found


def _told(file: Path) -> list[str]:
    lines: list[str] = []
    with open(file, encoding="utf-8", errors="replace") as handle:
        while len(lines) < _MOST and (line := handle.readline(1 << 16)):
            if any(word in line for word in TOLD):
                lines.append(line.strip()[:_LONGEST])
    return lines
