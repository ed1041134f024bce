"""Sampling of completions: a batched loop over a cache, in which each row's text depends on its own seed only."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from shl.core import ranks
from shl.core.below import Passed
from shl.core.errors import ShlError
from shl.core.graphs import decode_slots, suits
from shl.core.hooks import Steering
from shl.core.memory import fitted
from shl.core.models import Loaded
from shl.core.running import Running
from shl.core.sampling import Sampling, draw
from shl.core.trajectory import Course, Track, Waiting

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
    passed: Passed | None = None,
) -> list[Completion]:
    """Sample one completion for each prompt, in the order of the prompts.

    At most `batch_size` rows run at once, the longest prompts first, and others take the places of those that end. On a
    CUDA device steps are graphs, where model and course allow it. Where they do not nobody enters under a course that
    backtracks, nor on a processor, nor with a cache whose rows cannot be replaced: a batch runs to its end before the
    next begins.

    `forced` gives the tokens that an answer begins with; they are no part of max_new_tokens. An active `steering` takes
    the rows' coefficients from `coeffs`, which `course` spreads over the positions. Rows that can be rewound bring an
    unsteered twin into the batch, beyond `batch_size`. `on_finish` is told of each row as it ends. `passed` gets the
    states of every row below the steered blocks, under the row's number, where one process decodes a batch to its end.
    """
    course = course or Course()
    if steering is None and (coeffs is not None or not course.plain):
        raise ShlError("coefficients were given without a steering vector")
    if coeffs is None and course.plain:
        steering = None  # whose one coefficient stays as it is
    starts = forced if forced is not None else [[]] * len(prompts)
    doses = coeffs if coeffs is not None else [0.0] * len(prompts)
    todo = list(zip(prompts, starts, doses, strict=True))
    done: list[Completion | None] = [None] * len(todo)
    order = sorted(range(len(todo)), key=lambda i: -len(todo[i][0]) - len(todo[i][1]))

    def ended(i: int, track: Track) -> None:
        ids, told = track.ids, None if course.plain else track
        done[i] = completion = Completion(ids, loaded.chat.decode(ids), track.finish or "length", len(ids), told)
        if on_finish is not None:
            on_finish(i, completion)

    def decoded(share: Sequence[int]) -> list[tuple[int, Track]]:
        found: dict[int, Track] = {}

        def run(size: int) -> None:
            rows = {Track(*todo[i], course): i for i in share if i not in found}  # begun again, should memory run out
            waiting = deque((track, seeds[i]) for track, i in rows.items())
            while waiting:
                for track in batches(loaded, waiting, size, sampling, steering):
                    found[rows[track]] = track
                    if passed is not None:
                        passed.hand_over(id(track), rows[track], track.input)
                    ended(rows[track], track)

        batches: Any = decode_slots if suits(loaded, course) else partial(_batch, passed=passed)
        if share:
            fitted(loaded, lambda: min(batch_size, len(share) - len(found)), run, "decoding")
        return list(found.items())

    with torch.inference_mode():
        n = ranks.sharing()
        for tracks in ranks.each([order[k::n] for k in range(n)], decoded):
            for i, track in tracks:
                if done[i] is None:  # the work of another process
                    ended(i, track)
    return [completion for completion in done if completion is not None]


def _batch(
    loaded: Loaded,
    waiting: Waiting,
    size: int,
    sampling: Sampling,
    steering: Steering | None,
    passed: Passed | None = None,
) -> Iterator[Track]:
    """Decode rows that wait, `size` at once, until all that have been begun are at their end; each track as it ends.

    While more wait they take the places of ended rows, where the batch is open to them.
    """
    state = Running(loaded, *_take(waiting, size), sampling, steering, passed)
    stop = sampling.ends(loaded.stop_ids)
    while True:
        tokens, steps = state.sample()
        for k, (track, token, step) in enumerate(zip(state.alive, tokens.tolist(), steps, strict=True)):
            if track.finish is not None:
                continue
            if token in stop:
                track.finish = "stop"
            else:
                track.add(token, step)
                if track.watched and (trouble := track.trouble(loaded.chat.decode)):
                    track.rewind(*trouble)
                elif track.sampled == sampling.max_new_tokens:
                    track.finish = "length"
            if track.finish is not None:
                state.leave(k)
                yield track
        free = [k for k, track in enumerate(state.alive) if track.finish is not None]
        if len(free) == len(state.alive):
            return
        if not (waiting and state.open):
            state.advance(state.drop(tokens))
            continue
        state.advance(tokens)
        if len(free) >= max(1, size // 8):
            state.enter(free, *_take(waiting, len(free)))


def _take(waiting: Waiting, count: int) -> tuple[list[Track], list[int]]:
    """The next rows, and their seeds."""
    rows = [waiting.popleft() for _ in range(min(count, len(waiting)))]
    return [track for track, _ in rows], [seed for _, seed in rows]
