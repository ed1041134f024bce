"""Results of lm-evaluation-harness beside our own: its JSON in, metrics called `lm.<task>.<metric>` out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shl.core import strict
from shl.core.errors import InputError

_RUN = "make one with: lm_eval --model hf --model_args pretrained=BAKED --tasks … --output_path DIR"
_Z = 1.96  # standard errors on either side of a 95% interval


def read(path: Path | str) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Every number of every task, and its interval where the file gives a standard error.

    The harness writes `<metric>,<filter>` and `<metric>_stderr,<filter>`; the filter `none` is left out of our names.
    """
    results = strict.read_object(path, _RUN).get("results")
    if not isinstance(results, dict) or not results:
        raise InputError("holds no results of lm-eval", where=f"{path}: results", hint=_RUN)
    metrics: dict[str, float] = {}
    ci: dict[str, list[float]] = {}
    for task, values in results.items():
        if not isinstance(values, dict):
            raise InputError("is not an object", where=f"{path}: results.{task}", hint=_RUN)
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if metric.endswith("_stderr") or not strict.is_number(value):
                continue
            name = ".".join(("lm", task, metric, *([kind] if kind not in ("", "none") else [])))
            metrics[name] = float(value)
            error: Any = values.get(f"{metric}_stderr,{kind}")
            if strict.is_number(error):
                ci[name] = [value - _Z * error, value + _Z * error]
    if not metrics:
        raise InputError("holds no numbers", where=f"{path}: results", hint=_RUN)
    return metrics, ci
