"""Sampling of completions: a batched loop over a cache, in which each row's text depends on its own seed only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache

from shl.core.batches import left_pad, positions_of
from shl.core.cache import DecodeMasks, check_replaceable, new_cache, replace_rows, select_rows
from shl.core.errors import ShlError
from shl.core.hooks import Steering
from shl.core.memory import batched
from shl.core.models import Loaded
from shl.core.sampling import Sampling, draw, noise, surprises
from shl.core.trajectory import Course, Step, Track

__all__ = ["Completion", "Sampling", "decode", "draw"]


@dataclass(frozen=True)
class Completion:
    """One sampled answer: its tokens (forced ones first, the stop token left out), text, and why it ended.

    `track` tells the doses and rewinds on the way, when the dose was not simply constant.
    """

    ids: list[int]
    text: str
    finish: str
    n_tokens: int
    track: Track | None = field(default=None, compare=False, repr=False)


OnFinish = Callable[[int, Completion], None]


def decode(
    loaded: Loaded,
    prompts: Sequence[list[int]],
    *,
    seeds: Sequence[int],
    sampling: Sampling,
    steering: Steering | None = None,
    coeffs: Sequence[float] | None = None,
    course: Course | None = None,
    forced: Sequence[list[int]] | None = None,
    batch_size: int = 64,
    on_finish: OnFinish | None = None,
) -> list[Completion]:
    """Sample one completion for each prompt, in the order of the prompts.

    Prompts of like length share a batch. `forced` gives the tokens that an answer begins with; they are no part of
    max_new_tokens. An active `steering` takes the rows' coefficients from `coeffs`, which `course` spreads over the
    positions. Rows that can be rewound bring an unsteered twin into the batch, beyond `batch_size`.
    """
    course = course or Course()
    if steering is None and (coeffs is not None or not course.plain):
        raise ShlError("coefficients were given without a steering vector")
    starts = forced if forced is not None else [[]] * len(prompts)
    doses = coeffs if coeffs is not None else [0.0] * len(prompts)
    todo = list(zip(prompts, starts, doses, strict=True))
    done: list[Completion | None] = [None] * len(todo)
    order = sorted(range(len(todo)), key=lambda i: -len(todo[i][0]) - len(todo[i][1]))

    def decoded(rows: Sequence[int]) -> list[Track]:
        tracks = [Track(*todo[i], course) for i in rows]  # made here, so that rows can be begun again
        if steering is not None and coeffs is not None:
            steering.set([coeffs[i] for i in rows])
        _batch(loaded, tracks, [seeds[i] for i in rows], sampling, steering)
        return tracks

    with torch.inference_mode():
        for rows, tracks in batched(loaded, order, batch_size, decoded, "decoding"):
            for i, track in zip(rows, tracks, strict=True):
                ids, told = track.ids, None if course.plain else track
                finish = track.finish or "length"
                done[i] = completion = Completion(ids, loaded.chat.decode(ids), finish, len(ids), told)
                if on_finish is not None:
                    on_finish(i, completion)
    return [completion for completion in done if completion is not None]


def _batch(
    loaded: Loaded, tracks: list[Track], seeds: list[int], sampling: Sampling, steering: Steering | None
) -> None:
    """Decode one batch to its end: every track gets its tokens and its finish."""
    state = _State(loaded, tracks, seeds, sampling, steering)
    stop = frozenset() if sampling.endless else loaded.stop_ids | sampling.until
    while True:
        tokens, steps = state.sample()
        for track, token, step in zip(state.alive, tokens.tolist(), steps, strict=True):
            if track.finish is not None:
                continue
            if token in stop:
                track.finish = "stop"
                continue
            track.add(token, step)
            if track.watched and (trouble := track.trouble(loaded.chat.decode)):
                track.rewind(*trouble)
            elif track.sampled == sampling.max_new_tokens:
                track.finish = "length"
        if all(track.finish is not None for track in state.alive):
            return
        state.advance(state.drop(tokens))


class _State:
    """What a running batch carries from step to step: cache, masks, positions, noise and the last logits.

    Rows of the tensors are the tracks that are still alive, and behind them the unsteered twins of those that are
    watched. A twin reads the same tokens at dose 0, in the same pass.
    """

    def __init__(
        self, loaded: Loaded, tracks: list[Track], seeds: list[int], sampling: Sampling, steering: Steering | None
    ) -> None:
        self.loaded, self.sampling, self.steering = loaded, sampling, steering
        self.course = tracks[0].course
        self.alive = tracks
        self.twins = [k for k, track in enumerate(tracks) if track.watched]
        limits = self.course.backtrack
        steps = sampling.max_new_tokens + (limits.extra if limits and self.twins else 0)
        self.uniform, self.drawn = noise(seeds, sampling, steps, loaded.device), 0
        self.cache: DynamicCache = new_cache(loaded)
        if self.twins:
            check_replaceable(self.cache)
        ids, mask = left_pad([tracks[k].input for k in self.rows], loaded.device)
        self.masks = DecodeMasks(loaded, mask, steps)
        self.position = mask.sum(1, keepdim=True)
        self._dial(range(len(self.rows)), ids.shape[1])
        self.logits = self._forward(self.cache, ids, mask, positions_of(mask), logits_to_keep=1)

    @property
    def rows(self) -> list[int]:
        """For each row of the tensors, which of the tracks it reads."""
        return [*range(len(self.alive)), *self.twins]

    def _forward(self, cache: DynamicCache, ids: Tensor, mask: object, positions: Tensor, **kwargs: int) -> Tensor:
        out = self.loaded.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, **kwargs
        )
        return out.logits[:, -1]

    def _dial(self, rows: Iterable[int], width: int, back: int = 0) -> None:
        """Set the doses of the next pass: `width` positions that end `back` before the end of each track's input.

        A plain course leaves the steering as it was set for the whole batch.
        """
        if self.steering is None or self.course.plain:
            return
        doses, n = [], len(self.alive)
        for row in rows:
            end = len(self.alive[row].input) - back if row < n else 0  # a twin has no dose anywhere
            doses.append([self.alive[row].dose(i) if i >= 0 else 0.0 for i in range(end - width, end)])
        self.steering.set(doses)

    def sample(self) -> tuple[Tensor, list[Step | None]]:
        """The next token of every track, from the track's own noise, and what there is to say of it."""
        n = len(self.alive)
        if self.sampling.banned:
            self.logits[:, sorted(self.sampling.banned)] = -torch.inf
        if self.sampling.greedy:
            tokens = self.logits[:n].argmax(-1)
        else:
            tokens = draw(self.logits[:n], self.uniform[:, self.drawn : self.drawn + 1], self.sampling)
        self.drawn += 1
        if self.steering is None or self.course.plain:
            return tokens, [None] * n
        steps = [Step(track.coeff, dose) for track, dose in zip(self.alive, self.steering.dose(), strict=False)]
        if self.twins:
            surprise, excess = surprises(self.logits[n:], tokens[self.twins]).tolist()
            for k, *read in zip(self.twins, surprise, excess, strict=True):
                steps[k] = Step(*steps[k][:2], *read)
        return tokens, list(steps)

    def advance(self, tokens: Tensor) -> None:
        """Feed the sampled tokens and keep the logits that follow them."""
        if rewound := [k for k, track in enumerate(self.alive) if track.rewound]:
            self._replay(rewound, tokens)
        mask = self.masks.step()
        self._dial(range(len(self.rows)), 1)
        fed = tokens[self.rows] if self.twins else tokens
        self.logits = self._forward(self.cache, fed[:, None], mask, self.position)
        self.position = self.position + 1

    def _replay(self, rewound: list[int], tokens: Tensor) -> None:
        """Compute anew, at the new coefficient, what rewound tracks have read; their last token is fed next.

        Nothing of the old pass stays in the cache, since what was kept of it had seen the old coefficient.
        """
        rows = [row for row, k in enumerate(self.rows) if k in rewound]
        inputs = [self.alive[k].input[:-1] for k in self.rows if k in rewound]
        part = new_cache(self.loaded)
        if any(inputs):
            ids, mask = left_pad(inputs, tokens.device)
            self._dial(rows, ids.shape[1], back=1)
            self._forward(part, ids, mask, positions_of(mask), logits_to_keep=1)
        where = torch.tensor(rows, device=tokens.device)
        lengths = torch.tensor([len(ids) for ids in inputs], device=tokens.device)
        replace_rows(self.cache, where, part)
        self.masks.shorten(where, lengths)
        self.position[where] = lengths[:, None]
        for k in rewound:
            tokens[k] = self.alive[k].input[-1]
            self.alive[k].rewound = False

    def drop(self, tokens: Tensor) -> Tensor:
        """Let ended tracks and unread twins leave the batch when they are many; the tokens of those that stay."""
        n = len(self.alive)
        left = [k for k, track in enumerate(self.alive) if track.finish is None]
        read = [j for j, k in enumerate(self.twins) if k in left and self.alive[k].watched]
        kept = [*left, *(n + j for j in read)]
        if len(self.rows) - len(kept) < max(1, len(self.rows) // 16):
            return tokens
        rows = torch.tensor(kept, device=tokens.device)
        select_rows(self.cache, rows)
        self.masks.keep(rows)
        if self.steering is not None:
            self.steering.keep(rows)
        self.position = self.position[rows]
        self.uniform = self.uniform[rows[: len(left)]]
        self.twins = [left.index(self.twins[j]) for j in read]
        self.alive = [self.alive[k] for k in left]
        return tokens[rows[: len(left)]]
