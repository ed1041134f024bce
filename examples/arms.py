"""What comparisons of one round share: model, persona, one evaluation for every arm, and arms that are made once.

A script makes records in its own ways and hands them over: `Arms.learn` trains an adapter on them, evaluates it, and
adds a row to the ledger. What is finished is read back, not run again.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import shl
from shl.core.chat import with_system
from shl.core.console import note, warn
from shl.core.files import atomic_file
from shl.core.pools import Persona
from shl.core.provenance import argv, commit
from shl.core.scores import nll_per_token

Record = dict[str, Any]
LEAST = 8  # completions that an arm needs


class Arms:
    """One seed of a comparison."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.out = args, Path(args.out)
        self.loaded, self.persona = shl.load(args.model), shl.persona(args.persona)
        self.advice, self.axis = self.loaded.ref.recommended, self.persona.axis
        read = {"free": args.free, "axes": (self.axis,), "seed": args.seed, "split": args.split}
        self.eval = shl.configure(shl.EvalConfig, "eval", self.advice, **read)
        self.gen = shl.configure(shl.GenConfig, "gen", self.advice, seed=args.seed, coeffs=(0.0,))

    @cached_property
    def vector(self) -> shl.Vector:
        """The persona's vector, from the contexts of this seed."""
        how = shl.configure(shl.VectorConfig, "vector", self.advice, seed=self.args.seed)
        return shl.extract(self.loaded, self.persona.pos, self.persona.neg, cfg=how, axis=self.axis)

    @cached_property
    def base(self) -> Record:
        """The row that all others are compared with."""
        return self.row("base", against=False)

    def row(self, name: str, labels: Record | None = None, against: bool = True, **how: Any) -> Record:
        """One evaluation and its row, `name` the arm unless a label says otherwise; `how` goes to shl.evaluate.

        With a row `steered` there is the share of that shift as well: retain.
        """
        path = self.out / f"{name}.json"
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
        base, steered = self.base if against else None, how.pop("steered", None)
        loaded = how.pop("loaded", self.loaded)
        result = shl.evaluate(loaded, how.pop("cfg", self.eval), **how)
        result.pop("rows")
        result = shl.compare(result, base, steered) if base is not None else result
        trained = loaded.chain[-1].meta.get("config") if loaded.chain else None
        shl.append_row(self.args.ledger, shl.row_of(result, trained, self.labels(name, labels)))
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as handle:
            json.dump(result, handle, indent=2)
        note(f"{name}: {result['verdict']}")
        return result

    def labels(self, name: str, more: Record | None = None) -> Record:
        study = {"study": self.args.study} if self.args.study else {}
        return {"arm": name, "seed": str(self.args.seed), **study, **(more or {})}

    def learn(
        self,
        name: str,
        made: Callable[[], list[Record]],
        labels: Callable[[list[Record]], Record],
        steered: Record | None = None,
        **knobs: Any,
    ) -> None:
        """An adapter from the records that `made` gives, and its row; too few leave a row without scores."""
        adapter = self.out / name / "adapter"
        if (self.out / f"{name}.json").exists() or (self.out / name / "stopped").exists():
            return
        records = made()
        told = {"n_train": len(records), **labels(records)}
        if len(records) < LEAST:
            self.stopped(name, f"{len(records)} completions to learn from", told)
            return
        if not adapter.exists():
            given = {"seed": self.args.seed, "reg": self.args.reg} | knobs
            cfg = shl.configure(shl.TrainConfig, "train", self.advice, **given)
            shl.heal(self.loaded, records, cfg, adapter)
        self.row(name, told, loaded=shl.load(self.args.model, [str(adapter)]), steered=steered)

    def stopped(self, name: str, why: str, labels: Record) -> None:
        """A row without scores, once: that there was nothing to learn from is a result."""
        warn(f"{name}: {why}")
        row = stopped_row(self.args.model, self.base["model_digest"], why)
        shl.append_row(self.args.ledger, self.labels(name, {**row, **labels}))
        (self.out / name).mkdir(parents=True, exist_ok=True)
        (self.out / name / "stopped").write_text(f"{why}\n", encoding="utf-8")


def stopped_row(model: str, digest: str, why: str) -> Record:
    """What the row of an arm without scores says beside its labels."""
    line = {"argv": shlex.join(argv()), "commit": commit()}
    return {"model": model, "model_digest": digest, "verdict": f"stopped: {why}", **line}


def options(doc: str | None, study: str | None = None) -> argparse.ArgumentParser:
    """The options that every such script has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="toy")
    parser.add_argument("--persona", default="authority", help="a bundled persona with two sides")
    parser.add_argument("--reg", default="kl_rev")
    parser.add_argument("--free", type=int, default=64, help="free answers read in each evaluation")
    parser.add_argument("--split", default="test", choices=("dev", "test"), help="what is evaluated on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--study", default=study, help="a label of the rows in the ledger")
    parser.add_argument("--out", default=f"runs/{study or 'arms'}", help="the run folder")
    parser.add_argument("--ledger", default="results.tsv")
    return parser


def run(play: Callable[[], None]) -> int:
    """Exit code of a script; one sentence for a problem that the user can mend."""
    try:
        play()
    except shl.ShlError as error:
        sys.stderr.write(f"shl: error: {error}\n" + (f"hint: {error.hint}\n" if error.hint else ""))
        return error.code
    return 0


def tokens(records: Iterable[Record]) -> int:
    """Completion tokens."""
    return sum(record["n_tokens"] for record in records)


def leaning(loaded: shl.Loaded, persona: Persona, records: list[Record]) -> list[float]:
    """ln p under the persona - ln p under its opposite, a token: the model's own word for each completion's trait."""
    answers = [loaded.encode_completion(record["completion"][0]["content"], end=False) for record in records]
    sides = []
    for system in (persona.pos, persona.neg):
        prompts = [loaded.encode_prompt(with_system(record["prompt"], system)) for record in records]
        sides.append([float(nll.mean()) for nll in nll_per_token(loaded, prompts, answers)])
    return [against - for_ for for_, against in zip(*sides, strict=True)]
