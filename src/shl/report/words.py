"""What a report calls things: metrics, reasons and the rules by which a page puts them in order."""

from __future__ import annotations

from typing import Any, NamedTuple

from shl.core.strict import is_number

MINUS = "\N{MINUS SIGN}"


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
    "narrate": Metric("narrates", "share", "down", "free answers that talk about the trait instead of acting on it"),
    "facts": Metric("facts", "share", "up", "right answers to everyday questions"),
    "sums": Metric("sums", "share", "up", "right answers to small sums"),
    "top1": Metric("top-1", "share", "up", "vignettes whose most likely answer is their label"),
    "largest_share": Metric("largest answer", "share", "down", "vignettes that get the most frequent answer"),
    "informedness": Metric("informedness", "number", "up", "how much answers depend on the vignette; 0: not at all"),
}
TABLE = ("auth_nats", "care_nats", "p_ans_any", "json_is_valid", "broken", "free_ppl_p90", "facts",
         "free_ppl_p50", "sums")  # fmt: skip

REASONS = {
    "control": "coefficient 0: a control, scored but not trained on",
    "short": "too few tokens",
    "ppl_high": "too surprising to the base model",
    "ppl_low": "too predictable to the base model",
    "tail_ppl": "the last quarter is too surprising to the base model",
    "repetition": "repeats itself",
    "narration": "talks about the trait instead of acting on it",
    "refusal": "boilerplate that declines to answer",
    "where": "a condition given with --where does not hold",
    "duplicate": "nearly the same as one kept before",
    "unexplained": "dropped, and the files do not say why",
}

MISSING = {
    "base.json": ("no evaluation of the model itself, so nothing can be held against it", "shl eval -o {file}"),
    "prompted.json": (
        "no evaluation of the persona as a system prompt, so nobody knows how far the trait could move",
        "shl eval --persona NAME --baseline base.json -o {file}",
    ),
    "base.samples.jsonl": ("the base model's answers were not written down", "shl eval --per-row {file}"),
    "prompted.samples.jsonl": ("the prompted model's answers were not written down", "shl eval --per-row {file}"),
    "v.safetensors": ("no vector", "shl vector -o {file}"),
    "completions.jsonl": ("no steered completions", "shl gen --vec v.safetensors -o {file} --resume"),
    "keep.jsonl": ("nothing has been filtered", "shl filter completions.jsonl -o {file}"),
    "adapter": ("no adapter: the arm was interrupted here, or too few completions were kept", "shl train keep.jsonl"),
    "adapter/log.jsonl": ("no training log", ""),
    "eval.json": ("the round was not evaluated", "shl eval --adapter adapter --baseline base.json -o {file}"),
    "samples.jsonl": ("the healed model's answers were not written down", "shl eval --per-row {file}"),
}


def metric(name: str) -> Metric:
    """How to show any metric, known or not."""
    if name in METRICS:
        return METRICS[name]
    stem, _, axis = name.partition("_")
    if stem == "enact" and axis:
        return Metric(f"enacts {axis}", "share", "", f"free answers that enact {axis}, in sound language")
    if stem == "agree" and axis:
        return Metric(f"agrees {axis}", "share", "", f"answers that agree with {axis}")
    return Metric(name, "nats" if name.endswith("_nats") else "number", "", "")


def number(value: Any) -> float | None:
    """A number from a file that anybody may have written; anything else is none."""
    return float(value) if is_number(value) else None


def text(value: Any) -> str | None:
    """A string from a file that anybody may have written; anything else is none."""
    return value if isinstance(value, str) else None


def show(name: str, value: float | None) -> str:
    """A metric's value in words for a sentence."""
    if value is None:
        return "not measured"
    return (f"{value:.0%}" if metric(name).kind == "share" else f"{value:.2f}").replace("-", MINUS)
