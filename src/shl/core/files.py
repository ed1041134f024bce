"""Files that are complete when they exist: guarded stdout, atomic files and directories, resumable outputs."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from shl.core.errors import Mismatch, ShlError

Target = Path | str | None


def default_mode(directory: bool = False) -> int:
    """The mode a plain `open` or `mkdir` would give; temporary files are made with 0600 instead."""
    mask = os.umask(0)
    os.umask(mask)
    return (0o777 if directory else 0o666) & ~mask


@contextmanager
def guarded_stdout() -> Iterator[int]:
    """Point descriptor 1 at stderr while the block runs, and yield a private descriptor of the real stdout.

    Libraries print to stdout, some of them from native code; whatever they say lands on stderr.
    """
    sys.stdout.flush()
    private = os.dup(1)
    try:
        os.dup2(2, 1)
        yield private
    finally:
        sys.stdout.flush()
        os.dup2(private, 1)
        os.close(private)


@contextmanager
def data_stdout() -> Iterator[IO[str]]:
    """The real stdout as a line-buffered UTF-8 handle, for records only."""
    with (
        guarded_stdout() as private,
        open(private, "w", encoding="utf-8", buffering=1, newline="\n", closefd=False) as handle,
    ):
        yield handle


@contextmanager
def open_out(path: Target, force: bool = False) -> Iterator[IO[str]]:
    """Where records go: stdout for None and "-", else an atomic file. Either way stdout is guarded."""
    if path is None or str(path) == "-":
        with data_stdout() as handle:
            yield handle
    else:
        with guarded_stdout(), atomic_file(path, force) as handle:
            yield handle


def refuse_existing(path: Path | str, force: bool = False, *, marker: str = "shl.json") -> None:
    """Fail early when an output exists already; with force, only when replacing it would delete foreign files."""
    path = Path(path)
    if path.is_dir():
        if not any(path.iterdir()):
            return
        if force and not (path / marker).exists():
            raise ShlError(
                f"{path} is a directory that shl did not write, so --force leaves it alone",
                hint="choose another -o, or remove the directory yourself",
            )
    elif not path.is_file():
        return
    if not force:
        raise ShlError(f"{path} exists already", hint="add --force to replace it, or choose another -o")


@contextmanager
def atomic_file(path: Path | str, force: bool = False, mode: str = "w") -> Iterator[IO[Any]]:
    """Write a file that appears complete or not at all: temporary sibling, fsync, rename."""
    refuse_existing(path, force)
    target = Path(os.path.realpath(path))  # a link keeps pointing where it points
    text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    if target.exists() and not target.is_file():  # a device or a named pipe is written, never replaced
        with open(target, mode, **text) as handle:
            yield handle
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    number, temporary = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    try:
        with open(number, mode, **text) as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.chmod(temporary, default_mode())
        refuse_existing(path, force)  # it may have appeared meanwhile
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def atomic_dir(path: Path | str, force: bool = False, *, marker: str = "shl.json") -> Iterator[Path]:
    """Build a directory aside and publish it by rename, so that its existence means it is complete."""
    target = Path(os.path.abspath(path))
    refuse_existing(target, force, marker=marker)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        yield temporary
        _settle(temporary)
        refuse_existing(target, force, marker=marker)
        _swap(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _settle(root: Path) -> None:
    """Give every file and folder its plain mode, and have the disk hold it before it is published."""
    for folder, _, names in os.walk(root):
        os.chmod(folder, default_mode(directory=True))
        for name in names:
            file = os.path.join(folder, name)
            if not os.path.islink(file):
                os.chmod(file, default_mode())
                _fsync(file)


def _fsync(file: str) -> None:
    number = os.open(file, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _swap(fresh: Path, target: Path) -> None:
    """Rename the old directory aside, the new one in, and delete the old."""
    if not target.exists():
        os.replace(fresh, target)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
    os.replace(target, aside)
    try:
        os.replace(fresh, target)
    except BaseException:
        os.replace(aside, target)
        raise
    shutil.rmtree(aside)


class PartFile:
    """An output that grows as F.part, survives a kill, and is renamed to F when it is complete.

    F.part.json beside it holds the settings, so that an unfinished file is never continued with others.
    """

    def __init__(
        self, path: Path | str, settings: dict[str, Any], *, resume: bool = False, force: bool = False
    ) -> None:
        self.path = Path(path)
        self.part = self.path.with_name(self.path.name + ".part")
        self.plan = self.path.with_name(self.path.name + ".part.json")
        self.settings = json.loads(json.dumps(settings, sort_keys=True))
        if self.path.exists() and not self.path.is_file():
            raise ShlError(f"{self.path} is not a plain file", hint="leave -o out, and redirect stdout instead")
        self.complete = resume and not force and self.path.is_file()
        self.lines = 0
        if self.complete:
            return
        refuse_existing(self.path, force)
        if resume and not force and self.part.exists():
            self._check_settings()
            self.lines = _repair(self.part)
        elif self.part.exists() and not force:
            raise ShlError(
                f"{self.part} is left from a run that did not finish",
                hint="add --resume to continue it, or --force to start again",
            )

    def _check_settings(self) -> None:
        """Refuse to continue what was begun with other settings."""
        if not self.plan.exists():
            raise ShlError(f"{self.part} has no {self.plan.name} beside it", hint="add --force to start again")
        begun = json.loads(self.plan.read_text(encoding="utf-8"))
        changed = sorted(k for k in begun.keys() | self.settings.keys() if begun.get(k) != self.settings.get(k))
        if changed:
            raise Mismatch(
                f"{self.part} was begun with another {', '.join(changed)}",
                hint="repeat the line that began it, or add --force to start again",
            )

    @contextmanager
    def writer(self) -> Iterator[IO[str]]:
        """Append behind the lines that are there; the file is renamed when the block ends without an error."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.plan, force=True) as plan:
            plan.write(json.dumps(self.settings, sort_keys=True) + "\n")
        mode = "a" if self.lines else "w"
        with guarded_stdout(), open(self.part, mode, encoding="utf-8", buffering=1, newline="\n") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(self.part, self.path)
        self.plan.unlink(missing_ok=True)


def _repair(path: Path) -> int:
    """Cut a torn last line off, and count the complete ones."""
    lines = size = 0
    with open(path, "r+b") as handle:
        for line in handle:
            if not line.endswith(b"\n"):
                break
            lines, size = lines + 1, size + len(line)
        handle.truncate(size)
    return lines
