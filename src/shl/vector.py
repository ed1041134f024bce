"""Step 1, persona pair -> steering vector: the mean difference of hidden states under the two personas."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shl import __version__
from shl.core.batches import left_pad, positions_of
from shl.core.chat import Messages, join_system, with_system
from shl.core.console import progress
from shl.core.defaults import VectorConfig
from shl.core.errors import ShlError
from shl.core.hooks import Capture
from shl.core.memory import batched
from shl.core.models import Loaded, parse_layers
from shl.core.provenance import commit, digest_of
from shl.core.records import Pair, Prompt
from shl.core.seeds import seed_of
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
    sides = [[_under(prompt, persona) for prompt in chosen] for persona in (pos, neg)]
    encoded = [[loaded.encode_prompt(messages) for messages in side] for side in sides]
    if any(a == b for a, b in zip(*encoded, strict=True)):
        raise ShlError("both sides of the pair give the same prompt", hint="let --pos and --neg differ")
    personas = {"name": name, "axis": axis, "pos": pos, "neg": neg}
    digest = digest_of([[prompt.system, prompt.messages] for prompt in chosen])
    facts = {"personas": personas, "contexts": {"digest": digest, "n": len(chosen)}}
    return _mean_difference(loaded, encoded[0], encoded[1], cfg, facts)


def extract_pairs(loaded: Loaded, pairs: Sequence[Pair], cfg: VectorConfig | None = None) -> Vector:
    """The vector from explicit contrasts: chats, read at the last token of the templated prompt, or plain strings."""
    cfg = cfg or VectorConfig()
    encoded = [[_encode_side(loaded, pair[side]) for pair in pairs] for side in (0, 1)]
    digest = digest_of([[pair.pos, pair.neg] for pair in pairs])
    return _mean_difference(loaded, encoded[0], encoded[1], cfg, {"pairs": {"digest": digest, "n": len(pairs)}})


def _encode_side(loaded: Loaded, side: str | Messages) -> list[int]:
    return loaded.chat.encode_text(side, raw=True) if isinstance(side, str) else loaded.encode_prompt(side)


def _choose(contexts: Sequence[Prompt], cfg: VectorConfig) -> list[Prompt]:
    """As many contexts as asked for; which ones, when there are more, follows from the seed."""
    if len(contexts) <= cfg.contexts:
        return list(contexts)
    picked = random.Random(seed_of(cfg.seed, "contexts")).sample(range(len(contexts)), cfg.contexts)
    return [contexts[i] for i in sorted(picked)]


def _under(prompt: Prompt, persona: str | None) -> Messages:
    """A context under a persona; a system text of its own stays on both sides."""
    return with_system(prompt.messages, join_system(persona, prompt.system))


def _mean_difference(
    loaded: Loaded, pos: list[list[int]], neg: list[list[int]], cfg: VectorConfig, facts: Mapping[str, Any]
) -> Vector:
    if cfg.method != "mean-diff" or cfg.position != "last":
        raise ShlError(f"no method {cfg.method!r} at position {cfg.position!r}", hint="use mean-diff at last")
    if not pos:
        raise ShlError("there are no contexts to read the vector from")
    blocks = parse_layers(cfg.layers, loaded.n_blocks)
    states = last_states(loaded, [*pos, *neg], blocks, cfg.batch_size)
    layers, residual, agreement = {}, {}, {}
    for layer, state in states.items():
        above, below = state.double().split(len(pos))
        difference = above - below
        mean = difference.mean(0)
        layers[layer] = mean.float()
        residual[str(layer)] = float(below.norm(dim=-1).mean())
        agreement[str(layer)] = float(torch.nn.functional.cosine_similarity(difference, mean[None]).mean())
    vector = Vector(layers, _meta(loaded, blocks, cfg) | dict(facts))
    vector.meta["norms"] = {str(layer): norm for layer, norm in vector.norms.items()}
    vector.meta |= {"residual_norms": residual, "agreement": agreement}
    broken = [layer for layer, v in layers.items() if not torch.isfinite(v).all()]
    if broken:
        raise ShlError(f"hidden states of blocks {broken} are not finite", hint="try --dtype float32")
    return vector


def last_states(loaded: Loaded, prompts: list[list[int]], blocks: list[int], batch_size: int) -> dict[int, Tensor]:
    """Residual stream at the last token of every prompt, by block, on the CPU in float32."""
    states = {layer: torch.empty(len(prompts), loaded.hidden) for layer in blocks}
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))

    def read(rows: Sequence[int]) -> dict[int, Tensor]:
        ids, mask = left_pad([prompts[i] for i in rows], loaded.device)
        return capture.run(input_ids=ids, attention_mask=mask, position_ids=positions_of(mask))

    with (
        torch.inference_mode(),
        Capture(loaded, blocks, early_exit=True) as capture,
        progress("reading hidden states", len(prompts)) as bar,
    ):
        for rows, found in batched(loaded, order, batch_size, read, "reading hidden states"):
            for layer in blocks:
                states[layer][rows] = found[layer].float().cpu()
            bar.advance(len(rows))
    return states


def _meta(loaded: Loaded, blocks: list[int], cfg: VectorConfig) -> dict[str, Any]:
    return {
        "step": "vector",
        "method": cfg.method,
        "layers": blocks,
        "position": cfg.position,
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
