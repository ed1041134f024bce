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
    at = 0

    def most() -> int:
        return min(size, len(rows) - at)

    def attempt(n: int) -> tuple[Sequence[Row], Result]:
        return rows[at : at + n], work(rows[at : at + n])

    while at < len(rows):
        chosen, result = fitted(loaded, most, attempt, what)
        at += len(chosen)
        yield chosen, result


def fitted(loaded: Loaded, most: Callable[[], int], work: Callable[[int], Result], what: str) -> Result:
    """What `work(n)` makes with at most n rows at once: `most()` of them, but no more than are known to fit.

    When memory runs out inside it is called again with half as many. It may keep what it has finished by then; `most`
    is asked anew, so that it can say how many rows are left.
    """
    while True:
        size = min(most(), loaded.fits.get(what, most()))
        try:
            return work(size)
        except Exception as error:
            if not ran_out(error):
                raise
            if size == 1:
                raise ShlError(
                    f"out of memory while {what}, with one row at a time",
                    hint="use --dtype bfloat16, shorter texts, or a device with more memory",
                ) from error
        # only here is the error gone, and with it the tensors that its frames held
        _free()
        loaded.fits[what] = size // 2
        warn(f"out of memory while {what} {size} rows at once: going on with {size // 2}")


def _free() -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()
