"""An output that grows line by line, survives a kill, and can be continued."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from shl.core.console import warn
from shl.core.errors import Mismatch, ShlError
from shl.core.files import atomic_file, guarded_stdout, publish, refuse_existing
from shl.core.litter import Claim
from shl.core.strict import loads, read_object

_AGAIN = "add --force to start again"


def refuse_other(begun: Mapping[str, Any], settings: Mapping[str, Any], what: str) -> None:
    """Refuse to continue with other settings than something unfinished was begun with."""
    changed = sorted(k for k in begun.keys() | settings.keys() if begun.get(k) != settings.get(k))
    if changed:
        hint = f"repeat the line that began it, or {_AGAIN}"
        raise Mismatch(f"{what} with another {', '.join(changed)}", hint=hint)


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
        self.force, self.lines = force, 0
        if self.complete:
            self._tidy()
            return
        refuse_existing(self.path, force)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._claim = Claim(self.path)
        try:
            self._begin(resume)
        except BaseException:
            self._claim.release()
            raise

    def _begin(self, resume: bool) -> None:
        """What is there to continue; nothing when there is no unfinished file, or an empty one."""
        if self.force or not self.part.exists() or not self.part.stat().st_size:
            return
        if not resume:
            raise ShlError(
                f"{self.part} is left from a run that did not finish",
                hint="add --resume to continue it, or --force to start again",
            )
        self._check_settings()
        self.lines = _repair(self.part)

    def _check_settings(self) -> None:
        """Refuse to continue what was begun with other settings."""
        if not self.plan.exists():
            raise ShlError(f"{self.part} has no {self.plan.name} beside it", hint=_AGAIN)
        refuse_other(read_object(self.plan, _AGAIN), self.settings, f"{self.part} was begun")

    @contextmanager
    def writer(self) -> Iterator[IO[str]]:
        """Append behind the lines that are there; the file is renamed when the block ends without an error."""
        try:
            with atomic_file(self.plan, force=True) as plan:
                plan.write(json.dumps(self.settings, sort_keys=True) + "\n")
            mode = "a" if self.lines else "w"
            with guarded_stdout(), open(self.part, mode, encoding="utf-8", buffering=1, newline="\n") as handle:
                yield handle
                handle.flush()
                os.fsync(handle.fileno())
            publish(self.part, self.path, self.force)
            self.plan.unlink(missing_ok=True)
        finally:
            self._clear()
            self._claim.release()

    def _tidy(self) -> None:
        """Take away what a kill between the last steps has left beside a complete file."""
        with suppress(OSError, ShlError):
            if Claim.file(self.path).exists():
                Claim(self.path).release()
            if self.part.exists() and os.path.samefile(self.part, self.path):
                self.part.unlink()
            if not self.part.exists():
                self.plan.unlink(missing_ok=True)

    def _clear(self) -> None:
        """An unfinished file without a line is worth nothing, and would only be asked about."""
        with suppress(OSError):
            if not self.part.stat().st_size:
                self.part.unlink()
                self.plan.unlink(missing_ok=True)


def _repair(path: Path) -> int:
    """Cut off a torn last line, and a line that a crash has damaged with all that follow; count the others."""
    lines = size = 0
    with open(path, "r+b") as handle:
        for line in handle:
            if not line.endswith(b"\n"):
                break
            try:
                loads(line)
            except ValueError:
                warn(f"{path}:{lines + 1} was damaged; it and what followed is made again")
                break
            lines, size = lines + 1, size + len(line)
        handle.truncate(size)
    return lines
