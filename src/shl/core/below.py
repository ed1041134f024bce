"""The blocks below the first trained one: what they make of fixed texts is the same in every epoch, so it is kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shl.core.batches import right_pad
from shl.core.heal_data import Example
from shl.core.hooks import Capture
from shl.core.memory import batched
from shl.core.models import Loaded


class Below:
    """States that enter block `first`, for the examples of a round; within `standing_in` the blocks below do not run.

    They are those of the weights that were active when they were remembered.
    """

    def __init__(self, loaded: Loaded, first: int) -> None:
        self.loaded, self.first = loaded, first
        self._states: dict[int, Tensor] = {}  # [tokens, hidden] on the CPU, by identity of the example
        self._tuple = False
        self._batch: Tensor | None = None

    @torch.no_grad()
    def remember(self, examples: Sequence[Example], batch_size: int) -> None:
        """One pass of the lower blocks over every example, given by length."""
        if not self.first:
            return
        handle = self.loaded.blocks[self.first - 1].register_forward_hook(self._note)
        try:
            with Capture(self.loaded, [self.first - 1], "all", early_exit=True) as capture:

                def read(chosen: Sequence[Example]) -> Tensor:
                    ids = right_pad([one.ids for one in chosen], self.loaded.device)
                    return capture.run(input_ids=ids)[self.first - 1].cpu()

                for chosen, found in batched(self.loaded, examples, batch_size, read, "reading the lower blocks"):
                    self._states |= {id(one): row[: len(one)].clone() for one, row in zip(chosen, found, strict=True)}
        finally:
            handle.remove()

    def _note(self, module: nn.Module, args: Any, output: Any) -> None:
        self._tuple = isinstance(output, tuple)

    def use(self, chosen: Sequence[Example]) -> None:
        """The next pass is over these examples, in this order, padded on the right."""
        if self.first:
            rows = [self._states[id(one)] for one in chosen]
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


def _twice(forward: Any) -> Any:
    """A block that keeps its inputs only, and computes again when gradients are asked for."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run
