"""The loop without rounds, one adapter that learns from every batch: python examples/online.py --help

Each batch is generated steered by the model as it is, filtered, and learnt from by one step of the optimiser; every few
batches the vector, its doses and the controls are made anew. Prompts, filter, dose search, evaluation and columns of
the ledger are those of examples/loop.py, so that arms of both stand in one table: by default 48 batches of 16 are as
many steered completions as 4 rounds of that loop. Rows tell what was spent by then: `generated` (steered completions),
`controls`, `probed` (for the dose), `steps` of the optimiser, and `train_tokens` (completion tokens in those steps).

An evaluation leaves the adapter as a directory, for `shl eval --adapter`, and the state from which a killed run
continues; a larger --batches extends one that is finished.
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
from arms import run
from filelock import FileLock
from loop import Loop
from safetensors.torch import load_file, save

import shl
from shl.core import console
from shl.core.files import atomic_dir
from shl.core.fused import fused
from shl.core.heal_data import encode, select
from shl.core.heal_log import Epoch, quantiles, total_norm
from shl.core.heal_loss import AGGS, REGS
from shl.core.heal_part import put_back, state_of
from shl.core.heal_run import Run, adamw
from shl.core.lora import injected, target_modules
from shl.core.models import rechain
from shl.core.peft_dir import Adapter, read_adapter, write_adapter
from shl.core.provenance import canonical, digest_bytes, read_safetensors
from shl.core.seeds import seed_of
from shl.core.tensors import save_safetensors
from shl.train import adapter_config, adapter_meta

Record = dict[str, Any]
# options that the model recommends something for
ADVISED = {"reg": {"choices": REGS}, "agg": {"choices": AGGS}, **{key: {"type": float} for key in ("lam", "tau", "lr")}}
FREE = ("arms", "arm", "batches", "free", "split", "out", "ledger", "study")  # options that may change when it goes on
SPENT = ("batch", "round", "generated", "controls", "probed", "steps", "train_tokens")  # round: evaluations begun
# a batch is all data and its own epoch, nothing is held out, the reference is base
ONLINE = {"epochs": 1, "grad_accum": 1, "holdout": 0.0, "patience": 0, "on_policy": 0, "ref": "base"}


class Online(Loop):
    """The run: the factors of one adapter, their optimiser, and what every batch does to them."""

    def __init__(self, args: argparse.Namespace) -> None:
        loop = {"arms": [], "epochs": None, "backtrack": False, "checkpointing": False}  # what is the rounds' alone
        super().__init__(argparse.Namespace(**vars(args), **loop))
        self.args.arms = [args.arm]  # of the table
        self.folder = self.run / args.arm
        self.loaded = shl.load(args.model)
        given = {name: getattr(args, name) for name in ADVISED if getattr(args, name) is not None}
        advice = self.loaded.ref.recommended
        self.cfg = shl.configure(shl.TrainConfig, "train", advice, seed=args.seed, **ONLINE, **given)
        modules = target_modules(self.loaded, self.cfg.layers, self.cfg.targets)
        self.config = adapter_config(self.loaded, modules, self.cfg)
        start = torch.Generator().manual_seed(seed_of(args.seed, "heal", "start"))  # as shl train starts
        with injected(self.loaded, self.config, start) as self.lora:
            pass  # the factors stay when they are out of the model again
        self.optimiser, self.spent = adamw(self.lora, self.cfg), dict.fromkeys(SPENT, 0)
        self.begin()

    def begin(self) -> None:
        """Gather anew, until the next evaluation."""
        self.kept, self.rejects, self.log, self.tally = [], [], [], shl.Tally()

    def batch(self) -> None:
        """Generate, filter, learn."""
        self.refresh()
        number = self.spent["batch"]
        cfg = self.sampling(number, self.coeffs[number % len(self.coeffs)])
        # the vector may be some batches older than the adapter, on purpose
        made = shl.generate(self.loaded, self.chosen(number), cfg, self.teacher, allow_mismatch=True)
        # a prompt comes again: its records are told apart by batch
        said = [one | {"batch": number, "id": f"{one['id'].rpartition('/')[0]}/{number}"} for one in made]
        # controls first, for the limits, and what was kept before, so that it is not said twice
        judged = self.judge([*self.controls, *self.kept, *said], shl.Tally())
        fresh = [one for one in judged if one.get("batch") == number]
        for one in fresh:
            self.tally.add(one)
            (self.kept if one["keep"] else self.rejects).append(one)
        self.spent["generated"] += len(fresh)
        self.spent["batch"] += 1
        kept = [one for one in fresh if one["keep"]]
        if kept:
            self.learn(kept)
        told = f"nll {self.log[-1]['nll']:.3g}" if kept else "no step"
        console.note(f"batch {self.spent['batch']}: kept {len(kept)} of {len(fresh)} at {cfg.coeffs[0]:g}, {told}")

    def sampling(self, number: int, coeff: float) -> shl.GenConfig:
        """How a batch is sampled at one dose."""
        return dataclasses.replace(self.gen, coeffs=(coeff,), seed=10_000 * self.args.seed + number)

    def chosen(self, number: int) -> list[Any]:
        """The next prompts of each kind; every pass over them is in an order of its own."""
        scenes, words = ([p for p in self.prompts if p.id.startswith("words-") == one] for one in (False, True))
        found = []
        for kind, size in ((scenes, self.args.batch_scenes), (words, self.args.batch_words)):
            turn, at = divmod(number, max(1, len(kind) // max(1, size)))
            order = Random(seed_of(self.args.seed, "online", str(turn))).sample(kind, len(kind))
            found += order[at * size : (at + 1) * size]
        return found

    def vectors(self, number: int) -> Path:
        """Where the vector of a batch lies, its doses and controls."""
        return self.folder / "vectors" / str(number - number % self.args.refresh)

    def refresh(self) -> None:
        """Those that are in force, made when their turn comes and then read back."""
        folder, number = self.vectors(self.spent["batch"]), self.spent["batch"]
        if not folder.exists():
            sides, name = (self.persona.pos, self.persona.neg), self.persona.name
            vector = shl.extract(self.loaded, *sides, cfg=self.vector, name=name, axis=self.persona.axis)
            with atomic_dir(folder) as made:
                vector.save(made / "v.safetensors")
                controls = shl.generate(self.loaded, self.prompts, self.sampling(number, 0.0))
                self.write(made / "controls.jsonl", list(controls))
                (made / "dose.json").write_text(canonical(self.searched(vector, number)), encoding="utf-8")
        self.teacher = shl.Vector.load(folder / "v.safetensors")
        self.controls = list(shl.read_records(folder / "controls.jsonl"))
        dose = json.loads((folder / "dose.json").read_text(encoding="utf-8"))
        self.coeffs = dose["coeffs"]
        if number % self.args.refresh == 0:
            self.spent["controls"] += len(self.controls)
            self.spent["probed"] += dose["probed"]

    def searched(self, vector: shl.Vector, number: int) -> Record:
        """The doses, of which each batch takes the next, and how many completions their search took."""
        if self.args.coeff:
            return {"coeffs": [coeff for coeff in self.args.coeff if coeff] or [0.0], "probed": 0}
        prompts = shl.pool(self.persona.axis)[-self.args.probe :]
        cfg = shl.DoseConfig(prompts=len(prompts), seed=10_000 * self.args.seed + number)
        found = shl.by_survival(self.loaded, vector, prompts, self.args.survival, cfg, shl.FilterConfig())
        console.note(f"batch {number}: {found.value:.0%} survive at coefficient {found.coeff:.3g}")
        probed = len(prompts) * (len(found.readings) + 2)  # each of the two sweeps has its controls
        return {"coeffs": [round(found.coeff * share, 3) for share in (0.7, 1.0)], "probed": probed}

    def learn(self, kept: list[Record]) -> None:
        """The steps of one batch, against the base model."""
        rechain(self.loaded, [])
        examples = encode(self.loaded, select(kept, self.cfg), self.cfg)
        run = Run(self.loaded, self.cfg, examples, [], self.lora.modules)
        inside = injected(self.loaded, self.config, torch.Generator())
        with inside as lora, fused(self.loaded), run.below.standing_in(self.cfg.checkpointing):
            for _ in range(self.args.steps_per_batch):
                lora.put(self.lora.tensors())
                seen = Epoch()
                run.gradient(lora, [examples], seen)
                self.step(lora)
                self.spent["train_tokens"] += sum(len(one.completion) for one in examples)
                self.log.append(self.line(seen, len(examples)))
        now = self.lora.tensors()
        rechain(self.loaded, [Adapter(self.folder / "adapter", self.config, now, {}, digest_bytes(save(now)))])

    def step(self, lora: Any) -> None:
        """One step by the gradient of the factors in the model: linear warm-up, then a constant rate."""
        self.spent["steps"] += 1
        for own, other in zip(self.lora.parameters, lora.parameters, strict=True):
            own.grad, other.grad = other.grad, None
        for group in self.optimiser.param_groups:
            group["lr"] = self.cfg.lr * min(1.0, self.spent["steps"] / max(1, self.args.warmup))
        self.optimiser.step()

    def line(self, seen: Epoch, n: int) -> Record:
        """One step in the log, in the columns of a training's."""
        kl = quantiles("kl", torch.cat(seen.kl) if seen.kl else None)
        told = {"epoch": self.spent["batch"], "step": self.spent["steps"], "nll": fmean(seen.nll), **kl}
        told |= {"barrier_active": seen.fired / n if seen.kl else None, "pressure": seen.pressure}
        return told | {"grad_norm": seen.grad[-1], "update_norm": total_norm(self.lora.sizes().norms)}

    def evaluate(self) -> None:
        """Publish what the batches since the last evaluation have come to, then read it."""
        self.tally.require(self.args.min_keep)
        folder = self.folder / f"r{self.spent['round']}"
        self.write(folder / "keep.jsonl", self.kept)
        self.write(folder / "rejects.jsonl", self.rejects)
        begun = self.vectors(self.kept[0]["batch"])
        shl.Vector.load(begun / "v.safetensors").save(folder / "v.safetensors", force=True)
        rechain(self.loaded, [])
        meta = adapter_meta(self.loaded, self.cfg, self.kept, folder / "adapter")
        self.spent["round"] += 1
        with atomic_dir(folder / "adapter", force=True) as made:
            write_adapter(made, self.lora.tensors(), self.config, meta | {"spent": self.spent})
            self.write(made / "log.jsonl", self.log)
        facts = {"shl": canonical({"settings": self.settings(), "spent": self.spent})}
        save_safetensors(self.folder / "state.safetensors", state_of(self.lora, self.optimiser), facts, force=True)
        self.score()

    def score(self) -> None:
        """The row of the last evaluation, from the adapter as it was published."""
        number = self.spent["round"] - 1
        folder = self.folder / f"r{number}"
        rechain(self.loaded, [read_adapter(folder / "adapter")])
        self.scores(folder / "eval.json", lambda: self.loaded, {"arm": self.args.arm, "round": number})
        self.begin()

    def labels(self, label: Record) -> Record:
        """Rows of the arm also tell what was spent by then."""
        return super().labels(self.spent | label if "round" in label else label)

    def settings(self) -> Record:
        """What a run is continued with."""
        own = {name: value for name, value in vars(self.args).items() if name not in (*FREE, *ADVISED)}
        own |= {type(one).__name__: dataclasses.asdict(one) for one in (self.cfg, self.gen, self.vector)}
        return json.loads(canonical({**own, "model_digest": self.loaded.digest}))

    def restore(self) -> None:
        """Refuse other settings than those it was begun with; go on from the last evaluation, if there was one."""
        first, path, here = self.folder / "settings.json", self.folder / "state.safetensors", self.settings()
        state = json.loads(read_safetensors(path)[1]["shl"]) if path.exists() else {"settings": here}
        if not first.exists():  # vectors may lie there before the first state does
            self.write(first, [state["settings"]])
        begun = json.loads(first.read_text(encoding="utf-8"))
        if changed := sorted(name for name, value in here.items() if begun.get(name) != value):
            raise shl.ShlError(f"another {', '.join(changed)} began {self.folder}", hint="choose another --out")
        if not path.exists():
            return
        put_back(load_file(path), self.lora, self.optimiser)
        self.spent = state["spent"]
        console.note(f"{path}: going on after batch {self.spent['batch']}")
        self.score()

    def play(self) -> None:
        """All batches, with an evaluation every few and at the end; a run that starves says so in the ledger."""
        self.references()
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / ".lock"):
            self.restore()
            try:
                while self.spent["batch"] < self.args.batches:
                    self.batch()
                    if self.spent["batch"] % self.args.eval_every == 0 or self.spent["batch"] == self.args.batches:
                        self.evaluate()
            except shl.ShlError as error:
                if error.code != 3:
                    raise
                console.warn(f"{self.args.arm} stops at batch {self.spent['batch']}: {error}")
                (self.folder / f"r{self.spent['round']}").mkdir(exist_ok=True)
                self.stopped(self.args.arm, self.spent["round"], error)


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="toy")
    add("--persona", default="authority", help="a bundled persona")
    add("--batches", type=int, default=48, help="a larger number goes on from a finished run")
    add("--batch-scenes", type=int, default=8, help="scenes a batch, each at one coefficient")
    add("--batch-words", type=int, default=8, help="small wrongs a batch, to be told in one word")
    add("--prompts", type=int, default=48, help="scenes that batches are drawn from")
    add("--words", type=int, default=48, help="small wrongs that batches are drawn from")
    add("--steps-per-batch", type=int, default=1)
    add("--refresh", type=int, default=12, help="batches by one vector, its doses and controls")
    add("--eval-every", type=int, default=12, help="batches from one evaluation to the next")
    add("--warmup", type=int, default=4, help="steps until the full learning rate, which then stays")
    for name, kind in ADVISED.items():
        add(f"--{name}", **kind, help="without it what the model recommends")
    add("--coeff", type=float, nargs="+", help="doses, of which each batch takes the next; without them searched")
    add("--survival", type=float, default=0.8, help="share of a probe that passes the filter at the searched dose")
    add("--probe", type=int, default=16, help="prompts that the dose is searched on")
    add("--min-keep", type=int, default=8, help="with fewer kept completions by an evaluation the run stops")
    add("--free", type=int, default=128, help="free answers read in each evaluation")
    add("--split", default="test", choices=("dev", "test"))
    add("--seed", type=int, default=0)
    add("--arm", default="online", help="the name of its rows, and of its folder in the run")
    add("--out", default="runs/online", help="the run folder")
    add("--ledger", default="results.tsv")
    add("--study", help="a label of the rows in the ledger")
    args = parser.parse_args()
    if min(args.batches, args.steps_per_batch, args.refresh, args.eval_every, args.min_keep, args.probe) < 1:
        parser.error("batches, steps, --refresh, --eval-every, --min-keep and --probe are at least 1")
    return args


def main() -> int:
    """Run it; exit code 1 with one sentence for a problem that the user can mend."""
    args = options()

    def play() -> None:
        online = Online(args)
        online.play()
        online.show()

    return run(play)


if __name__ == "__main__":
    sys.exit(main())
