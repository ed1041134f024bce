"""What healed steering has to beat: python examples/controls.py [--model toy] [--seed 0] --out runs/controls

Trains the same adapter, by the same trainer, on equally many tokens from four sources, and adds a row to the ledger for
each and for what no training made:

    base, prompted                 the model, and the model with the persona as its system message
    raw, random                    the vector at its doses, and 20 random vectors of its length at the dose
    steered                        completions under the vector
    distilled                      completions under the persona's system message, which training does not see
    selected                       the model's own completions, those likeliest under the persona against its opposite
    placebo                        the model's own completions, as they come

A finished arm is not run again.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import shl
from shl.core.chat import with_system
from shl.core.console import note
from shl.core.files import atomic_file
from shl.core.scores import nll_per_token
from shl.core.verdict import compare

Record = dict[str, Any]
SOURCES = ("steered", "distilled", "selected", "placebo")


class Controls:
    """The run: its options, the model, the vector, and the evaluation that every arm gets."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.out = args, Path(args.out)
        self.loaded, self.persona = shl.load(args.model), shl.persona(args.persona)
        advice = self.loaded.ref.recommended
        axis = self.persona.axis
        self.eval = shl.configure(
            shl.EvalConfig, "eval", advice, free=args.free, axes=(axis,), seed=args.seed, split=args.split
        )
        self.train = shl.configure(
            shl.TrainConfig, "train", advice, seed=args.seed, include_controls=True, reg=args.reg
        )
        self.gen = shl.configure(shl.GenConfig, "gen", advice, seed=args.seed, coeffs=(0.0,))
        how = shl.configure(shl.VectorConfig, "vector", advice, seed=args.seed)
        self.vector = shl.extract(self.loaded, self.persona.pos, self.persona.neg, cfg=how, axis=axis)
        self.prompts = shl.pool(axis)[: args.prompts]
        self.tokens = 0  # that each arm learns from: as many as the steered one keeps

    def row(self, arm: str, base: Record | None = None, trained: Any = None, **how: Any) -> Record:
        """One evaluation and its row; read back where it is finished."""
        path = self.out / f"{arm}.json"
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
        result = shl.evaluate(how.pop("loaded", self.loaded), self.eval, **how)
        result.pop("rows")
        result = compare(result, base) if base is not None else result
        name, _, draw = arm.partition("/")
        labels = {"arm": name, "draw": draw, "study": self.args.study}
        shl.append_row(self.args.ledger, shl.row_of(result, trained, {k: v for k, v in labels.items() if v}))
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as handle:
            json.dump(result, handle, indent=2)
        note(f"{arm}: {result['verdict']}")
        return result

    def said(self, source: str) -> Iterator[Record]:
        """Completions of one source, sound ones, best first where they are selected."""
        samples = self.args.samples * (4 if source == "selected" else 1)
        cfg = replace(self.gen, samples=samples, system=self.persona.pos if source == "distilled" else None)
        vector = self.vector if source == "steered" else None
        if vector is not None:  # controls too, since the filter measures against them
            cfg = replace(cfg, coeffs=(0.0, self.args.coeff))
        made = list(shl.generate(self.loaded, self.prompts, cfg, vector))
        kept = list(shl.keep(made, shl.FilterConfig(keep_controls=vector is None)))
        if source != "selected":
            return iter(kept)
        best = sorted(zip(self.leaning(kept), kept, strict=True), key=lambda pair: -pair[0])
        return iter([record for _, record in best])

    def leaning(self, records: list[Record]) -> list[float]:
        """ln p under the persona - ln p under its opposite, a token: base's own word for each completion's trait."""
        answers = [self.loaded.encode_completion(r["completion"][0]["content"], end=False) for r in records]
        sides = []
        for system in (self.persona.pos, self.persona.neg):
            prompts = [self.loaded.encode_prompt(with_system(record["prompt"], system)) for record in records]
            sides.append([float(nll.mean()) for nll in nll_per_token(self.loaded, prompts, answers)])
        return [against - for_ for for_, against in zip(*sides, strict=True)]

    def arm(self, source: str, base: Record) -> None:
        """Completions of one source, cut to the same number of tokens, an adapter from them, and its row."""
        folder = self.out / source
        if not (folder / "adapter").exists():
            used, tokens = [], 0
            for record in self.said(source):
                if self.tokens and tokens >= self.tokens:
                    break
                used.append(record)
                tokens += record["n_tokens"]
            if source == "steered":
                self.tokens = tokens
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "tokens").write_text(str(tokens))
            note(f"{source}: {len(used)} completions, {tokens} tokens")
            shl.heal(self.loaded, used, self.train, folder / "adapter")
        elif source == "steered":
            self.tokens = int((folder / "tokens").read_text())
        loaded = shl.load(self.args.model, [str(folder / "adapter")])
        self.row(source, base, loaded.chain[-1].meta.get("config"), loaded=loaded)

    def play(self) -> None:
        """Every row, references first."""
        base = self.row("base")
        self.row("prompted", base, system=self.persona.pos)
        for coeff in self.args.raw or [self.args.coeff]:
            self.row(f"raw@{coeff:g}", base, vector=self.vector, coeff=coeff)
        for seed in range(self.args.random):
            self.row(f"random/{seed}", base, vector=self.vector.random_like(seed), coeff=self.args.coeff)
        for source in self.args.arms:
            self.arm(source, base)


def main() -> int:
    """Command line; exit code 1 with one sentence for a problem that the user can mend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="toy")
    parser.add_argument("--persona", default="authority", help="a bundled persona with two sides")
    parser.add_argument("--coeff", type=float, default=0.5)
    parser.add_argument("--reg", default="kl_rev")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--raw", type=float, nargs="*", help="coefficients of the raw vector; without any --coeff")
    parser.add_argument("--study", help="a label of the rows in the ledger")
    parser.add_argument("--random", type=int, default=20)
    parser.add_argument("--free", type=int, default=64)
    parser.add_argument("--arms", nargs="+", default=list(SOURCES), choices=SOURCES)
    parser.add_argument("--split", default="test", choices=("dev", "test"), help="what is evaluated on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs/controls")
    parser.add_argument("--ledger", default="results.tsv")
    try:
        Controls(parser.parse_args()).play()
    except shl.ShlError as error:
        sys.stderr.write(f"shl: error: {error}\n" + (f"hint: {error.hint}\n" if error.hint else ""))
        return error.code
    return 0


if __name__ == "__main__":
    sys.exit(main())
