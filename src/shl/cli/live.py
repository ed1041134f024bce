"""What `shl gen` shows of itself while it runs: the share that the filter's defaults would keep, by coefficient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shl.core.errors import ShlError


class Survival:
    """A filter beside the generation: it decides nothing, and says how it is going."""

    def __init__(self) -> None:
        from shl.filter import Baseline, Tally

        self.controls, self.tally = Baseline(), Tally()

    def __call__(self, record: dict[str, Any]) -> Mapping[str, object]:
        """Count a record; what stands behind the progress bar."""
        from shl.filter import judge

        try:
            self.controls.add(record)
            reasons = judge(record, baseline=self.controls)
        except ShlError:  # no scores, or no controls to hold them against: then nobody knows
            return {}
        self.tally.add(record | {"keep": not reasons, "reasons": reasons})
        shares = {coeff: self.tally.kept[coeff] / read for coeff, read in sorted(self.tally.read.items()) if coeff}
        return {"survive": " ".join(f"{coeff:g}:{share:.0%}" for coeff, share in shares.items())} if shares else {}
