"""Figures of a run: the path of each arm over the rounds, the response to the dose, and the training behind it."""

from __future__ import annotations

from shl.plot.dose import dose_response
from shl.plot.path import rows_of, trajectory
from shl.plot.style import FLOOR, FORMATS
from shl.plot.training import training_curves

__all__ = ["FLOOR", "FORMATS", "KINDS", "dose_response", "rows_of", "training_curves", "trajectory"]

KINDS = {"trajectory": trajectory, "dose": dose_response, "training": training_curves}
