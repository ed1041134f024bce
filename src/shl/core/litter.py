"""Locks that end with their process, and the removal of what processes that were killed have left behind."""

from __future__ import annotations

import os
import re
import shutil
import time
import weakref
from contextlib import suppress
from pathlib import Path

from shl.core.errors import ShlError

try:
    import fcntl
except ImportError:  # no such locks here: nothing is held, and nothing is swept
    fcntl = None  # type: ignore[assignment]

YOUNG = 60.0  # seconds; what is younger may be about to be locked


def hold(number: int) -> bool | None:
    """Lock an open file until it is closed, by whatever end the process comes to.

    False: another process holds it. None: there are no locks here.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def sweep(target: Path) -> None:
    """Remove temporary siblings of an output that nobody holds any more; a killed run cannot do it itself."""
    pattern = re.compile(re.escape(f".{target.name}.") + r"[a-z0-9_]{8}\.(tmp|old)")
    with suppress(OSError), os.scandir(target.parent) as entries:
        for entry in entries:
            old = pattern.fullmatch(entry.name)
            if not old or entry.is_symlink() or time.time() - entry.stat(follow_symlinks=False).st_ctime < YOUNG:
                continue
            if old[1] == "old" and not target.exists():  # killed between two renames: the only copy there is
                continue
            _remove(entry.path)


def _remove(path: str) -> None:
    with suppress(OSError):
        number = os.open(path, os.O_RDONLY)
        try:
            if hold(number) is not True:
                return
            if os.path.isdir(path):
                shutil.rmtree(path, ignore_errors=True)
            else:
                os.unlink(path)
        finally:
            os.close(number)


class Claim:
    """One process's right to write an output, held by a hidden lock file beside it until released or ended."""

    def __init__(self, target: Path) -> None:
        self.path = self.file(target)
        self._number = self._acquire(target)
        self._end = weakref.finalize(self, _drop, self._number, str(self.path))

    @staticmethod
    def file(target: Path) -> Path:
        """Where the claim on an output lies."""
        return target.with_name(f".{target.name}.lock")

    def _acquire(self, target: Path) -> int:
        while True:
            number = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            if hold(number) is False:
                os.close(number)
                raise ShlError(f"another process is writing {target}", hint="wait for it, end it, or choose another -o")
            with suppress(FileNotFoundError):
                if os.fstat(number).st_ino == os.stat(self.path).st_ino:
                    return number
            os.close(number)  # it was released, and its file removed, between the two steps

    def release(self) -> None:
        """Let others write."""
        self._end()


def _drop(number: int, path: str) -> None:
    with suppress(OSError):
        os.unlink(path)
    with suppress(OSError):
        os.close(number)
