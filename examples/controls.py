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
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property, partial

from arms import Arms, Record, leaning, options, run, tokens

import shl
from shl.core.console import note

SOURCES = ("steered", "distilled", "selected", "placebo")


class Controls(Arms):
    """The rows of one seed, references first."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        self.prompts = shl.pool(self.axis)[: args.prompts]

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
        best = sorted(zip(leaning(self.loaded, self.persona, kept), kept, strict=True), key=lambda pair: -pair[0])
        return iter([record for _, record in best])

    @cached_property
    def steered(self) -> list[Record]:
        """What the vector says, which also tells how much the other sources may."""
        return list(self.said("steered"))

    def most(self) -> int:
        """Tokens that the other sources may learn from: as many as the steered one keeps."""
        path = self.out / "steered" / "tokens"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(str(tokens(self.steered)))
        return int(path.read_text())

    def cut(self, source: str) -> list[Record]:
        """Completions of a source until there are as many tokens as steering gives."""
        used: list[Record] = []
        most = self.most()
        for record in self.steered if source == "steered" else self.said(source):
            if tokens(used) >= most:
                break
            used.append(record)
        note(f"{source}: {len(used)} completions, {tokens(used)} tokens")
        return used

    def play(self) -> None:
        """Every row."""
        self.row("base", against=False)
        self.row("prompted", system=self.persona.pos)
        for coeff in self.args.raw or [self.args.coeff]:
            self.row(f"raw@{coeff:g}", vector=self.vector, coeff=coeff)
        for seed in range(self.args.random):
            labels = {"arm": "random", "draw": str(seed)}
            self.row(f"random/{seed}", labels, vector=self.vector.random_like(seed), coeff=self.args.coeff)
        for source in self.args.arms:
            self.learn(source, partial(self.cut, source), lambda _: {}, include_controls=True)


def main() -> int:
    """Command line."""
    parser = options(__doc__, "controls")
    parser.add_argument("--coeff", type=float, default=0.5)
    parser.add_argument("--raw", type=float, nargs="*", help="coefficients of the raw vector; without any --coeff")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--random", type=int, default=20)
    parser.add_argument("--arms", nargs="+", default=list(SOURCES), choices=SOURCES)
    args = parser.parse_args()
    return run(lambda: Controls(args).play())


if __name__ == "__main__":
    sys.exit(main())
