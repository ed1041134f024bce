"""The full counts: every command killed, interrupted, starved of disk, raced and cut off, and what came of it.

PYTHONPATH=tests python -m faults [--times 20] [--sample] [--command NAME] [--fault KIND] [--seed S]
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from faults import child, disk, pipes, world
from faults.strike import INTERRUPT, KILL, LATE, Reference, strike, together

SIZES = (disk.FILLED, "4k", "8k", "16k", "64k", "200k", "400k")
LIMITS = (0, 100, 1000, 4000, 20_000, 100_000)


class Tally:
    """What came of each kind of fault for each command."""

    def __init__(self, faults: list[str]) -> None:
        self.faults = faults  # the kinds that were asked for; none means all
        self.went: dict[tuple[str, str], Counter[str]] = {}
        self.defects: list[str] = []

    def note(self, fault: str, command: str, work: Callable[..., str], *given: Any) -> None:
        """Do it, and count how it went; a defect is told at once."""
        if self.faults and fault not in self.faults:
            return
        try:
            outcome = work(*given)
        except (AssertionError, OSError, ValueError) as error:
            outcome = "DEFECT"
            self.defects.append(f"{command}, {fault}: {type(error).__name__}: {error}")
            print(self.defects[-1], file=sys.stderr, flush=True)
        self.went.setdefault((fault, command), Counter())[outcome] += 1

    def hits(self, fault: str, command: str) -> int:
        """How many met the command before its end."""
        went = self.went.get((fault, command), Counter())
        return went.total() - went[LATE]

    def show(self, name: str) -> None:
        """The rows of one command, in markdown."""
        for (fault, command), went in self.went.items():
            if command == name:
                told = ", ".join(f"{outcome} {times}" for outcome, times in went.most_common())
                print(f"| {command} | {fault} | {went.total()} | {told} |", flush=True)


def main() -> int:
    """Run, print a table, and fail when anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20, help="of each kind of strike for each command")
    parser.add_argument("--cold", type=int, default=1, help="of these in a fresh interpreter")
    parser.add_argument("--sample", action="store_true", help="a few of everything, in a minute")
    parser.add_argument("--command", action="append", default=[])
    parser.add_argument("--fault", action="append", default=[], metavar="KIND", help="such as 'disk full'")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    child.warm()
    tally, begun = Tally(given.fault), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="shl-faults-") as scratch, contextlib.chdir(scratch):
        there = Path(scratch) / "world"
        world.build(there)
        pipes.make_sources(there)
        print("| command | fault | times | what came of it |\n| --- | --- | ---: | --- |", flush=True)
        chosen = [one for one in world.COMMANDS if not given.command or one.name in given.command]
        (_sample if given.sample else _everything)(chosen, there, Path(scratch), tally, given)
    total = sum(went.total() for went in tally.went.values())
    print(f"\n{total} faults, {len(tally.defects)} defects, {time.monotonic() - begun:.0f} s")
    return 1 if tally.defects else 0


def _everything(
    chosen: list[world.Command], there: Path, scratch: Path, tally: Tally, given: argparse.Namespace
) -> None:
    for command in chosen:
        rng, folder, name = Random(f"{given.seed}/{command.name}"), scratch / "case", command.name
        reference = Reference(command, there, folder)
        for number, fault in ((KILL, "kill -9"), (INTERRUPT, "Ctrl-C")):
            for i in range(6 * given.times):  # one that comes too late is none of the count
                if tally.hits(fault, name) == given.times:
                    break
                tally.note(fault, name, strike, reference, folder, number, rng, i < given.cold)
        if command.outputs:
            for size in SIZES if disk.mountable() else ():
                tally.note("disk full", name, disk.full, reference, folder, size)
            for largest in LIMITS:
                tally.note("file limit", name, disk.limited, reference, folder, largest)
            tally.note("read-only", name, disk.read_only, reference, folder)
            for _ in range(3):
                tally.note("three at once", name, _race, reference, folder)
        if name in pipes.WRITERS:
            tally.note("full stdout", name, disk.full_stdout, reference, folder)
            for _ in range(4):
                tally.note("reader closes", name, pipes.reader_closes, reference, folder, rng)
        for _ in range(8) if name in pipes.READERS else ():
            tally.note("writer dies", name, pipes.writer_dies, name, there, folder, rng)
        tally.show(name)


# which commands meet which fault in the sample, beside one strike each
SAMPLE = {
    "file limit": ("vector", "train", "filter", "gen"),
    "disk full": ("filter", "eval", "export"),
    "read-only": ("gen", "results"),
    "three at once": ("gen", "new", "eval"),
    "full stdout": ("filter", "info"),
    "reader closes": ("filter", "info"),
    "writer dies": ("filter", "score"),
}


def _sample(chosen: list[world.Command], there: Path, scratch: Path, tally: Tally, given: argparse.Namespace) -> None:
    """One strike of either kind for each command, and the other faults in turn."""
    rng, folder = Random(given.seed), scratch / "case"
    for i, command in enumerate(chosen):
        reference, name = Reference(command, there, folder), command.name
        number, fault = ((KILL, "kill -9"), (INTERRUPT, "Ctrl-C"))[i % 2]
        for _ in range(6):  # one that comes too late, as on a busy machine, has struck nothing
            if not tally.hits(fault, name):
                tally.note(fault, name, strike, reference, folder, number, rng)
        work: dict[str, tuple[Any, ...]] = {
            "file limit": (disk.limited, reference, folder, 1000),
            "disk full": (disk.full, reference, folder, disk.FILLED),
            "read-only": (disk.read_only, reference, folder),
            "three at once": (_race, reference, folder),
            "full stdout": (disk.full_stdout, reference, folder),
            "reader closes": (pipes.reader_closes, reference, folder, rng),
            "writer dies": (pipes.writer_dies, name, there, folder, rng),
        }
        for fault, names in SAMPLE.items():
            if name in names and (fault != "disk full" or disk.mountable()):
                tally.note(fault, name, *work[fault])
        tally.show(name)


def _race(reference: Reference, folder: Path) -> str:
    codes = together(reference, folder, 3)
    reference.check(folder, finished=True, rows=3)
    return f"{codes.count(0)} of 3 wrote"


if __name__ == "__main__":
    sys.exit(main())
