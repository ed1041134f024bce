"""Step 1, persona pair -> steering vector: a direction in which hidden states differ between the two personas."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shl import __version__
from shl.core import directions
from shl.core.chat import Messages
from shl.core.console import progress
from shl.core.decode import Sampling, decode
from shl.core.defaults import POSITIONS, VectorConfig
from shl.core.errors import ShlError
from shl.core.models import Loaded, parse_layers
from shl.core.provenance import commit, digest_of
from shl.core.records import Pair, Prompt
from shl.core.seeds import seed_of
from shl.core.states import Span, read_states
from shl.core.vectors import Vector

__all__ = ["Vector", "extract", "extract_pairs"]


def extract(
    loaded: Loaded,
    pos: str,
    neg: str | None = None,
    contexts: Sequence[Prompt] | None = None,
    cfg: VectorConfig | None = None,
    *,
    name: str | None = None,
    axis: str | None = None,
) -> Vector:
    """The vector from a pair of persona texts: contexts under `pos` minus the same contexts under `neg`.

    Without `neg` the negative side has no system message. `name` and `axis` say which bundled persona this is.
    """
    from shl.core import pools

    cfg = cfg or VectorConfig()
    chosen = _choose(pools.contexts() if contexts is None else contexts, cfg)
    sides = [[prompt.asked(persona) for prompt in chosen] for persona in (pos, neg)]
    encoded = [[loaded.encode_prompt(messages) for messages in side] for side in sides]
    if any(a == b for a, b in zip(*encoded, strict=True)):
        raise ShlError("both sides of the pair give the same prompt", hint="let --pos and --neg differ")
    personas = {"name": name, "axis": axis, "pos": pos, "neg": neg}
    digest = digest_of([[prompt.system, prompt.messages] for prompt in chosen])
    facts = {"personas": personas, "contexts": {"digest": digest, "n": len(chosen)}}
    return _direction(loaded, encoded[0], encoded[1], cfg, facts)


def extract_pairs(loaded: Loaded, pairs: Sequence[Pair], cfg: VectorConfig | None = None) -> Vector:
    """The vector from explicit contrasts: chats, read at the last token of the templated prompt, or plain strings."""
    cfg = cfg or VectorConfig()
    encoded = [[_encode_side(loaded, pair[side]) for pair in pairs] for side in (0, 1)]
    digest = digest_of([[pair.pos, pair.neg] for pair in pairs])
    return _direction(loaded, encoded[0], encoded[1], cfg, {"pairs": {"digest": digest, "n": len(pairs)}})


def _encode_side(loaded: Loaded, side: str | Messages) -> list[int]:
    return loaded.chat.encode_text(side, raw=True) if isinstance(side, str) else loaded.encode_prompt(side)


def _choose(contexts: Sequence[Prompt], cfg: VectorConfig) -> list[Prompt]:
    """As many contexts as asked for; which ones, when there are more, follows from the seed."""
    if len(contexts) <= cfg.contexts:
        return list(contexts)
    picked = random.Random(seed_of(cfg.seed, "contexts")).sample(range(len(contexts)), cfg.contexts)
    return [contexts[i] for i in sorted(picked)]


def _direction(
    loaded: Loaded, pos: list[list[int]], neg: list[list[int]], cfg: VectorConfig, facts: Mapping[str, Any]
) -> Vector:
    """A direction for each block from the prompts of both sides."""
    combine = directions.method(cfg.method)
    if not pos:
        raise ShlError("there are no contexts to read the vector from")
    where = "answer" if cfg.method == "response" else cfg.position
    blocks = parse_layers(cfg.layers, loaded.n_blocks)
    above, below = _states(loaded, [pos, neg], blocks, where, cfg)
    layers, residual, agreement = {}, {}, {}
    for layer in blocks:
        plus, minus = above[layer].double(), below[layer].double()
        if not (torch.isfinite(plus).all() and torch.isfinite(minus).all()):
            raise ShlError(f"hidden states of block {layer} are not finite", hint="try --dtype float32")
        layers[layer] = combine(plus, minus).float()
        residual[str(layer)] = float(minus.norm(dim=-1).mean())
        shifts = torch.nn.functional.cosine_similarity(plus - minus, layers[layer].double()[None])
        agreement[str(layer)] = float(shifts.mean())
    vector = Vector(layers, _meta(loaded, blocks, cfg, where) | dict(facts))
    vector.meta["norms"] = {str(layer): norm for layer, norm in vector.norms.items()}
    vector.meta |= {"residual_norms": residual, "agreement": agreement}
    return vector


def _states(
    loaded: Loaded, sides: Sequence[list[list[int]]], blocks: list[int], where: str, cfg: VectorConfig
) -> list[dict[int, Tensor]]:
    """For each side, [rows, hidden] by block: at the last token of the prompt, or averaged over an answer to it."""
    if where not in POSITIONS:
        raise ShlError(f"no position {where!r}", hint=f"use one of {', '.join(POSITIONS)}")
    spans = [[Span(ids) for ids in side] if where == "last" else _answered(loaded, side, cfg) for side in sides]
    with progress("reading hidden states", sum(map(len, spans))) as bar:
        return [read_states(loaded, side, blocks, cfg.batch_size, bar) for side in spans]


def _answered(loaded: Loaded, prompts: list[list[int]], cfg: VectorConfig) -> list[Span]:
    """Each prompt with the model's own answer to it, by the same noise on both sides.

    Of an empty answer the prompt's last token is read.
    """
    with progress("answering under the persona", len(prompts)) as bar:
        said = decode(
            loaded,
            prompts,
            seeds=[seed_of(cfg.seed, "response", str(i)) for i in range(len(prompts))],
            sampling=Sampling(max_new_tokens=cfg.answer_tokens),
            batch_size=cfg.batch_size,
            on_finish=lambda *_: bar.advance(),
        )
    return [Span(ids + one.ids, max(1, len(one.ids))) for ids, one in zip(prompts, said, strict=True)]


def _meta(loaded: Loaded, blocks: list[int], cfg: VectorConfig, where: str) -> dict[str, Any]:
    return {
        "step": "vector",
        "method": cfg.method,
        "layers": blocks,
        "position": where,
        **({"answer_tokens": cfg.answer_tokens} if where == "answer" else {}),
        "seed": cfg.seed,
        "model": loaded.ref.id,
        "revision": loaded.ref.revision,
        "model_digest": loaded.digest,
        "adapters": loaded.adapters,
        "adapter_paths": loaded.adapter_paths,
        "template": loaded.template_digest,
        "version": __version__,
        "commit": commit(),
    }
