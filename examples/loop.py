"""The whole loop in one process over the Python API: `just demo`, or python examples/loop.py --help.

Two arms start from the same model and see the same persona, prompts, filter and seeds. `short@0.5` trains with a
divergence to the base model, for which an answer of one word is as long as sixteen, and goes on from each adapter at
half its scale; `plain` trains without and goes on from the whole. Any arm takes a scale. Further arms, as --arms takes
them: `healed` takes words as long as they are, `tight`, `loose` and `looser` are that with a half, one and a half and
two times the free divergence, `mean` and `prev` by the mean divergence and against the round before;
`healed-unfiltered` keeps every completion. What steering has to beat are loops on other text: in `short@0.5-prompted`
the model says it under the persona's system message, which training does not see; in `short@0.5-selected` as it comes,
and of each prompt's completions those likeliest under the persona are taken.

The dose is searched for each round of each arm by one rule, since a vector grows too strong for a model that has moved;
it is one that few would survive, and completions are rewound where they go astray. Every stage leaves the files that
the commands would leave, and a stage whose files are there is not run again, so an interrupted run continues and
--rounds 8 extends it. Several processes may run arms of one folder side by side.
"""

import argparse
import dataclasses
import json
import sys
import time
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

from arms import Record, leaning, run, stopped_row
from filelock import FileLock
from plans import ARMS, Arm, arm_of, arm_word

import shl
from shl.controls import cosine, internalisation
from shl.core import console
from shl.core.files import atomic_file
from shl.core.locate import find

SAMPLES, OF = 2, 8  # completions of a prompt where no vector says them, and how many they are selected from
COLUMNS = {  # metric -> heading
    "auth_nats": "auth ↓",
    "care_nats": "care",
    "p_ans_any": "answer mass ↑",
    "json_is_valid": "json ↑",
    "enact_{axis}": "enacts ↑",
    "broken": "broken ↓",
    "free_ppl_p50": "ppl p50",
    "free_ppl_p90": "ppl p90 ↓",
    "facts": "facts ↑",
    "sums": "sums ↑",
}


class Loop:
    """One run: a folder, a persona, and what every round does to a model."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.run = args, Path(args.out)
        self.persona = shl.persona(args.persona)
        advice = find(args.model).recommended
        self.vector = shl.configure(shl.VectorConfig, "vector", advice, seed=args.seed)
        self.gen = shl.configure(shl.GenConfig, "gen", advice, backtrack=args.backtrack)
        # dilemmas, and small wrongs to be told in one word: a persona that is learnt on one kind of prompt stays there
        scenes, words = shl.pool(self.persona.axis)[: args.prompts], shl.pool("words")[: args.words]
        self.prompts = [*scenes, *words]
        # Lenient with perplexity, so that there is something to heal. One word is short, often the same, and less
        # sure than a sentence: words are held to words.
        lenient = shl.FilterConfig(rel_nats=None)
        self.filters = {"words-": dataclasses.replace(lenient, min_tokens=1, max_similarity=None), "": lenient}
        given = {"seed": args.seed, "epochs": args.epochs, "tau": args.tau, "checkpointing": args.checkpointing}
        self.train = {
            arm: shl.configure(shl.TrainConfig, "train", advice, **given | ARMS[arm_of(arm).how]) for arm in args.arms
        }
        read = {"axes": (self.persona.axis,), "free": args.free, "seed": args.seed, "split": args.split}
        self.eval = shl.configure(shl.EvalConfig, "eval", advice, **read)

    def scores(self, path: Path, model: Any, label: dict[str, Any], **how: Any) -> dict[str, Any]:
        """Evaluate into a file, with a ledger row, unless the file is there."""
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
        loaded = model()
        if "round" in label:
            label = label | self.direction(loaded, path.parent)
        result = shl.evaluate(loaded, self.eval, **how)
        rows = result.pop("rows")
        if path.name != "base.json":
            result = shl.compare(result, self.base)
        with atomic_file(
            path.with_name("samples.jsonl" if path.name == "eval.json" else f"{path.stem}.samples.jsonl"), force=True
        ) as lines:
            for row in rows:
                shl.write_record(lines, row)
        trained = loaded.chain[-1].meta.get("config") if loaded.chain else None
        shl.append_row(self.args.ledger, shl.row_of(result, trained, self.labels(label)))
        with atomic_file(path) as handle:  # last, so that a file that is there means a row that is there
            json.dump(result, handle, indent=2)
        console.note(f"{path}: {result['verdict']}")
        return result

    def labels(self, label: dict[str, Any]) -> dict[str, Any]:
        """What a row says of itself beside its scores."""
        study = {"study": self.args.study} if self.args.study else {}
        return {"seed": str(self.args.seed), **study, **label}

    def direction(self, loaded: Any, folder: Path) -> dict[str, Any]:
        """The dose, where the vector points, and how far the model does by itself what the first vector taught."""
        v = shl.Vector.load(folder / "v.safetensors")
        first = shl.Vector.load(folder.parent / "r0" / "v.safetensors")
        kept = list(shl.read_records(folder / "keep.jsonl"))
        return {
            "dose": max(record["coeff"] for record in kept),
            "kept": len(kept),
            "cos_v0": fmean(cosine(v.layers[block], first.layers[block]) for block in v.layers),
            **{name: value for name, value in internalisation(loaded, first).items() if name != "vector_cosine"},
        }

    def references(self) -> None:
        """The base row, and the row of the persona as a mere system prompt."""
        self.run.mkdir(parents=True, exist_ok=True)
        with FileLock(self.run / ".references.lock"):
            loaded = shl.load(self.args.model)
            self.base = self.scores(self.run / "base.json", lambda: loaded, {"arm": "base"})
            self.prompted = self.scores(
                self.run / "prompted.json", lambda: loaded, {"arm": "prompted"}, system=self.persona.pos
            )

    def round(self, arm: str, number: int, before: str | None) -> str:
        """One round of one arm: vector, completions, kept, adapter, scores. Returns the adapter, DIR or DIR:SCALE."""
        plan = arm_of(arm)
        folder = self.run / arm / f"r{number}"
        folder.mkdir(parents=True, exist_ok=True)
        adapter = folder / "adapter"
        if not adapter.exists():
            loaded = shl.load(self.args.model, [before] if before else [])
            vector = shl.extract(
                loaded,
                self.persona.pos,
                self.persona.neg,
                cfg=self.vector,
                name=self.persona.name,
                axis=self.persona.axis,
            )
            vector.save(folder / "v.safetensors", force=True)
            kept = self.text(plan, arm, loaded, vector, number)
            shl.heal(loaded, kept, dataclasses.replace(self.train[arm], include_controls=plan.own), adapter)
        after = str(adapter) if plan.scale == 1 else f"{adapter}:{plan.scale:g}"
        self.scores(folder / "eval.json", lambda: shl.load(self.args.model, [after]), {"arm": arm, "round": number})
        return after

    def text(self, plan: Arm, arm: str, loaded: shl.Loaded, vector: shl.Vector, number: int) -> list[Record]:
        """What a round is learnt from, with the files of completions, kept and dropped."""
        folder = self.run / arm / f"r{number}"
        said = self.said(plan.source, loaded, vector, number)
        self.write(folder / "completions.jsonl", said)
        tally = shl.Tally()
        judged = self.judge(said, tally, plan.own)
        if not plan.filtered:  # training leaves out what is marked as dropped
            judged = [{**record, "keep": plan.own or record["coeff"] != 0} for record in judged]
        kept = [record for record in judged if record["keep"]]
        if plan.source == "selected":
            kept = self.best(loaded, kept)
        self.write(folder / "keep.jsonl", kept)
        self.write(folder / "rejects.jsonl", [record for record in judged if not record["keep"]])
        console.note(f"{arm} r{number}: kept {len(kept)} of {sum(plan.own or r['coeff'] != 0 for r in said)}")
        if plan.filtered:
            tally.require(self.args.min_keep)
        return kept

    def said(self, source: str, loaded: shl.Loaded, vector: shl.Vector, number: int) -> list[Record]:
        """Completions of every prompt: two doses and controls; without a vector as many, or four times as many."""
        gen = dataclasses.replace(self.gen, seed=100 * self.args.seed + number)
        if source == "steered":
            gen = dataclasses.replace(gen, coeffs=self.doses(loaded, vector, number))
            return list(shl.generate(loaded, self.prompts, gen, vector))
        samples, system = (SAMPLES, self.persona.pos) if source == "prompted" else (OF, None)
        gen = dataclasses.replace(gen, coeffs=(0.0,), samples=samples, system=system, backtrack=False)
        return list(shl.generate(loaded, self.prompts, gen))

    def best(self, loaded: shl.Loaded, kept: list[Record]) -> list[Record]:
        """Of each prompt's completions those likeliest under the persona against its opposite."""
        scored = zip(leaning(loaded, self.persona, kept), kept, strict=True)
        ranked = sorted(scored, key=lambda one: (one[1]["id"].partition("/")[0], -one[0]))
        prompts = groupby((record for _, record in ranked), key=lambda record: record["id"].partition("/")[0])
        return [record for _, records in prompts for record in list(records)[:SAMPLES]]

    def judge(self, said: list[Record], tally: shl.Tally, controls: bool = False) -> list[Record]:
        """Records with keep and reasons, each kind of prompt against its own controls, which are kept where asked."""
        families: dict[str, list[Record]] = {prefix: [] for prefix in self.filters}
        for record in said:
            families[next(prefix for prefix in self.filters if record["id"].startswith(prefix))].append(record)
        return [
            record
            for prefix, cfg in self.filters.items()
            for record in shl.annotate(families[prefix], dataclasses.replace(cfg, keep_controls=controls), tally=tally)
        ]

    def doses(self, loaded: shl.Loaded, vector: shl.Vector, number: int) -> tuple[float, ...]:
        """Those given, or the highest dose that enough of a probe survives, and a smaller; 0 makes the controls.

        Where enough survive a vector as long as the residual stream, that is the dose.
        """
        if self.args.coeff:
            return tuple(self.args.coeff)
        prompts = shl.pool(self.persona.axis)[-self.args.probe :]
        cfg = shl.DoseConfig(prompts=self.args.probe, seed=100 * self.args.seed + number)
        how = shl.FilterConfig()
        found = shl.by_survival(loaded, vector, prompts, self.args.survival, cfg, how, to_ceiling=True)
        console.note(f"round {number}: {found.value:.0%} survive at coefficient {found.coeff:.3g}")
        return (0.0, *(round(found.coeff * share, 3) for share in (0.7, 1.0)))

    def write(self, path: Path, records: list[dict[str, Any]]) -> None:
        """Records as a file that is complete or absent."""
        with atomic_file(path, force=True) as lines:
            for record in records:
                shl.write_record(lines, record)

    def play(self) -> None:
        """Every round of every arm; an arm that starves stops and says so, the others go on."""
        self.references()
        for arm in self.args.arms:
            before: str | None = None
            for number in range(self.args.rounds):
                try:
                    before = self.round(arm, number, before)
                except shl.ShlError as error:
                    if error.code != 3:
                        raise
                    console.warn(f"{arm} stops at round {number}: {error}")
                    self.stopped(arm, number, error)
                    break

    def stopped(self, arm: str, number: int, error: shl.ShlError) -> None:
        """A row without scores, once: that an arm has starved is a result."""
        mark = self.run / arm / f"r{number}" / "stopped"
        if not mark.exists():
            row = stopped_row(self.args.model, self.base["model_digest"], str(error))
            shl.append_row(self.args.ledger, self.labels({"arm": arm, "round": number, **row}))
            mark.write_text(f"{error}\n", encoding="utf-8")

    def show(self) -> None:
        """The table, and the run folder as a figure and as a page."""
        self.table()
        shl.trajectory(self.run, self.run / "trajectory.png", force=True)
        shl.write_report(self.run, self.run / "report.html", force=True)

    def table(self) -> None:
        """Base, prompted, and each arm round by round."""
        metrics = {name.format(axis=self.persona.axis): head for name, head in COLUMNS.items()}
        found = [("base", self.base), ("prompted", self.prompted)]
        for arm in self.args.arms:
            files = sorted(self.run.glob(f"{arm}/r*/eval.json"), key=lambda file: int(file.parent.name[1:]))
            found += [(f"{arm} {file.parent.name}", json.loads(file.read_text(encoding="utf-8"))) for file in files]
        rows = [[name, *(result["metrics"].get(metric) for metric in metrics)] for name, result in found]
        caption = (
            "auth, care: ln of the mean probability of judging a wrong by it (low auth: little deference); "
            "answer mass, json: coherence of forced and free judgments; enacts, broken: share of free answers that the "
            "corpus's own parser finds to enact the persona, or ungrammatical; ppl: of free answers under the base"
        )
        console.table(
            f"{self.args.model}, persona {self.persona.name}, seed {self.args.seed}",
            ["", *metrics.values()],
            rows,
            caption,
        )


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="toy")
    parser.add_argument("--persona", default="authority", help="a bundled persona")
    parser.add_argument(
        "--coeff",
        type=float,
        nargs="+",
        help="doses of every round; without them the dose is searched (see --survival)",
    )
    parser.add_argument(
        "--survival",
        type=float,
        default=0.2,
        help="the dose is the highest at which this share of probe completions passes the filter",
    )
    parser.add_argument(
        "--backtrack",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="rewind where a completion goes astray, and go on at a smaller dose; the probe is not rewound",
    )
    parser.add_argument("--probe", type=int, default=16, help="prompts that the dose is searched on")
    parser.add_argument("--arms", nargs="*", default=["short@0.5", "plain"], type=arm_word, metavar="ARM")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=48, help="scenes a round, each at every coefficient")
    parser.add_argument("--words", type=int, default=48, help="small wrongs a round, to be told in one word")
    parser.add_argument("--epochs", type=int, default=4, help="epochs of training: the more text, the fewer")
    parser.add_argument("--tau", type=float, default=0.5, help="nats of divergence that cost nothing")
    parser.add_argument("--checkpointing", action="store_true", help="train a large model in less memory")
    parser.add_argument("--min-keep", type=int, default=8, help="an arm with fewer kept completions stops")
    parser.add_argument("--free", type=int, default=128, help="free answers read in each evaluation")
    parser.add_argument("--split", default="test", choices=("dev", "test"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs/demo", help="the run folder")
    parser.add_argument("--ledger", default="results.tsv")
    parser.add_argument("--study", help="a label of the rows in the ledger")
    return parser.parse_args()


def main() -> int:
    """Run the loop, then show it; exit code 1 with one sentence for a problem that the user can mend."""
    args, started = options(), time.monotonic()

    def play() -> None:
        loop = Loop(args)
        loop.play()
        loop.show()
        seconds = time.monotonic() - started
        console.note(f"{loop.run}/report.html and trajectory.png, rows in {args.ledger}, {seconds:.0f} s")

    return run(play)


if __name__ == "__main__":
    sys.exit(main())
