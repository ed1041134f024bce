"""The moral reading of an evaluation: vignettes in, one row an item out, and the numbers that follow from the rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from shl.core import format as fmt
from shl.core import pools, vignettes
from shl.core.chat import with_system
from shl.core.decode import Sampling, decode
from shl.core.defaults import EvalConfig
from shl.core.free import Metrics, Part, Row
from shl.core.models import Loaded
from shl.core.seeds import seed_of
from shl.core.slot import Reading, find_slot, read_slot, think_first
from shl.core.stats import Array, bootstrap, clr, cross_entropy, nats, softmax, stratified, top_answers
from shl.core.vignettes import Item


def items(cfg: EvalConfig) -> list[Item]:
    """The vignettes to read: of a file, or bundled ones of one split; a limit takes from every foundation in turn."""
    if cfg.vignettes is not None:
        found = vignettes.read(cfg.vignettes, cfg.condition)
    else:
        found = [Item(one.id, one.foundation, one.text(cfg.condition)) for one in pools.vignettes(cfg.split)]
    return choose(found, cfg.limit)


def choose(found: Sequence[Item], limit: int | None) -> list[Item]:
    """At most `limit` of the items, from every foundation in turn, in their own order."""
    return [found[i] for i in stratified([one.foundation for one in found], limit)]


def read(loaded: Loaded, cfg: EvalConfig, system: str | None, variant: str = "") -> list[Row]:
    """The suite `mfv`: both frames of every vignette at the forced slot, and one of them, in turn, answered freely."""
    found = items(cfg)
    frames = [(item, reverse) for item in found for reverse in (False, True)]
    asked = [
        with_system([{"role": "user", "content": fmt.question(item.text, reverse)}], system) for item, reverse in frames
    ]
    contexts = think_first(loaded, asked, cfg.think, cfg.batch_size)
    reading = read_slot(loaded, contexts, find_slot(loaded), cfg.batch_size)
    free = [2 * i + i % 2 for i in range(len(found))]
    replies = decode(
        loaded,
        [contexts[k] for k in free],
        seeds=[0] * len(free),
        sampling=Sampling(max_new_tokens=cfg.json_tokens, greedy=True),
        batch_size=max(cfg.batch_size, 64),
    )
    return [
        row | {"reply": reply.text, "reply_says": fmt.parse_reply(reply.text, reverse=bool(i % 2))}
        for i, (row, reply) in enumerate(zip(rows_of(found, reading), replies, strict=True))
    ]


def rows_of(found: Sequence[Item], reading: Reading) -> list[Row]:
    """A row for each item, whose two frames stand one behind the other in the reading."""
    return [
        row_of(item, reading.logp[2 * i], reading.logp[2 * i + 1][::-1], float(reading.nll[2 * i : 2 * i + 2].mean()))
        for i, item in enumerate(found)
    ]


def row_of(item: Item, forward: Array, backward: Array, nll: float) -> Row:
    """One vignette: the mean log-probability of each foundation over the two frames, and what follows from it."""
    score = (forward + backward) / 2
    p = softmax(score)
    row = {
        "kind": "vignette",
        "id": item.id,
        "foundation": item.foundation,
        "score": score.tolist(),
        "p": p.tolist(),
        "top1": fmt.FOUNDATIONS[int(p.argmax())],
        "p_ans_any": float((np.exp(forward).sum() + np.exp(backward).sum()) / 2),
        "nll_json": nll,
    }
    return row | ({"human": list(item.human)} if item.human else {})


def measure(cfg: EvalConfig, rows: list[Row]) -> Part:
    """Profile in nats and centred log-ratios, answer mass, format and what the top answers tell, with intervals."""
    p, scores = (np.array([row[name] for row in rows]) for name in ("p", "score"))
    labels = np.array([fmt.FOUNDATIONS.index(row["foundation"]) for row in rows])
    mass, nll = (np.array([row[name] for row in rows], dtype=float) for name in ("p_ans_any", "nll_json"))
    replied = all("reply" in row for row in rows)
    valid = np.array([row.get("reply_says") is not None for row in rows], dtype=float)
    judged = all("human" in row for row in rows)
    surprise = cross_entropy(np.array([row["human"] for row in rows]), p) if judged else np.zeros(len(rows))

    def drawn(index: Any) -> Metrics:
        found = {**nats(p[index].mean(axis=0)), **clr(scores[index]), "p_ans_any": float(mass[index].mean())}
        if replied:
            found["json_is_valid"] = float(valid[index].mean())
        found |= {"ppx_json": float(np.exp(nll[index].mean())), **top_answers(p[index], labels[index])}
        return found | ({"human_nll": float(surprise[index].mean())} if judged else {})

    everything = np.arange(len(rows))
    missing = {} if replied else {"json_is_valid": "the suite asks for no free reply"}
    return (
        drawn(everything),
        bootstrap(drawn, len(rows), cfg.bootstrap, seed_of(cfg.seed, "bootstrap", "vignette")),
        missing,
    )


def profile(rows: list[Row]) -> dict[str, float]:
    """Mean probability of each foundation."""
    mean: Array = np.array([row["p"] for row in rows]).mean(axis=0)
    return {name: float(value) for name, value in zip(fmt.FOUNDATIONS, mean, strict=True)}
