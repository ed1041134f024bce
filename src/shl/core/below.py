"""The blocks below the first that differs: what they make of a text is kept, and need not be computed again.

Below the first trained block it is the same in every epoch of a training; below the first steered one it is the same
for the steered and for the base model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from shl.core.batches import right_pad
from shl.core.heal_data import Example
from shl.core.hooks import Capture, Hooks, hidden_of
from shl.core.memory import batched
from shl.core.models import Loaded

_MANY = 32  # passes that are kept one by one


class Below:
    """States that enter block `first`, each under a key; within `standing_in` the blocks below do not run.

    They are those of the weights that were active when they were computed.
    """

    def __init__(self, loaded: Loaded, first: int) -> None:
        self.loaded, self.first = loaded, first
        self._states: dict[int, Tensor] = {}  # [tokens, hidden] on the CPU
        self._texts: dict[int, list[int]] = {}  # the tokens that states were handed over for
        self._tuple = False
        self._batch: Tensor | None = None

    @torch.no_grad()
    def remember(self, examples: Sequence[Example], batch_size: int) -> None:
        """One pass of the lower blocks over every example, given by length; the keys are their identities."""
        if not self.first:
            return
        handle = self.loaded.blocks[self.first - 1].register_forward_hook(self.note)
        try:
            with Capture(self.loaded, [self.first - 1], "all", early_exit=True) as capture:

                def read(chosen: Sequence[Example]) -> Tensor:
                    ids = right_pad([one.ids for one in chosen], self.loaded.device)
                    return capture.run(input_ids=ids)[self.first - 1].cpu()

                for chosen, found in batched(self.loaded, examples, batch_size, read, "reading the lower blocks"):
                    self._states |= {id(one): row[: len(one)].clone() for one, row in zip(chosen, found, strict=True)}
        finally:
            handle.remove()

    def note(self, module: nn.Module, args: Any, output: Any) -> None:
        """A hook: blocks of some families return tuples."""
        self._tuple = isinstance(output, tuple)

    def know(self, key: int, ids: list[int], states: Tensor) -> None:
        """Take over states that somebody has computed, of all tokens but the last, behind which nothing is read."""
        self._texts[key], self._states[key] = ids, pad(states[: len(ids) - 1], (0, 0, 0, 1))

    def has(self, key: int, ids: list[int]) -> bool:
        """Whether states were handed over for just these tokens."""
        return self._texts.get(key) == ids

    def use(self, keys: Sequence[int]) -> None:
        """The next pass is over the texts of these keys, in this order, padded on the right."""
        if self.first:
            rows = [self._states[key] for key in keys]
            self._batch = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.loaded.device)

    @contextmanager
    def standing_in(self, checkpointing: bool = False) -> Iterator[None]:
        """Passes begin at block `first` with the states named by `use`; with checkpointing the others compute twice."""

        def through(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            return (hidden,) if self._tuple else hidden

        def last(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            return (self._batch,) if self._tuple else self._batch

        blocks = self.loaded.blocks
        stand_ins: dict[int, Any] = {index: through for index in range(self.first)}
        if self.first:
            stand_ins[self.first - 1] = last
        for index in range(self.first, len(blocks)) if checkpointing else ():
            stand_ins[index] = _twice(blocks[index].forward)
        try:
            for index, forward in stand_ins.items():
                blocks[index].forward = forward
            yield
        finally:
            for index in stand_ins:
                vars(blocks[index]).pop("forward", None)


class Passed(Hooks):
    """What a block gives out for the rows of a running batch, before anything is added to it.

    Entered before `Steering`, so that its hook comes first. `below` has the states of the rows that were handed over.
    """

    def __init__(self, loaded: Loaded, layer: int) -> None:
        super().__init__(loaded, [layer])
        self.below = Below(loaded, layer + 1)
        self._passes: list[Tensor] = []  # [rows, positions, hidden]
        self._on = False
        self._left: dict[int, Tensor] = {}

    def _make(self, layer: int) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            if not self._on:
                return
            self.below.note(module, args, output)
            self._passes.append(hidden_of(output))
            if len(self._passes) > _MANY:
                self._passes = [torch.cat(self._passes, 1)]

        return note

    def begin(self, whole: bool) -> None:
        """The next pass is the first of a batch; nothing is kept unless every pass is over the whole batch."""
        self._passes, self._on = [], whole

    def keep(self, rows: Tensor) -> None:
        """All others leave the batch."""
        self._passes = [torch.cat(self._passes, 1)[rows]]

    def leave(self, key: int, row: int, count: int) -> None:
        """A row has come to its end: its states are those of the last `count` positions."""
        self._left[key] = torch.cat([one[row] for one in self._passes])[-count:].clone()

    def hand_over(self, key: int, number: int, ids: list[int]) -> None:
        """The states that were left under `key`, if any, are those of these tokens, and known under a number."""
        if key in self._left:
            self.below.know(number, ids, self._left.pop(key))


def _twice(forward: Any) -> Any:
    """A block that keeps its inputs only, and computes again when gradients are asked for."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run
