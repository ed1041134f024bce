"""What healing learns from: python examples/data.py --parts size course filter price [--model toy] --out runs/data

Questions of one round each, every arm trained by kl_rev with what the model recommends:

    size      10, 50 or 200 completions by 2 or 6 epochs, at a dose of sound text and at one of mostly broken text,
              unfiltered; the smaller sets are the beginnings of the larger. Arms such as n50-e6-c0.75
    course    at a strong dose: constant, or with a falling schedule, a gate, backtracking; filtered, 50 completions
    filter    completions at three doses, all of them and those that pass the filter, by nll and by kl_rev: what is
              retained of the vector's own shift at the mean dose of what is learnt from. Arms such as nll-kept
    price     what a shift costs before anything is trained: KL per token to base of prompted and of steered text,
              sampled at temperature 1, where it is the mean of ln p(own) - ln p(base). Then one round on steered text

`python examples/data.py --report results.tsv --study price` prints what the price predicts over models and personas.
A finished arm is not run again.
"""

import argparse
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from arms import Arms, Record, options, run

import shl
from shl import results
from shl.core.chat import with_system
from shl.core.hooks import Steering
from shl.core.metrics import finite
from shl.core.scores import nll_per_token
from shl.eval import judge_of

COURSES: dict[str, dict[str, Any]] = {
    "constant": {},
    "linear": {"schedule": "linear"},
    "exp": {"schedule": "exp"},
    "gate": {"gate": "cosine"},
    "backtrack": {"backtrack": True},
}
PARTS = ("size", "course", "filter", "price")
COLUMNS = ("price_prompted", "price_steered", "enact_prompted", "enact_steered", "healed")


class Data(Arms):
    """The arms of one seed."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        self.known: dict[float, list[Record]] = {}  # completions by dose

    def broken(self, records: Sequence[Record]) -> Record:
        """The share of the text that the model's judge finds broken, and the share that enacts the persona."""
        judge = judge_of(self.loaded)
        if judge is None or not records:
            return {}
        found = [judge({**record, "axis": self.axis}) for record in records]
        enacts = [not one["broken"] and one["stance"] == "enact" for one in found]
        return {
            "data_broken": statistics.fmean(one["broken"] for one in found),
            "data_enact": statistics.fmean(enacts),
        }

    # --- size ---

    def said(self, coeff: float) -> list[Record]:
        """As many completions as the largest arm takes, in an order that owes nothing to the prompts."""
        if coeff in self.known:
            return self.known[coeff]
        samples = 2
        cfg = replace(self.gen, coeffs=(coeff,), samples=samples, score=False)
        prompts = shl.pool(self.axis)[: max(self.args.sizes) // samples]
        made = list(shl.generate(self.loaded, prompts, cfg, self.vector))
        random.Random(self.args.seed).shuffle(made)
        self.known[coeff] = made
        return made

    def size(self) -> None:
        for coeff in self.args.doses:
            for n in self.args.sizes:
                for epochs in self.args.epochs:
                    made = partial(self.first, coeff, n)
                    self.learn(f"n{n}-e{epochs}-c{coeff:g}", made, self.broken, epochs=epochs)

    def first(self, coeff: float, n: int) -> list[Record]:
        return self.said(coeff)[:n]

    # --- course ---

    def course(self) -> None:
        for name in COURSES:
            kept: Record = {}
            self.learn(
                name, partial(self.kept, name, kept), partial(self.of_course, kept), epochs=max(self.args.epochs)
            )

    def kept(self, name: str, told: Record) -> list[Record]:
        """What passes the filter at its defaults, measured by controls of the same prompts."""
        cfg = replace(self.gen, coeffs=(0.0, self.args.strong), **COURSES[name])
        made = list(shl.generate(self.loaded, shl.pool(self.axis)[: 2 * self.args.most], cfg, self.vector))
        found = list(shl.keep(made, shl.FilterConfig()))
        told["kept"] = len(found) / (2 * self.args.most)
        return found[: self.args.most]

    def of_course(self, told: Record, records: list[Record]) -> Record:
        return {**told, **self.broken(records)}

    # --- filter ---

    def filter(self) -> None:
        for which in ("all", "kept"):
            records = self.mixed[which]
            dose = round(statistics.fmean(record["coeff"] for record in records), 3)
            steered = self.row(f"steered-{which}", {"dose": dose}, vector=self.vector, coeff=dose)
            for reg in ("nll", "kl_rev"):
                told = partial(self.of_course, {"dose": dose})
                self.learn(f"{reg}-{which}", partial(list, records), told, steered=steered, reg=reg)

    @cached_property
    def mixed(self) -> dict[str, list[Record]]:
        """Completions at every dose, and those of them that pass the filter at its defaults."""
        cfg = replace(self.gen, coeffs=(0.0, *self.args.mixed))
        made = list(shl.generate(self.loaded, shl.pool(self.axis)[: self.args.prompts], cfg, self.vector))
        return {"all": [r for r in made if r["coeff"]], "kept": list(shl.keep(made, shl.FilterConfig()))}

    # --- price ---

    def price(self) -> None:
        self.learn("priced", self.steered, self.priced)

    @cached_property
    def dose(self) -> float:
        """The highest dose that four fifths of a probe survive, as the gentle loops search it."""
        probe = shl.pool(self.axis)[-16:]
        found = shl.by_survival(self.loaded, self.vector, probe, 0.8, shl.DoseConfig(seed=self.args.seed))
        return round(found.coeff, 3)

    def steered(self) -> list[Record]:
        """The text that healing learns from."""
        cfg = replace(self.gen, coeffs=(0.0, round(0.7 * self.dose, 3), self.dose))
        made = list(shl.generate(self.loaded, shl.pool(self.axis)[: self.args.prompts], cfg, self.vector))
        return list(shl.keep(made, shl.FilterConfig()))

    def priced(self, kept: list[Record]) -> Record:
        """KL per token of either kind of text to base, and how often each enacts the persona."""
        plain = replace(self.gen, temperature=1.0, top_k=0, top_p=1.0, score=False)
        prompts = shl.pool(self.axis)[: self.args.prompts]
        found: Record = {"dose": self.dose}
        for name, cfg, vector in (
            ("prompted", replace(plain, system=self.persona.pos), None),
            ("steered", replace(plain, coeffs=(self.dose,)), self.vector),
        ):
            said = [r for r in shl.generate(self.loaded, prompts, cfg, vector) if r["completion"][0]["content"]]
            told = self.broken(said)
            found |= {f"price_{name}": self.kl(said, cfg.system, vector), f"enact_{name}": told.get("data_enact")}
            found[f"broken_{name}"] = told.get("data_broken")
        return found | self.broken(kept)

    def kl(self, said: list[Record], system: str | None, vector: shl.Vector | None) -> float:
        """Nats a token, over all tokens of the texts: the surprise under base less that where they were sampled."""
        answers = [self.loaded.encode_completion(record["completion"][0]["content"], end=False) for record in said]
        bare = [self.loaded.encode_prompt(record["prompt"]) for record in said]
        asked = [self.loaded.encode_prompt(with_system(record["prompt"], system)) for record in said]
        base = nll_per_token(self.loaded, bare, answers)
        if vector is None:
            own = nll_per_token(self.loaded, asked, answers)
        else:
            with Steering(self.loaded, vector.layers) as steering:
                steering.set([self.dose])
                own = nll_per_token(self.loaded, asked, answers)
        return float(sum((b - o).sum() for b, o in zip(base, own, strict=True)) / sum(map(len, base)))

    def play(self) -> None:
        """The parts that were asked for."""
        self.row("base", against=False)
        self.row("prompted", system=self.persona.pos)
        for part in self.args.parts:
            {"size": self.size, "course": self.course, "filter": self.filter, "price": self.price}[part]()


# --- the report ---


def report_rows(found: list[results.Row], study: str) -> str:
    """A line for each model and persona, means over seeds; how each column ranks with the shift after healing."""
    rows = [row for row in results.distinct(found) if row.get("study", "").partition("-")[0] == study]
    cells: dict[str, list[list[float]]] = {}
    for row in rows:
        if row["arm"] != "priced" or not row.get("price_steered"):
            continue
        axis = next(name for name in row if name.startswith("enact_") and row[name] and name not in COLUMNS)
        same = ("model", "seed", "study", "settings")
        base = next(r for r in rows if r["arm"] == "base" and all(r[name] == row[name] for name in same))
        healed = number(row, axis) - number(base, axis)
        before = [number(row, name) for name in COLUMNS[:2]]
        before += [number(row, name) - number(base, axis) for name in COLUMNS[2:4]]
        cells.setdefault(f"{row['model']}, {axis.removeprefix('enact_')}", []).append([*before, healed])
    means = {name: [statistics.fmean(column) for column in zip(*seeds, strict=True)] for name, seeds in cells.items()}
    lines = ["| model, axis | " + " | ".join(COLUMNS) + " |", "| --- |" + " --- |" * len(COLUMNS)]
    lines += [f"| {name} | " + " | ".join(f"{value:+.2f}" for value in values) + " |" for name, values in means.items()]
    columns = list(zip(*means.values(), strict=True))
    if len(means) > 2:
        told = [f"{spearman(column, columns[-1]):+.2f}" for column in columns[:-1]]
        lines.append("| rank correlation with healed | " + " | ".join([*told, ""]) + " |")
    return "\n".join(lines)


def number(row: results.Row, name: str) -> float:
    if (value := finite(row.get(name))) is None:
        raise shl.ShlError(f"a row of {row['arm']} on {row['model']} has no {name}", hint="run --parts price again")
    return value


def spearman(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Correlation of ranks, equal values sharing the mean of theirs; 0 where one side is constant."""

    def ranks(values: Sequence[float]) -> list[float]:
        return [sum(v < value for v in values) + (values.count(value) - 1) / 2 for value in values]

    a, b = ranks(list(xs)), ranks(list(ys))
    return statistics.correlation(a, b) if len(set(a)) > 1 and len(set(b)) > 1 else 0.0


def main() -> int:
    """Command line."""
    parser = options(__doc__, "data")
    parser.add_argument("--parts", nargs="+", default=["size", "course"], choices=PARTS)
    parser.add_argument("--doses", type=float, nargs="+", default=[0.5, 0.75], help="of size")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10, 50, 200], help="completions of size")
    parser.add_argument("--epochs", type=int, nargs="+", default=[2, 6], help="of size; the largest holds for course")
    parser.add_argument("--most", type=int, default=50, help="completions of course")
    parser.add_argument("--strong", type=float, default=0.8, help="the dose of course")
    parser.add_argument("--prompts", type=int, default=48, help="of filter and price")
    parser.add_argument("--mixed", type=float, nargs="+", default=[0.5, 0.75, 1], help="the doses of filter")
    parser.add_argument("--report", type=Path, metavar="LEDGER", help="print what the price predicts, and run nothing")
    args = parser.parse_args()
    if args.report:
        return run(lambda: print(report_rows(results.read_rows(args.report), args.study)))
    return run(lambda: Data(args).play())


if __name__ == "__main__":
    sys.exit(main())
