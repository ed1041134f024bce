"""A running batch: what it carries from step to step, and how rows enter it, are rewound, and leave."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from shl.core.batches import left_pad, positions_of
from shl.core.below import Passed
from shl.core.cache import (
    DecodeMasks,
    check_replaceable,
    cut_columns,
    new_cache,
    replace_rows,
    select_rows,
    unreplaceable,
)
from shl.core.hooks import Steering
from shl.core.models import Loaded
from shl.core.sampling import Sampling, draw, noise, surprises
from shl.core.trajectory import Step, Track


def entering_pays(device: torch.device) -> bool:
    """Whether a step costs much the same however many rows it has, and however many columns.

    On a processor it does not: prompts computed a few at a time, and the columns of the longest row for all, cost more
    than the small batches at the end of one, see docs/evidence/010-generation-speed.md.
    """
    return device.type != "cpu"


class Running:
    """What a running batch carries from step to step: cache, masks, positions, noise and the last logits.

    Rows of the tensors are the tracks that are still alive, and behind them the unsteered twins of those that are
    watched. A twin reads the same tokens at dose 0, in the same pass.
    """

    def __init__(
        self,
        loaded: Loaded,
        tracks: list[Track],
        seeds: list[int],
        sampling: Sampling,
        steering: Steering | None,
        passed: Passed | None = None,
    ) -> None:
        self.loaded, self.sampling, self.steering = loaded, sampling, steering
        self.course = tracks[0].course
        self.alive = list(tracks)
        self.twins = [k for k, track in enumerate(tracks) if track.watched]
        limits = self.course.backtrack
        self.steps = sampling.max_new_tokens + (limits.extra if limits and self.twins else 0)
        self.uniform, self.drawn = noise(seeds, sampling, self.steps, loaded.device), 0
        self.cache: DynamicCache = new_cache(loaded)
        can = limits is None and not unreplaceable(self.cache)
        self.open = can and entering_pays(loaded.device)  # to rows that wait
        if self.twins:
            check_replaceable(self.cache)
        whole = not self.twins and not self.open  # every pass
        self.passed = passed if whole else None
        if passed is not None:
            passed.begin(whole)
        ids, mask = left_pad([tracks[k].input for k in self.rows], loaded.device)
        self.masks = DecodeMasks(loaded, mask, self.steps)
        self.position = mask.sum(1, keepdim=True)
        self._dial(range(len(self.rows)), ids.shape[1])
        self.logits = self._forward(self.cache, ids, mask, positions_of(mask), logits_to_keep=1)
        self.doses = self._doses()

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

        Under a plain course a row has one dose, at every position.
        """
        if self.steering is None:
            return
        if self.course.plain:
            self.steering.set([self.alive[row].coeff for row in rows])
            return
        doses, n = [], len(self.alive)
        for row in rows:
            end = len(self.alive[row].input) - back if row < n else 0  # a twin has no dose anywhere
            doses.append([self.alive[row].dose(i) if i >= 0 else 0.0 for i in range(end - width, end)])
        self.steering.set(doses)

    def _doses(self) -> list[float]:
        """The dose of each row at the last position of the last pass, where tracks tell it."""
        return [] if self.steering is None or self.course.plain else self.steering.dose()

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
        steps = [Step(track.coeff, dose) for track, dose in zip(self.alive, self.doses, strict=False)]
        if self.twins:
            surprise, excess = surprises(self.logits[n:], tokens[self.twins]).tolist()
            for k, *read in zip(self.twins, surprise, excess, strict=True):
                steps[k] = Step(*steps[k][:2], *read)
        return tokens, list(steps)

    def leave(self, k: int) -> None:
        """A track has ended; what it has read is all of its input but for a token that no pass has followed."""
        track = self.alive[k]
        if self.passed is not None:
            self.passed.leave(id(track), k, len(track.input) - (track.finish == "length"))

    def advance(self, tokens: Tensor) -> None:
        """Feed the sampled tokens and keep the logits that follow them."""
        if rewound := [k for k, track in enumerate(self.alive) if track.rewound]:
            self._replay(rewound, tokens)
        mask = self.masks.step()
        if not self.course.plain:
            self._dial(range(len(self.rows)), 1)
        fed = tokens[self.rows] if self.twins else tokens
        self.logits = self._forward(self.cache, fed[:, None], mask, self.position)
        self.position = self.position + 1
        self.doses = self._doses()

    def enter(self, places: list[int], tracks: list[Track], seeds: list[int]) -> None:
        """Begin new tracks in the first of these places, whose tracks have ended: a pass over their prompts alone.

        Columns that are older than every token of a live row are cut off, so that the cache grows with the longest
        row only. The prompts are no longer than the live rows, since the longest began first.
        """
        places = places[: len(tracks)]
        for k, track in zip(places, tracks, strict=True):
            self.alive[k] = track
        ids, mask = left_pad([track.input for track in tracks], self.logits.device)
        part, where = new_cache(self.loaded), torch.tensor(places, device=self.logits.device)
        self._dial(places, ids.shape[1])
        self.logits[where] = self._forward(part, ids, mask, positions_of(mask), logits_to_keep=1)
        for k, dose in zip(places, self._doses(), strict=False):
            self.doses[k] = dose
        idle = self.masks.seen - max(len(track.input) for track in self.alive if track.finish is None)
        cut_columns(self.cache, idle)
        self.masks.cut(idle, self.steps)
        replace_rows(self.cache, where, part)
        self.position[where] = lengths = mask.sum(1, keepdim=True)
        self.masks.shorten(where, lengths[:, 0])
        unused, width = self.uniform[:, self.drawn :], self.uniform.shape[1]
        self.uniform, self.drawn = pad(unused, (0, width))[:, :width], 0
        self.uniform[where] = noise(seeds, self.sampling, width, where.device)
        if self.course.plain:
            self._dial(range(len(self.alive)), 1)

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
        if self.passed is not None:
            self.passed.keep(rows)
        if self.steering is not None and self.course.plain:
            self.steering.keep(rows)
        self.position = self.position[rows]
        self.uniform = self.uniform[rows[: len(left)]]
        self.twins = [left.index(self.twins[j]) for j in read]
        self.alive = [self.alive[k] for k in left]
        return tokens[rows[: len(left)]]
