"""The command line: commands in pipeline order, and `main`, the boundary where errors become exit codes."""

from __future__ import annotations

import _thread
import errno
import os
import re
import signal
import sys
import threading
import traceback
from contextlib import suppress
from typing import Annotated, Any, NoReturn

import typer

from shl import __version__
from shl.cli import bake, dose, eval, export, filter, gen, info, new, plot, report, results, score, train, vector
from shl.cli.common import finite
from shl.core import ranks
from shl.core.console import say
from shl.core.errors import ShlError
from shl.core.memory import ran_out

app = typer.Typer(
    name="shl",
    help="Distil a persona steering vector into LoRA weights and heal the incoherence, one round at a time.",
    epilog="One round: shl vector, then shl gen | shl filter, shl train, shl eval. Every step reads and writes files.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for _step in (vector, gen, filter, train, bake, eval, dose, score, results, plot, report, info, export, new):
    app.command(name=_step.NAME, epilog=_step.EXAMPLES, no_args_is_help=_step.NEEDS_ARGUMENTS)(finite(_step.command))


def _version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Distil a persona steering vector into LoRA weights and heal the incoherence, one round at a time."""


def main() -> NoReturn:
    """Run a command. Exit: 0 done or reader closed, 1 mendable, 2 usage, 3 below a gate, 130 Ctrl-C."""
    _Stop.asked, hook = False, sys.unraisablehook
    sys.unraisablehook = _swallowed
    with suppress(ValueError):  # outside the main thread nobody can listen
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, _stop)
    try:
        app(prog_name="shl")
    except SystemExit as done:
        if isinstance(done.__context__, BrokenPipeError):  # the reader has what it wanted
            _leave(0)
        raise
    except BrokenPipeError:
        _leave(0)
    except KeyboardInterrupt:
        _leave(130)
    except Exception as error:
        _leave(130 if _Stop.asked else _report(error))
    finally:
        sys.unraisablehook = hook
    raise AssertionError("typer always exits")


def program() -> NoReturn:
    """The command as a process of its own. Once it has ended Ctrl-C would only make the interpreter complain, which is
    taking itself down; and one of several processes leaves at once, since taking the group down beside others that do
    the same aborts now and then."""
    try:
        main()
    except SystemExit as done:
        if ranks.world() == 1:
            raise
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(done.code if isinstance(done.code, int) else int(bool(done.code)))
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Stop:
    """Whether Ctrl-C was pressed: native code that it meets may raise another error instead, or swallow it."""

    asked = False


def _stop(number: int, frame: object) -> NoReturn:
    _Stop.asked = True
    raise KeyboardInterrupt


def _swallowed(lost: Any) -> None:
    """An exception that had nowhere to go; Ctrl-C is sent again in a moment, when it has."""
    if lost.exc_type is KeyboardInterrupt and _Stop.asked:
        again = threading.Timer(0.01, _thread.interrupt_main)
        again.daemon = True
        again.start()
    else:
        sys.__unraisablehook__(lost)


_DISK = {
    errno.ENOSPC: "make room there and run the same line again, or choose another -o; nothing half-written was kept",
    errno.EDQUOT: "make room within your quota and run the same line again, or choose another -o",
    errno.EFBIG: "files may not grow this large here (ulimit -f); choose another -o",
    errno.EROFS: "choose an -o in a place that can be written",
    errno.EACCES: "choose an -o in a place that you may write, and check that you may read the input",
    errno.ENOENT: "check the path",
    errno.EISDIR: "name a file",
    errno.ENOTDIR: "check the path: a part of it is a file",
    errno.EIO: "the disk reports a fault; copy what you need elsewhere, and choose another -o",
}


def _leave(code: int) -> NoReturn:
    """Exit without a second failure when Python flushes a stdout that nobody reads."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def _report(error: Exception) -> int:
    """Say what went wrong and what to type next; only a bug shows its traceback."""
    message, hint, code = _explain(error)
    if not message or os.environ.get("SHL_DEBUG"):
        traceback.print_exception(error, file=sys.stderr)
    say(f"shl: error: {message or 'this is a bug in shl; please report it with the lines above'}")
    if hint:
        say(f"hint: {hint}")
    return code


def _explain(error: Exception) -> tuple[str, str, int]:
    """Message, hint and exit code of an error; no message for a bug."""
    if isinstance(error, ShlError):
        return error.message, error.hint, error.code
    if ran_out(error):
        return (
            "out of memory",
            "use --dtype bfloat16, a smaller --batch-size or --rank, or a device with more memory",
            1,
        )
    if isinstance(error, OSError):
        reason = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        return reason, _DISK.get(error.errno or 0, "set SHL_DEBUG=1 to see where"), 1
    if native := re.search(r"\(os error (\d+)\)", str(error)):  # an OSError of safetensors or tokenizers
        return str(error), _DISK.get(int(native[1]), "set SHL_DEBUG=1 to see where"), 1
    return "", "", 1
