"""A full disk, a file that may not grow, a place that cannot be written: one sentence, nothing by halves, a rerun."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from faults.child import Ended, run
from faults.strike import Reference
from faults.world import clear

FILLED = "nothing"  # no room at all
ROOM = "64m"  # of the small file system when there is room again


def mountable() -> bool:
    """Whether a small file system can be mounted here, which needs root."""
    if os.geteuid():
        return False
    try:
        with small(Path("/tmp/shl-faults-probe"), "64k"):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


@contextmanager
def small(folder: Path, size: str) -> Iterator[Path]:
    """A file system in memory that holds no more than `size`, and says ENOSPC as a disk does."""
    clear(folder)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "shl-faults", folder], check=True, capture_output=True
    )
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True, capture_output=True)
        folder.rmdir()


def _remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True, capture_output=True)


def full(reference: Reference, folder: Path, size: str) -> str:
    """The disk is full at some byte; with room the same line finishes."""
    clear(folder)
    with small(folder / "out", "16k" if size == FILLED else size):
        ballast = folder / "out" / ".ballast"
        if size == FILLED:
            with suppress(OSError), ballast.open("wb", buffering=0) as handle:
                while handle.write(bytes(4096)):
                    pass
        ended = run(reference.command.argv(reference.world, "out"), folder)
        told = _told(ended, "No space left on device")
        reference.check(folder / "out")
        ballast.unlink(missing_ok=True)
        _remount(folder / "out", f"size={ROOM}")
        if told:
            reference.rerun(folder, "out")
    return "No space left on device" if told else "had room enough"


def limited(reference: Reference, folder: Path, largest: int) -> str:
    """No file may grow beyond some bytes: what stands for a full disk where nothing can be mounted."""
    clear(folder)
    (folder / "out").mkdir()
    ended = run(reference.command.argv(reference.world, "out"), folder, largest=largest)
    told = _told(ended, "File too large")
    reference.check(folder / "out")
    if told:
        reference.rerun(folder, "out")
    return "File too large" if told else "had room enough"


def read_only(reference: Reference, folder: Path) -> str:
    """A place that cannot be written, by mount for root and by mode for others."""
    clear(folder)
    if os.geteuid():
        (folder / "out").mkdir(mode=0o555)
        try:
            ended = run(reference.command.argv(reference.world, "out"), folder)
        finally:
            os.chmod(folder / "out", 0o755)
        assert _told(ended, "Permission denied"), f"wrote into a read-only folder: {ended}"
        assert not os.listdir(folder / "out")
        return "Permission denied"
    with small(folder / "out", "1m"):
        _remount(folder / "out", "ro")
        ended = run(reference.command.argv(reference.world, "out"), folder)
        assert _told(ended, "Read-only file system"), f"wrote onto a read-only file system: {ended}"
        assert not os.listdir(folder / "out")
        _remount(folder / "out", "rw")
        reference.rerun(folder, "out")
    return "Read-only file system"


def full_stdout(reference: Reference, folder: Path) -> str:
    """Records go to a device that takes none."""
    clear(folder)
    words = reference.command.argv(reference.world)
    if "-o" in words:
        at = words.index("-o")
        words = [word for word in (*words[:at], *words[at + 2 :]) if word != "--resume"]
    number = os.open("/dev/full", os.O_WRONLY)
    try:
        ended = run(words, folder, stdout=number)
    finally:
        os.close(number)
    assert _told(ended, "No space left on device"), f"did not notice that nothing was written: {ended}"
    return "No space left on device"


def _told(ended: Ended, reason: str) -> bool:
    """Whether it failed for this reason; then in one sentence with a hint."""
    assert "Traceback" not in ended.err and "Exception ignored" not in ended.err, ended.err[-1500:]
    if ended.code == 0:
        return False
    assert ended.code == 1 and reason in ended.err, f"exit code {ended.code}: {ended.err[-600:]}"
    assert ended.err.count("shl: error: ") == ended.err.count("hint: ") == 1, ended.err[-600:]
    return True
