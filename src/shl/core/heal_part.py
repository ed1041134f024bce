"""DIR.part: where a healing stands after its last finished epoch, so that the same line continues after a kill."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from shl.core import console, strict
from shl.core.errors import InputError
from shl.core.litter import Claim
from shl.core.part import refuse_other
from shl.core.provenance import canonical, read_safetensors
from shl.core.records import dumps
from shl.core.tensors import save_safetensors

if TYPE_CHECKING:
    from shl.core.heal_run import Run
    from shl.core.lora import Lora

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
_AGAIN = "add --force to start again"


class Checkpoint:
    """The state beside an output, held by one process, tied to the settings that it was begun with."""

    def __init__(self, out: Path, settings: dict[str, Any], force: bool = False) -> None:
        self.path = out.with_name(out.name + ".part")
        self.settings = json.loads(json.dumps(settings, sort_keys=True))
        out.parent.mkdir(parents=True, exist_ok=True)
        self._claim = Claim(out)
        self._left: tuple[dict[str, Any], dict[str, Tensor]] | None = None  # of a training that did not finish
        try:
            if force:
                self.drop()
            elif self.path.exists():
                self._left = self._read()
                refuse_other(self._left[0]["settings"], self.settings, f"{self.path} is left from a training")
        except BaseException:
            self.release()
            raise

    def _read(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What the file says and its tensors, which have to be those that were written."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            found = strict.loads(read_safetensors(self.path)[1]["shl"])
            if not isinstance(found["settings"], dict) or not isinstance(found["rows"], list):
                raise ValueError("it holds no settings or no rows")
            digest, tensors = found.pop("digest"), load_file(self.path)
        except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise InputError(f"is not the state of a training: {error}", where=str(self.path), hint=_AGAIN) from error
        if digest != _digest(found, tensors):
            raise InputError("was damaged after it was written: its digest differs", where=str(self.path), hint=_AGAIN)
        return found, tensors

    def save(
        self, run: Run, lora: Lora, optimiser: torch.optim.Optimizer, shuffle: torch.Generator, rows: list[Any]
    ) -> None:
        """Write the state after an epoch; a kill leaves this one or the one before."""
        tensors = state_of(lora, optimiser)
        if run.best is not None:
            tensors |= {f"best.{name}": value for name, value in run.best[1].items()}
        tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}  # from the device once
        tensors["shuffle"] = shuffle.get_state()
        state = {"settings": self.settings, "step": run.step, "open": sorted(run.open), "rows": rows}
        state["best"] = run.best[0] if run.best else None
        save_safetensors(self.path, tensors, {"shl": dumps(state | {"digest": _digest(state, tensors)})}, force=True)

    def restore(
        self, run: Run, lora: Lora, optimiser: torch.optim.Optimizer, shuffle: torch.Generator
    ) -> list[dict[str, Any]]:
        """Put back what a run that did not finish had reached; returns its log, empty when there is none."""
        if self._left is None:
            return []
        (state, tensors), self._left = self._left, None
        put_back(tensors, lora, optimiser)
        shuffle.set_state(tensors["shuffle"])
        run.step, run.open = state["step"], set(state["open"])
        run.best = None if state["best"] is None else (state["best"], _under("best.", tensors))
        console.note(f"{self.path}: going on after epoch {len(state['rows']) - 1} of {run.cfg.epochs}")
        return state["rows"]

    def drop(self) -> None:
        """Remove the state: the output is there, or there is nothing worth continuing."""
        self.path.unlink(missing_ok=True)

    def release(self) -> None:
        """Let others write the output."""
        self._claim.release()


def state_of(lora: Lora, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The factors and the optimiser's moments, by name."""
    tensors = {f"lora.{name}": value for name, value in lora.tensors().items()}
    for number, moments in optimiser.state_dict()["state"].items():
        tensors |= {f"adam.{number}.{name}": moments[name] for name in _MOMENTS}
    return tensors


def put_back(tensors: dict[str, Tensor], lora: Lora, optimiser: torch.optim.Optimizer) -> None:
    """Give both what `state_of` gave once."""
    lora.put(_under("lora.", tensors))
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in _under("adam.", tensors).items():
        number, _, what = name.partition(".")
        moments.setdefault(int(number), {})[what] = value
    optimiser.load_state_dict({**optimiser.state_dict(), "state": moments})


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _digest(state: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """The digest of a state and its tensors: names, types, shapes, values."""
    total = hashlib.sha256(canonical(state).encode())
    for name, value in sorted(tensors.items()):
        total.update(canonical([name, str(value.dtype), value.shape]).encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return "sha256:" + total.hexdigest()
