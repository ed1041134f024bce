"""What a report calls things: columns, reasons, what is missing, and the rules by which a page puts them in order."""

from __future__ import annotations

from typing import Any

from shl.core.metrics import metric
from shl.core.strict import is_number

MINUS = "\N{MINUS SIGN}"


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
