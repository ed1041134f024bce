"""Q0, can we filter: what `shl filter` keeps of completions that were read and labelled before it saw them.

    python examples/can_we_filter.py

160 completions of the embedded model, 32 prompts at five doses, in docs/evidence/q0: labels.jsonl says of each whether
it is coherent, what it enacts, and to which half it belongs. Half a may set thresholds, half b reports. Prints
precision and recall of coherence with 95% intervals (Wilson), what the filter removes, and every error of half b.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import shl

FOLDER = Path(__file__).parent.parent / "docs" / "evidence" / "q0"


def wilson(k: int, n: int) -> str:
    """A share with its 95% interval (Wilson 1927)."""
    if n == 0:
        return "-"
    p, z = k / n, 1.96
    middle, width = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((middle + sign * width) / (1 + z * z / n) for sign in (-1, 1))
    return f"{p:.2f} [{low:.2f}, {high:.2f}] ({k} of {n})"


def judged(cfg: shl.FilterConfig) -> list[dict[str, Any]]:
    """Every labelled completion with its label and the filter's reasons; controls are judged like the rest."""
    labels = {row["id"]: row for row in read(FOLDER / "labels.jsonl")}
    records = shl.annotate(list(shl.read_records(FOLDER / "completions.jsonl")), cfg)
    return [
        {**labels[record["id"]], "record": record, "reasons": [r for r in record["reasons"] if r != "control"]}
        for record in records
    ]


def read(path: Path) -> list[dict[str, Any]]:
    """Lines of JSON."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def report(name: str, rows: list[dict[str, Any]]) -> None:
    """Precision and recall over steered completions, and what is left of the trait."""
    steered = [row for row in rows if row["record"]["coeff"] != 0]
    kept = [row for row in steered if not row["reasons"]]
    sound = [row for row in steered if row["coherent"]]
    print(f"{name}: {len(steered)} steered completions, {len(sound)} coherent, {len(kept)} kept")
    print(f"  precision  {wilson(sum(row['coherent'] for row in kept), len(kept))}")
    print(f"  recall     {wilson(sum(not row['reasons'] for row in sound), len(sound))}")
    broken = [row for row in steered if not row["coherent"]]
    print(f"  incoherent dropped  {wilson(sum(bool(row['reasons']) for row in broken), len(broken))}")
    for what, some in (("before", steered), ("after", kept)):
        print(f"  enacts {what} the filter  {wilson(sum(row['stance'] == 'enact' for row in some), len(some))}")


def main() -> None:
    """Print the page."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows = judged(shl.FilterConfig())
    halves = {half: [row for row in rows if row["half"] == half] for half in ("a", "b")}
    for half, some in halves.items():
        report(f"half {half}", some)
    report("both", rows)
    for wrong, title in ((False, "kept though incoherent"), (True, "dropped though coherent")):
        print(f"\nhalf b, {title}:")
        for row in halves["b"]:
            if row["record"]["coeff"] != 0 and row["coherent"] is wrong and bool(row["reasons"]) is wrong:
                why = ", ".join(row["reasons"]) or row.get("note", "")
                print(f"- {row['id']} ({why}): {row['record']['completion'][0]['content']}")


if __name__ == "__main__":
    main()
