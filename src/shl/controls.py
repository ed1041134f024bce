"""Controls of an evaluation: random vectors of the same norm, one adapter at several scales, what became internal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from shl.core import pools
from shl.core.console import progress
from shl.core.defaults import VectorConfig
from shl.core.errors import ShlError
from shl.core.models import Loaded, rechain
from shl.core.states import Span, read_states
from shl.core.vectors import Vector
from shl.vector import extract

Result = dict[str, Any]


def random_controls(vector: Vector, n: int, measure: Callable[[Vector], Result]) -> list[Result]:
    """Evaluations under n random vectors with the lengths of `vector`; seeds 0 to n - 1."""
    found = []
    with progress("random vectors", n) as bar:
        for seed in range(n):
            found.append(measure(vector.random_like(seed)))
            bar.advance()
    return found


def against_random(result: Mapping[str, Any], drawn: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and spread of the random vectors' metrics, and the percentile of the result among them.

    The percentile is the share of random vectors below the result, equal ones counting half.
    """
    out: dict[str, Any] = {"n": len(drawn), "mean": {}, "sd": {}, "percentile": {}}
    for name, value in result["metrics"].items():
        others = np.array([one["metrics"][name] for one in drawn if one["metrics"].get(name) is not None], dtype=float)
        if value is None or not len(others):
            continue
        out["mean"][name] = float(others.mean())
        out["sd"][name] = float(others.std(ddof=1)) if len(others) > 1 else None
        out["percentile"][name] = float((others < value).mean() + (others == value).mean() / 2)
    return out


def frontier(loaded: Loaded, scales: Sequence[float], measure: Callable[[], Result]) -> Iterator[tuple[float, Result]]:
    """One evaluation at each scale of the newest adapter; the chain is as before afterwards."""
    if not loaded.chain:
        raise ShlError("there is no adapter to scale", hint="name one with --adapter DIR")
    before = list(loaded.chain)
    try:
        for scale in scales:
            rechain(loaded, [*before[:-1], replace(before[-1], scale=scale * before[-1].scale)])
            yield scale, measure()
    finally:
        rechain(loaded, before)


def internalisation(loaded: Loaded, teacher: Vector, cfg: VectorConfig | None = None) -> dict[str, float | None]:
    """How far the chain does by itself what the teacher vector did.

    `student_cosine`: cos between the teacher and the student vector, which is the chain's own shift of the states at
    the last token of templated prompts without persona, h(chain) - h(base). `student_share`: that shift's length
    along the teacher, in lengths of the teacher: the coefficient that it amounts to. `vector_cosine`: cos between
    the teacher and the vector of the same personas read on the chain. All are means over the teacher's blocks.
    """
    blocks = sorted(teacher.layers)
    cfg = cfg or VectorConfig()
    spans = [Span(loaded.encode_prompt(prompt.messages)) for prompt in pools.contexts()[: cfg.contexts]]
    now = read_states(loaded, spans, blocks, cfg.batch_size)
    with loaded.base():
        base = read_states(loaded, spans, blocks, cfg.batch_size)
    shifts = {block: (now[block].double() - base[block].double()).mean(0) for block in blocks}
    cosines = {block: cosine(shifts[block], teacher.layers[block]) for block in blocks}
    shares = [float(shifts[b] @ teacher.layers[b].double() / teacher.layers[b].double().norm() ** 2) for b in blocks]
    personas = teacher.meta.get("personas") or {}
    again = None
    if personas.get("pos"):
        own = replace(cfg, layers=",".join(map(str, blocks)))
        vector = extract(loaded, personas["pos"], personas.get("neg"), cfg=own)
        again = float(np.mean([cosine(vector.layers[b], teacher.layers[b]) or 0.0 for b in blocks]))
    known = [value for value in cosines.values() if value is not None]
    return {
        "student_cosine": float(np.mean(known)) if known else None,
        "student_share": float(np.mean(shares)),
        "vector_cosine": again,
    }


def cosine(a: torch.Tensor, b: torch.Tensor) -> float | None:
    """cos of the angle between two directions. None where either has no length, such as the shift of an empty chain."""
    length = float(a.double().norm() * b.double().norm())
    return None if length == 0 else float(a.double() @ b.double()) / length
