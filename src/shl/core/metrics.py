"""The metrics of an evaluation: what each is called, how it is written, and which way is better."""

from __future__ import annotations

import math
from typing import Any, NamedTuple


class Metric(NamedTuple):
    """How a metric is shown: a short name, how to write its value, which way is better, and what it means."""

    short: str
    kind: str  # share, nats, ppl, number
    better: str  # up, down, or empty when neither is
    meaning: str


METRICS = {
    "auth_nats": Metric("authority", "nats", "", "ln of the mean probability of judging a wrong by Authority"),
    "care_nats": Metric("care", "nats", "", "the same for Care"),
    "fairness_nats": Metric("fairness", "nats", "", "the same for Fairness"),
    "loyalty_nats": Metric("loyalty", "nats", "", "the same for Loyalty"),
    "sanctity_nats": Metric("sanctity", "nats", "", "the same for Sanctity"),
    "liberty_nats": Metric("liberty", "nats", "", "the same for Liberty"),
    "social_nats": Metric("social norms", "nats", "", "the same for social norms: odd, not wrong"),
    "p_ans_any": Metric("answer mass", "share", "up", "probability on the seven digits where a digit must stand"),
    "json_is_valid": Metric("valid JSON", "share", "up", "free replies that hold a JSON object with a digit"),
    "ppx_json": Metric("JSON ppl", "ppl", "down", "perplexity of the forced answer's frame"),
    "broken": Metric("broken", "share", "down", "free answers that the independent judge finds ungrammatical"),
    "free_ppl_p50": Metric("ppl p50", "ppl", "down", "median perplexity of free answers under the base model"),
    "free_ppl_p90": Metric("ppl p90", "ppl", "down", "their 90th percentile"),
    "free_tail_p90": Metric("tail ppl p90", "ppl", "down", "the same for the last quarter of each answer"),
    "free_rep": Metric("repetition", "share", "down", "mean share of free answers covered by repeated n-grams"),
    "free_tokens": Metric("tokens", "number", "", "mean length of free answers"),
    "free_refused": Metric("refused", "share", "down", "free answers that decline to answer, in boilerplate"),
    "free_persona_p50": Metric("ppl under persona p50", "ppl", "down", "median under base with the persona prompt"),
    "free_persona_p90": Metric("ppl under persona p90", "ppl", "down", "their 90th percentile"),
    "judge_ppl_p50": Metric("judge ppl p50", "ppl", "down", "median perplexity of free answers under another model"),
    "judge_ppl_p90": Metric("judge ppl p90", "ppl", "down", "their 90th percentile"),
    "human_nll": Metric("against people", "nats", "down", "cross-entropy of people's answers and the model's"),
    "narrate": Metric("narrates", "share", "down", "free answers that talk about the trait instead of acting on it"),
    "facts": Metric("facts", "share", "up", "right answers to everyday questions"),
    "sums": Metric("sums", "share", "up", "right answers to small sums"),
    "top1": Metric("top-1", "share", "up", "vignettes whose most likely answer is their label"),
    "largest_share": Metric("largest answer", "share", "down", "vignettes that get the most frequent answer"),
    "informedness": Metric("informedness", "number", "up", "how much answers depend on the vignette; 0: not at all"),
}


def metric(name: str) -> Metric:
    """How to show any metric, known or not."""
    if name in METRICS:
        return METRICS[name]
    stem, _, axis = name.partition("_")
    if stem == "enact" and axis:
        return Metric(f"enacts {axis}", "share", "", f"free answers that enact {axis}, in sound language")
    if stem == "agree" and axis:
        meaning = f"mean probability of the answer that the persona of {axis} would give, beside the opposite one"
        return Metric(f"agrees {axis}", "share", "", meaning)
    if name.endswith("_clr"):
        return Metric(
            f"{stem} CLR", "nats", "", f"mean centred log-ratio of {stem}: its score less the mean of the seven"
        )
    if name.startswith("lm."):
        return Metric(name.removeprefix("lm."), "number", "", "from lm-eval")
    return Metric(name, "nats" if name.endswith("_nats") else "number", "", "")


def is_trait(name: str) -> bool:
    """Whether a metric is moved by a persona; which way is better is then the persona's own choice."""
    return name.endswith(("_nats", "_clr")) or name.startswith(("enact_", "agree_"))


def finite(value: Any) -> float | None:
    """A metric from JSON or from a ledger's text as a finite number; an empty or odd cell is none."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        return None
    return found if math.isfinite(found) else None
