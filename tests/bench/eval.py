"""The native instrument against the package tinymfv, side by side: speed, and scores item by item.

    pip install -e '.[tinymfv]' && python tests/bench/eval.py [--think 64] [--limit 28] [--pairs 3]

Same weights, vignettes and budget of thought; interleaved pairs, medians of wall and of processor time. Ours is read
twice: as `shl eval` does it (own wording, thought ends where the model ends it, a free JSON reply on top), and by the
package's own protocol, in which nothing may end a thought. Prediction: the first at least three times faster, the
second about as fast on a CPU, where both compute the same prompts; scores of the second equal to 1e-3 nats.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import make_model
from shl.core import moral, package
from shl.core.defaults import EvalConfig
from shl.core.models import Loaded, load


def timed(run: Callable[[], Any]) -> tuple[float, float, Any]:
    """Wall seconds, processor seconds, and what came of it."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = run()
    return time.perf_counter() - wall, time.process_time() - cpu, found


def gap(rows: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[str, float]:
    """The largest difference over items in score (nats), answer mass, and nll of the prefill (nats)."""
    pairs = list(zip(rows, theirs, strict=True))
    return {
        "score": max(float(np.abs(np.array(a["score"]) - b["score"]).max()) for a, b in pairs),
        "mass": max(abs(a["p_ans_any"] - b["pmass_allowed"]) for a, b in pairs),
        "nll": max(abs(a["nll_json"] - b["nll_prefill"]) for a, b in pairs),
    }


def race(name: str, loaded: Loaded, args: argparse.Namespace) -> None:
    """One model: pairs of runs, and the items of the last pair."""
    tool = package.find()
    cfg = EvalConfig(suite="tinymfv:classic", limit=args.limit, think=args.think, batch_size=args.batch_size)
    chosen, found = package._chosen(tool, cfg, "classic")
    protocol = package.Protocol(pad_to=8, begin_twice=True)

    file = Path(tool.__file__).parent / "data" / "vignettes_classic_other_violate.jsonl"
    own = EvalConfig(vignettes=str(file), limit=args.limit, think=args.think, batch_size=args.batch_size)

    def theirs() -> list[dict[str, Any]]:
        report = tool.evaluate(
            loaded.model,
            loaded.tokenizer,
            vignettes=chosen,
            max_think_tokens=args.think,
            return_per_row=True,
            verbose=0,
        )
        return report["per_row"]

    def ours() -> list[dict[str, Any]]:
        return moral.rows_of(found, package.read_slots(loaded, cfg, found, None, protocol))

    times = []
    for _ in range(args.pairs):
        shl, there = timed(lambda: moral.read(loaded, own, None)), timed(theirs)
        same = timed(ours)
        times.append(
            (*(there[i] / shl[i] for i in (0, 1)), *(there[i] / same[i] for i in (0, 1)), there[1], shl[1], same[1])
        )
    wall, cpu, wall_same, cpu_same, *seconds = [statistics.median(column) for column in zip(*times, strict=True)]
    differences = ", ".join(f"{what} {value:.1e}" for what, value in gap(same[2], there[2]).items())
    print(
        f"| {name} | {len(found)} | {wall:.1f} / {cpu:.1f} | {wall_same:.1f} / {cpu_same:.1f} | "
        f"{seconds[0]:.1f} / {seconds[1]:.1f} / {seconds[2]:.1f} | {differences} |",
        flush=True,
    )


def main() -> None:
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--think", type=int, default=package.THINK)
    parser.add_argument("--limit", type=int, default=28)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--model", nargs="+", default=["toy", "qwen3", "llama"])
    args = parser.parse_args()
    print(f"{package.version()}, {args.think} tokens of thought, {args.pairs} pairs\n")
    print(
        "| model | vignettes | shl eval: times faster, wall / processor | the same by the package's protocol "
        "| processor seconds: package / shl eval / its protocol | largest differences by its protocol |\n"
        "| --- | ---: | ---: | ---: | ---: | --- |"
    )
    for name in args.model:
        with tempfile.TemporaryDirectory() as folder:
            loaded = load(name if name == "toy" else str(make_model(Path(folder), name)), device="cpu")
            race(name, loaded, args)


if __name__ == "__main__":
    main()
