"""Training curves: what the log of each adapter says, epoch by epoch, round after round, arm beside arm."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shl.core.errors import InputError, ShlError
from shl.core.metrics import finite
from shl.core.records import read_lines
from shl.core.runs import rounds
from shl.plot.style import Line, Panel, check_format, save, sheet

STRETCH = 0.9  # how much of the space between two rounds the epochs of one take
# column of the log -> title, whether its axis is logarithmic, and its lower end where zero means something
CURVES = {
    "nll": ("training nll, nats per token", False, None),
    "holdout_nll": ("held-out nll, nats per token", False, None),
    "barrier_active": ("barrier active, share of sequences", False, 0.0),
    "pressure": ("pressure: gradient of barrier over nll", False, 0.0),
    "holdout_kl_p95": ("held-out KL, 95th percentile, nats", False, 0.0),
    "update_norm": ("norm of the change", False, 0.0),
}


@dataclass(frozen=True)
class Training:
    """The log of one adapter, row 0 before training."""

    arm: str
    round: int
    log: list[dict[str, Any]]


def training_curves(source: Path | str | Iterable[Path | str], out: Path | str, force: bool = False) -> None:
    """Draw the logs of run folders or adapter directories to a file; its suffix is the format."""
    check_format(out)
    found = [one for path in ([source] if isinstance(source, Path | str) else source) for one in _read(Path(path))]
    if not found:
        raise ShlError("there is nothing to plot", hint="a training log is what shl train leaves in its directory")
    arms = list(dict.fromkeys(one.arm for one in found))
    if not (panels := _panels(found, arms)):
        raise ShlError("the logs hold no curves", hint=f"columns that are drawn: {', '.join(CURVES)}")
    save(sheet(panels, arms, "Training"), out, force)


def _read(path: Path) -> list[Training]:
    """The logs under a run folder, or that of one adapter, which is its own arm."""
    if (path / "adapter_config.json").is_file():
        return [Training(path.name, 0, _log(path))]
    if not (found := rounds(path)):
        raise InputError("is neither a run folder nor an adapter", where=str(path), hint="shl info says what it is")
    logs = [(one, one.folder / "adapter") for one in found]
    return [Training(one.arm, one.number, _log(adapter)) for one, adapter in logs if (adapter / "log.jsonl").is_file()]


def _log(adapter: Path) -> list[dict[str, Any]]:
    return [row for _, row in read_lines(adapter / "log.jsonl")]


def _panels(found: list[Training], arms: list[str]) -> list[Panel]:
    """A panel for every column that some log has."""
    return [panel for name in CURVES if (panel := _panel(name, found, arms)).drawn()]


def _panel(name: str, found: list[Training], arms: list[str]) -> Panel:
    """One column of the logs: each round is a stretch of the axis; a single round has its epochs on it."""
    title, log, low = CURVES[name]
    turns = sorted({one.round for one in found})
    single = len(turns) == 1
    panel = Panel(title, "epoch" if single else "round, epochs within it", log=log, low=low, integers=single)
    for one in found:
        last = max((epoch for row in one.log if (epoch := finite(row.get("epoch"))) is not None), default=0) or 1
        spots = []
        for row in one.log:
            epoch, value = finite(row.get("epoch")), finite(row.get(name))
            if epoch is not None and value is not None:
                spots.append((epoch if single else turns.index(one.round) + STRETCH * epoch / last, value))
        panel.lines.append(Line(arms.index(one.arm), spots))
    if not single:
        every = -(-len(turns) // 8)  # at most eight rounds are named
        panel.ticks = [(at + STRETCH / 2, f"r{turn}") for at, turn in enumerate(turns) if at % every == 0]
    return panel
