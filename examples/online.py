"""The loop without rounds, one adapter that learns from every batch: python examples/online.py --help

Each batch is generated steered by the model as it is, filtered, and learnt from by one step of the optimiser; the vector
and its dose are made anew every few batches. Prompts, filter, dose search, evaluation and the columns of the ledger are
those of examples/loop.py, so that arms of both stand in one table. By default 24 batches of 16 are as many steered
completions as 4 rounds of that loop. Rows also tell what had been spent by then: `generated` (steered completions),
`controls`, `probed` (for the dose), `steps` of the optimiser, and `train_tokens` (completion tokens in those steps).

Every evaluation leaves the adapter as a directory for `shl eval --adapter`, and the state of the optimiser, from which
a run that was killed continues; a larger --batches extends one that is finished.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

import torch
from filelock import FileLock
from loop import Loop
from safetensors.torch import load_file, save

import shl
from shl.core import console
from shl.core.files import atomic_dir, atomic_file
from shl.core.fused import fused
from shl.core.heal_data import encode, select
from shl.core.heal_log import Epoch, quantiles, total_norm
from shl.core.heal_loss import AGGS, REGS
from shl.core.heal_run import Run, adamw
from shl.core.locate import find
from shl.core.lora import injected, target_modules
from shl.core.models import rechain
from shl.core.peft_dir import Adapter, read_adapter, write_adapter
from shl.core.provenance import canonical, digest_bytes, read_safetensors
from shl.core.records import dumps
from shl.core.seeds import seed_of
from shl.core.tensors import save_safetensors
from shl.train import adapter_config, adapter_meta

Record = dict[str, Any]
BARRIER = ("reg", "agg", "lam", "tau", "lr")  # options that are the model's to recommend
FREE = ("arms", "arm", "batches", "free", "split", "out", "ledger", "study")  # options that may change in between


@dataclasses.dataclass
class Spent:
    """How far the run is and what it has taken."""

    batch: int = 0
    round: int = 0  # evaluations that are due or done
    generated: int = 0
    controls: int = 0
    probed: int = 0
    steps: int = 0
    train_tokens: int = 0


class Online(Loop):
    """The run: the factors of one adapter, their optimiser, and what every batch does to them."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(argparse.Namespace(**vars(args), arms=[], epochs=None))
        self.args.arms = [args.arm]  # of the table
        self.folder = self.run / args.arm
        given = {name: value for name in BARRIER if (value := getattr(args, name)) is not None}
        # nothing is held out, and a batch is seen in its own steps only
        once = {"epochs": 1, "grad_accum": 1, "holdout": 0.0, "patience": 0, "on_policy": 0, "ref": "base"}
        advice = find(args.model).recommended
        self.cfg = shl.configure(shl.TrainConfig, "train", advice, seed=args.seed, **once, **given)
        self.loaded = shl.load(args.model)
        modules = target_modules(self.loaded, self.cfg.layers, self.cfg.targets)
        self.config = adapter_config(self.loaded, modules, self.cfg)
        with injected(self.loaded, self.config, self.start()) as self.lora:
            pass  # out of the model again, the factors stay
        self.optimiser = adamw(self.lora, self.cfg)
        self.spent, self.tally = Spent(), shl.Tally()
        # since the last evaluation:
        self.kept: list[Record] = []
        self.rejects: list[Record] = []
        self.log: list[Record] = []

    def start(self) -> torch.Generator:
        """What `shl train` draws the first factors by."""
        return torch.Generator().manual_seed(seed_of(self.args.seed, "heal", "start"))

    # --- one batch ---

    def batch(self) -> None:
        """Generate, filter, learn."""
        spent = self.spent
        self.refresh()
        cfg = dataclasses.replace(
            self.gen, coeffs=(self.coeffs[spent.batch % len(self.coeffs)],), seed=10_000 * self.args.seed + spent.batch
        )
        # the vector may be some batches older than the adapter, on purpose
        said = list(shl.generate(self.loaded, self.chosen(spent.batch), cfg, self.teacher, allow_mismatch=True))
        mark = {"batch": spent.batch}  # a prompt comes again: its records are told apart by batch
        said = [one | mark | {"id": f"{one['id'].rpartition('/')[0]}/{spent.batch}"} for one in said]
        # controls first, for the limits, and what is kept already, so that it is not said twice
        judged = self.judge([*self.controls, *self.kept, *said], shl.Tally())
        fresh = [one for one in judged if one.get("batch") == spent.batch]
        for one in fresh:
            self.tally.add(one)
        kept = [one for one in fresh if one["keep"]]
        self.kept += kept
        self.rejects += [one for one in fresh if not one["keep"]]
        spent.generated += len(fresh)
        spent.batch += 1
        if kept:
            self.learn(kept)
        told = f", nll {self.log[-1]['nll']:.3g}" if kept else ", no step"
        console.note(f"batch {spent.batch}: kept {len(kept)} of {len(fresh)} at {cfg.coeffs[0]:g}{told}")

    def chosen(self, batch: int) -> list[Any]:
        """The next prompts of each kind; every pass over them is in an order of its own."""
        words = [prompt for prompt in self.prompts if prompt.id.startswith("words-")]
        scenes = [prompt for prompt in self.prompts if prompt not in words]
        found = []
        for name, kind, size in (("scenes", scenes, self.args.batch_scenes), ("words", words, self.args.batch_words)):
            turn, at = divmod(batch, max(1, len(kind) // max(1, size)))
            order = Random(seed_of(self.args.seed, "online", name, str(turn))).sample(kind, len(kind))
            found += order[at * size : (at + 1) * size]
        return found

    def refresh(self) -> None:
        """The vector, its doses and the controls that are in force, made when their turn comes and then read back."""
        begun = self.spent.batch - self.spent.batch % self.args.refresh
        folder = self.vectors(begun)
        if not folder.exists():
            how = {"cfg": self.vector, "name": self.persona.name, "axis": self.persona.axis}
            vector = shl.extract(self.loaded, self.persona.pos, self.persona.neg, **how)
            coeffs, probed = self.searched(vector, begun)
            gen = dataclasses.replace(self.gen, coeffs=(0.0,), seed=10_000 * self.args.seed + begun)
            controls = list(shl.generate(self.loaded, self.prompts, gen))
            with atomic_dir(folder) as made:
                vector.save(made / "v.safetensors")
                self.write(made / "controls.jsonl", controls)
                (made / "dose.json").write_text(canonical({"coeffs": coeffs, "probed": probed}), encoding="utf-8")
        self.teacher = shl.Vector.load(folder / "v.safetensors")
        self.controls = list(shl.read_records(folder / "controls.jsonl"))
        dose = json.loads((folder / "dose.json").read_text(encoding="utf-8"))
        self.coeffs = dose["coeffs"]
        if begun == self.spent.batch:
            self.spent.controls += len(self.controls)
            self.spent.probed += dose["probed"]

    def vectors(self, batch: int) -> Path:
        """Where what was made at a batch lies."""
        return self.folder / "vectors" / str(batch)

    def searched(self, vector: shl.Vector, batch: int) -> tuple[list[float], int]:
        """The doses, of which each batch takes the next, and how many completions their search took."""
        prompts = shl.pool(self.persona.axis)[-self.args.probe :]
        if self.args.coeff:
            return [coeff for coeff in self.args.coeff if coeff], 0
        cfg = shl.DoseConfig(prompts=len(prompts), seed=10_000 * self.args.seed + batch)
        found = shl.by_survival(self.loaded, vector, prompts, self.args.survival, cfg, shl.FilterConfig())
        console.note(f"batch {batch}: {found.value:.0%} survive at coefficient {found.coeff:.3g}")
        probed = len(prompts) * (len(found.readings) + 2)  # each of the two sweeps has its controls
        return [round(found.coeff * share, 3) for share in (0.7, 1.0)], probed

    def learn(self, kept: list[Record]) -> None:
        """The steps of one batch, against the base model."""
        rechain(self.loaded, [])
        examples = encode(self.loaded, select(kept, self.cfg), self.cfg)
        run = Run(self.loaded, self.cfg, examples, [], self.lora.modules)
        with (
            injected(self.loaded, self.config, self.start()) as inside,
            fused(self.loaded),
            run.below.standing_in(self.cfg.checkpointing),
        ):
            for _ in range(self.args.steps_per_batch):
                inside.put(self.lora.tensors())
                seen = Epoch()
                run.gradient(inside, [examples], seen)
                for own, other in zip(self.lora.parameters, inside.parameters, strict=True):
                    own.grad, other.grad = other.grad, None
                self.step()
                self.spent.train_tokens += sum(len(one.completion) for one in examples)
                self.log.append(self.line(seen, len(examples)))
        rechain(self.loaded, [self.adapter()])

    def step(self) -> None:
        """One step of the optimiser: linear warm-up, then a constant rate."""
        self.spent.steps += 1
        for group in self.optimiser.param_groups:
            group["lr"] = self.cfg.lr * min(1.0, self.spent.steps / max(1, self.args.warmup))
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)

    def line(self, seen: Epoch, n: int) -> Record:
        """One step in the log."""
        return {
            "epoch": self.spent.batch,
            "step": self.spent.steps,
            "nll": fmean(seen.nll),
            **quantiles("kl", torch.cat(seen.kl) if seen.kl else None),
            "barrier_active": seen.fired / n if seen.kl else None,
            "pressure": seen.pressure,
            "grad_norm": seen.grad[-1],
            "lr": self.optimiser.param_groups[0]["lr"],
            "update_norm": total_norm(self.lora.sizes().norms),
        }

    def adapter(self) -> Adapter:
        """The factors as they are, as one more adapter of a chain."""
        tensors = self.lora.tensors()
        return Adapter(self.folder / "adapter", self.config, tensors, {}, digest_bytes(save(tensors)))

    # --- evaluation and state ---

    def evaluate(self) -> None:
        """Publish what the batches since the last evaluation have come to, then read it."""
        self.tally.require(self.args.min_keep)
        folder = self.folder / f"r{self.spent.round}"
        self.write(folder / "keep.jsonl", self.kept)
        self.write(folder / "rejects.jsonl", self.rejects)
        begun = self.kept[0]["batch"]
        shl.Vector.load(self.vectors(begun - begun % self.args.refresh) / "v.safetensors").save(
            folder / "v.safetensors", force=True
        )
        rechain(self.loaded, [])
        meta = adapter_meta(self.loaded, self.cfg, self.kept, folder / "adapter") | {"n_train": len(self.kept)}
        with atomic_dir(folder / "adapter", force=True) as made:
            write_adapter(made, self.lora.tensors(), self.config, meta | {"online": dataclasses.asdict(self.spent)})
            self.write(made / "log.jsonl", self.log)
        self.spent.round += 1
        self.save()
        self.score()

    def score(self) -> None:
        """The row of the last evaluation, from the adapter as it was published."""
        number = self.spent.round - 1
        folder = self.folder / f"r{number}"
        rechain(self.loaded, [read_adapter(folder / "adapter")])
        spent = {name: value for name, value in dataclasses.asdict(self.spent).items() if name != "round"}
        label = {"arm": self.args.arm, "round": number, **spent}
        self.scores(folder / "eval.json", lambda: self.loaded, label)
        self.kept, self.rejects, self.log, self.tally = [], [], [], shl.Tally()

    def settings(self) -> Record:
        """What a run is continued with."""
        own = {name: value for name, value in vars(self.args).items() if name not in (*FREE, *BARRIER)}
        parts = {"train": self.cfg, "gen": self.gen, "vector": self.vector}
        told = {name: dataclasses.asdict(cfg) for name, cfg in parts.items()}
        return json.loads(canonical({**own, **told, "model_digest": self.loaded.digest}))

    def save(self) -> None:
        """The factors, the optimiser's moments, and what was spent."""
        tensors = {f"lora.{name}": value for name, value in self.lora.tensors().items()}
        for number, moments in self.optimiser.state_dict()["state"].items():
            tensors |= {f"adam.{number}.{name}": value for name, value in moments.items()}
        state = {"settings": self.settings(), "spent": dataclasses.asdict(self.spent)}
        save_safetensors(self.folder / "state.safetensors", tensors, {"shl": dumps(state)}, force=True)

    def restore(self) -> None:
        """Go on from the last evaluation, if there was one."""
        path = self.folder / "state.safetensors"
        if not path.exists():
            return
        state, tensors = json.loads(read_safetensors(path)[1]["shl"]), load_file(path)
        here = self.settings()
        if changed := sorted(name for name, value in here.items() if state["settings"].get(name) != value):
            raise shl.ShlError(f"{path} was begun with another {', '.join(changed)}", hint="choose another --out")
        self.lora.put({name.removeprefix("lora."): value for name, value in tensors.items()})
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for name in (name for name in tensors if name.startswith("adam.")):
            _, number, what = name.split(".")
            moments.setdefault(int(number), {})[what] = tensors[name]
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": moments})
        self.spent = Spent(**state["spent"])
        console.note(f"{path}: going on after batch {self.spent.batch}")
        self.score()

    def play(self) -> None:
        """All batches, with an evaluation every few and at the end; a run that starves says so in the ledger."""
        self.references()
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / ".lock"):
            self.restore()
            try:
                while self.spent.batch < self.args.batches:
                    self.batch()
                    if self.spent.batch % self.args.eval_every == 0 or self.spent.batch == self.args.batches:
                        self.evaluate()
            except shl.ShlError as error:
                if error.code != 3:
                    raise
                console.warn(f"{self.args.arm} stops at batch {self.spent.batch}: {error}")
                (self.folder / f"r{self.spent.round}").mkdir(exist_ok=True)
                self.stopped(self.args.arm, self.spent.round, error)


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="toy")
    add("--persona", default="authority", help="a bundled persona")
    add("--batches", type=int, default=24, help="a larger number goes on from a finished run")
    add("--batch-scenes", type=int, default=8, help="scenes a batch, each at one coefficient")
    add("--batch-words", type=int, default=8, help="small wrongs a batch, to be told in one word")
    add("--prompts", type=int, default=24, help="scenes that batches are drawn from")
    add("--words", type=int, default=24, help="small wrongs that batches are drawn from")
    add("--steps-per-batch", type=int, default=1)
    add("--refresh", type=int, default=6, help="batches by one vector, its doses and controls")
    add("--eval-every", type=int, default=6, help="batches")
    add("--warmup", type=int, default=4, help="steps until the full learning rate, which then stays")
    add("--reg", choices=REGS, help="this and the next four: without them what the model recommends")
    add("--agg", choices=AGGS)
    add("--lam", type=float)
    add("--tau", type=float)
    add("--lr", type=float)
    add("--coeff", type=float, nargs="+", help="doses, of which each batch takes the next; without them searched")
    add("--survival", type=float, default=0.8, help="share of a probe that passes the filter at the searched dose")
    add("--probe", type=int, default=16, help="prompts that the dose is searched on")
    add("--min-keep", type=int, default=8, help="with fewer kept completions between two evaluations the run stops")
    add("--free", type=int, default=128, help="free answers read in each evaluation")
    add("--split", default="test", choices=("dev", "test"))
    add("--seed", type=int, default=0)
    add("--arm", default="online", help="the name of its rows and of its folder in the run")
    add("--out", default="runs/online", help="the run folder")
    add("--ledger", default="results.tsv")
    add("--study", help="a label of the rows in the ledger")
    args = parser.parse_args()
    for name in ("batches", "steps_per_batch", "refresh", "eval_every", "min_keep"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is less than 1")
    return args


def main() -> int:
    """Run it; exit code 1 with one sentence for a problem that the user can mend."""
    try:
        online = Online(options())
        online.play()
        online.table()
        shl.trajectory(online.run, online.run / "trajectory.png", force=True)
        shl.write_report(online.run, online.run / "report.html", force=True)
    except shl.ShlError as error:
        console.say(f"shl: error: {error}" + (f"\nhint: {error.hint}" if error.hint else ""))
        return error.code
    return 0


if __name__ == "__main__":
    sys.exit(main())
