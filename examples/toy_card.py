"""Measures the embedded model for its card, docs/toy.md: python examples/toy_card.py [--axis authority] > table.md

One markdown table an axis: base, both personas as system prompts, and raw steering over coefficients, all read the
same way with the same sampling noise.
"""

import argparse
import sys
from dataclasses import replace
from typing import Any

from shl.core import pools
from shl.core.console import note
from shl.core.defaults import EvalConfig, VectorConfig, configure
from shl.core.models import Loaded, load
from shl.eval import evaluate
from shl.vector import extract

COEFFS = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
COLUMNS = {
    "auth_nats": "auth_nats",
    "care_nats": "care_nats",
    "p_ans_any": "p_ans_any",
    "json_is_valid": "json",
    "largest_share": "largest",
    "informedness": "informed",
    "enact_{axis}": "enacts",
    "broken": "broken",
    "free_ppl_p50": "ppl p50",
    "free_ppl_p90": "ppl p90",
    "free_tail_p90": "tail p90",
    "free_tokens": "tokens",
    "facts": "facts",
    "sums": "sums",
}


def sweep(
    loaded: Loaded, axis: str, persona: pools.Persona, cfg: EvalConfig, coeffs: tuple[float, ...], layers: str | None
) -> list[tuple[str, dict[str, Any]]]:
    """(name, metrics) of base, prompted and steered, in that order."""
    neutral = evaluate(loaded, cfg)
    rows = [("base", neutral), ("prompted +", evaluate(loaded, cfg, system=persona.pos))]
    if persona.neg:
        rows.append(("prompted -", evaluate(loaded, cfg, system=persona.neg)))
    vector = extract(
        loaded,
        persona.pos,
        persona.neg,
        cfg=configure(VectorConfig, "vector", loaded.ref.recommended, **({"layers": layers} if layers else {})),
        name=persona.name,
        axis=axis,
    )
    note(f"{persona.name}: norms {vector.norms}, residual norms {vector.meta['residual_norms']}")
    for coeff in coeffs:
        rows.append((f"c = {coeff:g}", evaluate(loaded, replace(cfg, competence=False), vector, coeff)))
        note(f"c = {coeff:g}: {rows[-1][1]['verdict']}")
    return [(name, result["metrics"]) for name, result in rows]


def table(rows: list[tuple[str, dict[str, Any]]], axis: str) -> str:
    """The rows in markdown."""
    names = [name.format(axis=axis) for name in COLUMNS]
    lines = ["| | " + " | ".join(COLUMNS.values()) + " |", "| --- |" + " ---: |" * len(COLUMNS)]
    for name, metrics in rows:
        lines.append(f"| {name} | " + " | ".join(_shown(metrics.get(one)) for one in names) + " |")
    return "\n".join(lines)


def _shown(value: float | None) -> str:
    """Two decimals; three digits where a number is large, three decimals where it is nearly one."""
    if value is None:
        return ""
    if abs(value) >= 10:
        return f"{value:.3g}"
    return f"{value:.3f}" if value >= 0.995 else f"{value:.2f}"


def main() -> None:
    """Command line of the card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="toy")
    parser.add_argument("--axis", nargs="+", default=["authority", "humanity", "boldness"])
    parser.add_argument("--coeff", type=float, nargs="+", default=COEFFS)
    parser.add_argument("--layers", help="blocks to steer, other than those that the model recommends")
    parser.add_argument("--split", default="test")
    parser.add_argument("--free", type=int, default=128)
    args = parser.parse_args()
    loaded = load(args.model)
    for axis in args.axis:
        given = {"split": args.split, "free": args.free, "bootstrap": 1, "axes": (axis,)}
        cfg = configure(EvalConfig, "eval", loaded.ref.recommended, **given)
        rows = sweep(loaded, axis, pools.persona(axis), cfg, tuple(args.coeff), args.layers)
        sys.stdout.write(f"### {axis}\n\n{table(rows, axis)}\n\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
