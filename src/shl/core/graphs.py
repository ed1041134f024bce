"""Decoding by CUDA graphs: over a cache of fixed size with a slot for each row, which rows enter and leave.

A row keeps its slot until it ends; the next waiting row then takes it. Tokens lie at the left of a slot, and each row
is at a place of its own, so nothing is padded and nothing moves. A step reads and writes the same memory every time
and leaves its result there: on CUDA it is captured once and replayed, without Python in between.

Where rows can be rewound a slot has two rows of the tensors: the track's, and its unsteered twin's, which reads the
same tokens at dose 0. A rewound track is read into its slot anew, and what was drawn beyond the rewind is drawn again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from shl.core.batches import right_pad
from shl.core.cache import windows
from shl.core.console import warn
from shl.core.fused import fused
from shl.core.graph_cache import SlotCache, attention
from shl.core.hooks import Steering
from shl.core.memory import ran_out
from shl.core.models import Loaded
from shl.core.quantised import is_sealed
from shl.core.sampling import Sampling, draw, noise, surprises
from shl.core.trajectory import Course, Step, Track, Waiting

_CHUNK = 8  # steps between two looks at what was drawn: looking costs a wait for the device


def suits(loaded: Loaded, course: Course) -> bool:
    """Whether rows are decoded over slots: on one CUDA device, in plain attention, with doses known ahead."""
    return loaded.device.type == "cuda" and loaded.graphs and possible(loaded, course)


def possible(loaded: Loaded, course: Course) -> bool:
    """Whether they could be, on any device."""
    weights = list(loaded.model.parameters())
    whole = len({weight.device for weight in weights}) == 1 and not any(map(is_sealed, weights))
    return course.gate is None and whole and windows(loaded) is not None


def decode_slots(
    loaded: Loaded, waiting: Waiting, size: int, sampling: Sampling, steering: Steering | None
) -> Iterator[Track]:
    """Decode rows that wait, each with its seed, `size` at once, until all are at their end; each track as it ends."""
    yield from _Run(loaded, waiting, size, sampling, steering).go()


class _Run:
    """What decoding over slots carries from step to step. `drawn`, `recent`, `uniform` and `doses` are by slot."""

    def __init__(
        self,
        loaded: Loaded,
        waiting: Waiting,
        size: int,
        sampling: Sampling,
        steering: Steering | None,
    ) -> None:
        self.loaded, self.sampling, self.steering = loaded, sampling, steering
        self.waiting, self.course = waiting, waiting[0][0].course
        size = min(size, len(waiting))
        self.alive: list[Track | None] = [None] * size  # for each slot, the track in it
        limits = self.course.backtrack if any(track.watched for track, _ in waiting) else None
        self.wide = 1 if limits is None else 2  # rows of a slot
        most = sampling.max_new_tokens + _CHUNK  # a row goes on until somebody looks
        self.capacity = max(len(track.input) for track, _ in waiting) + most
        steps = most + (limits.extra if limits else 0)
        where, rows = loaded.device, size * self.wide

        def zeros(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=where)

        self.ids, self.read, self.coeff = zeros(rows, 1), zeros(rows), zeros(rows, 1, 1, dtype=torch.float32)
        self.drawn, self.recent, self.clock = zeros(size), zeros(size, _CHUNK), zeros(1)
        self.uniform = zeros(size, 0 if sampling.greedy else steps, dtype=torch.float32)
        self.doses = zeros(size, steps, dtype=torch.float32)
        self.surprise = zeros(2, size, _CHUNK, dtype=torch.float32)  # and excess, of the tokens in `recent`
        self.banned = torch.tensor(sorted(sampling.banned), dtype=torch.long, device=where)
        self.stop = sampling.ends(loaded.stop_ids)
        self.cache: SlotCache | None = None
        self.graphs: dict[int, torch.cuda.CUDAGraph | None] = {}
        self.pool: Any = None

    def go(self) -> Iterator[Track]:
        """Until nobody waits and every slot is free."""
        while True:
            self._enter()
            if not any(self.alive):
                return
            self._shrink()
            self._play()
            yield from self._look()

    # --- rows come and go ---

    def _enter(self) -> None:
        """Let waiting tracks have the free slots, when those are many: reading a prompt takes as long as some steps."""
        free = [slot for slot, track in enumerate(self.alive) if track is None]
        if not self.waiting or (len(free) < max(1, len(self.alive) // 4) and len(free) < len(self.waiting)):
            return
        slots = free[: len(self.waiting)]
        tracks, seeds = zip(*(self.waiting.popleft() for _ in slots), strict=True)
        self.uniform[slots] = noise(list(seeds), self.sampling, self.uniform.shape[1], self.uniform.device)
        self._fill(slots, tracks)
        for slot, track in zip(slots, tracks, strict=True):
            self.alive[slot] = track

    def _fill(self, slots: list[int], tracks: Sequence[Track]) -> None:
        """Read the inputs of tracks into slots, but for their last tokens, which are fed in the next step."""
        inputs = [track.input[:-1] for track in tracks]
        where = torch.tensor(slots, device=self.loaded.device)
        rows = self._rows(where)

        def tensor(values: list[Any]) -> Tensor:
            return torch.tensor(values, device=where.device)

        states = self._prefill(tracks, inputs)
        if self.cache is None:
            self.cache = SlotCache(states, len(self.read), self.capacity, self.read)
        self.cache.fill(rows, states)
        self.read[rows] = tensor([len(ids) for ids in inputs]).repeat_interleave(self.wide)
        self.ids[rows, 0] = tensor([track.input[-1] for track in tracks]).repeat_interleave(self.wide)
        self.drawn[where] = tensor([track.drawn for track in tracks])
        if self.steering is not None:
            steps = range(self.doses.shape[1])  # those before the next one are over
            doses = [[track.dose(len(track.input) - 1 + t - track.drawn) for t in steps] for track in tracks]
            self.doses[where] = tensor(doses)

    def _rows(self, slots: Tensor) -> Tensor:
        """The rows of some slots: tracks and their twins in turn."""
        return (slots[:, None] * self.wide + torch.arange(self.wide, device=slots.device)).flatten()

    def _prefill(self, tracks: Sequence[Track], inputs: list[list[int]]) -> DynamicCache:
        """The states of the tokens of some inputs, padded on the right, where no token sees the padding."""
        # a prompt of one token leaves nothing to read; what is read in its place is overwritten
        ids = right_pad([ids or [0] for ids in inputs], self.loaded.device).repeat_interleave(self.wide, 0)
        if self.steering is not None:
            plain, width = self.course.plain, ids.shape[1]
            doses = [[track.coeff] if plain else [track.dose(i) for i in range(width)] for track in tracks]
            twins = [[0.0] * len(doses[0])] * (self.wide - 1)
            self.steering.set([dose for own in doses for dose in (own, *twins)])
        states = DynamicCache()  # without a configuration: sliding layers too keep all of their tokens
        self.loaded.body(input_ids=ids, past_key_values=states, use_cache=True)
        return states

    def _shrink(self) -> None:
        """When nobody waits and three quarters of the slots are free, go on with a quarter of them."""
        size = len(self.alive) // 4
        if self.waiting or sum(track is not None for track in self.alive) > size:
            return
        slots = sorted(range(len(self.alive)), key=lambda slot: self.alive[slot] is None)[:size]  # those taken first
        where = torch.tensor(slots, device=self.read.device)
        assert self.cache is not None
        for tensor in (*self.cache.tensors, self.ids, self.read):
            tensor[: size * self.wide] = tensor[self._rows(where)]
        for tensor in (self.drawn, self.uniform, self.doses):
            tensor[:size] = tensor[where]
        self.alive = [self.alive[slot] for slot in slots]

    # --- steps ---

    def _step(self, n: int) -> None:
        """One token for each of the first n slots; what comes of it stays on the device, for the next step to read."""
        wide, rows = self.wide, n * self.wide
        read, drawn = self.read[:rows], self.drawn[:n]
        if self.steering is not None:
            self.coeff[:rows:wide, 0] = self.doses[:n].gather(1, drawn[:, None])  # that of a twin stays 0
        logits = self.loaded.model(
            input_ids=self.ids[:rows], position_ids=read[:, None], past_key_values=self.cache, use_cache=True
        ).logits[:, -1]
        if len(self.banned):
            logits = logits.index_fill(1, self.banned, -torch.inf)
        if self.sampling.greedy:
            tokens = logits[::wide].argmax(-1)
        else:
            tokens = draw(logits[::wide], self.uniform[:n].gather(1, drawn[:, None]), self.sampling)
        self.recent[:n].index_copy_(1, self.clock, tokens[:, None])
        if wide > 1:
            self.surprise[:, :n].index_copy_(2, self.clock, surprises(logits[1::wide], tokens)[..., None])
        self.ids[:rows].view(n, wide).copy_(tokens[:, None])  # a twin reads what its track says
        self.clock.add_(1).remainder_(_CHUNK)
        drawn.add_(1).clamp_(max=self.doses.shape[1] - 1)  # a slot that nobody is in goes on, within bounds
        read.add_(1).clamp_(max=self.capacity - 1)

    def _play(self) -> None:
        """As many steps as there are between two looks."""
        n, where = len(self.alive), self.loaded.device
        if where.type == "cuda" and self.loaded.graphs and n not in self.graphs:
            with torch.cuda.device(where):
                self.graphs[n] = self._capture(n)
        graph = self.graphs.get(n)
        with nullcontext() if graph is not None else self._ready(n):
            for _ in range(_CHUNK):
                graph.replay() if graph is not None else self._step(n)

    def _capture(self, n: int) -> torch.cuda.CUDAGraph | None:
        """A step of n rows as a graph; none, with a word, for a model whose step cannot be one."""
        state = [self.ids, self.read, self.drawn, self.recent, self.surprise, self.clock, self.coeff]
        before = [tensor.clone() for tensor in state]
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        try:
            with self._ready(n):
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):  # once in earnest: libraries make their handles, kernels are compiled
                    self._step(n)
                torch.cuda.current_stream().wait_stream(stream)
                with torch.cuda.graph(graph, pool=self.pool):
                    self._step(n)
        except RuntimeError as error:
            if ran_out(error):
                raise
            warn(f"decoding without CUDA graphs, which this model does not allow: {str(error).splitlines()[0]}")
            self.loaded.graphs = False  # neither tried nor told again
            return None
        finally:
            for tensor, value in zip(state, before, strict=True):
                tensor.copy_(value)
        self.pool = self.pool or graph.pool()
        return graph

    @contextmanager
    def _ready(self, n: int) -> Iterator[None]:
        """Attention over slots, kernels where they can be had, and doses from the tensor that steps write to."""
        if self.steering is not None:
            self.steering.bind(self.coeff[: n * self.wide])
        with attention(self.loaded, self.read), fused(self.loaded):
            yield

    def _look(self) -> Iterator[Track]:
        """Take in what was drawn since the last look: the tracks that have ended, whose slots are free now."""
        surprise, excess = self.surprise.tolist() if self.wide > 1 else ([], [])
        rewound = []
        for slot, drawn in enumerate(self.recent[: len(self.alive)].tolist()):
            if (track := self.alive[slot]) is None:
                continue
            self._take(track, drawn, surprise[slot] if surprise else (), excess[slot] if excess else ())
            if track.rewound:
                rewound.append(slot)
                track.rewound = False
            if track.finish is not None:
                self.alive[slot] = None
                yield track
        if rewound:
            self._fill(rewound, [track for slot in rewound if (track := self.alive[slot]) is not None])

    def _take(self, track: Track, drawn: list[int], surprise: Sequence[float], excess: Sequence[float]) -> None:
        """Let a track have the tokens that were drawn for it, up to its end or to where it is rewound."""
        plain = self.steering is None or self.course.plain
        for i, token in enumerate(drawn):
            if token in self.stop:
                track.finish = "stop"
                return
            told = (surprise[i], excess[i]) if track.watched else ()
            track.add(token, None if plain else Step(track.coeff, track.dose(len(track.input) - 1), *told))
            if track.watched and (trouble := track.trouble(self.loaded.chat.decode)):
                track.rewind(*trouble)
                return
            if track.sampled == self.sampling.max_new_tokens:
                track.finish = "length"
                return
