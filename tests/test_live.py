"""What a person sees while a command runs: numbers behind the bar on a terminal, and nothing of them elsewhere."""

import dataclasses
import os
import pty
import re
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
TRAINING = """
from shl.core.console import watch
from shl.core.heal_log import COLUMNS
with watch("healing", COLUMNS, 30) as view:
    for epoch in range(30):
        view.row({"epoch": epoch, "nll": 1.23456, "holdout_nll": 1.34567, "kl_mean": 0.0123456, "kl_p95": 0.0456789,
                  "kl_max": 6.18765, "barrier_active": 0.0476190, "pressure": 0.0123456, "update_norm": 13.5612})
        view.advance(nll=0.5)
print("record")
"""
LAST = ["29", "1.235", "1.346", "0.01235", "0.04568", "6.188", "0.04762", "0.01235", "13.56"]


def watched(script: str = SCRIPT, **size: str) -> str:
    """What the script writes to a terminal, of 120 columns when nothing else is said."""
    mine, theirs = pty.openpty()
    env = os.environ | {"COLUMNS": "120", "TERM": "xterm", "FORCE_COLOR": "1"} | size
    with subprocess.Popen([sys.executable, "-c", script], stderr=theirs, stdout=subprocess.PIPE, env=env) as run:
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


@pytest.mark.skipif(not hasattr(pty, "openpty"), reason="there are no terminals here")
def test_a_training_fits_a_small_terminal() -> None:
    """Nine numbers a row, uncut; and with more epochs than lines the last ones and the bar stay on the screen."""
    last = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", watched(TRAINING, COLUMNS="80", LINES="24")).rpartition("healing  ")[2]
    lines = [line.strip() for line in last.splitlines()]
    assert "…" not in last and len(last.rstrip().splitlines()) < 24
    assert [line.split() for line in lines if line.startswith("29")] == [LAST]
    assert any("30/30" in line for line in lines)


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
