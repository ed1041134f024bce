"""Which block to steer: each candidate's effect on what the model says, at the dose that its language bears."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any

from shl.core.chat import under
from shl.core.console import note
from shl.core.defaults import DoseConfig, VectorConfig
from shl.core.errors import BelowGate, ShlError
from shl.core.models import Loaded, parse_layers
from shl.core.records import Prompt
from shl.core.scores import nll_per_token
from shl.core.vectors import Vector
from shl.dose import by_survival
from shl.vector import extract

CANDIDATES = "0.2:0.8"  # of the depth: below, the persona is not yet read; above, what is said is nearly settled
MOST = 8  # candidates


@dataclass(frozen=True)
class Reading:
    """One candidate block: its dose, the share that survived there, and the effect with its standard error.

    The effect is the mean of ln p(answer | pos) - ln p(answer | neg) over the surviving answers, under the base model
    with each persona as its system message: how much more they speak for the one persona than for the other, in nats.
    """

    layer: int
    coeff: float
    survival: float
    effect: float
    error: float


def measure_blocks(
    loaded: Loaded,
    pos: str,
    neg: str | None,
    prompts: Sequence[Prompt],
    contexts: Sequence[Prompt] | None = None,
    cfg: VectorConfig | None = None,
    probe: DoseConfig | None = None,
    survival: float = 0.8,
) -> list[Reading]:
    """Every candidate that can be steered, measured on `prompts`; the one with the largest effect comes first.

    Each is steered at the highest dose at which the share `survival` of its answers passes the filter, so that all
    are compared at equal coherence. Raises when no candidate has such a dose.
    """
    if not prompts:
        raise ShlError("there are no prompts to measure blocks on", hint="give --prompts FILE")
    cfg = cfg or VectorConfig()
    probe = probe or DoseConfig(seed=cfg.seed)
    layers = candidates(loaded.n_blocks)
    whole = extract(loaded, pos, neg, contexts, replace(cfg, layers=",".join(map(str, layers))))
    readings = []
    for layer in layers:
        vector = Vector({layer: whole.layers[layer]}, dict(whole.meta))
        try:
            dose = by_survival(loaded, vector, prompts, survival, probe, to_ceiling=True)
        except BelowGate as error:
            note(f"block {layer}: {error}")
            continue
        said = [record for record in dose.survivors if record["coeff"] == dose.coeff]
        readings.append(Reading(layer, dose.coeff, dose.value, *_effect(loaded, said, pos, neg)))
        note(f"block {layer}: effect {readings[-1].effect:.3g} nats at coefficient {dose.coeff:.3g}")
    if not readings:
        raise ShlError("no block can be steered without breaking the answers", hint="use other personas or prompts")
    return sorted(readings, key=lambda reading: -reading.effect)


def candidates(n_blocks: int) -> list[int]:
    """The blocks of the band CANDIDATES, or of many of them MOST that are evenly spread."""
    inside = parse_layers(CANDIDATES, n_blocks)
    if len(inside) <= MOST:
        return inside
    return [inside[round(k * (len(inside) - 1) / (MOST - 1))] for k in range(MOST)]


def _effect(loaded: Loaded, records: list[dict[str, Any]], pos: str, neg: str | None) -> tuple[float, float]:
    """Mean log odds of the answers, in nats, and its standard error."""
    with loaded.base():
        for_, against = (_surprise(loaded, records, persona) for persona in (pos, neg))
    odds = [b - a for a, b in zip(for_, against, strict=True)]
    return fmean(odds), stdev(odds) / math.sqrt(len(odds)) if len(odds) > 1 else math.inf


def _surprise(loaded: Loaded, records: list[dict[str, Any]], persona: str | None) -> list[float]:
    """-ln p of each whole answer under a persona."""
    asked = [loaded.encode_prompt(under(record["prompt"], persona)) for record in records]
    answered = [loaded.encode_completion(record["completion"][0]["content"], end=False) for record in records]
    return [float(nll.double().sum()) for nll in nll_per_token(loaded, asked, answered)]
