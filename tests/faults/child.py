"""One shl command in a process of its own that can be struck: forked from this one, where everything is imported.

A fork costs milliseconds where a fresh start costs seconds of imports; signals, files and exit codes are as real.
"""

from __future__ import annotations

import faulthandler
import fcntl
import importlib
import os
import pkgutil
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

SPINS = 120.0  # seconds of computing after which a command that should have ended never will
STANDS = 60.0  # seconds without any computing after which it waits for what will not come
_TICK = os.sysconf("SC_CLK_TCK")


@dataclass
class Ended:
    """How a command ended: its exit code (negative: the signal that killed it), what it said, how long it took."""

    code: int
    out: bytes
    err: str
    seconds: float = field(compare=False)


def warm() -> None:
    """Import everything that a command could, so that children begin with the command itself."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` has it ignored, here and in fresh starts
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", MPLBACKEND="Agg")
    import shl

    for module in pkgutil.walk_packages(shl.__path__, "shl."):
        # kernels are for CUDA alone, and triton need not be there
        if not module.name.endswith(("__main__", ".kernels")) and not module.name.startswith("shl.toy"):
            importlib.import_module(module.name)
    names = ("transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto", "peft", "gguf",
             "transformers.tokenization_utils_tokenizers", "matplotlib.backends.backend_agg", "filelock",
             "rich.console", "rich.table", "torch.optim", "jinja2.sandbox", "transformers.pytorch_utils")  # fmt: skip
    for name in names:
        importlib.import_module(name)
    from shl.core import litter

    litter.YOUNG = 0.0  # what a killed run left is swept by the next, however soon it comes


class Child:
    """A command that runs. `stdin` and `stdout` are descriptors; without stdout what it writes is kept."""

    def __init__(
        self, argv: Sequence[str], folder: Path, *, stdin: int | None = None, stdout: int | None = None,
        largest: int | None = None, cold: bool = False,
    ) -> None:  # fmt: skip
        self.folder, self.begun = folder, time.monotonic()
        self._out = folder.parent / f"{folder.name}.out"
        out = os.open(self._out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        self._err, err = os.pipe()  # not a file: a limit on files must not silence what is said about it
        fcntl.fcntl(err, fcntl.F_SETPIPE_SZ, 1 << 20)
        ends = (os.open(os.devnull, os.O_RDONLY) if stdin is None else stdin, out if stdout is None else stdout, err)
        if cold:
            command = [sys.executable, "-m", "shl", *argv]
            path = {
                "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))
            }  # what is tested here, from there too
            self.pid = subprocess.Popen(
                command, cwd=folder, stdin=ends[0], stdout=ends[1], stderr=ends[2], env=os.environ | path
            ).pid
        else:
            self.pid = os.fork()
            if not self.pid:
                _run(argv, folder, ends, largest)
        for number in (out, err, *(() if stdin is not None else ends[:1])):
            os.close(number)

    def strike(self, number: int) -> None:
        """Send a signal, if there is still somebody to get it."""
        if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            os.kill(self.pid, number)

    @property
    def ended(self) -> bool:
        """Whether it is over; the exit code can still be had."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def wait(self) -> Ended:
        """Wait for the end; one that does not come is a defect of the command."""
        used, since = 0.0, time.monotonic()
        while not self.ended:
            if (now := self._used()) != used:
                used, since = now, time.monotonic()
            # a busy machine makes a command slow, and it still computes a little now and then
            if used > SPINS or (time.monotonic() - since > STANDS and not self._wants()):
                self.strike(signal.SIGABRT)  # has it say where it stands
                time.sleep(1)
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise AssertionError(f"hangs after {used:.1f} s of computing: {self._said()[1][-2000:]}")
            time.sleep(0.001)
        _, status = os.waitpid(self.pid, 0)
        return Ended(os.waitstatus_to_exitcode(status), *self._said(), time.monotonic() - self.begun)

    def _stat(self) -> list[str]:
        """Fields of /proc/PID/stat from the state on; none where there is no such thing, or no such process."""
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return []

    def _used(self) -> float:
        """Seconds of computing so far."""
        stat = self._stat()
        return (int(stat[11]) + int(stat[12])) / _TICK if stat else time.monotonic() - self.begun

    def _wants(self) -> bool:
        """Whether it is waiting for a processor or a disk, rather than for an event."""
        return self._stat()[:1] in (["R"], ["D"])

    def _said(self) -> tuple[bytes, str]:
        with open(self._err, "rb") as err:
            return self._out.read_bytes(), err.read().decode(errors="replace")


def _run(argv: Sequence[str], folder: Path, ends: Sequence[int], largest: int | None) -> None:
    """The child: a command behind its error boundary, as the console script calls it."""
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number, end in enumerate(ends):
            os.dup2(end, number)
        os.closerange(3, 256)
        sys.stdin, sys.stdout, sys.stderr = (open(i, mode) for i, mode in enumerate("rww"))  # noqa: SIM115
        sys.stderr.reconfigure(line_buffering=True, errors="backslashreplace")
        os.chdir(folder)
        if largest is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
        faulthandler.enable(sys.stderr)
        sys.argv = ["shl", *argv]
        from shl.cli import main

        main()
    except SystemExit as done:
        code = done.code if isinstance(done.code, int) else 0 if done.code is None else 1
    except KeyboardInterrupt:  # before or behind the boundary, where a real process would be starting or ending
        code = 130
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def run(argv: Sequence[str], folder: Path, **ends: int) -> Ended:
    """A command from beginning to end."""
    return Child(argv, folder, **ends).wait()  # type: ignore[arg-type]


def aside(work: Callable[[], None]) -> None:
    """Do something in a process of its own, so that this one stays without threads."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            work()
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        raise RuntimeError("the small world could not be made")
