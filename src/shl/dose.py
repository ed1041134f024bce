"""How much of a vector: the coefficient at which a divergence, or the share of completions that survive, is met."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from shl.core.console import note, progress
from shl.core.decode import Sampling, decode
from shl.core.defaults import DoseConfig, FilterConfig, GenConfig
from shl.core.errors import BelowGate, ShlError
from shl.core.head import Head, completion_states
from shl.core.heal_loss import token_losses
from shl.core.hooks import Steering
from shl.core.memory import batched
from shl.core.models import Loaded
from shl.core.records import Prompt
from shl.core.seeds import seed_of
from shl.core.vectors import Vector
from shl.core.vocabulary import Reference
from shl.filter import annotate
from shl.gen import generate

_Read = tuple[list[int], list[int], Reference]  # prompt, answer, and what the unsteered model makes of it


@dataclass(frozen=True)
class Dose:
    """A coefficient, what was measured there (KL in nats, or a share), and every reading on the way to it."""

    coeff: float
    value: float
    readings: list[tuple[float, float]]
    survivors: list[dict[str, Any]]  # completions of the probe that passed the filter; none when searching by KL


def ceiling(vector: Vector, cfg: DoseConfig) -> float:
    """The highest coefficient to try: where the vector is `cfg.ceiling` times as long as the residual stream."""
    residual = vector.meta.get("residual_norms") or {}
    ratios = [residual[str(layer)] / norm for layer, norm in vector.norms.items() if str(layer) in residual and norm]
    if not ratios:
        raise ShlError("the vector does not say how long the residual stream is", hint="make it anew with shl vector")
    return cfg.ceiling * min(ratios)


# --- by divergence ---


def by_kl(
    loaded: Loaded,
    vector: Vector,
    prompts: Sequence[Prompt],
    target: float,
    cfg: DoseConfig | None = None,
    *,
    system: str | None = None,
) -> Dose:
    """The coefficient at which the 95th percentile over tokens of KL(steered || unsteered) reaches a target, in nats.

    Both read the same completions, sampled without steering; unsteered is the chain at coefficient 0. Bisection to
    1% of the coefficient. A target that the ceiling does not reach is an error. `system` stands before every prompt.
    """
    cfg = cfg or DoseConfig()
    vector.check(loaded)
    probe = _Probe(loaded, vector, prompts, cfg, system)
    low, high = 0.0, ceiling(vector, cfg)
    if (top := probe.kl(high)) < target:
        raise ShlError(
            f"at coefficient {high:.3g}, {cfg.ceiling:g} times the residual stream, KL is {top:.3g} nats, "
            f"less than the target {target:g}",
            hint="choose a lower --target-kl or a higher --ceiling",
        )
    with progress("searching the dose", None) as bar:
        while high - low > 0.01 * high:
            middle = (low + high) / 2
            reached = probe.kl(middle)
            low, high = (middle, high) if reached < target else (low, middle)
            bar.advance(coefficient=middle, KL=reached, between=f"{low:.3g} and {high:.3g}")
    return Dose(high, probe.kl(high), sorted(set(probe.readings)), [])


class _Probe:
    """Unsteered completions, and how far steering moves the distributions along them."""

    def __init__(
        self, loaded: Loaded, vector: Vector, prompts: Sequence[Prompt], cfg: DoseConfig, system: str | None = None
    ) -> None:
        self.loaded, self.cfg = loaded, cfg
        self.vector = vector
        self.readings: list[tuple[float, float]] = []
        asked = [loaded.encode_prompt(prompt.asked(system)) for prompt in prompts[: cfg.prompts]]
        said = decode(
            loaded,
            asked,
            seeds=[seed_of(cfg.seed, "dose", prompt.id) for prompt in prompts[: cfg.prompts]],
            sampling=Sampling(max_new_tokens=cfg.max_new_tokens),
            batch_size=cfg.batch_size,
        )
        rows = [(a, one.ids) for a, one in zip(asked, said, strict=True) if one.ids]
        if not rows:
            raise ShlError("no probe prompt got an answer", hint="give other PROMPTS")
        self.head = Head.of(loaded)
        self.head.check(loaded, rows[0][0] + rows[0][1])
        self.rows: list[_Read] = []  # each with its states where nothing steers
        with torch.inference_mode():
            for chosen, plain in self._batches(rows, self._unsteered):
                parts = plain.split([len(answer) for _, answer in chosen])
                self.rows += [(*row, part) for row, part in zip(chosen, parts, strict=True)]

    def _batches(self, rows: Sequence[Any], work: Callable[[Sequence[Any]], Any]) -> Iterator[Any]:
        return batched(self.loaded, rows, self.cfg.batch_size, work, "reading the probe")

    def _unsteered(self, rows: Sequence[Any]) -> Reference:
        return Reference.of(self.head, completion_states(self.loaded, rows)[0])

    @torch.inference_mode()
    def kl(self, coeff: float) -> float:
        """95th percentile over all completion tokens, in nats."""
        with Steering(self.loaded, self.vector.layers) as steering:
            steering.set([coeff])
            found = [kl for _, kl in self._batches(self.rows, self._divergence)]
        value = float(torch.cat(found).float().quantile(0.95))
        self.readings.append((coeff, value))
        return value

    def _divergence(self, rows: Sequence[_Read]) -> torch.Tensor:
        """KL of each completion token, under the steering that is active."""
        steered, targets = completion_states(self.loaded, [row[:2] for row in rows])
        plain = Reference.join([one for *_, one in rows], steered.device)
        return token_losses(steered, targets, self.head, plain, "kl_rev")[1]


# --- by survival ---


def by_survival(
    loaded: Loaded,
    vector: Vector,
    prompts: Sequence[Prompt],
    target: float,
    cfg: DoseConfig | None = None,
    filter_cfg: FilterConfig | None = None,
    *,
    gen: GenConfig | None = None,
    to_ceiling: bool = False,
) -> Dose:
    """The highest coefficient at which a target share of probe completions passes the filter.

    `gen` says how they are sampled and steered, but for the coefficients and what `cfg` says of the probe. A grid up to
    the ceiling in ratios of 1.41, all doses in one batch, then a finer one between the last dose that survives and the
    first that does not. Raises (exit code 3) when even the smallest dose does not survive, and when the ceiling does,
    unless `to_ceiling` takes that as the answer.
    """
    cfg = cfg or DoseConfig()
    top = ceiling(vector, cfg)
    readings: dict[float, float] = {}
    bank: list[dict[str, Any]] = []
    grid = [top * 2 ** (-k / 2) for k in reversed(range(cfg.grid))]
    for _ in range(2):
        shares, survivors = _survival(
            loaded, vector, prompts, grid, cfg, filter_cfg or FilterConfig(), gen or GenConfig()
        )
        readings |= shares
        bank += survivors
        note("survive: " + ", ".join(f"{coeff:.3g} {share:.0%}" for coeff, share in sorted(shares.items())))
        alive = [coeff for coeff in sorted(readings) if readings[coeff] >= target]
        if not alive:
            low = min(readings)
            raise BelowGate(
                f"at coefficient {low:.3g}, the smallest tried, {readings[low]:.0%} of the completions survive, "
                f"fewer than {target:.0%}",
                hint="lower --survival or --ceiling, or look at what shl filter drops",
            )
        above = [coeff for coeff in readings if coeff > alive[-1]]
        if not above and to_ceiling:
            break
        if not above:
            raise ShlError(
                f"even at coefficient {alive[-1]:.3g}, {cfg.ceiling:g} times the residual stream, "
                f"{readings[alive[-1]]:.0%} survive",
                hint="raise --ceiling",
            )
        step = (min(above) - alive[-1]) / (cfg.refine + 1)
        grid = [alive[-1] + step * k for k in range(1, cfg.refine + 1)]
    return Dose(alive[-1], readings[alive[-1]], sorted(readings.items()), bank)


def _survival(
    loaded: Loaded,
    vector: Vector,
    prompts: Sequence[Prompt],
    grid: Sequence[float],
    cfg: DoseConfig,
    filter_cfg: FilterConfig,
    gen: GenConfig,
) -> tuple[dict[float, float], list[dict[str, Any]]]:
    """Share that survives by coefficient, and the survivors."""
    gen = replace(
        gen,
        coeffs=(0.0, *grid),
        limit=cfg.prompts,
        samples=1,
        score=True,
        max_new_tokens=cfg.max_new_tokens,
        seed=seed_of(cfg.seed, "dose") % 2**31,
        batch_size=cfg.batch_size,
    )
    judged = list(annotate(generate(loaded, prompts, gen, vector), filter_cfg))
    shares = {}
    for coeff in grid:
        rows = [row for row in judged if row["coeff"] == coeff]
        shares[coeff] = sum(row["keep"] for row in rows) / len(rows)
    return shares, [row for row in judged if row["keep"]]
