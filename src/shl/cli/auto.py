"""`shl gen --coeff auto`: what the dose is to meet, and the search for it on a probe."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from shl.cli.common import usage
from shl.core import console, records
from shl.core.defaults import DoseConfig, GenConfig
from shl.core.errors import ShlError
from shl.core.part import PartFile

if TYPE_CHECKING:
    from shl.core.models import Loaded
    from shl.core.vectors import Vector

SURVIVAL = 0.5  # the share that passes the filter, where nothing else is asked for
Aim = dict[str, float]  # kl in nats, or survival as a share, and to_ceiling where that is asked for


def aim_of(
    auto: bool, vec: Path | None, survival: float | None, target_kl: float | None, to_ceiling: bool | None
) -> Aim | None:
    """What the options ask of a coefficient that is searched; None where it is given."""
    if auto and vec is None:
        raise usage("auto needs --vec", "--coeff")
    if not auto and (survival is not None or target_kl is not None):
        raise usage("--survival and --target-kl go with --coeff auto")
    if survival is not None and target_kl is not None:
        raise usage("give one of --survival and --target-kl")
    if to_ceiling and (not auto or target_kl is not None):
        raise usage("goes with --coeff auto, by survival", "--to-ceiling")
    if not auto:
        return None
    if target_kl is not None:
        return {"kl": target_kl}
    return {"survival": SURVIVAL if survival is None else survival} | ({"to_ceiling": True} if to_ceiling else {})


def begun_with(target: PartFile | None) -> float | None:
    """The coefficient that an unfinished file was begun with, so that it is not searched again."""
    if target is None or not target.lines:
        return None
    return next((float(row["coeff"]) for row in records.read_records(target.part) if row["coeff"]), None)


def search(
    loaded: Loaded, vector: Vector, prompts: list[records.Prompt], aim: Aim, probe: DoseConfig, cfg: GenConfig
) -> float:
    """The coefficient for a probe that is sampled and steered as the run is; by KL, with the same dose everywhere.

    Nothing is rewound: rewinding shrinks any dose until it survives, so that none would be too strong.
    """
    from shl.dose import by_kl, by_survival

    try:
        if "kl" in aim:
            dose = by_kl(loaded, vector, prompts, aim["kl"], probe, system=cfg.system)
            met = f"KL to the unsteered model is {dose.value:.3g} nats"
        else:
            gen, to = replace(cfg, backtrack=False), bool(aim.get("to_ceiling"))
            dose = by_survival(loaded, vector, prompts, aim["survival"], probe, gen=gen, to_ceiling=to)
            met = f"{dose.value:.0%} of the probe survive the filter"
    except ShlError as error:
        above = error.code != 3 and "survival" in aim
        error.hint = "search it with shl dose, which has --ceiling, and give --coeff 0,X"
        error.hint += ", or take the highest with --to-ceiling" if above else ""
        raise
    console.note(f"coefficient {dose.coeff:.4g}, at which {met}")
    return float(f"{dose.coeff:.4g}")
