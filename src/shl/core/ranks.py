"""Several processes at one command: which of them this is, how they share work, and who speaks and writes.

`accelerate launch --module shl …` and `torchrun -m shl …` start them and tell each its rank by environment variables.
Work is cut into the batches that one process would compute, so that what comes out is the same, in the same order.
"""

from __future__ import annotations

import atexit
import datetime
import io
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from shl.core.errors import ShlError

Item = TypeVar("Item")
Result = TypeVar("Result")
_PATIENCE = datetime.timedelta(hours=12)  # one may compute long while the others wait
_together = False


def world() -> int:
    """How many processes there are; 1 without a launcher."""
    told = all(name in os.environ for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"))
    return int(os.environ.get("WORLD_SIZE", "1")) if told else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return int(os.environ.get("RANK", "0")) if world() > 1 else 0


def first() -> bool:
    """Whether this process speaks and writes."""
    return rank() == 0


def refuse_stdin(source: str | None) -> None:
    """Several processes cannot read one stdin."""
    if source == "-" and world() > 1:
        raise ShlError("stdin cannot be read by several processes", hint="write the records to a file, and name it")


def device() -> str:
    """This process's own GPU."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if world() > 1 else "cuda"


def share(value: Result) -> Result:
    """What the first process has here, in all of them."""
    if world() == 1:
        return value
    held = [value]
    _group().broadcast_object_list(held, src=0)
    return held[0]


def spread(items: Iterable[Item], work: Callable[[Item], Result]) -> Iterator[Result]:
    """work(item) of every item, in order, each done by one process; the first gets all results, the others none.

    When the first stops early and closes this, the others end as well.
    """
    if world() == 1:
        yield from map(work, items)
        return
    todo = iter(items)
    while turn := list(islice(todo, world())):
        mine = work(turn[rank()]) if rank() < len(turn) else None
        results = _gather(mine)
        try:
            if first():
                yield from results[: len(turn)]
        except GeneratorExit:
            share(False)
            raise
        if not share(True):
            return


@contextmanager
def together() -> Iterator[None]:
    """Inside this context all processes run the same steps, and `each` divides the batches of each step."""
    global _together
    before, _together = _together, world() > 1
    try:
        yield
    finally:
        _together = before


def each(items: Sequence[Item], work: Callable[[Item], Result]) -> Iterator[Result]:
    """work(item) of every item, in order, in every process; inside `together` each process does its share of them."""
    if not _together:
        yield from map(work, items)
        return
    shares = _gather([work(item) for item in items[rank() :: world()]])
    for i in range(len(items)):
        yield shares[i % world()][i // world()]


@contextmanager
def own(out: Path) -> Iterator[Path]:
    """Where to write what all processes make: the place named in the first, one that is thrown away in the others."""
    if first():
        yield out
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / out.name


def sharing() -> int:
    """Among how many processes `each` divides its items now."""
    return world() if _together else 1


def _gather(value: Any) -> list[Any]:
    """What every process has here, in the order of ranks, with tensors of GPUs on this process's own."""
    import torch

    packed = io.BytesIO()
    torch.save(value, packed)
    held: list[Any] = [None] * world()
    _group().all_gather_object(held, packed.getvalue())

    def place(storage: Any, location: str) -> Any:
        return storage.cuda(device()) if location.startswith("cuda") else storage

    # what comes from our own processes, not from a file
    return [torch.load(io.BytesIO(data), map_location=place, weights_only=False) for data in held]


def _group() -> Any:
    """torch's module, once the processes have met."""
    import torch.distributed as group

    if not group.is_initialized():
        group.init_process_group("gloo", timeout=_PATIENCE)
        atexit.register(group.destroy_process_group)
    return group
