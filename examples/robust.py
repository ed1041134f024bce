"""Does a healed persona survive? python examples/robust.py --arm healed=runs/…/r9/adapter --seed 100 --out runs/robust

Each arm, and base and the prompted model beside them, is evaluated under conditions, a row in the ledger for each:

    plain       as it is
    opposed     under a system message that asks for the persona's opposite; prompted has it behind its own
    stranger    under a system message that says nothing of the trait
    with        under the persona's own message as well: what healing adds to a prompt
    long        after three turns of everyday conversation, with the answers that the model itself gave to them
    wording     vignettes told in the first person

Printed is how much of its plain shift each arm keeps: (arm - base under the condition) / (arm - base when plain).
"""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from arms import Arms, Record, options, run

import shl
from shl.core.chat import join_system
from shl.core.decode import Sampling, decode

STRANGER = "You answer in plain words and are glad when a question is clear."
TALK = ("What is 12 plus 30?", "How do you feel about people who are always late?", "What is 9 minus 4?")
LEAST = 0.05  # a smaller shift is none to keep a share of
CONDITIONS = ("plain", "opposed", "stranger", "with", "long", "wording")


class Robust(Arms):
    """Conditions by arms, of one seed."""

    def system(self, condition: str, arm: str) -> str | None:
        """The system message of an arm under a condition."""
        own = self.persona.pos if arm == "prompted" else None
        added = {"opposed": self.persona.neg, "stranger": STRANGER, "with": self.persona.pos}.get(condition)
        return join_system(own, added)

    def scored(self, arm: str, loaded: shl.Loaded, condition: str) -> Record:
        """One row."""
        cfg = replace(self.eval, condition="first") if condition == "wording" else self.eval
        before = self.talk(loaded) if condition == "long" else ()
        return self.row(
            f"{arm}-{condition}",
            {"arm": arm, "condition": condition},
            against=False,
            loaded=loaded,
            cfg=cfg,
            system=self.system(condition, arm),
            before=before,
        )

    def talk(self, loaded: shl.Loaded) -> list[dict[str, str]]:
        """A short everyday conversation with this model, its own answers taken at their likeliest."""
        turns: list[dict[str, str]] = []
        for question in TALK:
            turns.append({"role": "user", "content": question})
            ids = loaded.encode_prompt(turns)
            said = decode(loaded, [ids], seeds=[0], sampling=Sampling(max_new_tokens=48, greedy=True))
            turns.append({"role": "assistant", "content": said[0].text})
        return turns

    def play(self) -> None:
        """Every arm under every condition, and the table."""
        arms: dict[str, list[str]] = {"base": [], "prompted": [], **dict(self.args.arm)}
        found: dict[str, dict[str, Any]] = {}
        for arm, chain in arms.items():
            loaded = shl.load(self.args.model, chain) if chain else self.loaded
            for condition in self.args.conditions:
                if (arm, condition) != ("prompted", "with"):
                    found.setdefault(arm, {})[condition] = self.scored(arm, loaded, condition)["metrics"]
        print(table(found, ("auth_nats", f"enact_{self.axis}")))


def table(found: Mapping[str, Mapping[str, Record]], metrics: tuple[str, ...]) -> str:
    """The share of its plain shift that each arm keeps under each condition, "-" where there was none to keep."""
    conditions = [one for one in next(iter(found.values())) if one != "plain"]
    lines = [
        "| arm | metric | plain shift | " + " | ".join(conditions) + " |",
        "| --- |" + " --- |" * (len(conditions) + 2),
    ]
    for arm, rows in found.items():
        for metric in metrics if arm != "base" else ():
            shifts = {one: rows[one][metric] - found["base"][one][metric] for one in rows}
            plain = shifts["plain"]
            kept = [
                f"{shifts[one] / plain:.0%}" if one in shifts and abs(plain) >= LEAST else "-" for one in conditions
            ]
            lines.append(f"| {arm} | {metric} | {plain:+.2f} | " + " | ".join(kept) + " |")
    return "\n".join(lines)


def pair(text: str) -> tuple[str, list[str]]:
    """NAME=DIR[,DIR…] as a name and a chain."""
    name, _, chain = text.partition("=")
    if not name or not chain:
        raise argparse.ArgumentTypeError(f"{text!r} names no adapter; write NAME=DIR")
    return name, chain.split(",")


def main() -> int:
    """Command line."""
    parser = options(__doc__, "robust")
    parser.add_argument(
        "--arm", type=pair, action="append", default=[], metavar="NAME=DIR", help="an adapter; repeat it"
    )
    parser.add_argument("--conditions", nargs="+", default=list(CONDITIONS), choices=CONDITIONS)
    args = parser.parse_args()
    if "plain" not in args.conditions:
        parser.error("--conditions needs plain, which the others are compared with")
    return run(lambda: Robust(args).play())


if __name__ == "__main__":
    sys.exit(main())
