"""The loop of a healing: what is computed once, then epochs of batches, losses and steps, and the rows of the log."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shl.core import console, ranks
from shl.core.below import Below
from shl.core.defaults import TrainConfig
from shl.core.errors import ShlError
from shl.core.fused import fused
from shl.core.head import Head, completion_states
from shl.core.heal_data import Example, alike, batches, by_length
from shl.core.heal_log import COLUMNS, Epoch, mean, quantiles, total_norm
from shl.core.heal_loss import Losses, combine, token_losses
from shl.core.heal_own import reference
from shl.core.heal_part import Checkpoint
from shl.core.lora import Lora, Sizes, first_block
from shl.core.memory import batched
from shl.core.models import Loaded
from shl.core.seeds import seed_of
from shl.core.vocabulary import Reference


class Diverged(ShlError):
    """A number of the training is not finite."""


class State(NamedTuple):
    """The adapter at the end of an epoch, on the CPU, and the log up to the last one."""

    epoch: int
    tensors: dict[str, Tensor]
    sizes: Sizes  # of each module's update
    rows: list[dict[str, Any]]


class Part(NamedTuple):
    """What one forward and backward pass gave."""

    grads: tuple[Tensor, ...]
    nll: list[float]
    kl: Tensor
    fired: list[bool]
    pressure: float | None


class Run:
    """One training: data, what is computed once for all epochs, optimiser, schedule.

    Computed once: what the reference makes of the completions, and the states below the first trained block.
    """

    def __init__(
        self, loaded: Loaded, cfg: TrainConfig, train: list[Example], held: list[Example], modules: Sequence[str]
    ) -> None:
        self.loaded, self.cfg, self.train, self.held = loaded, cfg, train, held
        self.barrier = cfg.reg != "nll"
        self.reg = cfg.reg if self.barrier else "kl_rev"  # what the held-out divergence is, in any case
        self.lam = cfg.lam * cfg.lam_decay ** len(loaded.chain)
        self.per_epoch = math.ceil(math.ceil(len(train) / cfg.batch_size) / cfg.grad_accum)
        self.total = self.per_epoch * cfg.epochs
        self.step = 0
        self.open: set[int] = set()  # indices of the examples whose barrier was open when they were last seen
        self.best: tuple[int, dict[str, Tensor]] | None = None  # epoch of the lowest held-out nll, with --patience
        self.good = State(0, {}, Sizes({}, {}), [])
        self.number = {id(one): i for i, one in enumerate([*train, *held])}
        self.head = Head.of(loaded)
        self.head.check(loaded, train[0].ids)
        self.ref: dict[int, Reference] = {}  # by identity of the example
        self.below = Below(loaded, first_block(loaded, modules))
        with console.progress("reading the reference", None), fused(loaded):
            self.below.remember(by_length([*train, *held]), cfg.batch_size)
            with reference(loaded, cfg):
                self._remember(by_length([*(train if self.barrier else []), *held]))

    def generator(self, purpose: str) -> torch.Generator:
        """Random numbers for one purpose, from the seed alone."""
        return torch.Generator().manual_seed(seed_of(self.cfg.seed, "heal", purpose))

    @torch.no_grad()
    def _remember(self, examples: list[Example]) -> None:
        head = Head.of(self.loaded)
        # states below the first trained block are the same with and without this round's adapter, but not without chain
        same = not (self.cfg.ref == "base" and self.loaded.chain)
        with self.below.standing_in() if same else nullcontext():
            for chosen, known in self._batched(examples, partial(self._reference, head), "reading the reference"):
                parts = known.split([len(one.completion) for one in chosen])
                self.ref |= {id(one): part for one, part in zip(chosen, parts, strict=True)}

    def _reference(self, head: Head, chosen: Sequence[Example]) -> Reference:
        return Reference.of(head, self._states(chosen)[0], self.reg, self.cfg.ref_top_k)

    def _batched(
        self, examples: Sequence[Example], work: Callable[[Sequence[Example]], Any], what: str
    ) -> Iterator[Any]:
        size = -(-min(self.cfg.batch_size, len(examples)) // ranks.sharing())  # a part of each batch for each process
        return batched(self.loaded, examples, max(1, size), work, what)

    def _states(self, chosen: Sequence[Example]) -> tuple[Tensor, Tensor]:
        """Hidden states that predict the completion tokens, one after the other, and those tokens."""
        self.below.use([id(one) for one in chosen])
        return completion_states(self.loaded, [(one.prompt, one.completion) for one in chosen])

    def _tokens(self, chosen: Sequence[Example], divergence: bool) -> tuple[Tensor, Tensor]:
        """nll and KL of each completion token of a batch."""
        hidden, targets = self._states(chosen)
        if not divergence:
            return token_losses(hidden, targets, self.head)
        ref = Reference.join([self.ref[id(one)] for one in chosen], hidden.device)
        eager = torch.tensor([self.number[id(one)] in self.open for one in chosen for _ in one.completion])
        return token_losses(hidden, targets, self.head, ref, self.reg, eager.to(hidden.device))

    def fit(self, lora: Lora, part: Checkpoint) -> None:
        """All epochs, each followed by a checkpoint. `good` is then the adapter and the whole log."""
        cfg, shuffle = self.cfg, self.generator("batches")
        optimiser = adamw(lora, cfg)
        watch = console.watch("healing", COLUMNS, self.total)
        with fused(self.loaded), self.below.standing_in(cfg.checkpointing), watch as view:
            rows = part.restore(self, lora, optimiser, shuffle)
            sizes = self._sizes(lora)
            rows = rows or [self._row(0, Epoch(), sizes)]
            self.good = State(len(rows) - 1, lora.tensors(), sizes, rows)
            for row in rows:
                view.row(row)
            view.advance(self.step)
            for epoch in range(len(rows), cfg.epochs + 1):
                if self._enough(rows):
                    console.note(f"held-out nll has not fallen for {cfg.patience} epochs: stopped after {epoch - 1}")
                    break
                seen = Epoch()
                plan = batches([len(one) for one in self.train], cfg.batch_size, shuffle)
                for at in range(0, len(plan), cfg.grad_accum):
                    group = [[self.train[i] for i in batch] for batch in plan[at : at + cfg.grad_accum]]
                    self._update(lora, optimiser, group, seen)
                    view.advance(epoch=epoch, nll=sum(seen.nll[-len(group[-1]) :]) / len(group[-1]))
                sizes = self._sizes(lora)
                rows = [*rows, self._row(epoch, seen, sizes)]
                view.row(rows[-1])
                if cfg.patience and rows[-1]["holdout_nll"] == min(row["holdout_nll"] for row in rows):
                    self.best = epoch, lora.tensors()
                self.good = State(epoch, lora.tensors(), sizes, rows)
                if epoch < cfg.epochs:
                    part.save(self, lora, optimiser, shuffle, rows)
        if self.best is not None and self.best[0] < len(rows) - 1:
            lora.put(self.best[1])
            self.good = State(self.best[0], lora.tensors(), lora.sizes(), rows)

    @torch.no_grad()
    def _sizes(self, lora: Lora) -> Sizes:
        """How large the update is, which has to be finite for that."""
        for weight in lora.parameters:
            self._finite(weight.abs().max(), "the adapter")
        return lora.sizes()

    def _enough(self, rows: list[dict[str, Any]]) -> bool:
        """Whether the held-out nll has stopped falling."""
        since = len(rows) - 1 - (self.best[0] if self.best else 0)
        return bool(self.cfg.patience) and since >= self.cfg.patience

    def _update(self, lora: Lora, optimiser: torch.optim.Optimizer, group: list[list[Example]], seen: Epoch) -> None:
        """One step of the optimiser over a group of micro-batches."""
        self.gradient(lora, group, seen)
        for parameters in optimiser.param_groups:
            parameters["lr"] = self.cfg.lr * schedule(self.step, self.total, self.cfg.warmup)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        self.step += 1

    def gradient(self, lora: Lora, group: list[list[Example]], seen: Epoch) -> None:
        """Leave the gradient over a group of micro-batches, clipped, at the factors."""
        cfg, n = self.cfg, sum(map(len, group))
        for batch in (part for whole in group for part in alike(whole)):
            for chosen, part in self._batched(batch, partial(self._gradients, lora, seen), "training on"):
                for weight, grad in zip(lora.parameters, part.grads, strict=True):
                    grad = grad * (len(chosen) / n)
                    weight.grad = grad if weight.grad is None else weight.grad.add_(grad)
                seen.nll += part.nll
                seen.pressure = part.pressure if seen.pressure is None else seen.pressure
                if self.barrier:
                    seen.kl.append(part.kl)
                    for one, fired in zip(chosen, part.fired, strict=True):
                        (self.open.add if fired else self.open.discard)(self.number[id(one)])
                        seen.fired += fired
        if cfg.spectral:
            (cfg.spectral * lora.operator_norm()).backward()
        norm = torch.nn.utils.clip_grad_norm_(lora.parameters, cfg.max_grad_norm or math.inf)
        self._finite(norm)
        seen.grad.append(float(norm))

    def _gradients(self, lora: Lora, seen: Epoch, batch: Sequence[Example]) -> Part:
        """The mean loss over a batch, and its gradient, which stays apart: a batch that does not fit is begun again."""
        cfg = self.cfg
        nll, kl = self._tokens(batch, self.barrier)
        lengths = [len(one.completion) for one in batch]
        losses = combine(nll, kl, lengths, cfg.reg, cfg.agg, self.lam, cfg.tau, cfg.shortest)
        self._finite((losses.nll + losses.barrier).detach())
        grads, pressure = _gradient(losses, lora, apart=seen.pressure is None and self.barrier)
        per_row = [float(one.mean()) for one in nll.detach().split(lengths)]
        return Part(grads, per_row, kl.detach().cpu(), losses.fired, pressure)

    def _finite(self, value: Tensor | float, what: str = "the loss or its gradient") -> None:
        if not math.isfinite(found := float(value)):
            raise Diverged(
                f"{what} is {found} at step {self.step} of {self.total}",
                hint="lower --lr or --lam; in float16 use --dtype bfloat16 or float32",
            )

    @torch.no_grad()
    def _row(self, epoch: int, seen: Epoch, sizes: Sizes) -> dict[str, Any]:
        """One line of the log. What was not measured is null."""
        kl = torch.cat(seen.kl) if seen.kl else None
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
            "update_norm": total_norm(sizes.norms),
            "operator_norm": sizes.mean_largest,
        }
        for name, value in row.items():
            self._finite(value or 0.0, name)
        return row | quantiles("own_kl", None) | {"should": []}

    def _held_out(self) -> tuple[float | None, Tensor | None]:
        per_row, kls = [], []
        for chosen, (nll, kl) in self._batched(self.held, partial(self._tokens, divergence=True), "reading held-out"):
            per_row += [float(one.mean()) for one in nll.split([len(one.completion) for one in chosen])]
            kls.append(kl.cpu())
        return mean(per_row), torch.cat(kls) if kls else None


def adamw(lora: Lora, cfg: TrainConfig) -> torch.optim.AdamW:
    """The optimiser of an adapter."""
    return torch.optim.AdamW(lora.parameters, lr=cfg.lr, betas=(0.9, 0.95), weight_decay=cfg.weight_decay, fused=True)


def schedule(step: int, total: int, warmup: float) -> float:
    """Share of the full learning rate at a step: linear warm-up, then a cosine towards zero."""
    rise = max(1, round(warmup * total))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise + 1) / (total - rise + 1)))


def _gradient(losses: Losses, lora: Lora, apart: bool) -> tuple[tuple[Tensor, ...], float | None]:
    """The gradient of the loss; `apart` in two passes that sum to it, which also say how hard the barrier pulls beside
    the nll: the ratio of their norms."""

    def of(part: Tensor, again: bool = False) -> tuple[Tensor, ...]:
        return torch.autograd.grad(part, lora.parameters, retain_graph=again, materialize_grads=True)

    if not apart or not any(losses.fired):
        return of(losses.nll + losses.barrier), 0.0 if apart else None
    parts = of(losses.barrier, again=True), of(losses.nll)
    norms = [torch.cat([g.flatten() for g in part]).norm() for part in parts]
    return tuple(map(torch.add, *parts)), float(norms[0] / norms[1].clamp_min(1e-30))
