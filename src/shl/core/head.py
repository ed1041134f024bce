"""From hidden states to logits, a chunk of positions at a time: the model's head, and the states behind completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shl.core.batches import right_pad
from shl.core.errors import ShlError
from shl.core.models import Loaded
from shl.core.offload import at_hand, is_away

_SHORT = (torch.bfloat16, torch.float16)


def wide(values: Tensor) -> Tensor:
    """At least float32, in which divergences are taken."""
    return values.float() if values.dtype in _SHORT else values


@dataclass(frozen=True)
class Head:
    """The map from final hidden states to logits, with what some families do to logits afterwards."""

    weight: Tensor
    bias: Tensor | None
    factor: float
    cap: float | None

    @classmethod
    def of(cls, loaded: Loaded) -> Head:
        """The head under the weights that are active now; it stays with them when they are swapped."""
        values = loaded.text_config.to_dict()
        layer = loaded.model.get_output_embeddings()
        factor = (values.get("logit_scale") or 1.0) / (values.get("logits_scaling") or 1.0)
        weight, bias = (at_hand(layer, name, loaded.device) for name in ("weight", "bias"))
        cap = values.get("final_logit_softcapping")
        assert weight is not None
        return cls(weight, bias, factor, cap)

    @property
    def linear(self) -> bool:
        """Whether logits are a linear map of the hidden states."""
        return self.cap is None

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [n, vocabulary] in float32."""
        return self._shaped(torch.nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias).float())

    def logits_of(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Logits [n, k] of the tokens `ids` [n, k] alone, in the precision of `wide`."""
        found = (wide(self.weight[ids]) * wide(hidden)[:, None]).sum(-1)
        return self._shaped(found if self.bias is None else found + wide(self.bias)[ids])

    def part(self, hidden: Tensor, tokens: slice) -> Tensor:
        """Logits [n, k] of a stretch of the vocabulary, summed and kept in the precision of `wide`."""
        weight = self.weight[tokens]
        if weight.is_cuda and weight.dtype in _SHORT:
            found = torch.mm(hidden.to(weight.dtype), weight.T, out_dtype=torch.float32)
        else:
            found = wide(hidden) @ wide(weight).T
        return self._shaped(found if self.bias is None else found.add_(wide(self.bias)[tokens]))

    def pull(self, grad: Tensor, logits: Tensor, tokens: slice) -> Tensor:
        """The gradient [n, hidden] at the states, from that at the logits of `part`."""
        weight = self.weight[tokens]
        if self.cap is not None:
            grad = grad * (1 - (logits / self.cap) ** 2)
        if weight.is_cuda and weight.dtype in _SHORT:
            found = torch.mm(grad.to(weight.dtype), weight, out_dtype=torch.float32)
        else:
            found = grad @ wide(weight)
        return found if self.factor == 1 else found * self.factor

    def _shaped(self, logits: Tensor) -> Tensor:
        if self.factor != 1:
            logits = logits * self.factor
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    @torch.no_grad()
    def check(self, loaded: Loaded, ids: Sequence[int]) -> None:
        """Fail when this is not what the model itself does. A model is asked once."""
        if loaded.head_checked:
            return
        tokens = torch.tensor([list(ids[:8])], device=loaded.device)
        whole = loaded.model(input_ids=tokens, use_cache=False).logits[0].float()
        mine = self.logits(final_states(loaded, tokens)[0])
        if not torch.allclose(whole, mine, rtol=1e-2, atol=1e-2 * float(whole.abs().max())):
            raise ShlError(
                f"{type(loaded.model).__name__} does something to its logits that is not known here",
                hint="please report the model; shl gen --no-score works meanwhile",
            )
        loaded.head_checked = True


def final_states(loaded: Loaded, ids: Tensor) -> Tensor:
    """Hidden states behind the last norm, for rows padded on the right."""
    # a model that is spread over devices may keep its head on another one than its last block
    states = loaded.body(input_ids=ids, use_cache=False).last_hidden_state
    head = loaded.model.get_output_embeddings().weight
    return states.to(loaded.device if is_away(head) else head.device)


def completion_states(loaded: Loaded, rows: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """For (prompt, completion) rows: the states that predict the completion tokens, row after row, and those tokens."""
    ids = right_pad([prompt + completion for prompt, completion in rows], loaded.device)
    hidden = final_states(loaded, ids)
    row = [k for k, (_, completion) in enumerate(rows) for _ in completion]
    column = [len(prompt) + t for prompt, completion in rows for t in range(len(completion))]
    where, ids = torch.tensor([row, column], device=hidden.device), ids.to(hidden.device)
    return hidden[where[0], where[1] - 1], ids[where[0], where[1]]
