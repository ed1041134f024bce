"""The study behind docs/results.md: python examples/study.py loops axes controls --seeds 100 101 --jobs 2 [--commit]

Every part is a list of jobs, and a job is one command line of this folder that adds rows to a ledger. A job whose rows
are in the ledger is not run again, here or in a fresh clone; the rows of a job that was killed are not taken over, and
what it has made is used when it is run again. With --commit each job's rows are committed as they come.

    loops      ten rounds of each arm on the three variants of the model, at a dose that most survive, nothing rewound
    axes       the same on the other personas
    backtrack  ten rounds at a dose that few survive, on completions that are rewound where they go astray: the demo's
    further    the same on the other personas
    controls   what healing has to beat, one round
    data       how much and how broken data; schedules, gate and backtracking as data
    filter     what is retained of the steered shift, with the filter and without
    price      what prompted and steered text costs in KL, and what comes of it, on three models and three personas
    online     an update for each batch instead of rounds
    robust     the models of `backtrack` under an opposing system message, in a long conversation, in other words;
               robust-gentle: those of `loops`; robust-other: those that learnt from other text than steered

Choose on --split dev with seeds 0 to 4; report on --split test with seeds 100 to 104.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from shl import results
from shl.core.console import note, warn

HERE = Path(__file__).parent
MODELS = ("toy", "toy:rare", "toy:never")
ARMS = ("healed", "plain", "plain@0.5", "healed@0.5", "short@0.5", "tight", "prev", "mean", "healed-unfiltered",
        "plain-unfiltered", "short@0.5-prompted", "short@0.5-selected")  # fmt: skip
GENTLE = "--survival 0.8 --no-backtrack --tau 0.25"  # the settings of the first loops, before those of the demo
SAME = ("study", "model", "arm", "seed", "round", "draw", "condition")  # two rows that agree in these are one result


@dataclass(frozen=True)
class Job:
    """A command line, the rows that say that it is done, and the jobs that have to end before."""

    name: str
    line: tuple[str, ...]
    rows: Mapping[str, str]
    needs: tuple[str, ...] = ()

    def done(self, ledger: list[results.Row]) -> bool:
        return any(all(row.get(column) == value for column, value in self.rows.items()) for row in ledger)


def loop(args: argparse.Namespace, study: str, model: str, seed: int, arm: str, *more: str) -> Job:
    """One arm of one loop; the arm `base` is the references alone. What choices are made by has a label of its own."""
    study += "-dev" if args.split == "dev" else ""
    run = f"{args.run}/{study}/{model.replace(':', '-')}/s{seed}"
    line = f"loop.py --model {model} --rounds {args.rounds} --seed {seed} --split {args.split} --study {study}"
    arms = () if arm == "base" else (arm,)
    needs = () if arm == "base" else (f"{study} {model} {seed} base",)
    keys = {"study": study, "model": model, "arm": arm, "seed": str(seed)}
    options = (*line.split(), "--out", run, *more, *shlex.split(args.loop), "--arms", *arms)
    return Job(f"{study} {model} {seed} {arm}", options, keys, needs)


def loops(args: argparse.Namespace, study: str = "loops", more: str = GENTLE) -> Iterator[Job]:
    """Seeds first, so that a study that is cut short has every arm."""
    for seed in args.seeds:
        for model in args.models:
            arms = [arm for arm in args.arms if arm != "tight" or more != GENTLE]  # where healed is as tight
            yield from (loop(args, study, model, seed, arm, *more.split()) for arm in ("base", *arms))


def axes(args: argparse.Namespace, study: str = "loops", more: str = GENTLE) -> Iterator[Job]:
    for seed in args.seeds:
        for persona in ("boldness", "humanity"):
            how = ("--persona", persona, *more.split())
            yield from (loop(args, f"{study}-{persona}", "toy", seed, arm, *how) for arm in ("base", *args.arms))


def one_round(args: argparse.Namespace, script: str, name: str, last: str, more: str, model: str, seed: int) -> Job:
    """A job of a script for one-round comparisons; `last` is the arm that it ends with."""
    run = f"{args.run}/{name}/{model.replace(':', '-')}/s{seed}"
    line = f"{script} --model {model} --seed {seed} --split {args.split} --study {name} --free 128 --out {run} {more}"
    keys = {"study": name, "model": model, "arm": last, "seed": str(seed)}
    return Job(f"{name} {model} {seed}", tuple(line.split()), keys)


def controls(args: argparse.Namespace) -> Iterator[Job]:
    """Twenty random vectors with the first seed; the other seeds have other contexts, samples and trainings."""
    for seed in args.seeds:
        for model in args.models:
            more = f"--raw 0.25 0.4 0.5 0.6 0.75 1 --random {0 if seed % 100 else 20}"
            yield one_round(args, "controls.py", "controls", "placebo", more, model, seed)


def data(args: argparse.Namespace) -> Iterator[Job]:
    for seed in args.seeds:
        yield one_round(args, "data.py", "data", "backtrack", "--parts size course", "toy", seed)


def filtered(args: argparse.Namespace) -> Iterator[Job]:
    for seed in args.seeds:
        yield one_round(args, "data.py", "filter", "kl_rev-kept", "--parts filter", "toy", seed)


def price(args: argparse.Namespace) -> Iterator[Job]:
    for seed in args.seeds:
        for model in args.models:
            for persona in ("authority", "humanity", "boldness"):
                more = f"--parts price --persona {persona}"
                yield one_round(args, "data.py", f"price-{persona}", "priced", more, model, seed)


# what is read under other conditions, as folders below a seed's: last rounds, and a third plain one, which is as sound
ROBUST = {
    "demo": {"short@0.5": "short@0.5/r{last}/adapter:0.5"},
    "gentle": {"healed": "healed/r{last}/adapter", "plain@0.5": "plain@0.5/r2/adapter:0.5"},
    "other": {arm: arm + "/r{last}/adapter:0.5" for arm in ("short@0.5-prompted", "short@0.5-selected")},
}


def robust(args: argparse.Namespace, which: str = "demo", study: str = "backtrack") -> Iterator[Job]:
    """The models that a study has ended with, under the conditions of robust.py."""
    arms = {arm: where.format(last=args.rounds - 1) for arm, where in ROBUST[which].items()}
    for seed in args.seeds:
        run = f"{args.run}/{study}/toy/s{seed}"
        more = " ".join(f"--arm {arm}={run}/{where}" for arm, where in arms.items())
        job = one_round(args, "robust.py", "robust", list(arms)[-1], more, "toy", seed)
        yield replace(job, name=f"robust {which} {seed}", needs=tuple(f"{study} toy {seed} {arm}" for arm in arms))


def online(args: argparse.Namespace) -> Iterator[Job]:
    """Twelve batches of sixteen are the completions of a round, and four steps on each its epochs."""
    for seed in args.seeds:
        line = f"online.py --seed {seed} --split {args.split} --study online --out {args.run}/online/toy/s{seed}"
        line += f" --batches {12 * args.rounds} --steps-per-batch 4 --lr 1e-3"
        keys = {"study": "online", "model": "toy", "arm": "online", "seed": str(seed)}
        yield Job(f"online toy {seed}", tuple(line.split()), keys)


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[Job]]] = {
    "loops": loops,
    "axes": axes,
    "backtrack": partial(loops, study="backtrack", more=""),
    "further": partial(axes, study="backtrack", more=""),
    "controls": controls,
    "data": data,
    "filter": filtered,
    "price": price,
    "robust": robust,
    "robust-gentle": partial(robust, which="gentle", study="loops"),
    "robust-other": partial(robust, which="other"),
    "online": online,
}


def number(text: str) -> Any:
    """A cell as what it was before it was text, so that it is written the same way again."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, int | float) and repr(value) == text else text


class Study:
    """Jobs side by side, and the one ledger that their rows go to."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.lock = args, threading.Lock()
        # in the order of PARTS, so that nobody waits for a job that comes later
        self.jobs = [job for part, jobs in PARTS.items() if part in args.parts for job in jobs(args)]
        self.ended = {job.name: threading.Event() for job in self.jobs}
        self.failed: list[str] = []

    def ledger(self) -> list[results.Row]:
        path = Path(self.args.ledger)
        return results.read_rows(path) if path.exists() and path.stat().st_size else []

    def run(self, job: Job) -> None:
        """A job that is not done, once those that it needs have ended."""
        try:
            for name in job.needs:
                if name in self.ended:
                    self.ended[name].wait()
            if job.done(self.ledger()):
                return
            rows = Path(self.args.run) / "rows" / f"{job.name}.tsv"
            rows.parent.mkdir(parents=True, exist_ok=True)
            line = [sys.executable, str(HERE / job.line[0]), *job.line[1:], "--ledger", str(rows)]
            with open(rows.with_suffix(".log"), "a", encoding="utf-8") as log:
                code = subprocess.run(line, stdout=log, stderr=log, env=self.environment(), check=False).returncode
            if code == 0:
                self.take(job, rows)
            else:
                self.failed.append(job.name)
                warn(f"{job.name}: exit code {code}, see {log.name}")
        finally:
            self.ended[job.name].set()

    def environment(self) -> dict[str, str]:
        """Cores are shared out; the number of threads changes the order of sums, so it is one unless told otherwise."""
        return {"OMP_NUM_THREADS": "1"} | dict(os.environ)

    def take(self, job: Job, rows: Path) -> None:
        """The rows that the ledger lacks, in one go with their commit."""
        with self.lock:
            known = {tuple(row.get(name, "") for name in SAME) for row in self.ledger()}
            new = [row for row in results.read_rows(rows) if tuple(row.get(name, "") for name in SAME) not in known]
            for row in new:
                results.append_row(self.args.ledger, {name: number(text) for name, text in row.items()})
            if self.args.commit and new:
                where = Path(self.args.ledger).resolve()
                for step in (("add",), ("commit", "-qm", f"Rows: {job.name}")):
                    subprocess.run(["git", "-C", str(where.parent), *step, "--", where.name], check=True)
        note(f"{job.name}: {len(new)} rows")

    def play(self) -> int:
        """All jobs in order, as many side by side as asked for; 1 if one failed."""
        left = [job for job in self.jobs if not job.done(self.ledger())]
        note(f"{len(left)} of {len(self.jobs)} jobs to run")
        if self.args.list:
            print("\n".join(shlex.join(("python", f"examples/{job.line[0]}", *job.line[1:])) for job in left))
            return 0
        with ThreadPoolExecutor(self.args.jobs) as pool:
            list(pool.map(self.run, self.jobs))
        return 1 if self.failed else 0


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=list(PARTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[100, 101, 102, 103, 104])
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="of loops and controls")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), help="of the loops, as examples/loop.py takes them")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--loop", default="", help="further options of examples/loop.py, in one word")
    parser.add_argument("--split", default="test", choices=("dev", "test"))
    parser.add_argument("--jobs", type=int, default=2, help="side by side, one core each")
    parser.add_argument("--run", default="runs/study", help="the folder for everything but rows")
    parser.add_argument("--ledger", default="results.tsv")
    parser.add_argument("--commit", action="store_true", help="commit the ledger after each job")
    parser.add_argument("--list", action="store_true", help="print the command lines that are left, and run nothing")
    return Study(parser.parse_args()).play()


if __name__ == "__main__":
    sys.exit(main())
