"""What a person sees while a command runs: numbers behind the bar on a terminal, and nothing of them elsewhere."""

import dataclasses
import os
import pty
import subprocess
import sys

import pytest

from shl import filter as flt
from shl.cli.live import Survival
from shl.core.defaults import FilterConfig
from test_report import said

SCRIPT = """
from shl.core.console import progress
with progress("generating", 2) as bar:
    bar.advance(**{"tokens/s": 497.25})
    bar.advance(0, survive="0.5:94% [b]1:12%[/b] \\x1b[2J")
    bar.advance()
print("record")
"""


def watched() -> str:
    """What the script writes to a terminal of 120 columns."""
    mine, theirs = pty.openpty()
    env = os.environ | {"COLUMNS": "120", "TERM": "xterm", "FORCE_COLOR": "1"}
    with subprocess.Popen([sys.executable, "-c", SCRIPT], stderr=theirs, stdout=subprocess.PIPE, env=env) as run:
        os.close(theirs)
        seen = b""
        while True:
            try:
                part = os.read(mine, 4096)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            seen += part
        assert run.stdout is not None and run.stdout.read() == b"record\n"
    os.close(mine)
    return seen.decode()


@pytest.mark.skipif(not hasattr(pty, "openpty"), reason="there are no terminals here")
def test_numbers_stay_behind_the_bar_until_they_change() -> None:
    seen = watched()
    assert "tokens/s 497.2  survive 0.5:94% [b]1:12%[/b]" in seen  # the rate is still there, and nothing is markup
    assert "\x1b[2J" not in seen and "2/2" in seen


def test_elsewhere_nothing_of_it_is_said() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("record\n", "")


def test_the_running_share_is_what_the_filter_keeps() -> None:
    """But for near-duplicates, which only the filter looks for."""
    rows = said("healed", 0) + said("plain", 1)
    tally = flt.Tally()
    list(flt.annotate(rows, dataclasses.replace(FilterConfig(), max_similarity=None), tally=tally))
    watch = Survival()
    shown = [watch(row) for row in rows]
    assert watch.tally.kept == tally.kept and watch.tally.read == tally.read
    assert shown[0] == {} and shown[-1] == {"survive": "0.5:100% 1:0%"}


def test_without_controls_or_scores_nobody_knows() -> None:
    row = said("healed", 0)[1]
    assert Survival()(row) == {} and Survival()(row | {"scores": {}}) == {}
