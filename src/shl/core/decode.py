"""Sampling of completions: a batched loop over a cache, in which each row's text depends on its own seed only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from shl.core.batches import left_pad, positions_of
from shl.core.cache import DecodeMasks, new_cache
from shl.core.errors import ShlError
from shl.core.hooks import Steering
from shl.core.models import Loaded


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. A top_k, top_p or min_p of 0 (1 for top_p) leaves that filter out."""

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 64
    top_p: float = 0.95
    min_p: float = 0.0
    greedy: bool = False


@dataclass(frozen=True)
class Completion:
    """One sampled answer: its tokens (forced ones first, the stop token left out), text, and why it ended."""

    ids: list[int]
    text: str
    finish: str
    n_tokens: int


OnFinish = Callable[[int, Completion], None]


def decode(
    loaded: Loaded,
    prompts: Sequence[list[int]],
    *,
    seeds: Sequence[int],
    sampling: Sampling,
    steering: Steering | None = None,
    coeffs: Sequence[float] | None = None,
    forced: Sequence[list[int]] | None = None,
    batch_size: int = 64,
    on_finish: OnFinish | None = None,
) -> list[Completion]:
    """Sample one completion for each prompt, in the order of the prompts.

    Prompts of like length share a batch. `forced` gives the tokens that an answer begins with; they are no part of
    max_new_tokens. An active `steering` takes the rows' coefficients from `coeffs`.
    """
    if coeffs is not None and steering is None:
        raise ShlError("coefficients were given without a steering vector")
    starts = forced if forced is not None else [[]] * len(prompts)
    inputs = [[*prompt, *start] for prompt, start in zip(prompts, starts, strict=True)]
    done: list[Completion | None] = [None] * len(inputs)
    order = sorted(range(len(inputs)), key=lambda i: -len(inputs[i]))
    with torch.inference_mode():
        for at in range(0, len(order), batch_size):
            rows = order[at : at + batch_size]
            if steering is not None and coeffs is not None:
                steering.set([coeffs[i] for i in rows])
            sampled = _batch(loaded, [inputs[i] for i in rows], [seeds[i] for i in rows], sampling, steering)
            for i, (ids, finish) in zip(rows, sampled, strict=True):
                ids = [*starts[i], *ids]
                done[i] = completion = Completion(ids, loaded.chat.decode(ids), finish, len(ids))
                if on_finish is not None:
                    on_finish(i, completion)
    return [completion for completion in done if completion is not None]


def _batch(
    loaded: Loaded, inputs: list[list[int]], seeds: list[int], sampling: Sampling, steering: Steering | None
) -> list[tuple[list[int], str]]:
    """Decode one batch to its end: for each row the sampled ids without the stop token, and the finish."""
    state = _State(loaded, inputs, seeds, sampling)
    stop = loaded.stop_ids
    alive = list(range(len(inputs)))
    out: list[list[int]] = [[] for _ in inputs]
    ended = [False] * len(inputs)
    for step in range(sampling.max_new_tokens):
        tokens = state.sample(step)
        for row, token in zip(alive, tokens.tolist(), strict=True):
            if not ended[row]:
                ended[row] = token in stop
                if not ended[row]:
                    out[row].append(token)
        left = [k for k, row in enumerate(alive) if not ended[row]]
        if not left or step + 1 == sampling.max_new_tokens:
            break
        if len(alive) - len(left) >= max(1, len(alive) // 16):
            keep = torch.tensor(left, device=tokens.device)
            tokens = tokens[keep]
            state.keep(keep)
            if steering is not None:
                steering.keep(keep)
            alive = [alive[k] for k in left]
        state.advance(tokens)
    return [(ids, "stop" if stopped else "length") for ids, stopped in zip(out, ended, strict=True)]


class _State:
    """What a running batch carries from step to step: cache, masks, positions, noise and the last logits."""

    def __init__(self, loaded: Loaded, inputs: list[list[int]], seeds: list[int], sampling: Sampling) -> None:
        self.model = loaded.model
        self.sampling = sampling
        ids, mask = left_pad(inputs, loaded.device)
        self.uniform = _noise(seeds, sampling, loaded.device)
        self.masks = DecodeMasks(loaded, mask, sampling.max_new_tokens)
        self.cache: DynamicCache = new_cache(loaded)
        self.position = mask.sum(1, keepdim=True)
        self.logits = self._forward(ids, mask, positions_of(mask), logits_to_keep=1)

    def _forward(self, ids: Tensor, mask: object, positions: Tensor, **kwargs: int) -> Tensor:
        out = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            **kwargs,
        )
        return out.logits[:, -1]

    def sample(self, step: int) -> Tensor:
        """The next token of every row, from the row's own noise."""
        if self.sampling.greedy:
            return self.logits.argmax(-1)
        return draw(self.logits, self.uniform[:, step : step + 1], self.sampling)

    def advance(self, tokens: Tensor) -> None:
        """Feed the sampled tokens and keep the logits that follow them."""
        mask = self.masks.step()
        self.logits = self._forward(tokens[:, None], mask, self.position)
        self.position = self.position + 1

    def keep(self, rows: Tensor) -> None:
        """Drop rows from the batch together with their cache."""
        self.cache.batch_select_indices(rows)
        self.masks.keep(rows)
        self.uniform = self.uniform[rows]
        self.position = self.position[rows]


def _noise(seeds: list[int], sampling: Sampling, device: torch.device) -> Tensor:
    """One uniform number for each row and step, from a generator of the row's own, drawn on the CPU."""
    steps = 0 if sampling.greedy else sampling.max_new_tokens
    rows = [torch.rand(steps, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows).to(device)


def draw(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """Tokens by inverse distribution function over the filtered softmax, most likely tokens first.

    `uniform` is [rows, 1]. Filters act in the order top-k, top-p, min-p and keep a head of the sorted tokens.
    """
    if sampling.temperature <= 0:
        return logits.argmax(-1)
    scaled = logits.float() / sampling.temperature
    width = scaled.shape[-1]
    k = min(sampling.top_k or width, width)
    top, index = torch.topk(scaled, k, dim=-1)
    probs = torch.softmax(top, dim=-1)
    cumulative = probs.cumsum(-1)
    kept = _head_length(probs, cumulative, sampling)
    target = uniform * cumulative.gather(-1, kept - 1)
    chosen = (cumulative <= target).sum(-1, keepdim=True)
    return index.gather(-1, torch.minimum(chosen, kept - 1)).squeeze(-1)


def _head_length(probs: Tensor, cumulative: Tensor, sampling: Sampling) -> Tensor:
    """How many of the sorted tokens the filters keep, [rows, 1]; at least one."""
    inside = cumulative - probs < sampling.top_p if sampling.top_p < 1 else torch.ones_like(probs, dtype=torch.bool)
    if sampling.min_p > 0:
        inside &= probs >= sampling.min_p * probs[:, :1]
    return inside.sum(-1, keepdim=True).clamp_(min=1)
