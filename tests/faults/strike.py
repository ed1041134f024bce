"""Killed and interrupted at any moment: what is visible is complete or absent, and a rerun finishes."""

from __future__ import annotations

import os
import signal
import time
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

from faults.child import Child, Ended, run
from faults.world import Command, clear, meaning

KILL, INTERRUPT = signal.SIGKILL, signal.SIGINT
LATE = "too late: it had ended"


class Reference:
    """What a command writes when nothing happens to it, and how long that takes."""

    def __init__(self, command: Command, world: Path, folder: Path) -> None:
        self.command, self.world = command, world
        clear(folder)
        ended = run(command.argv(world), folder)
        assert ended.code == 0, f"{command.name} fails even in peace: {ended.err[-800:]}"
        self.seconds = ended.seconds
        self.out = ended.out
        names = (*command.outputs, *([command.ledger] if command.ledger else []))
        self.meaning = {name: meaning(folder / name) for name in names}
        assert all(self.meaning.values()), f"{command.name} wrote nothing"
        self.folder = folder

    @cached_property
    def fresh(self) -> float:
        """How long it takes from the start of an interpreter on."""
        clear(self.folder)
        return run(self.command.argv(self.world), self.folder, cold=True).seconds

    def check(self, folder: Path, finished: bool = False, rows: int = 2) -> None:
        """Every visible file is a complete output, or the unfinished file that a rerun continues."""
        command = self.command
        for path in folder.iterdir():
            if path.name.startswith("."):
                continue
            if path.name == command.ledger:
                found = meaning(path)
                assert all(row == self.meaning[path.name][0] for row in found), f"a row of {path} is damaged"
                assert 0 < len(found) <= rows, f"{path} has {len(found)} rows"
            elif path.name in command.outputs:
                assert meaning(path) == self.meaning[path.name], f"{path.name} is visible and not complete"
            else:
                part = path.name.removesuffix(".json").removesuffix(".part")
                known = path.name == f"{command.ledger}.lock" or (
                    command.name in ("gen", "train") and part in command.outputs
                )
                assert known and not (finished and ".part" in path.name), f"{path.name} is left behind"
        for name in self.meaning if finished else ():
            assert (folder / name).exists(), f"{name} is missing after a rerun"

    def rerun(self, folder: Path, out: str = ".") -> None:
        """The same line again finishes; one that is told that its output exists already is complete but for others."""
        again = run(self.command.argv(self.world, out), folder)
        if again.code == 1 and "exists already" in again.err:
            if not self.command.forced:  # what is there was found complete
                return
            again = run(self.command.argv(self.world, out, force=True), folder)
        assert again.code == 0, f"the rerun exits {again.code}: {again.err[-600:]}"
        self.check(folder / out, finished=True)
        left = [path.name for path in (folder / out).iterdir() if path.name.startswith(".")]
        assert not left, f"litter is left: {left}"


def strike(reference: Reference, folder: Path, number: int, rng: Random, cold: bool = False) -> str:
    """One command struck once; returns where it was struck, or raises AssertionError with what is wrong."""
    seconds = reference.fresh if cold else reference.seconds
    clear(folder)
    child = Child(reference.command.argv(reference.world), folder, cold=cold)
    where = _wait(child, seconds, folder, rng)
    child.strike(number)
    ended = child.wait()
    _judge(ended, number, cold)
    if ended.code == 0:
        reference.check(folder, finished=True)
        return LATE
    reference.check(folder)
    reference.rerun(folder)
    return f"{where}, fresh interpreter" if cold else where


def _wait(child: Child, seconds: float, folder: Path, rng: Random) -> str:
    """Until a random moment, a moment near the end, or the moment at which something appears in the folder."""
    way = rng.choice(("any moment", "near the end", "at a file", "at a file"))
    if way == "at a file":
        # the names that have been seen; strike at a random one of the changes, or soon after
        seen: set[str] = set()
        changes = rng.randint(1, 4)
        while changes and not child.ended:
            now = set(os.listdir(folder))
            changes -= now != seen
            seen = now
        time.sleep(rng.choice((0.0, 0.0, rng.random() * 0.02)))
        return way
    moment = seconds * (0.9 * rng.random() if way == "any moment" else 0.8 + 0.25 * rng.random())
    while time.monotonic() - child.begun < moment and not child.ended:
        time.sleep(0.0005)
    return way


def _judge(ended: Ended, number: int, cold: bool) -> None:
    """A kill ends it; Ctrl-C ends it with 130 and without a traceback, unless it was over already."""
    if number == KILL:
        assert ended.code in (-KILL, 0), f"exit code {ended.code} after kill -9: {ended.err[-600:]}"
        return
    # the interpreter itself was starting, before a line of ours
    early = cold and (ended.code == -INTERRUPT or "init_import_site" in ended.err or "<frozen site>" in ended.err)
    assert ended.code in (130, 0) or early, f"exit code {ended.code} after Ctrl-C: {ended.err[-800:]}"
    if not early:
        assert "Traceback" not in ended.err, f"a traceback after Ctrl-C: {ended.err[-800:]}"


def together(reference: Reference, folder: Path, many: int) -> list[int]:
    """Several processes on one output: one of them writes it, the others are told, and none harms it."""
    clear(folder)
    children = [Child(reference.command.argv(reference.world), _beside(folder, i)) for i in range(many)]
    ends: list[Any] = [child.wait() for child in children]
    for ended in ends:
        told = "exists already" in ended.err or "another process" in ended.err
        assert ended.code == 0 or (ended.code == 1 and told), f"exit code {ended.code}: {ended.err[-600:]}"
        assert "Traceback" not in ended.err
    assert any(ended.code == 0 for ended in ends), "none of them finished"
    return [ended.code for ended in ends]


def _beside(folder: Path, index: int) -> Path:
    """A folder of its own for what each says, which is a link to the one where all write."""
    link = folder.with_name(f"{folder.name}.{index}")
    link.unlink(missing_ok=True)
    link.symlink_to(folder)
    return link
