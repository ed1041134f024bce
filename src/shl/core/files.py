"""Files that are complete when they exist: guarded stdout, atomic files and directories."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from shl.core import litter
from shl.core.errors import ShlError

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


def refuse_links_out(folder: Path | str, name: str) -> Path:
    """A file of a folder that came from elsewhere; a link that leaves the folder is refused."""
    path = Path(folder) / name
    if not path.resolve().is_relative_to(Path(folder).resolve()):
        raise ShlError(
            f"{path} is a link to a file outside its directory",
            hint=f"if you trust it, copy it with its files: cp -rL {folder} COPY",
        )
    return path


@contextmanager
def atomic_file(path: Path | str, force: bool = False, mode: str = "w") -> Iterator[IO[Any]]:
    """Write a file that appears complete or not at all: temporary sibling, fsync, rename."""
    if Path(path).is_dir():
        raise ShlError(f"{path} is a directory", hint="name a file with -o")
    refuse_existing(path, force)
    target = Path(os.path.realpath(path))  # a link keeps pointing where it points
    text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    if target.exists() and not target.is_file():  # a device or a named pipe is written, never replaced
        with open(target, mode, **text) as handle:
            yield handle
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    litter.sweep(target)
    number, temporary = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    litter.hold(number)
    try:
        with open(number, mode, **text) as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.chmod(temporary, default_mode())
        publish(Path(temporary), target, force)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def atomic_dir(path: Path | str, force: bool = False, *, marker: str = "shl.json") -> Iterator[Path]:
    """Build a directory aside and publish it by rename, so that its existence means it is complete."""
    target = Path(os.path.abspath(path))
    refuse_existing(target, force, marker=marker)
    target.parent.mkdir(parents=True, exist_ok=True)
    litter.sweep(target)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    number = os.open(temporary, os.O_RDONLY)
    litter.hold(number)
    try:
        yield temporary
        _settle(temporary)
        if force:
            refuse_existing(target, force, marker=marker)
            _swap(temporary, target)
        else:
            publish(temporary, target)
        _keep(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        os.close(number)


def publish(fresh: Path, target: Path, force: bool = False) -> None:
    """Give a finished file or directory its name; without force never over one that appeared meanwhile."""
    try:
        if force:
            os.replace(fresh, target)
        elif fresh.is_dir():
            os.rename(fresh, target)  # fails where anything but an empty directory stands
        else:
            _name(fresh, target)
    except FileExistsError:
        refuse_existing(target)
        raise
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.ENOTDIR):
            refuse_existing(target)
        raise
    _keep(target.parent)


def _name(fresh: Path, target: Path) -> None:
    """Rename a file where there is none. A second name fails, unlike a rename, when the name is taken."""
    try:
        os.link(fresh, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL):
            raise
        refuse_existing(target)  # a file system without second names
        os.replace(fresh, target)
    else:
        os.unlink(fresh)


def _keep(folder: Path) -> None:
    """Have the disk hold the names in a folder."""
    with suppress(OSError):  # some file systems cannot
        _fsync(str(folder))


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
    shutil.rmtree(aside, ignore_errors=True)
