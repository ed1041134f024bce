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


def quantiles(name: str, kl: Tensor | None) -> dict[str, float | None]:
    """Mean, 95th percentile and maximum over positions."""
    if kl is None:
        return {f"{name}_{what}": None for what in ("mean", "p95", "max")}
    ordered = kl.sort().values
    p95 = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    return {f"{name}_mean": float(kl.mean()), f"{name}_p95": float(p95), f"{name}_max": float(ordered[-1])}


_COLUMNS = ("epoch", "nll", "holdout_nll", "kl_mean", "kl_p95", "kl_max", "barrier_active", "pressure", "update_norm")
_CAPTION = (
    "nll: nats per token; kl: divergence per position; barrier_active: share of sequences over tau; "
    "pressure: gradient of the barrier over that of the nll, on the epoch's first batch"
)


def report(rows: list[dict[str, Any]], cfg: TrainConfig, first_round: bool) -> None:
    """The table, and what to make of it."""
    first, last = rows[0], rows[-1]
    console.table("healing", _COLUMNS, [[row[name] for name in _COLUMNS] for row in rows], _CAPTION)
    if last["holdout_nll"] is not None:
        console.note(
            f"SHOULD: held-out nll falls ({first['holdout_nll']:.3f} -> {last['holdout_nll']:.3f}) "
            "ELSE nothing general is learnt: raise --lr or --epochs, or look at the data"
        )
        if first_round or cfg.ref == "prev":
            console.note(
                f"SHOULD: KL starts at 0 ({first['holdout_kl_max']:.2g}) ELSE the reference is not the model trained"
            )
    if cfg.reg != "nll":
        active = [row["barrier_active"] for row in rows[1:]]
        if not any(active):
            console.warn(
                f"the barrier never fired: {cfg.agg} of the divergence stayed under tau {cfg.tau:g}, so this was "
                f"plain nll; lower --tau (the largest KL of a position was {last['kl_max']:.3g})"
            )
        else:
            console.note(f"SHOULD: the barrier is active in part ({active[-1]:.0%}) ELSE tau is out of reach or inert")
