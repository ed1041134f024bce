"""The log of a healing: what is gathered over an epoch, and what to make of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from shl.core import console
from shl.core.defaults import TrainConfig

if TYPE_CHECKING:
    from torch import Tensor


START = 1e-3  # nats: a divergence at the start that rounding explains
STRONG, ASTRAY = 30, 3  # times the data's gradient, and times the divergence on the data, that call for a look


@dataclass
class Epoch:
    """What is gathered over an epoch."""

    nll: list[float] = field(default_factory=list)
    kl: list[Tensor] = field(default_factory=list)
    fired: int = 0
    pressure: float | None = None
    grad: list[float] = field(default_factory=list)


def mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def total_norm(norms: dict[str, float]) -> float:
    """Frobenius norm over all modules together."""
    return math.sqrt(math.fsum(norm * norm for norm in norms.values()))


QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}


def quantiles(name: str, kl: Tensor | None) -> dict[str, float | None]:
    """Mean and quantiles over positions."""
    if kl is None:
        return dict.fromkeys((f"{name}_mean", *(f"{name}_{what}" for what in QUANTILES)))
    ordered = kl.sort().values
    last = len(ordered) - 1
    found = {f"{name}_{what}": float(ordered[min(last, int(q * len(ordered)))]) for what, q in QUANTILES.items()}
    return {f"{name}_mean": float(kl.mean()), **found}


COLUMNS = ("epoch", "nll", "holdout_nll", "kl_mean", "kl_p95", "kl_max", "barrier_active", "pressure", "update_norm")
_CAPTION = (
    "nll: nats per token; kl: divergence per position; barrier active: share of sequences over tau; "
    "pressure: gradient of the barrier over that of the nll, at the epoch's first sequences"
)


def expectations(rows: list[dict[str, Any]], cfg: TrainConfig, first_round: bool) -> list[dict[str, Any]]:
    """What should be so in this log, whether it is, and what else is the case: each can say no."""
    first, last = rows[0], rows[-1]
    told: list[dict[str, Any]] = []

    def should(holds: bool, what: str, otherwise: str) -> None:
        told.append({"should": what, "else": otherwise, "holds": holds})

    if last["holdout_nll"] is not None:
        should(
            last["holdout_nll"] < first["holdout_nll"],
            f"held-out nll falls ({first['holdout_nll']:.3f} -> {last['holdout_nll']:.3f})",
            "nothing general is learnt: raise --lr or --epochs, or look at the data",
        )
        if first_round or cfg.ref == "prev":
            should(
                first["holdout_kl_max"] < START,
                f"KL starts at 0 ({first['holdout_kl_max']:.2g})",
                "the reference is not the model trained",
            )
    if cfg.reg != "nll":
        active = [row["barrier_active"] for row in rows[1:]]
        pulls = [row["pressure"] for row in rows[1:] if row["pressure"]]
        should(
            any(active),
            f"the barrier is active in part ({active[-1]:.0%})",
            f"the barrier never fired: {cfg.agg} of the divergence stayed under tau {cfg.tau:g}, so this was plain "
            f"nll; lower --tau (the largest KL of a position was {last['kl_max']:.3g})",
        )
        if pulls:
            should(
                max(pulls) < STRONG,
                f"the barrier pulls no more than {STRONG} times as hard as the data ({max(pulls):.2g} at most)",
                "single spikes rule the step, behind the clipped gradient: lower --lam or --lr",
            )
    if last.get("own_kl_mean") is not None and last["holdout_kl_mean"] is not None:
        should(
            last["own_kl_mean"] < ASTRAY * last["holdout_kl_mean"] + START,
            f"KL on the student's own text ({last['own_kl_mean']:.3g}) stays near that on held-out data "
            f"({last['holdout_kl_mean']:.3g})",
            "where it leads itself it strays further than the barrier can see: lower --tau, or fewer --epochs",
        )
    return told


def report(rows: list[dict[str, Any]]) -> None:
    """The table, and what to make of it."""
    console.table("healing", COLUMNS, [[row[name] for name in COLUMNS] for row in rows], _CAPTION)
    for one in rows[-1]["should"]:
        if one["holds"]:
            console.note(f"SHOULD: {one['should']} ELSE {one['else']}")
        else:
            console.warn(f"SHOULD: {one['should']}. It is not so: {one['else']}")
