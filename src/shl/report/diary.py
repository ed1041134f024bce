"""What the model said: every completion of a run by prompt, and one prompt whose answers stand for the rest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shl.core.provenance import digest_of
from shl.core.records import Record, check_record
from shl.core.runs import REFERENCES, Round, Scored
from shl.report.notes import Notes
from shl.report.words import number

Judged = dict[str, list[str]]  # record id -> reasons; empty for a kept one


class Diary:
    """Prompts, and what was said to each: by which stage of which arm in which round."""

    def __init__(self) -> None:
        self.prompts: list[dict[str, Any]] = []
        self.says: list[dict[str, Any]] = []
        self._index: dict[str, int] = {}
        self._heard: set[str] = set()

    def add_completions(self, one: Round, records: list[Record], judged: Judged | None) -> None:
        """Completions of a round. Controls come from the chain before it: base, or the round before, healed.

        `judged` says what the filter did; None when nothing was filtered yet.
        """
        for record in records:
            coeff = number(record.get("coeff")) or 0.0
            stage, arm, turn = ("steered", one.arm, one.number) if coeff else _speaker(record, one)
            tags = [] if judged is None or record["id"] not in judged else _filtered(judged[record["id"]])
            self._add("training", record, record["id"].rsplit("/", 2)[0], stage, arm, turn, coeff, tags)

    def add_answers(self, scored: Scored, rows: list[Record]) -> None:
        """Free answers of an evaluation to held-out prompts."""
        arm = None if scored.kind in REFERENCES else scored.arm
        for row in rows:
            if row.get("kind") == "free":
                name = row["id"].rsplit("/", 1)[0]
                self._add("held out", row, name, scored.kind, arm, scored.round, None, _judged(row))

    def _add(
        self, pool: str, record: Record, name: str, stage: str, arm: str | None, turn: int | None,
        coeff: float | None, tags: list[str],
    ) -> None:  # fmt: skip
        said = record["completion"][-1]["content"]
        prompt = self._prompt(pool, name, record["prompt"])
        row = {
            "p": prompt, "id": record["id"], "stage": stage, "arm": arm, "round": turn, "coeff": coeff, "text": said,
            "tags": tags, "tokens": number(record.get("n_tokens")), "cut": record.get("finish") == "length",
            "scores": _scores(record.get("scores")),
        }  # fmt: skip
        if stage == "base":  # every arm starts from the same model, so what it said before is heard once
            if (key := digest_of([prompt, record["id"], said])) in self._heard:
                return
            self._heard.add(key)
        self.says.append(row)

    def _prompt(self, pool: str, name: str, messages: list[dict[str, str]]) -> int:
        """The number of a prompt; the same messages in the same pool are the same prompt."""
        key = digest_of([pool, messages])
        if key not in self._index:
            self._index[key] = len(self.prompts)
            lines = [("" if one["role"] == "user" else f"{one['role']}: ") + one["content"] for one in messages]
            self.prompts.append({"id": name, "pool": pool, "text": "\n\n".join(lines)})
        return self._index[key]

    def typical(self, arms: list[str]) -> dict[str, Any] | None:
        """The held-out prompt whose answers lie nearest to the median perplexity of every arm's last round.

        So it is chosen by rule, and stands for what is usual, not for what is best.
        """
        last = {arm: rows for arm in arms if (rows := self._last(arm))}
        ranks = [dict(_ranks(rows)) for rows in last.values()]
        shared = [p for p in (ranks[0] if ranks else {}) if all(p in one for one in ranks)]
        if not shared:
            return None
        chosen = min(shared, key=lambda p: sum(abs(one[p] - 0.5) for one in ranks))
        answers = [self._answer(chosen, stage) for stage in REFERENCES]
        answers += [next(row for row in rows if row["p"] == chosen) for rows in last.values()]
        return {"p": chosen, "answers": [row for row in answers if row is not None]}

    def _answer(self, prompt: int, stage: str) -> dict[str, Any] | None:
        return next((row for row in self.says if row["p"] == prompt and row["stage"] == stage), None)

    def _last(self, arm: str) -> list[dict[str, Any]]:
        """An arm's answers to held-out prompts in its last round."""
        rows = [
            row
            for row in self.says
            if row["arm"] == arm and row["stage"] == "healed" and self.prompts[row["p"]]["pool"] == "held out"
        ]
        turn = max((row["round"] for row in rows), default=None)
        return [row for row in rows if row["round"] == turn]


def read_answers(scored: Scored, notes: Notes) -> list[Record] | None:
    """The free answers behind an evaluation, checked; None when they were not written down."""
    return notes.lines(scored.samples, lambda row: _check(row, scored.samples))


def _check(row: Record, path: Path) -> None:
    """Refuse a free answer without prompt or completion; other kinds are not shown, so may be anything."""
    if row.get("kind") == "free":
        check_record(row, str(path))


def _speaker(record: Record, one: Round) -> tuple[str, str | None, int | None]:
    """Who says a control row: the chain that the round starts from."""
    chain = record.get("adapters")
    if one.number == 0 or (chain is not None and not chain):
        return "base", None, None
    return "healed", one.arm, one.number - 1


def _filtered(reasons: list[str]) -> list[str]:
    """What the filter did, as tags. A control is neither kept nor dropped."""
    if not reasons:
        return ["kept"]
    return ["control"] if reasons == ["control"] else ["dropped", *(one for one in reasons if one != "control")]


def _judged(row: Record) -> list[str]:
    """What an independent judge found, as tags."""
    judge = row.get("judge")
    if not isinstance(judge, dict):
        return []
    stance = judge.get("stance")
    tags = ["broken" if judge.get("broken") else "sound"]
    tags += [stance] if stance in ("enact", "oppose", "mixed") else ["no stance"]
    return tags + (["narrates"] if judge.get("narrates") else [])


def _scores(scores: Any) -> dict[str, float]:
    """Scores that are numbers, whoever gave them."""
    return {name: value for name, raw in dict(scores or {}).items() if (value := number(raw)) is not None}


def _ranks(rows: list[dict[str, Any]]) -> Iterator[tuple[int, float]]:
    """Prompts with the rank of their first answer by perplexity, from 0 to 1; no perplexity counts as the worst."""
    ordered = sorted(rows, key=lambda row: row["scores"].get("ppl", float("inf")))
    for rank, row in reversed(list(enumerate(ordered))):
        yield row["p"], (rank + 0.5) / len(ordered)
