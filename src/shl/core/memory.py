"""Work in batches that fit into memory: where one does not, half as many rows at a time, and a word about it."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from shl.core import ranks
from shl.core.console import warn
from shl.core.errors import ShlError

if TYPE_CHECKING:
    from shl.core.models import Loaded

Row = TypeVar("Row")
Result = TypeVar("Result")

# what allocators say in a plain RuntimeError: that of the CPU, cuBLAS and cuDNN beneath torch's own, and Apple's
_SAID = re.compile(r"DefaultCPUAllocator|not enough memory|out of memory|STATUS_ALLOC_FAILED|Invalid buffer size")


def ran_out(error: BaseException | None) -> bool:
    """Whether an error says that memory ran out, be it Python's, the CPU's or the GPU's. Needs no torch."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and _SAID.search(str(error)) is not None


def batched(
    loaded: Loaded, rows: Sequence[Row], size: int, work: Callable[[Sequence[Row]], Result], what: str
) -> Iterator[tuple[Sequence[Row], Result]]:
    """The rows in batches of at most `size`, each with what `work` makes of it.

    When memory runs out inside `work`, the same rows are tried again half as many at a time, and the model remembers
    how many fitted for this kind of work. `work` must leave nothing behind when it fails. Processes that share the work
    compute some of the batches each, and all get what comes of them.
    """
    shares = [rows[at : at + size] for at in range(0, len(rows), size)]
    if ranks.sharing() == 1:
        yield from _alone(loaded, rows, size, work, what)
        return

    def mine(share: Sequence[Row]) -> list[tuple[int, Result]]:
        return [(len(chosen), result) for chosen, result in _alone(loaded, share, size, work, what)]

    for share, parts in zip(shares, ranks.each(shares, mine), strict=True):
        at = 0
        for n, result in parts:
            yield share[at : at + n], result
            at += n


def _alone(
    loaded: Loaded, rows: Sequence[Row], size: int, work: Callable[[Sequence[Row]], Result], what: str
) -> Iterator[tuple[Sequence[Row], Result]]:
    """The batches of one process."""
    at, size = 0, min(size, loaded.fits.get(what, size))
    while at < len(rows):
        chosen = rows[at : at + size]
        try:
            result = work(chosen)
        except Exception as error:
            if not ran_out(error):
                raise
            if len(chosen) == 1:
                raise ShlError(
                    f"out of memory while {what}, with one row at a time",
                    hint="use --dtype bfloat16, shorter texts, or a device with more memory",
                ) from error
            size = len(chosen) // 2
        else:
            at += len(chosen)
            yield chosen, result
            continue
        # only here is the error gone, and with it the tensors that its frames held
        _free()
        loaded.fits[what] = size
        warn(f"out of memory while {what} {len(chosen)} rows at once: going on with {size}")


def _free() -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()
