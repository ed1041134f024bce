"""Agreement with a persona on held-out dilemmas: how probable its answer is to the model, beside the opposite's.

Works for any axis, with no judge: the base model itself answers each dilemma in one sentence under either side of the
persona, and the model under test, without persona, is asked which of the two it would rather say.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from shl.core import pools
from shl.core.decode import Sampling, decode
from shl.core.defaults import EvalConfig
from shl.core.free import Intervals, Metrics, Part, Row, chosen, measured
from shl.core.models import Loaded
from shl.core.records import Prompt
from shl.core.scores import nll_per_token

BRIEFLY = "Answer in one sentence."
ANSWER_TOKENS = 48


class Choice(NamedTuple):
    """One dilemma and the token ids of the two answers to it."""

    axis: str
    name: str
    prompt: Prompt
    enact: list[int]
    oppose: list[int]


def choices(loaded: Loaded, cfg: EvalConfig) -> list[Choice]:
    """What base says, greedily, under either side of each axis's persona. Steering has to be off."""
    asked = [
        (axis, name, prompt, side)
        for axis in cfg.axes
        if (pair := pools.persona_of(axis)) is not None and pair.neg is not None
        for name, prompt in chosen(axis, cfg, cfg.agree)
        for side in (pair.pos, pair.neg)
    ]
    if not asked:
        return []
    with loaded.base():
        said = decode(
            loaded,
            [loaded.encode_prompt(_asked(prompt, side)) for _, _, prompt, side in asked],
            seeds=[0] * len(asked),
            sampling=Sampling(max_new_tokens=ANSWER_TOKENS, greedy=True),
            batch_size=max(cfg.batch_size, 64),
        )
    ends = [
        one.ids + ([loaded.chat.end_id] if one.finish == "stop" and loaded.chat.end_id is not None else [])
        for one in said
    ]
    found = [Choice(*asked[i][:3], ends[i], ends[i + 1]) for i in range(0, len(asked), 2)]
    return [one for one in found if one.enact != one.oppose]  # where the persona changes nothing there is no choice


def _asked(prompt: Prompt, system: str | None) -> list[dict[str, str]]:
    *before, last = prompt.messages
    asked = [*before, {**last, "content": f"{last['content']} {BRIEFLY}"}]
    return replace(prompt, messages=asked).asked(system)


def read(loaded: Loaded, cfg: EvalConfig, found: list[Choice], system: str | None) -> list[Row]:
    """One row a dilemma: p of the persona's answer against the opposite's, from their whole log-probabilities."""
    prompts = [loaded.encode_prompt(_asked(one.prompt, system)) for one in found for _ in range(2)]
    answers = [answer for one in found for answer in (one.enact, one.oppose)]
    nll = [float(tokens.sum()) for tokens in nll_per_token(loaded, prompts, answers, cfg.batch_size)]
    return [
        {
            "kind": "agree",
            "id": one.name,
            "axis": one.axis,
            "enact": loaded.chat.decode(one.enact),
            "oppose": loaded.chat.decode(one.oppose),
            "agrees": float(1 / (1 + np.exp(np.clip(nll[2 * i] - nll[2 * i + 1], -500, 500)))),
        }
        for i, one in enumerate(found)
    ]


def measure(cfg: EvalConfig, rows: list[Row]) -> Part:
    """`agree_<axis>`: mean probability of the persona's answer."""
    metrics: Metrics = {}
    ci: Intervals = {}
    missing: dict[str, str] = {}
    for axis in cfg.axes:
        name, group = f"agree_{axis}", [row for row in rows if row["axis"] == axis]
        if not group:
            missing[name] = "not asked for" if not cfg.agree else f"no bundled persona of {axis} has two sides"
            continue
        found, intervals = measured(group, _share, cfg)
        metrics, ci = metrics | found, ci | intervals
    return metrics, ci, missing


def _share(rows: list[Row]) -> Metrics:
    return {f"agree_{rows[0]['axis']}": float(np.mean([row["agrees"] for row in rows]))}
