"""What becomes of the dose along a trajectory: schedules, gate and backtracking against a constant dose, on `toy`.

Prints a markdown table. Every arm sees the same prompts, vectors and sampling seeds; kept is what `shl filter` keeps
at its defaults, against the controls of the same seed; enacts and broken are the word of the corpus grammar.

    python tests/bench/trajectory.py > table.md
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any

import shl
from shl.filter import Baseline, annotate
from shl.toy.grammar import judge

FILTER = shl.FilterConfig(keep_controls=True)  # so that controls are counted like the others
ARMS: dict[str, tuple[float, dict[str, Any]]] = {  # factor of the coefficient, and options of generation
    "constant": (1, {}),
    "linear": (1, {"schedule": "linear"}),
    "exp": (1, {"schedule": "exp"}),
    "gate": (1, {"gate": "cosine"}),
    "gate, 4 times the coefficient": (4, {"gate": "cosine"}),
    "backtrack": (1, {"backtrack": True}),
    "backtrack, max-surprise 0.5": (1, {"backtrack": True, "max_surprise": 0.5}),
}


@dataclass
class Cell:
    """One arm at one coefficient and one seed; `seconds` of processor time went into its rows."""

    rows: list[dict[str, Any]]
    baseline: Baseline
    seconds: float
    axis: str

    def measures(self) -> dict[str, float | None]:
        """Shares of all completions or of the kept ones, and processor time for each that is kept and enacts."""
        said = [row["completion"][0]["content"] for row in self.rows]
        asked = [row["prompt"][-1]["content"] for row in self.rows]
        ends = [row["finish"] for row in self.rows]
        verdicts = [judge(text, self.axis, user, end) for text, user, end in zip(said, asked, ends, strict=True)]
        enacts = [not one.broken and one.stance == "enact" for one in verdicts]
        kept = [k for k, one in enumerate(annotate(self.rows, FILTER, baseline=self.baseline)) if one["keep"]]
        spans = [span for row in self.rows for span in self._spans(row)]
        rewinds = [one for row in self.rows for one in row.get("trajectory", {}).get("rewinds", ())]
        good = sum(enacts[k] for k in kept)
        n, tokens = len(self.rows), sum(row["n_tokens"] for row in self.rows)
        return {
            "dose": sum(span["tokens"] * span["dose"] for span in spans) / tokens,
            "kept": len(kept) / n,
            "enacts, of kept": good / len(kept) if kept else None,
            "broken, of kept": fmean(verdicts[k].broken for k in kept) if kept else None,
            "kept and enacts": good / n,
            "broken": fmean(one.broken for one in verdicts),
            "rewinds": len(rewinds) / n,
            "tokens cut": sum(one["at"] - one["to"] for one in rewinds) / tokens,
            "CPU s each": self.seconds / good if good else None,
        }

    @staticmethod
    def _spans(row: dict[str, Any]) -> list[dict[str, Any]]:
        plain = {"spans": [{"tokens": row["n_tokens"], "dose": row["coeff"]}]}
        return row.get("trajectory", plain)["spans"]


def measure(args: argparse.Namespace) -> dict[tuple[str, float], list[dict[str, float | None]]]:
    """The measures of every arm and coefficient, a list over seeds; first those of the controls."""
    loaded, persona = shl.load("toy"), shl.persona(args.persona)
    axis = persona.axis
    prompts = shl.pool(f"{axis}-{args.split}" if args.split else axis)
    found: dict[tuple[str, float], list[dict[str, float | None]]] = {}
    for seed in args.seeds:
        cfg = shl.GenConfig(limit=args.prompts, max_new_tokens=256, seed=seed)
        vector = shl.extract(loaded, persona.pos, persona.neg, cfg=shl.VectorConfig(seed=seed))
        began = time.process_time()
        controls = list(shl.generate(loaded, prompts, replace(cfg, coeffs=(0.0,)), vector=vector))
        baseline = Baseline(controls)
        found.setdefault(("no vector", 0.0), []).append(
            Cell(controls, baseline, time.process_time() - began, axis).measures()
        )
        for arm in args.arms:
            factor, options = ARMS[arm]
            for dose in args.doses:
                began = time.process_time()
                asked = replace(cfg, coeffs=(factor * dose,), **options)
                rows = list(shl.generate(loaded, prompts, asked, vector=vector))
                cell = Cell(rows, baseline, time.process_time() - began, axis).measures()
                found.setdefault((arm, factor * dose), []).append(cell)
                print(f"seed {seed} {arm} {factor * dose:g}: kept {cell['kept']:.2f}", file=sys.stderr)
    return found


def table(found: dict[tuple[str, float], list[dict[str, float | None]]]) -> str:
    """Means over seeds, with the standard deviation for the shares that are compared."""
    names = list(next(iter(found.values()))[0])
    lines = ["| arm | coefficient | " + " | ".join(names) + " |", "| --- | ---: |" + " ---: |" * len(names)]
    for (arm, coeff), cells in found.items():
        shown = [_cell([cell[name] for cell in cells], name) for name in names]
        lines.append(f"| {arm} | {coeff:g} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _cell(values: list[float | None], name: str) -> str:
    """Mean over the seeds in which there is a value, ± over them."""
    there = [value for value in values if value is not None]
    if not there:
        return "-"
    spread = len(there) > 1 and name in ("kept", "enacts, of kept", "kept and enacts", "broken")
    return f"{fmean(there):.2f}" + (f" ± {stdev(there):.2f}" if spread else "")


def options() -> argparse.Namespace:
    """What is run: by default the table of docs/evidence/002-trajectory.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--persona", default="authority")
    parser.add_argument("--split", default="test", help="dev, test, or nothing for the pool of generation")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--doses", type=float, nargs="+", default=[0.35, 0.5, 0.65, 0.8, 1.0, 1.25])
    parser.add_argument("--seeds", type=int, nargs="+", default=[100, 101, 102])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    return parser.parse_args()


if __name__ == "__main__":
    print(table(measure(options())))
