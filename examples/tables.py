"""The tables of docs/results.md from the ledger: `just tables`, or python examples/tables.py [--check].

A table stands in the page between <!-- table NAME --> and <!-- end -->, and NAME is one of TABLES below. Whatever is
between the marks is written anew; with --check nothing is written, and a table that differs is an error.
"""

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import headline
import matched

from shl import results
from shl.core.metrics import finite

Rows = list[results.Row]
Make = Callable[[Rows], str]
BLOCK = re.compile(r"(<!-- table (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
READ = ("auth_nats", "care_nats", "enact_authority", "broken", "free_ppl_p90", "informedness", "facts")
SHORT = {"enact_authority": "enacts", "free_ppl_p90": "ppl p90", "informedness": "informed", "student_share": "share"}


def select(rows: Rows, **wanted: str) -> Rows:
    """Rows that say this, in the order of the ledger."""
    found = [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]
    return results.distinct(found)


def means(rows: Rows, by: Sequence[str], metrics: Sequence[str], order: Sequence[str] = ()) -> str:
    """Mean ± standard deviation over seeds, a line for each group; `order` puts arms first, in that order."""
    groups: dict[tuple[str, ...], Rows] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(name, "") or "-" for name in by), []).append(row)
    names = sorted(groups, key=lambda name: (order.index(name[0]) if name[0] in order else len(order), *ranked(name)))
    heads = [*by, *(SHORT.get(metric, metric) for metric in metrics), "seeds"]
    lines = ["| " + " | ".join(heads) + " |", "| " + " | ".join("---" for _ in heads) + " |"]
    for name in names if order else groups:
        cells = [results.spread([row.get(metric, "") for row in groups[name]]) for metric in metrics]
        seeds = ", ".join(sorted({row.get("seed", "") for row in groups[name]}))
        lines.append("| " + " | ".join([*name, *cells, seeds]) + " |")
    return "\n".join(lines)


def ranked(name: Sequence[str]) -> list[tuple[float, str]]:
    """A key that counts rounds as numbers."""
    return [(-1.0 if (value := finite(part)) is None else value, part) for part in name[1:]]


def of_study(study: str, by: Sequence[str] = ("arm",), metrics: Sequence[str] = READ, **how: object) -> Make:
    """A table of means over the seeds of one study, on one model unless `model` is among the columns."""

    def make(rows: Rows) -> str:
        mine = select(rows, study=study, **({} if "model" in by else {"model": str(how.get("model", "toy"))}))
        kept = [row for row in mine if (how.get("keep") or (lambda _: True))(row) and row.get("p_ans_any")]  # type: ignore[operator]
        return means(kept, by, metrics, how.get("order") or ())  # type: ignore[arg-type]

    return make


def one_round(row: Mapping[str, str]) -> bool:
    return "," not in row["arm"]


def against_scaled(rows: Rows) -> str:
    """U2 at matched trait, as examples/matched.py prints it."""
    by_arm: dict[str, dict[str, Mapping[str, str]]] = {}
    for row in select(rows, study="u2"):
        by_arm.setdefault(row["arm"], {})[row["seed"]] = row
    tables = (matched.table(by_arm, "nll", "base", "auth_nats", metric) for metric in ("broken", "enact_authority"))
    return "\n\n".join("\n".join(lines) for lines in tables)


def reach(rows: Rows, study: str = "loops", models: Sequence[str] = ("toy",), trait: str = "auth_nats") -> str:
    """What examples/headline.py prints: reach and rounds survived of each arm."""
    parts = []
    for model in models:
        if select(rows, study=study, model=model, arm="base"):
            parts.append(headline.table(headline.Study(rows, study, model, trait), ("plain", "plain@0.5")))
    return "\n\n".join(parts)


def last_rounds(rows: Rows, study: str = "loops") -> str:
    """Rounds 0, 4 and 9 of every arm and model; an arm that stopped shows its last round."""
    found = []
    for row in select(rows, study=study):
        if row["arm"] in ("base", "prompted") or row.get("round") in ("0", "2", "4", "9"):
            found.append(row)
    metrics = (
        "auth_nats",
        "enact_authority",
        "broken",
        "free_ppl_p90",
        "informedness",
        "facts",
        "dose",
        "cos_v0",
        "student_share",
    )
    return means([row for row in found if row.get("p_ans_any")], ("model", "arm", "round"), metrics)


TABLES: dict[str, Make] = {
    "u2": of_study("u2", metrics=READ, keep=one_round),
    "u2-matched": against_scaled,
    "u2-second": of_study("u2", keep=lambda row: not one_round(row)),
    "loops": last_rounds,
    "reach": reach,
    "reach-said": partial(reach, trait="enact_authority"),
    "controls": of_study("controls"),
}


def written(page: str, rows: Rows) -> str:
    """The page with every table made anew."""

    def anew(found: re.Match[str]) -> str:
        begin, name, _, end = found.groups()
        if name not in TABLES:
            raise SystemExit(f"tables: there is no table {name}; known are {', '.join(TABLES)}")
        return f"{begin}{TABLES[name](rows)}\n{end}"

    return BLOCK.sub(anew, page)


def main() -> int:
    """Command line; exit code 1 when --check finds a table that the ledger no longer says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ledger", type=Path, default=Path("results.tsv"))
    parser.add_argument("--page", type=Path, default=Path("docs/results.md"))
    parser.add_argument("--check", action="store_true", help="write nothing, and fail where a table differs")
    args = parser.parse_args()
    page = args.page.read_text(encoding="utf-8")
    new = written(page, results.read_rows(args.ledger))
    if not args.check:
        args.page.write_text(new, encoding="utf-8")
    elif new != page:
        print(f"tables: {args.page} does not show what {args.ledger} says; run: just tables", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
