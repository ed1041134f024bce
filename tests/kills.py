"""`make` of a run folder killed with -9 again and again: the same artifacts as a run that nothing happened to.

PYTHONPATH=tests python -m kills [--times 10] [--rounds 2] [--seed S]

Each time either make alone is killed, so that the command it had started lives on beside the next make, or everything
at once, as when a machine goes down. `just kills` runs the full count; the suite kills twice, on a shorter run.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from faults.world import meaning
from shl.core.strict import loads
from shl.new import create
from small import LENIENT, small_model

PATIENCE = 20  # makes that may fail while a command of a killed make still holds its output
TOLD = re.compile('<script type="application/json" id="data">(.*?)</script>', re.DOTALL)
LATE = "too late"
DATED = ("artifacts", "told")  # parts of a report that hold times and command lines


def options(model: str, rounds: int, arms: str = "healed plain") -> list[str]:
    """The variables of a run that is as small as a run can be."""
    given = {"MODEL": model, "ROUNDS": rounds, "ARMS": arms, "FREE": 2, "GEN": "-n 4", "FILTER": LENIENT}
    return [f"{name}={value}" for name, value in given.items()]


def start(folder: Path, given: Sequence[str]) -> subprocess.Popen[bytes]:
    """A make in a process group of its own; what it says is added to make.log beside the folder."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    known = {name: value for name, value in os.environ.items() if name not in ("SHL_MODEL", "MAKEFLAGS", "MAKELEVEL")}
    with open(folder.parent / "make.log", "ab") as log:
        return subprocess.Popen(["make", *given], cwd=folder, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                                env=known | {"PATH": path, "HF_HUB_OFFLINE": "1"}, start_new_session=True)  # fmt: skip


def strike(folder: Path, given: Sequence[str], after: float, everything: bool) -> str:
    """Start make, kill it after some seconds; returns what was hit."""
    begun = start(folder, given)
    try:
        code = begun.wait(after)
        return f"{LATE}: make had ended with {code}"
    except subprocess.TimeoutExpired:
        (os.killpg if everything else os.kill)(begun.pid, signal.SIGKILL)
        begun.wait()
        return "make and its commands" if everything else "make alone"


def complaint(folder: Path) -> str:
    """The last error that a command of make told."""
    log = (folder.parent / "make.log").read_text(encoding="utf-8", errors="replace")
    return next((line for line in reversed(log.splitlines()) if line.startswith("shl: error: ")), "without a word")


def finish(folder: Path, given: Sequence[str]) -> int:
    """Run make until it is done; returns how often it had to be called, because an orphan still held a file."""
    for attempt in range(1, PATIENCE + 1):
        if start(folder, given).wait() == 0:
            return attempt
        time.sleep(1)
    log = (folder.parent / "make.log").read_text(encoding="utf-8", errors="replace")
    raise AssertionError(f"make does not finish: {log[-3000:]}")


def visible(folder: Path) -> list[Path]:
    """The files of a run that are more than leftovers."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".lock")
    return [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def content(folder: Path) -> dict[str, Any]:
    """What every visible file says, whatever the time and the command line. A ledger is the set of its rows."""
    found: dict[str, Any] = {}
    for path in visible(folder):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".html":
            facts = loads(TOLD.search(path.read_text(encoding="utf-8"))[1])
            found[name] = {key: value for key, value in facts.items() if key not in DATED}
        elif path.suffix == ".tsv":  # an evaluation that was killed between its row and its file has two rows
            found[name] = {repr(sorted(row.items())) for row in meaning(path)}
        else:
            found[name] = meaning(path)
    return found


def differences(one: Path, other: Path) -> list[str]:
    """Files that only one of two runs has, or that do not say the same."""
    mine, theirs = content(one), content(other)
    names = sorted(mine.keys() | theirs.keys())
    missing = object()
    return [name for name in names if mine.get(name, missing) != theirs.get(name, missing)]


def main() -> int:
    """The full count: one run in peace, one that is killed all along, compared file by file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--arms", default="healed plain")
    parser.add_argument("--jobs", type=int, default=2, help="of make")
    parser.add_argument("--seed", type=int, default=None, help="of the moments [a new one each time]")
    args = parser.parse_args()
    seed = int(time.time()) if args.seed is None else args.seed
    rng = Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        given = [f"-j{args.jobs}", *options(small_model(root), args.rounds, args.arms)]
        calm, struck = root / "calm" / "run", root / "struck" / "run"  # the report says the folder's name
        for run in (calm, struck):
            run.parent.mkdir()
            create(run, rounds=args.rounds)
        begun = time.monotonic()
        finish(calm, given)
        seconds = time.monotonic() - begun
        print(f"in peace: {seconds:.0f} s, {len(content(calm))} files; seed of the moments {seed}")
        print("| kill | after s | hit | complete files then |\n| ---: | ---: | --- | ---: |")
        number = tries = 0
        while number < args.times and tries < 3 * args.times:
            # together three quarters of the run, and what a kill destroys is made again: so they fall on most of it
            after = rng.uniform(0, 1.5 * seconds / args.times)
            hit = strike(struck, given, after, everything=rng.random() < 0.5)
            late = hit.startswith(LATE)  # one that comes too late is none of the count
            number, tries = number + (not late), tries + 1
            why = f"; {complaint(struck)}" if late and not hit.endswith(" 0") else ""
            print(f"| {'-' if late else number} | {after:.1f} | {hit}{why} | {len(visible(struck))} |", flush=True)
        attempts = finish(struck, given)
        wrong = differences(calm, struck)
        rows = [len(meaning(run / "results.tsv")) for run in (calm, struck)]
        print(f"\nthen make, called {attempts} times: {len(content(struck))} files, {len(wrong)} differ {wrong}")
        print(f"rows of the ledger: {rows[0]} in peace, {rows[1]} when killed")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
