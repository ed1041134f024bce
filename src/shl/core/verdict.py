"""What an evaluation comes to: one verdict, deltas against base, and ratios whose denominators are guarded. Torch-free.

Damage is looked for first, against absolute bounds: a collapsed model makes every ratio look excellent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shl.core.errors import BelowGate, Mismatch
from shl.core.metrics import is_trait

# An evaluation below a floor, above a ceiling or this many times above its base is called broken, whatever its trait.
FLOORS = {"p_ans_any": 0.9, "json_is_valid": 0.9}
# `broken`: an absolute bound above what the embedded model breaks at base: up to one answer in six takes both poles.
# The perplexities: text of any model that is sampled at temperature 1 and still reads lies far below.
CEILINGS = {"broken": 0.25, "free_rep": 0.3, "free_refused": 0.25, "free_ppl_p90": 200.0, "free_tail_p90": 500.0}
TIMES_BASE = {"ppx_json": 3.0, "free_ppl_p90": 3.0, "free_tail_p90": 4.0, "judge_ppl_p90": 3.0}
LEAST_SHIFT = 0.05  # a smaller shift is no denominator
COLLAPSE = 1.25  # times the prompted shift: what lies beyond it, at falling informedness, is an answer that stuck
LEAST_FALL = 0.02  # of informedness
COMPETENCE = ("facts", "sums", "lm.")
Numbers = Mapping[str, Any]


def difference(after: Numbers, before: Numbers) -> dict[str, float | None]:
    """after - before for every metric that both have; null where either is null."""
    out: dict[str, float | None] = {}
    for name in after:
        if name in before:
            a, b = after[name], before[name]
            out[name] = None if a is None or b is None else a - b
    return out


def compare(
    result: Mapping[str, Any],
    baseline: Mapping[str, Any],
    steered: Mapping[str, Any] | None = None,
    prompted: Mapping[str, Any] | None = None,
    target: str = "auth_nats",
) -> dict[str, Any]:
    """The result with `delta` and `ratios` against base, `retain` against a steered row, and a verdict that knows both.

    retain = shift of the result / shift of the steered row, both against base, for traits only. With the evaluation
    of the prompted model, a shift far beyond the prompt's at falling informedness is called collapsed.
    """
    for other in (baseline, steered, prompted):
        refuse_other(result, other)
    delta = difference(result["metrics"], baseline["metrics"])
    said = verdict(result, baseline, prompted)
    out = {**result, "delta": delta, "ratios": ratios(result, baseline, target, said), "verdict": said}
    if steered is not None:
        shifts = difference(steered["metrics"], baseline["metrics"])
        out["retain"] = {name: _share(delta[name], shifts.get(name)) for name in delta if is_trait(name)}
    return out


def refuse_other(result: Mapping[str, Any], other: Mapping[str, Any] | None) -> None:
    """Only rows measured the same way on the same model have differences. What `result` does not say is not asked."""
    for name in ("suite", "model_digest", "settings", "n") if other is not None else ():
        if name in result and result[name] != (theirs := other.get(name)):  # type: ignore[union-attr]
            raise Mismatch(
                f"the two evaluations differ in {name}: {result[name]} and {theirs}",
                hint="measure the baseline again with the same options: shl eval -o base.json",
            )


def _share(part: float | None, whole: float | None) -> float | None:
    if part is None or whole is None or abs(whole) < LEAST_SHIFT:
        return None
    return part / whole


def ratios(result: Mapping[str, Any], baseline: Mapping[str, Any], target: str, said: str = "") -> dict[str, Any]:
    """What the shift of one trait cost, null where the model is broken or the shift is too small to divide by.

    surgicality = |target's shift| / the largest shift of any other trait of its kind: above 1 the target moved most.
    coherence_cost = loss of coherence / |target's shift|.
    competence_loss = mean fall of facts, sums and imported tasks.
    """
    now, base = result["metrics"], baseline["metrics"]
    delta = difference(now, base)
    moved = delta.get(target)
    others = [
        abs(value) for name, value in delta.items() if name != target and _kin(name, target) and value is not None
    ]
    usable = moved is not None and abs(moved) >= LEAST_SHIFT and not said.startswith("broken")
    shift = abs(moved) if usable and moved is not None else None
    lost = [-value for name, value in delta.items() if name.startswith(COMPETENCE) and value is not None]
    return {
        "target": target,
        "surgicality": None if shift is None or not others else shift / max(max(others), LEAST_SHIFT),
        "coherence_cost": None if shift is None else (coherence(base) - coherence(now)) / shift,
        "competence_loss": sum(lost) / len(lost) if lost else None,
    }


def _kin(name: str, target: str) -> bool:
    """Traits of one kind: the seven foundations in nats, or in centred log-ratios, or the axes of one reading."""
    ends = [end for end in ("_nats", "_clr") if target.endswith(end)]
    return name.endswith(tuple(ends)) if ends else name.startswith(target.partition("_")[0] + "_")


def coherence(metrics: Numbers) -> float:
    """One number for gates: the lowest of the answer mass, the share of valid JSON and the share of unbroken text."""
    broken = metrics.get("broken")
    parts = [metrics["p_ans_any"], metrics.get("json_is_valid"), None if broken is None else 1 - broken]
    return min(part for part in parts if part is not None)


def gate(result: Mapping[str, Any], least: float) -> None:
    """Raise (exit code 3) when the coherence is below a minimum."""
    if (found := coherence(result["metrics"])) < least:
        raise BelowGate(f"coherence {found:.3f} is below --min-coherence {least:g}", hint=result["verdict"])


def verdict(
    result: Mapping[str, Any], baseline: Mapping[str, Any] | None = None, prompted: Mapping[str, Any] | None = None
) -> str:
    """One line: what is broken, if anything; only then what the trait did and how much the answers still tell."""
    metrics, base = result["metrics"], baseline["metrics"] if baseline else {}
    if faults := _faults(metrics, base):
        return f"broken: {', '.join(faults)}"
    told = f"largest answer {metrics['largest_share']:.0%}, informedness {metrics['informedness']:.2f}"
    told += _shift(metrics, base, "informedness")
    if prompted and (beyond := _collapsed(metrics, base, prompted["metrics"])):
        return f"collapsed: {beyond}; {told}"
    shown = ("auth_nats", "care_nats", *(name for name in metrics if name.startswith("enact_")))
    traits = [f"{name} {metrics[name]:.2f}{_shift(metrics, base, name)}" for name in shown if metrics[name] is not None]
    lost = [n for n in metrics if n.startswith(COMPETENCE) and base.get(n) and (metrics[n] or 0) < base[n] - 0.05]
    worse = f"; lost {', '.join(f'{n} {metrics[n]:.2f}{_shift(metrics, base, n)}' for n in lost)}" if lost else ""
    return f"coherent: {', '.join(traits)}; {told}{worse}"


def _shift(metrics: Numbers, base: Numbers, name: str) -> str:
    return "" if base.get(name) is None or metrics.get(name) is None else f" ({metrics[name] - base[name]:+.2f})"


def _collapsed(metrics: Numbers, base: Numbers, prompted: Numbers) -> str:
    """The foundation that the prompt moves most, moved the same way and too far while the answers tell less."""
    wanted = {name: prompted[name] - base[name] for name in base if name.endswith("_nats") and name in prompted}
    name = max(wanted, key=lambda one: abs(wanted[one]), default="")
    if not name or abs(wanted[name]) < LEAST_SHIFT:
        return ""
    times = (metrics[name] - base[name]) / wanted[name]
    falls = metrics["informedness"] < base["informedness"] - LEAST_FALL
    return f"{name} {metrics[name]:.2f} is {times:.1f} x the prompt's shift" if times > COLLAPSE and falls else ""


def _faults(metrics: Numbers, base: Numbers) -> list[str]:
    """Every coherence reading outside its bounds. A reading that is missing says nothing."""
    known = {name: value for name, value in metrics.items() if value is not None}
    low = [f"{name} {known[name]:.2f} < {floor}" for name, floor in FLOORS.items() if known.get(name, 1.0) < floor]
    high = [f"{name} {known[name]:.2f} > {top}" for name, top in CEILINGS.items() if known.get(name, 0.0) > top]
    ratios = {n: known[n] / base[n] for n in TIMES_BASE if n in known and base.get(n)}
    worse = [f"{n} {known[n]:.1f} = {r:.1f} x base" for n, r in ratios.items() if r > TIMES_BASE[n]]
    return low + high + worse
