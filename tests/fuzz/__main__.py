"""The full count: so many damaged artifacts of each kind through every reader, in this process.

    PYTHONPATH=tests python -m fuzz [--cases N] [--seed S] [--kind KIND]

A case is named by kind, seed and number, so that one alone can be run again with --only.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

from fuzz.mutate import damage
from fuzz.readers import READERS, Defect, check
from fuzz.seeds import Blob, sound


def cases(kind: str, original: Blob, seed: int, count: int, first: int = 0) -> Iterator[tuple[int, Blob]]:
    """Numbered damaged copies; each follows from kind, seed and number alone."""
    for number in range(first, first + count):
        yield number, damage(kind, original, Random(f"{kind}/{seed}/{number}"))


def run(count: int, seed: int = 0, kinds: tuple[str, ...] = (), first: int = 0) -> tuple[Counter[str], list[str]]:
    """So many cases for each kind; how they went, and the defects."""
    went: Counter[str] = Counter()
    defects: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        (folder := Path(scratch) / "case").mkdir()
        (seeds := Path(scratch) / "sound").mkdir()
        originals = sound(seeds)
        for kind in kinds or originals:
            outcome = check(kind, originals[kind], originals[kind], folder)
            if outcome != "accepted":
                defects.append(f"{kind}: the sound artifact was {outcome}")
            for number, blob in cases(kind, originals[kind], seed, count, first):
                try:
                    went[f"{kind} {check(kind, blob, originals[kind], folder)}"] += 1
                except Defect as defect:
                    went[f"{kind} DEFECT"] += 1
                    cause = defect.__cause__
                    at = traceback.extract_tb(cause.__traceback__)[-1] if cause else None
                    place = f" at {Path(at.filename).name}:{at.lineno}" if at else ""
                    defects.append(f"{kind}/{seed}/{number}: {str(defect)[:300]}{place}")
    return went, defects


def main() -> int:
    """Run, print a table, and fail when there is a defect."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=24_000, help="over all kinds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", action="append", default=[])
    parser.add_argument("--only", metavar="KIND/SEED/NUMBER", help="one case, with its traceback")
    given = parser.parse_args()
    if given.only:
        kind, seed, number = given.only.split("/")
        with tempfile.TemporaryDirectory() as scratch:
            (folder := Path(scratch) / "case").mkdir()
            original = sound(Path(scratch))[kind]
            ((_, blob),) = cases(kind, original, int(seed), 1, int(number))
            for name, data in blob.items():
                print(f"--- {name or kind}: {data[:3000]!r}")
            print(check(kind, blob, original, folder))
        return 0
    begun = time.monotonic()
    kinds = tuple(given.kind)
    with contextlib.redirect_stderr(io.StringIO()):  # warnings about what was mended
        went, defects = run(-(-given.cases // (len(kinds) or len(READERS))), given.seed, kinds)
    for outcome, times in sorted(went.items()):
        print(f"{outcome:24} {times}")
    print(f"{went.total()} cases, {len(defects)} defects, {time.monotonic() - begun:.0f} s")
    for defect in defects[:60]:
        print(defect, file=sys.stderr)
    return 1 if defects else 0


if __name__ == "__main__":
    sys.exit(main())
