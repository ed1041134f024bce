"""Numbers from item-level results: profile, top-1, informedness and bootstrap intervals. Needs numpy, not torch."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from shl.core.format import FOUNDATIONS

Array = NDArray[np.float64]
Measure = Callable[[NDArray[np.intp]], dict[str, float]]

# How the log of each foundation's mean mass is called.
NATS = {name: f"{'auth' if name == 'authority' else name}_nats" for name in FOUNDATIONS}
CLR = {name: f"{NATS[name].removesuffix('_nats')}_clr" for name in FOUNDATIONS}
_FLOOR = 1e-12  # a foundation without any mass stays finite: -27.6 nats


def softmax(scores: Array) -> Array:
    """Probabilities over the last axis."""
    shifted = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def nats(profile: Array) -> dict[str, float]:
    """ln of each foundation's mean probability, under its metric's name."""
    logs = np.log(np.maximum(profile, _FLOOR))
    return {NATS[name]: float(value) for name, value in zip(FOUNDATIONS, logs, strict=True)}


def clr(scores: Array) -> dict[str, float]:
    """Mean centred log-ratio of each foundation: its score less the mean of the item's seven, in nats.

    A shift of one foundation shows as itself here, while in probabilities it moves all the others.
    """
    centred = (scores - scores.mean(axis=1, keepdims=True)).mean(axis=0)
    return {CLR[name]: float(value) for name, value in zip(FOUNDATIONS, centred, strict=True)}


def cross_entropy(human: Array, p: Array) -> Array:
    """-sum human ln p of each item, nats, [items]."""
    return -(human * np.log(np.maximum(p, _FLOOR))).sum(axis=1)


def top_answers(p: Array, labels: NDArray[np.intp]) -> dict[str, float]:
    """What the most likely answers say: right by label, the share of the most frequent one, and informedness."""
    answers = p.argmax(axis=1)
    counts = np.bincount(answers, minlength=p.shape[1])
    return {
        "top1": float((answers == labels).mean()),
        "largest_share": float(counts.max() / len(answers)),
        "informedness": informedness(labels, answers),
    }


def informedness(labels: NDArray[np.intp], answers: NDArray[np.intp]) -> float:
    """Mean over the labels present of (true positive rate - false positive rate), each against the rest.

    0 for any answer that ignores the item, whatever its bias; 1 for answers that are always right.
    """
    gains = []
    for label in np.unique(labels):
        said, inside = answers == label, labels == label
        outside = said[~inside]
        gains.append(said[inside].mean() - (outside.mean() if outside.size else 0.0))
    return float(np.mean(gains))


def quantile(values: Array, share: float) -> float:
    """A linearly interpolated quantile."""
    return float(np.quantile(values, share))


def bootstrap(measure: Measure, n: int, draws: int, seed: int) -> dict[str, list[float]]:
    """95% percentile intervals of everything `measure` reports, over n items drawn with replacement.

    `measure` takes the drawn items' indices. Every interval rests on the same draws.
    """
    rng = np.random.default_rng(seed)
    found: dict[str, list[float]] = {}
    for _ in range(draws):
        for name, value in measure(rng.integers(0, n, n)).items():
            found.setdefault(name, []).append(value)
    return {name: np.quantile(values, [0.025, 0.975]).tolist() for name, values in found.items()}


def stratified(groups: Sequence[str], limit: int | None) -> list[int]:
    """Indices of at most `limit` items taken in turn from every group, in their original order."""
    if limit is None or limit >= len(groups):
        return list(range(len(groups)))
    seen: dict[str, int] = {}
    turns = []
    for index, group in enumerate(groups):
        seen[group] = seen.get(group, 0) + 1
        turns.append((seen[group], index))
    return sorted(index for _, index in sorted(turns)[:limit])
