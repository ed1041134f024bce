"""What each coherence reading sees as the dose grows: python examples/coherence.py -o coherence.png > table.md

Reads a model under a persona's vector at several coefficients, and draws the answer mass, the valid JSON and the forced
prefill's perplexity beside the checks of free text. The evaluations themselves go to stderr as verdicts.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from shl.core import pools
from shl.core.console import note
from shl.core.defaults import EvalConfig, VectorConfig, configure
from shl.core.models import load
from shl.core.verdict import CEILINGS, FLOORS, compare
from shl.eval import evaluate
from shl.vector import extract

SHARES = ("p_ans_any", "json_is_valid", "broken", "free_rep", "free_refused")
SURPRISES = ("ppx_json", "free_ppl_p50", "free_ppl_p90", "free_tail_p90", "free_persona_p90")
TRAITS = ("auth_nats", "informedness", "largest_share", "agree_authority", "enact_authority")


def sweep(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One evaluation at each coefficient, each compared with that at 0 and with the prompted model."""
    loaded, persona = load(args.model), pools.persona(args.persona)
    cfg = configure(EvalConfig, "eval", loaded.ref.recommended, split=args.split, free=args.free, limit=args.limit,
                    max_new_tokens=args.max_new_tokens, agree=16, competence=False, bootstrap=100,
                    axes=(persona.axis,))  # fmt: skip
    how = configure(VectorConfig, "vector", loaded.ref.recommended)
    vector = extract(loaded, persona.pos, persona.neg, cfg=how, name=persona.name, axis=persona.axis)
    base, prompted = evaluate(loaded, cfg), evaluate(loaded, cfg, system=persona.pos)
    found = []
    for coeff in args.coeff:
        result = compare(evaluate(loaded, cfg, vector, coeff), base, None, prompted)
        note(f"c = {coeff:g}: {result['verdict']}")
        found.append({"c": coeff, **result["metrics"], "verdict": result["verdict"]})
    return found


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Three panels over the coefficient: shares with their bounds, perplexities on a logarithmic scale, traits."""
    figure, axes = plt.subplots(3, 1, figsize=(8, 10), sharex=True, constrained_layout=True)
    bounds = {**FLOORS, **CEILINGS}
    for axis, names in zip(axes, (SHARES, SURPRISES, TRAITS), strict=True):
        for name in (one for one in names if any(row.get(one) is not None for row in rows)):
            (line,) = axis.plot(
                [row["c"] for row in rows], [row.get(name) for row in rows], marker="o", ms=3, label=name
            )
            if axis is axes[0] and name in bounds:
                axis.axhline(bounds[name], color=line.get_color(), lw=0.6, ls=":")
        axis.legend(fontsize=8, ncols=2)
    axes[0].set_ylabel("share (dotted: bound of the verdict)")
    axes[1].set_ylabel("perplexity")
    axes[1].set_yscale("log")
    axes[2].set_ylabel("trait and what answers tell")
    axes[2].set_xlabel("coefficient of the vector")
    kinds = [row["verdict"].partition(":")[0] for row in rows]
    colours = {"coherent": "tab:green", "collapsed": "tab:orange", "broken": "tab:red"}
    for row, kind in zip(rows, kinds, strict=True):
        axes[0].plot(row["c"], 1.06, marker="s", color=colours[kind], clip_on=False)
    axes[0].set_title("squares: verdict (green coherent, orange collapsed, red broken)", fontsize=9)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="toy")
    parser.add_argument("--persona", default="authority")
    parser.add_argument("--coeff", type=float, nargs="+", default=[0, 0.25, 0.5, 0.6, 0.75, 1, 1.5, 2, 3, 4, 6])
    parser.add_argument("--split", default="test")
    parser.add_argument("--free", type=int, default=32)
    parser.add_argument("--limit", type=int, default=35)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("-o", "--out", type=Path, required=True)
    args = parser.parse_args()
    rows = sweep(args)
    draw(rows, args.out)
    names = [name for name in (*SHARES, *SURPRISES, *TRAITS) if any(row.get(name) is not None for row in rows)]
    lines = ["| c | " + " | ".join(names) + " | verdict |", "| ---: |" + " ---: |" * len(names) + " --- |"]
    for row in rows:
        cells = ["" if row.get(name) is None else f"{row[name]:.3g}" for name in names]
        lines.append(f"| {row['c']:g} | {' | '.join(cells)} | {row['verdict'].partition(':')[0]} |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
