"""Heal: distil kept completions into a LoRA while a divergence to a reference model holds it back."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shl.core import console
from shl.core.defaults import TrainConfig
from shl.core.errors import ShlError
from shl.core.files import atomic_dir, refuse_existing
from shl.core.heal_data import encode, select, split
from shl.core.heal_log import expectations, quantiles, report, total_norm
from shl.core.heal_loss import AGGS, REGS
from shl.core.heal_own import own_answers, own_divergence
from shl.core.heal_part import Checkpoint
from shl.core.heal_run import Diverged, Run
from shl.core.lora import injected, target_modules
from shl.core.models import Loaded
from shl.core.offload import refuse_away
from shl.core.peft_dir import peft_config, write_adapter
from shl.core.provenance import digest_of, header
from shl.core.records import dumps

_SETTINGS = ("config", "model_digest", "adapters", "data")  # what an unfinished training is continued with


@dataclass
class TrainResult:
    """What a training did: where the adapter lies, and its log, one row an epoch."""

    path: Path
    digest: str
    rows: list[dict[str, Any]] = field(repr=False)
    n_train: int
    n_holdout: int
    steps: int
    tokens: int  # completion tokens in one epoch
    seconds: float
    update_norm: float

    @property
    def tokens_per_second(self) -> float:
        """Completion tokens trained on in a second of the whole call."""
        return self.tokens * (len(self.rows) - 1) / self.seconds


def heal(
    loaded: Loaded,
    records: Iterable[dict[str, Any]],
    cfg: TrainConfig | None = None,
    out: Path | str = "adapter",
    force: bool = False,
    *,
    source: str = "the records",
) -> TrainResult:
    """Train this round's adapter on top of the loaded chain, and publish it as a PEFT directory."""
    started = time.monotonic()
    cfg, out = cfg or TrainConfig(), Path(out)
    _check(loaded, cfg, out, force)
    used = select(records, cfg, source)
    train, held = split(used, encode(loaded, used, cfg), cfg)
    if cfg.patience and not held:
        raise ShlError(
            f"nothing of {source} is held out, so no held-out nll can stop the training",
            hint="leave --patience out, raise --holdout, or give more prompts",
        )
    modules = target_modules(loaded, cfg.layers, cfg.targets)
    config = adapter_config(loaded, modules, cfg)
    settings = {name: value for name, value in adapter_meta(loaded, cfg, used, out).items() if name in _SETTINGS}
    part = Checkpoint(out, {**settings, "dtype": str(loaded.dtype)}, force)

    def write(where: Path, force: bool, **facts: Any) -> str:
        good = run.good
        meta = adapter_meta(loaded, cfg, used, where) | {"n_train": len(train), "n_holdout": len(held), "lam": run.lam}
        meta |= {"epochs_run": len(good.rows) - 1, "epoch_kept": good.epoch}
        meta |= {"update_norms": good.sizes.norms, "operator_norms": good.sizes.largest}
        with atomic_dir(where, force) as folder:
            digest = write_adapter(folder, good.tensors, config, meta | facts)
            (folder / "log.jsonl").write_text("".join(dumps(row) + "\n" for row in good.rows), encoding="utf-8")
        return digest

    try:
        run = Run(loaded, cfg, train, held, modules)
        with injected(loaded, config, run.generator("start")) as lora:
            run.fit(lora, part)
            own = own_answers(loaded, cfg, [*held, *train])
        total, rows = total_norm(run.good.sizes.norms), run.good.rows
        if not 0 < total < math.inf:
            raise ShlError(f"the adapter did not move: its norm is {total}", hint="raise --lr or --epochs")
        rows[-1] |= quantiles("own_kl", own_divergence(loaded, cfg, own, run.reg))
        rows[-1]["should"] = expectations(rows, cfg, first_round=not loaded.chain)
        digest = write(out, force)
        part.drop()
    except Diverged as stop:
        part.drop()  # the same line would end the same way again
        raise Diverged(_keep_good(run, stop.message, out, write), hint=stop.hint) from None
    finally:
        part.release()
    tokens = sum(len(one.completion) for one in train)
    result = TrainResult(out, digest, rows, len(train), len(held), run.step, tokens, time.monotonic() - started, total)
    report(rows)
    console.note(
        f"trained on {result.n_train} completions, {result.tokens} tokens an epoch, {result.steps} steps "
        f"in {result.seconds:.1f} s: {result.path}, norm {result.update_norm:.3g}, {result.digest[:19]}…"
    )
    return result


def _check(loaded: Loaded, cfg: TrainConfig, out: Path, force: bool) -> None:
    """Refuse what cannot work before anything is computed."""
    for name, value, known in (("reg", cfg.reg, REGS), ("agg", cfg.agg, AGGS), ("ref", cfg.ref, ("base", "prev"))):
        if value not in known:
            raise ShlError(f"unknown {name} {value!r}", hint=f"use --{name} {'|'.join(known)}")
    counts = {"rank": cfg.rank, "epochs": cfg.epochs, "batch-size": cfg.batch_size, "grad-accum": cfg.grad_accum,
              "shortest": cfg.shortest}  # fmt: skip
    for name, count in counts.items():
        if count < 1:
            raise ShlError(f"{name} is {count}", hint=f"use --{name} 1 or more")
    if not 0 <= cfg.holdout < 1:
        raise ShlError(f"holdout is {cfg.holdout:g}", hint="give a share from 0 up to, not including, 1")
    for name, count in {"ref-top-k": cfg.ref_top_k, "patience": cfg.patience, "on-policy": cfg.on_policy}.items():
        if count < 0:
            raise ShlError(f"{name} is {count}", hint=f"use --{name} 0 or more")
    if cfg.shortest > 1 and cfg.agg not in ("mean", "rmse"):
        raise ShlError(f"shortest does nothing to agg {cfg.agg}", hint="use --agg mean or rmse")
    if cfg.lam_decay < 0:
        raise ShlError(f"lam-decay is {cfg.lam_decay:g}", hint="use --lam-decay 0 or more")
    refuse_away(loaded, "nothing can be trained on it", "use --dtype bfloat16, more GPUs, or --device cpu")
    refuse_existing(out, force)
    if any(Path(adapter.path).resolve() == out.resolve() for adapter in loaded.chain):
        raise ShlError(f"{out} is part of the chain that is being trained on", hint="choose another -o")


def _keep_good(run: Run, why: str, out: Path, write: Callable[..., str]) -> str:
    """Training that ran away: the adapter as the last sound epoch left it goes beside the output, under a free name."""
    epoch = len(run.good.rows) - 1
    if epoch < 1:
        return f"{why}; no epoch had ended, so nothing was written"
    names = (out.with_name(f"{out.name}.epoch{epoch}" + (f"-{i}" if i > 1 else "")) for i in itertools.count(1))
    kept = next(name for name in names if not name.exists())
    write(kept, False, stopped=why)
    return f"{why}; the adapter of epoch {epoch}, the last that was sound, is in {kept}"


# --- what is written and said ---


def adapter_config(loaded: Loaded, modules: list[str], cfg: TrainConfig) -> dict[str, Any]:
    """The adapter_config.json of a training on these modules."""
    from transformers.pytorch_utils import Conv1D

    alpha = 2.0 * cfg.rank if cfg.alpha is None else float(cfg.alpha)
    transposed = {isinstance(loaded.model.get_submodule(path), Conv1D) for path in modules}
    if len(transposed) > 1:
        raise ShlError("these blocks mix two kinds of linear maps", hint="choose one kind with --target")
    return peft_config(
        loaded.ref.path, modules, cfg.rank, alpha, revision=loaded.ref.revision, fan_in_fan_out=transposed.pop()
    )


def adapter_meta(loaded: Loaded, cfg: TrainConfig, used: list[dict[str, Any]], out: Path) -> dict[str, Any]:
    """Where the adapter came from: model, chain, data, vectors."""
    home = os.path.realpath(out)
    parents = [
        {"path": os.path.relpath(os.path.realpath(one.path), home), "digest": one.digest, "scale": one.scale}
        for one in loaded.chain
    ]
    data = [[one["prompt"], one["completion"], one.get("finish")] for one in used]
    return {
        **header("train", asdict(cfg), parents),
        "model": loaded.ref.id,
        "revision": loaded.ref.revision,
        "model_digest": loaded.digest,
        "model_class": type(loaded.model).__name__,
        "template": loaded.template_digest,
        "adapters": loaded.adapters,
        "data": digest_of(data),
        "n_records": len(used),
        "coeffs": sorted({one["coeff"] for one in used if one.get("coeff") is not None}),
        "vectors": sorted({one["vector"] for one in used if one.get("vector")}),
    }
