"""How far the student strays where it leads itself: KL to the reference on answers of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from shl.core.decode import Sampling, decode
from shl.core.defaults import TrainConfig
from shl.core.head import Head, completion_states
from shl.core.heal_data import Example
from shl.core.heal_loss import token_losses
from shl.core.memory import batched
from shl.core.models import Loaded
from shl.core.seeds import seed_of
from shl.core.vocabulary import Reference

TOKENS = 64  # of each answer at most


class Own(NamedTuple):
    """An answer of the student's own."""

    prompt: list[int]
    answer: list[int]
    states: Tensor  # [answer, hidden] behind the last norm, which predict it


@contextmanager
def reference(loaded: Loaded, cfg: TrainConfig) -> Iterator[None]:
    """The weights that the divergence is measured against: without the chain, or with it."""
    if cfg.ref == "base":
        with loaded.base():
            yield
    else:
        yield


@torch.no_grad()
def own_answers(loaded: Loaded, cfg: TrainConfig, examples: Sequence[Example]) -> list[Own]:
    """What the model as it is now answers to the first few different prompts, sampled at temperature 1."""
    prompts = [list(one) for one in dict.fromkeys(tuple(one.prompt) for one in examples)][: cfg.on_policy]
    if not prompts:
        return []
    seeds = [seed_of(cfg.seed, "heal", f"own {i}") for i in range(len(prompts))]
    sampling = Sampling(max_new_tokens=TOKENS)
    said = decode(loaded, prompts, seeds=seeds, sampling=sampling, batch_size=cfg.batch_size)
    rows = [(prompt, one.ids) for prompt, one in zip(prompts, said, strict=True) if one.ids]

    def read(chosen: Sequence[tuple[list[int], list[int]]]) -> Tensor:
        return completion_states(loaded, chosen)[0]

    found = []
    for chosen, states in batched(loaded, rows, cfg.batch_size, read, "reading its own answers"):
        parts = states.split([len(answer) for _, answer in chosen])
        found += [Own(*row, part) for row, part in zip(chosen, parts, strict=True)]
    return found


@torch.no_grad()
def own_divergence(loaded: Loaded, cfg: TrainConfig, answers: Sequence[Own], reg: str) -> Tensor | None:
    """Divergence at each position of those answers; called when the adapter in training is out of the model."""
    head = Head.of(loaded)

    def read(chosen: Sequence[Own]) -> Tensor:
        with reference(loaded, cfg):
            states, targets = completion_states(loaded, [(one.prompt, one.answer) for one in chosen])
            ref = Reference.of(Head.of(loaded), states, reg, cfg.ref_top_k)
        return token_losses(torch.cat([one.states for one in chosen]), targets, head, ref, reg)[1].cpu()

    parts = [kl for _, kl in batched(loaded, answers, cfg.batch_size, read, "reading its own answers")]
    return torch.cat(parts) if parts else None
