"""What an evaluation hears when the model speaks freely: answers to held-out prompts, and to competence questions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from shl.core import pools
from shl.core.chat import under, with_system
from shl.core.console import Rate, progress
from shl.core.decode import Completion, Sampling, decode
from shl.core.defaults import EvalConfig
from shl.core.models import Loaded
from shl.core.records import Prompt
from shl.core.scores import nll_per_token, perplexity, score
from shl.core.seeds import seed_of
from shl.core.stats import bootstrap, quantile
from shl.core.text import refusal

Row = dict[str, Any]
Metrics = dict[str, float]
Intervals = dict[str, list[float]]
Part = tuple[Metrics, Intervals, dict[str, str]]  # the last: why a metric is missing
Judge = Callable[[Row], dict[str, Any]]  # broken, stance and narrates of one free answer

EMISSION = ("free_ppl_p50", "free_ppl_p90", "free_tail_p90", "free_rep", "free_tokens", "free_refused")
PERSONA = ("free_persona_p50", "free_persona_p90")
JUDGE = ("judge_ppl_p50", "judge_ppl_p90")
REPLY_TOKENS = 32  # a competence answer is one short sentence
_NUMBER = re.compile(r"-?\d+")


def speak(loaded: Loaded, cfg: EvalConfig, system: str | None, before: Sequence[dict[str, str]] = ()) -> list[Row]:
    """Sampled answers to held-out prompts, one row each. Their noise is shared by every model and coefficient.

    `before` are turns of a conversation that every prompt comes at the end of.
    """
    asked = [
        (axis, name, replace(prompt, messages=[*before, *prompt.messages]))
        for axis in cfg.axes
        for name, prompt in chosen(axis, cfg, cfg.free)
    ]
    rate = Rate()
    with progress("free answers", len(asked)) as bar:
        completions = decode(
            loaded,
            [loaded.encode_prompt(prompt.asked(system)) for _, _, prompt in asked],
            seeds=[seed_of(cfg.seed, "eval", axis, name) for axis, name, _ in asked],
            sampling=Sampling(max_new_tokens=cfg.max_new_tokens),
            batch_size=max(cfg.batch_size, 64),
            on_finish=lambda _, completion: bar.advance(**rate.count(completion.n_tokens)),
        )
    return [_free_row(*where, completion) for where, completion in zip(asked, completions, strict=True)]


def chosen(axis: str, cfg: EvalConfig, count: int) -> Iterator[tuple[str, Prompt]]:
    """`count` prompts of the axis, in an order that owes nothing to the file's; a small pool goes round again."""
    pool = sorted(pools.eval_pool(axis, cfg.split), key=lambda prompt: seed_of(0, "eval", axis, prompt.id))
    for turn in range(count):
        prompt = pool[turn % len(pool)]
        yield f"{prompt.id}/{turn // len(pool)}", prompt


def _free_row(axis: str, name: str, prompt: Prompt, completion: Completion) -> Row:
    return {
        "kind": "free",
        "id": name,
        "axis": axis,
        "prompt": prompt.asked(),  # without the system text under test: the persona is never in a record
        "completion": [{"role": "assistant", "content": completion.text}],
        "finish": completion.finish,
        "n_tokens": completion.n_tokens,
    }


def measure_free(
    loaded: Loaded, cfg: EvalConfig, rows: list[Row], judge: Judge | None, other: Loaded | None = None
) -> Part:
    """Score free answers under the base model, also with the persona in its prompt, and by the independent judges.

    `other` is a second model that judges by its own perplexity. Adds what it finds to the rows.
    """
    judged = ("broken", "narrate", *(f"enact_{axis}" for axis in cfg.axes))
    if not rows:
        return {}, {}, dict.fromkeys((*EMISSION, *PERSONA, *judged), "no free answers were asked for")
    texts = [row["completion"][0]["content"] for row in rows]
    for row, scores in zip(rows, score(loaded, [row["prompt"] for row in rows], texts, cfg.batch_size), strict=True):
        row["scores"] = scores
    _score_once_more(loaded, cfg, rows, texts, other)
    metrics, ci = measured(rows, _emission, cfg)
    missing = {name: "no free answer has any text" for name in EMISSION if name not in metrics}
    if not any("ppl_persona" in row for row in rows):
        missing |= dict.fromkeys(PERSONA, "no persona is known for these axes: name one with --under")
    if judge is None:
        return metrics, ci, missing | dict.fromkeys(judged, f"{loaded.ref.id} has no independent judge of its answers")
    for row in rows:
        row["judge"] = judge(row)
    for measure, group in [(_soundness, rows), *((_stance, [r for r in rows if r["axis"] == a]) for a in cfg.axes)]:
        more, intervals = measured(group, measure, cfg)
        metrics, ci = metrics | more, ci | intervals
    return metrics, ci, missing


def _score_once_more(loaded: Loaded, cfg: EvalConfig, rows: list[Row], texts: list[str], other: Loaded | None) -> None:
    """Perplexity under base with the persona in the prompt, to tell novelty from damage, and under another model."""
    told = [cfg.persona or (pair.pos if (pair := pools.persona_of(row["axis"])) else None) for row in rows]
    if all(told):
        with loaded.base():
            _add_ppl(loaded, cfg, rows, texts, told, "ppl_persona")
    if other is not None:
        _add_ppl(other, cfg, rows, texts, [None] * len(rows), "ppl_judge")


def _add_ppl(
    model: Loaded, cfg: EvalConfig, rows: list[Row], texts: list[str], systems: Sequence[str | None], name: str
) -> None:
    asked = [model.encode_prompt(under(row["prompt"], system)) for row, system in zip(rows, systems, strict=True)]
    answered = [model.encode_completion(text, end=False) for text in texts]
    for row, nll in zip(rows, nll_per_token(model, asked, answered, cfg.batch_size), strict=True):
        row[name] = perplexity(nll)


def measured(rows: list[Row], measure: Callable[[list[Row]], Metrics], cfg: EvalConfig) -> tuple[Metrics, Intervals]:
    """A measure over rows, and its bootstrap intervals."""

    def drawn(index: np.ndarray) -> Metrics:
        return measure([rows[i] for i in index])

    seed = seed_of(cfg.seed, "bootstrap", rows[0]["kind"])
    return measure(rows), bootstrap(drawn, len(rows), cfg.bootstrap, seed)


def _emission(rows: list[Row]) -> Metrics:
    scores = [row["scores"] for row in rows]
    found = {
        "free_rep": float(np.mean([one["rep"] for one in scores])),
        "free_tokens": float(np.mean([row["n_tokens"] for row in rows])),
        "free_refused": float(np.mean([refusal(row["completion"][0]["content"]) for row in rows])),
    }
    said = [one for one in scores if one["ppl"] is not None]
    if said:
        ppl = np.array([one["ppl"] for one in said])
        tail = np.array([one["ppl_tail"] for one in said])
        found |= {"free_ppl_p50": quantile(ppl, 0.5), "free_ppl_p90": quantile(ppl, 0.9)}
        found["free_tail_p90"] = quantile(tail, 0.9)
    for key, names in (("ppl_persona", PERSONA), ("ppl_judge", JUDGE)):
        if values := [row[key] for row in rows if row.get(key) is not None]:
            found |= {name: quantile(np.array(values), share) for name, share in zip(names, (0.5, 0.9), strict=True)}
    return found


def _soundness(rows: list[Row]) -> Metrics:
    return {
        "broken": float(np.mean([row["judge"]["broken"] for row in rows])),
        "narrate": float(np.mean([row["judge"]["narrates"] for row in rows])),
    }


def _stance(rows: list[Row]) -> Metrics:
    """Share of all answers that enact the trait in sound language: it cannot be read from soup."""
    enacted = [row["judge"]["stance"] == "enact" and not row["judge"]["broken"] for row in rows]
    return {f"enact_{rows[0]['axis']}": float(np.mean(enacted))}


class Question(Protocol):
    """One competence item; `kind` is facts or sums."""

    @property
    def id(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def user(self) -> str: ...
    @property
    def answer(self) -> str: ...


def quiz(loaded: Loaded, cfg: EvalConfig, system: str | None, items: Sequence[Question]) -> list[Row]:
    """Greedy answers to competence questions, one row each."""
    if not items:
        return []
    prompts = [with_system([{"role": "user", "content": item.user}], system) for item in items]
    completions = decode(
        loaded,
        [loaded.encode_prompt(messages) for messages in prompts],
        seeds=[0] * len(items),
        sampling=Sampling(max_new_tokens=REPLY_TOKENS, greedy=True),
        batch_size=max(cfg.batch_size, 64),
    )
    return [
        {
            "kind": item.kind,
            "id": item.id,
            "user": item.user,
            "answer": item.answer,
            "reply": completion.text,
            "right": right(item.kind, item.answer, completion.text),
        }
        for item, completion in zip(items, completions, strict=True)
    ]


def right(kind: str, answer: str, reply: str) -> bool:
    """Does the first sentence hold the answer as whole words? In a sum the last number has to be it."""
    first = re.split(r"(?<=[.!?])\s|\n", reply.strip(), maxsplit=1)[0]
    if kind == "sums":
        return _NUMBER.findall(first)[-1:] == [answer]
    return re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", first, re.IGNORECASE) is not None


def measure_quiz(loaded: Loaded, cfg: EvalConfig, rows: list[Row]) -> Part:
    """The share of right answers by kind."""
    metrics: Metrics = {}
    ci: Intervals = {}
    for kind in ("facts", "sums"):
        if group := [row for row in rows if row["kind"] == kind]:
            share, interval = measured(group, lambda drawn: {drawn[0]["kind"]: _share_right(drawn)}, cfg)
            metrics, ci = metrics | share, ci | interval
    reason = f"{loaded.ref.id} brings no questions of its own" if cfg.competence else "not asked for"
    return metrics, ci, {kind: reason for kind in ("facts", "sums") if kind not in metrics}


def _share_right(rows: list[Row]) -> float:
    return float(np.mean([row["right"] for row in rows]))
