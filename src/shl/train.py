"""Heal: distil kept completions into a LoRA while a divergence to a reference model holds it back."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shl.core import console
from shl.core.defaults import TrainConfig
from shl.core.errors import ShlError
from shl.core.files import atomic_dir, refuse_existing
from shl.core.head import Head, completion_states
from shl.core.heal_data import Example, batches, encode, select, split
from shl.core.heal_log import Epoch, mean, quantiles, report, total_norm
from shl.core.heal_loss import AGGS, REGS, Losses, combine, token_losses
from shl.core.lora import Lora, injected, target_modules
from shl.core.memory import batched
from shl.core.models import Loaded
from shl.core.peft_dir import peft_config, write_adapter
from shl.core.provenance import digest_of, header
from shl.core.records import dumps
from shl.core.seeds import seed_of


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
    modules = target_modules(loaded, cfg.layers, cfg.targets)
    config = _adapter_config(loaded, modules, cfg)
    run = _Run(loaded, cfg, train, held)

    def write(state: _State, where: Path, force: bool, **facts: Any) -> str:
        meta = _meta(loaded, cfg, used, where) | {"n_train": len(train), "n_holdout": len(held)}
        with atomic_dir(where, force) as folder:
            digest = write_adapter(folder, state.tensors, config, meta | {"update_norms": state.norms} | facts)
            (folder / "log.jsonl").write_text("".join(dumps(row) + "\n" for row in state.rows), encoding="utf-8")
        return digest

    try:
        with injected(loaded, config, run.generator("start")) as lora:
            run.fit(lora)
    except _Diverged as stop:
        raise _Diverged(_keep_good(run, stop.message, out, write), hint=stop.hint) from None
    total, rows = total_norm(run.good.norms), run.good.rows
    if not 0 < total < math.inf:
        raise ShlError(f"the adapter did not move: its norm is {total}", hint="raise --lr or --epochs")
    digest = write(run.good, out, force)
    tokens = sum(len(one.completion) for one in train)
    result = TrainResult(out, digest, rows, len(train), len(held), run.step, tokens, time.monotonic() - started, total)
    report(rows, cfg, first_round=not loaded.chain)
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
    counts = {"rank": cfg.rank, "epochs": cfg.epochs, "batch-size": cfg.batch_size, "grad-accum": cfg.grad_accum}
    for name, count in counts.items():
        if count < 1:
            raise ShlError(f"{name} is {count}", hint=f"use --{name} 1 or more")
    if not 0 <= cfg.holdout < 1:
        raise ShlError(f"holdout is {cfg.holdout:g}", hint="give a share from 0 up to, not including, 1")
    refuse_existing(out, force)
    if any(Path(adapter.path).resolve() == out.resolve() for adapter in loaded.chain):
        raise ShlError(f"{out} is part of the chain that is being trained on", hint="choose another -o")


def _keep_good(run: _Run, why: str, out: Path, write: Callable[..., str]) -> str:
    """Training that ran away: the adapter as the last sound epoch left it goes beside the output, under a free name."""
    epoch = len(run.good.rows) - 1
    if epoch < 1:
        return f"{why}; no epoch had ended, so nothing was written"
    names = (out.with_name(f"{out.name}.epoch{epoch}" + (f"-{i}" if i > 1 else "")) for i in itertools.count(1))
    kept = next(name for name in names if not name.exists())
    write(run.good, kept, False, stopped=why)
    return f"{why}; the adapter of epoch {epoch}, the last that was sound, is in {kept}"


# --- the loop ---


class _Diverged(ShlError):
    """A number of the training is not finite."""


class _State(NamedTuple):
    """The adapter at the end of an epoch, on the CPU, and the log up to there."""

    tensors: dict[str, Tensor]
    norms: dict[str, float]
    rows: list[dict[str, Any]]


class _Part(NamedTuple):
    """What one forward and backward pass gave."""

    grads: tuple[Tensor, ...]
    nll: list[float]
    kl: Tensor
    fired: int
    pressure: float | None


class _Run:
    """One training: data, reference, schedule."""

    def __init__(self, loaded: Loaded, cfg: TrainConfig, train: list[Example], held: list[Example]) -> None:
        self.loaded, self.cfg, self.train, self.held = loaded, cfg, train, held
        self.barrier = cfg.reg != "nll"
        self.reg = cfg.reg if self.barrier else "kl_rev"  # what the held-out divergence is, in any case
        self.per_epoch = math.ceil(math.ceil(len(train) / cfg.batch_size) / cfg.grad_accum)
        self.total = self.per_epoch * cfg.epochs
        self.step = 0
        self.head = Head.of(loaded)
        self.head.check(loaded, train[0].prompt + train[0].completion)
        self.good = _State({}, {}, [])
        self.ref: dict[int, Tensor] = {}  # final hidden states over the completion, by identity of the example
        with _reference(loaded, cfg):
            self.ref_head = Head.of(loaded)
            self._remember([*(train if self.barrier else []), *held])

    def generator(self, purpose: str) -> torch.Generator:
        """Random numbers for one purpose, from the seed alone."""
        return torch.Generator().manual_seed(seed_of(self.cfg.seed, "heal", purpose))

    @torch.no_grad()
    def _remember(self, examples: list[Example]) -> None:
        order = sorted(examples, key=len, reverse=True)
        for chosen, states in self._batched(order, lambda batch: self._states(batch)[0].cpu(), "reading the base"):
            parts = states.split([len(one.completion) for one in chosen])
            self.ref |= {id(one): part.clone() for one, part in zip(chosen, parts, strict=True)}

    def _batched(self, examples: list[Example], work: Callable[[Sequence[Example]], Any], what: str) -> Iterator[Any]:
        return batched(self.loaded, examples, self.cfg.batch_size, work, what)

    def _states(self, chosen: Sequence[Example]) -> tuple[Tensor, Tensor]:
        """Hidden states that predict the completion tokens, one after the other, and those tokens."""
        return completion_states(self.loaded, [(one.prompt, one.completion) for one in chosen])

    def _tokens(self, chosen: Sequence[Example], divergence: bool) -> tuple[Tensor, Tensor]:
        """nll and KL of each completion token of a batch."""
        hidden, targets = self._states(chosen)
        ref = torch.cat([self.ref[id(one)] for one in chosen]).to(hidden.device) if divergence else None
        return token_losses(hidden, targets, self.head, ref, self.ref_head, self.reg)

    def fit(self, lora: Lora) -> None:
        """All epochs. `good` is the state at the end of the last; row 0 of its log is that before training."""
        cfg = self.cfg
        optimiser = torch.optim.AdamW(lora.parameters, lr=cfg.lr, betas=(0.9, 0.95), weight_decay=cfg.weight_decay)
        shuffle = self.generator("batches")
        self.good = _State({}, {}, [self._row(0, Epoch(), lora)])
        with console.progress("healing", self.total) as bar:
            for epoch in range(1, cfg.epochs + 1):
                seen = Epoch()
                plan = batches([len(one) for one in self.train], cfg.batch_size, shuffle)
                for at in range(0, len(plan), cfg.grad_accum):
                    group = [[self.train[i] for i in batch] for batch in plan[at : at + cfg.grad_accum]]
                    self._update(lora, optimiser, group, seen)
                    bar.advance(nll=sum(seen.nll[-len(group[-1]) :]) / len(group[-1]), epoch=epoch)
                self.good = _State(lora.tensors(), lora.norms(), [*self.good.rows, self._row(epoch, seen, lora)])

    def _update(self, lora: Lora, optimiser: torch.optim.Optimizer, group: list[list[Example]], seen: Epoch) -> None:
        """One step of the optimiser over a group of micro-batches."""
        cfg, n = self.cfg, sum(map(len, group))
        for batch in group:
            first = seen.pressure is None and self.barrier
            for chosen, part in self._batched(batch, partial(self._gradients, lora, first), "training on"):
                for weight, grad in zip(lora.parameters, part.grads, strict=True):
                    grad = grad * (len(chosen) / n)
                    weight.grad = grad if weight.grad is None else weight.grad.add_(grad)
                seen.nll += part.nll
                seen.fired += part.fired
                seen.pressure = part.pressure if seen.pressure is None else seen.pressure
                if self.barrier:
                    seen.kl.append(part.kl)
        if cfg.spectral:
            (cfg.spectral * lora.operator_norm()).backward()
        norm = torch.nn.utils.clip_grad_norm_(lora.parameters, cfg.max_grad_norm or math.inf)
        self._finite(norm)
        seen.grad.append(float(norm))
        for parameters in optimiser.param_groups:
            parameters["lr"] = cfg.lr * schedule(self.step, self.total, cfg.warmup)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        self.step += 1

    def _gradients(self, lora: Lora, first: bool, batch: Sequence[Example]) -> _Part:
        """The mean loss over a batch, and its gradient, which stays apart: a batch that does not fit is begun again."""
        cfg = self.cfg
        nll, kl = self._tokens(batch, self.barrier)
        lengths = [len(one.completion) for one in batch]
        losses = combine(nll, kl, lengths, cfg.reg, cfg.agg, cfg.lam, cfg.tau)
        loss = losses.nll + losses.barrier
        self._finite(loss.detach())
        pressure = _pressure(losses, lora) if first else None
        grads = torch.autograd.grad(loss, lora.parameters, materialize_grads=True)
        per_row = [float(one.mean()) for one in nll.detach().split(lengths)]
        return _Part(grads, per_row, kl.detach().cpu(), losses.fired, pressure)

    def _finite(self, value: Tensor | float, what: str = "the loss or its gradient") -> None:
        if not math.isfinite(found := float(value)):
            raise _Diverged(
                f"{what} is {found} at step {self.step} of {self.total}",
                hint="lower --lr or --lam; in float16 use --dtype bfloat16 or float32",
            )

    @torch.no_grad()
    def _row(self, epoch: int, seen: Epoch, lora: Lora) -> dict[str, Any]:
        """One line of the log. What was not measured is null."""
        kl = torch.cat(seen.kl) if seen.kl else None
        for weight in lora.parameters:
            self._finite(weight.abs().max(), "the adapter")
        held_nll, held_kl = self._held_out()
        row: dict[str, Any] = {
            "epoch": epoch,
            "step": self.step,
            "nll": mean(seen.nll),
            **quantiles("kl", kl),
            "barrier_active": seen.fired / len(self.train) if self.barrier and epoch else None,
            "pressure": seen.pressure,
            "grad_norm": mean(seen.grad),
            "holdout_nll": held_nll,
            **quantiles("holdout_kl", held_kl),
            "update_norm": total_norm(lora.norms()),
            "operator_norm": float(lora.operator_norm()),
        }
        for name, value in row.items():
            self._finite(value or 0.0, name)
        return row

    def _held_out(self) -> tuple[float | None, Tensor | None]:
        per_row, kls = [], []
        for chosen, (nll, kl) in self._batched(self.held, partial(self._tokens, divergence=True), "reading held-out"):
            per_row += [float(one.mean()) for one in nll.split([len(one.completion) for one in chosen])]
            kls.append(kl.cpu())
        return mean(per_row), torch.cat(kls) if kls else None


@contextmanager
def _reference(loaded: Loaded, cfg: TrainConfig) -> Iterator[None]:
    """The weights that the divergence is measured against: without the chain, or with it."""
    if cfg.ref == "base":
        with loaded.base():
            yield
    else:
        yield


def schedule(step: int, total: int, warmup: float) -> float:
    """Share of the full learning rate at a step: linear warm-up, then a cosine towards zero."""
    rise = max(1, round(warmup * total))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise + 1) / (total - rise + 1)))


def _pressure(losses: Losses, lora: Lora) -> float:
    """How hard the barrier pulls beside the nll: the ratio of their gradients' norms."""
    if not losses.fired:
        return 0.0
    parts = [
        torch.cat([g.flatten() for g in torch.autograd.grad(part, lora.parameters, retain_graph=True)]).norm()
        for part in (losses.barrier, losses.nll)
    ]
    return float(parts[0] / parts[1].clamp_min(1e-30))


# --- what is written and said ---


def _adapter_config(loaded: Loaded, modules: list[str], cfg: TrainConfig) -> dict[str, Any]:
    from transformers.pytorch_utils import Conv1D

    alpha = 2.0 * cfg.rank if cfg.alpha is None else float(cfg.alpha)
    transposed = {isinstance(loaded.model.get_submodule(path), Conv1D) for path in modules}
    if len(transposed) > 1:
        raise ShlError("these blocks mix two kinds of linear maps", hint="choose one kind with --target")
    return peft_config(
        loaded.ref.path, modules, cfg.rank, alpha, revision=loaded.ref.revision, fan_in_fan_out=transposed.pop()
    )


def _meta(loaded: Loaded, cfg: TrainConfig, used: list[dict[str, Any]], out: Path) -> dict[str, Any]:
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
