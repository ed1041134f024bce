"""The two hooks on decoder blocks: one adds a steering vector to their outputs, one reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from shl.core.errors import ShlError
from shl.core.models import Loaded


def hidden_of(output: Tensor | tuple) -> Tensor:
    """The residual stream in what a block returns: a tensor, in older layouts the head of a tuple."""
    return output[0] if isinstance(output, tuple) else output


class Hooks:
    """Forward hooks that are present inside a `with` and gone after it, whatever happens."""

    def __init__(self, loaded: Loaded, layers: Sequence[int]) -> None:
        if not layers:
            raise ShlError("no blocks to hook were given")
        if outside := [i for i in layers if not 0 <= i < loaded.n_blocks]:
            raise ShlError(f"no such blocks {outside} in a model of {loaded.n_blocks}")
        self.loaded = loaded
        self.layers = sorted(layers)
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def _make(self, layer: int) -> Callable[..., Any]:
        raise NotImplementedError

    def __enter__(self) -> Self:
        for layer in self.layers:
            self._handles.append(self.loaded.blocks[layer].register_forward_hook(self._make(layer)))
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        while self._handles:
            self._handles.pop().remove()


class Steering(Hooks):
    """Adds coeff * v to the output of each chosen block: a coefficient for each row, or for each row and position.

    The coefficients sit in a tensor that stays while they change, so that nothing is registered anew. One
    coefficient alone serves a batch of any size. With the gate `cosine` they are multiplied by max(0, cos(h, v)), h
    being the state that the shift is added to: each position and block has a gate of its own.
    """

    def __init__(self, loaded: Loaded, vector: dict[int, Tensor], gate: str | None = None) -> None:
        super().__init__(loaded, list(vector))
        for layer, direction in vector.items():
            if direction.shape != (loaded.hidden,):
                shape = tuple(direction.shape)
                raise ShlError(f"the vector of block {layer} has shape {shape}, the model is {loaded.hidden} wide")
        if gate not in (None, "cosine"):
            raise ShlError(f"gate {gate!r} is not cosine")
        self.vector = {layer: vector[layer].detach().to(torch.float32) for layer in self.layers}
        self.gate = gate
        self.coeff = torch.ones(1, 1, 1)
        self.bound = False
        self.fired = 0
        self._shift: dict[int, Tensor] = {}
        self._dose: dict[int, Tensor] = {}

    def set(self, coeffs: Sequence[float] | Sequence[Sequence[float]] | Tensor) -> None:
        """Give each row of the next batch its coefficient, or one for each of its positions, [rows, positions]."""
        new = torch.as_tensor(coeffs, dtype=torch.float32)
        new = (new if new.dim() == 2 else new.reshape(-1, 1))[..., None].cpu()
        if new.shape == self.coeff.shape and not self.bound:
            with torch.inference_mode():  # where the tensor may come from
                self.coeff.copy_(new)
        else:
            self.coeff, self.bound = new.clone(), False
        self._shift.clear()

    def bind(self, coeffs: Tensor) -> None:
        """Read the coefficients from this tensor, [rows, 1, 1], at every pass: whoever holds it may write to it."""
        self.coeff, self.bound = coeffs, True
        self._shift.clear()

    def keep(self, rows: Tensor) -> None:
        """Drop the coefficients of rows that have left the batch."""
        if len(self.coeff) > 1:
            self.coeff = self.coeff[rows.cpu()]
            self._shift = {layer: shift[rows.to(shift.device)] for layer, shift in self._shift.items()}

    def dose(self) -> list[float]:
        """For each row, what the coefficient came to at the last position of the last pass: mean over the blocks."""
        if self.gate is None:
            return self.coeff[:, -1, 0].tolist()
        return torch.stack([self._dose[layer].cpu() for layer in self.layers]).mean(0).tolist()

    def _make(self, layer: int) -> Callable[..., Any]:
        def add(module: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple:
            hidden = hidden_of(output)
            rows, positions = self.coeff.shape[:2]
            if rows not in (1, len(hidden)):
                raise ShlError(f"{rows} coefficients for a batch of {len(hidden)} rows")
            if positions not in (1, hidden.shape[1]):
                raise ShlError(f"coefficients of {positions} positions for a pass of {hidden.shape[1]}")
            self.fired += 1
            steered = hidden + (self._constant(layer, hidden) if self.gate is None else self._gated(layer, hidden))
            return (steered, *output[1:]) if isinstance(output, tuple) else steered

        return add

    def _constant(self, layer: int, hidden: Tensor) -> Tensor:
        """coeff * v, kept until the coefficients change."""
        shift = self._shift.get(layer)
        if shift is None or self.bound or shift.device != hidden.device or shift.dtype != hidden.dtype:
            # multiplied in float32 and rounded once
            shift = (self.coeff.to(hidden.device) * self._direction(layer, hidden)).to(hidden.dtype)
            self._shift[layer] = shift
        return shift

    def _gated(self, layer: int, hidden: Tensor) -> Tensor:
        """coeff * max(0, cos(h, v)) * v for the states of this pass."""
        direction = self._direction(layer, hidden)
        agreement = torch.cosine_similarity(hidden.float(), direction, dim=-1)[..., None].clamp_(min=0)
        dose = self.coeff.to(hidden.device) * agreement
        self._dose[layer] = dose[:, -1, 0]
        return (dose * direction).to(hidden.dtype)

    def _direction(self, layer: int, hidden: Tensor) -> Tensor:
        """The vector of a block, moved to where the block is, once."""
        if self.vector[layer].device != hidden.device:
            self.vector[layer] = self.vector[layer].to(hidden.device)
        return self.vector[layer]

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        super().__exit__(kind, error, trace)
        if kind is None and self.fired == 0:
            raise ShlError("the steering hook never fired", hint="the model's blocks are not the ones that were hooked")


class _Enough(Exception):
    """Everything asked for has been read; the rest of the forward pass is not needed."""


class Capture(Hooks):
    """Reads the output of chosen blocks: at the last position, which left padding keeps in place, or at all.

    With `early_exit` the pass ends after the last block needed, so that later blocks and the head never run.
    """

    def __init__(
        self, loaded: Loaded, layers: Sequence[int], positions: str = "last", *, early_exit: bool = False
    ) -> None:
        super().__init__(loaded, layers)
        if positions not in ("last", "all"):
            raise ShlError(f"positions {positions!r} is neither last nor all")
        self.positions = positions
        self.early_exit = early_exit
        self.outputs: dict[int, Tensor] = {}

    def run(self, past_key_values: DynamicCache | None = None, **inputs: Tensor) -> dict[int, Tensor]:
        """One forward pass of the model's body, behind what a cache holds if given; the outputs read, by block."""
        self.outputs = {}
        cached = past_key_values is not None
        with suppress(_Enough):
            self.loaded.body(**inputs, past_key_values=past_key_values, use_cache=cached)
        missing = [layer for layer in self.layers if layer not in self.outputs]
        if missing:
            raise ShlError(f"the reading hooks never fired at blocks {missing}")
        return self.outputs

    def _make(self, layer: int) -> Callable[..., Any]:
        def read(module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
            hidden = hidden_of(output).detach()
            self.outputs[layer] = (hidden[:, -1] if self.positions == "last" else hidden).clone()
            if self.early_exit and layer == self.layers[-1]:
                raise _Enough

        return read
