"""What the name of a loop's arm says: how it trains, what it keeps of an adapter, and which text it learns from."""

import argparse
import re
from dataclasses import dataclass
from typing import Any

ARMS: dict[str, dict[str, Any]] = {
    "healed": {"reg": "kl_rev", "agg": "rmse", "ref": "base"},
    "plain": {"reg": "nll"},
    "tight": {"reg": "kl_rev", "agg": "rmse", "ref": "base", "tau": 0.25},
    "loose": {"reg": "kl_rev", "agg": "rmse", "ref": "base", "tau": 0.75},
    "looser": {"reg": "kl_rev", "agg": "rmse", "ref": "base", "tau": 1.0},
    "short": {"reg": "kl_rev", "agg": "rmse", "ref": "base", "shortest": 16},
    "mean": {"reg": "kl_rev", "agg": "mean", "ref": "base"},
    "prev": {"reg": "kl_rev", "agg": "rmse", "ref": "prev"},
}
NAME = re.compile(r"(?P<how>[a-z]+)(@(?P<scale>[\d.]+))?(?P<unfiltered>-unfiltered)?(-(?P<source>prompted|selected))?")


@dataclass(frozen=True)
class Arm:
    """What the name of an arm says: how it trains, what is kept of an adapter, and what it learns from."""

    how: str
    scale: float
    filtered: bool
    source: str  # steered, prompted or selected

    @property
    def own(self) -> bool:
        """Whether no vector speaks, so that everything is at coefficient 0."""
        return self.source != "steered"


def arm_of(word: str) -> Arm:
    """NAME[@SCALE][-unfiltered][-prompted|-selected], with a name of ARMS."""
    found = NAME.fullmatch(word)
    if found is None or found["how"] not in ARMS or not (scale := _number(found["scale"] or "1")):
        raise argparse.ArgumentTypeError(f"no arm is called {word!r}; there are {', '.join(ARMS)}")
    return Arm(found["how"], scale, not found["unfiltered"], found["source"] or "steered")


def _number(text: str) -> float:
    """0 for what is none, which is no scale either."""
    try:
        return float(text)
    except ValueError:
        return 0.0


def arm_word(word: str) -> str:
    """An arm as the command line takes it."""
    arm_of(word)
    return word
