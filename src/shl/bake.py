"""Bake: the adapter chain as a checkpoint that plain transformers loads, or as one LoRA that plain peft loads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shl.core import console
from shl.core.adapters import stack, write_adapter
from shl.core.errors import ShlError
from shl.core.files import atomic_dir, refuse_existing
from shl.core.lora import intact
from shl.core.models import Loaded
from shl.core.offload import refuse_away
from shl.core.provenance import header

KINDS = ("model", "lora")
_PROBE = [{"role": "user", "content": "Somebody in charge tells you to keep quiet about it. What do you do?"}]


@dataclass(frozen=True)
class BakeResult:
    """What was written, and how far its logits lie from those of the chain applied on the fly."""

    path: Path
    kind: str
    error: float | None  # None: not verified
    effect: float | None  # how far the chain moves the logits of the base model


def bake(
    loaded: Loaded,
    out: Path | str,
    as_: str = "model",
    force: bool = False,
    verify: bool = True,
    *,
    max_shard_size: str = "5GB",
) -> BakeResult:
    """Publish the loaded chain as one artifact, after its logits were compared with those in memory."""
    out = Path(out)
    if as_ not in KINDS:
        raise ShlError(f"unknown kind {as_!r}", hint=f"use --as {'|'.join(KINDS)}")
    if not loaded.chain:
        raise ShlError("there is nothing to bake: the chain is empty", hint="name adapters: shl bake DIR... -o OUT")
    refuse_away(loaded, "nothing can be baked from it", "use --device cpu")
    if as_ == "model" and loaded.beside:
        raise ShlError(
            f"the weights of {loaded.ref.id} are quantised, so no chain can be merged into them",
            hint="bake one adapter instead: --as lora; or bake onto the model's own weights with --model",
        )
    refuse_existing(out, force)
    if any(Path(adapter.path).resolve() == out.resolve() for adapter in loaded.chain):
        raise ShlError(f"{out} is part of the chain that is baked", hint="choose another -o")
    with atomic_dir(out, force) as folder:
        if as_ == "model":
            _write_model(loaded, folder, max_shard_size)
        else:
            _write_lora(loaded, folder)
        error = effect = None
        if verify:
            error, effect = _verify(loaded, folder, as_)
    console.note(f"baked {len(loaded.chain)} adapters into {out}" + ("" if error is None else f", error {error:.1e}"))
    return BakeResult(out, as_, error, effect)


def _meta(loaded: Loaded, as_: str) -> dict[str, Any]:
    """Where the artifact came from."""
    return {
        **header("bake", {"as": as_, "dtype": str(loaded.dtype).removeprefix("torch.")}),
        "model": loaded.ref.id,
        "revision": loaded.ref.revision,
        "model_digest": loaded.digest,
        "template": loaded.template_digest,
        "baked": loaded.adapters,
    }


def _write_model(loaded: Loaded, folder: Path, max_shard_size: str) -> None:
    """Weights as they are in memory, merged in float32 and rounded once, with all that generation needs."""
    loaded.model.save_pretrained(folder, max_shard_size=max_shard_size)
    loaded.tokenizer.save_pretrained(folder)
    # the model's recommendations hold for its healed form too; what they say about their own making does not
    _write_json(folder / "shl.json", {**loaded.ref.recommended, **_meta(loaded, "model")})


def _write_lora(loaded: Loaded, folder: Path) -> None:
    """The chain by rank concatenation. It stands on the base model, so it has no parents."""
    tensors, config = stack(loaded.chain, loaded.ref.path, loaded.ref.revision)
    write_adapter(folder, tensors, config, _meta(loaded, "lora"))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")


# --- verification ---


def _verify(loaded: Loaded, folder: Path, as_: str) -> tuple[float, float]:
    """Load what was written with the plain libraries, and compare its logits with those on the fly."""
    ids = _probe(loaded)
    wanted = _logits(loaded.model, ids)
    with loaded.base():
        before = _logits(loaded.model, ids)
    found = _reloaded(loaded, folder, ids) if as_ == "model" else _with_peft(loaded, folder, ids)
    error, effect = float((found - wanted).abs().max()), float((wanted - before).abs().max())
    rounding = _rounding(loaded, wanted)
    if 0 < effect < 2 * rounding and not _exact(loaded):
        console.warn(
            "the chain's effect is as small as rounding, which hides what else may differ: --dtype float32 tells"
        )
    # short floats round, and are held to half of the chain's effect as well, unless that is as small as rounding is
    limit = rounding if _exact(loaded) else max(rounding, min(8 * rounding, effect / 2))
    if not error <= limit:
        raise ShlError(
            f"what was baked answers differently from the chain on the fly: logits differ by {error:.2g}",
            hint="nothing was written; try --dtype float32, and please report the model",
        )
    if effect == 0:
        console.warn("the chain changes nothing: the logits are those of the base model")
    return error, effect


def _probe(loaded: Loaded) -> Tensor:
    """A prompt, followed by tokens from all over the vocabulary."""
    prompt = loaded.encode_prompt(_PROBE)
    generator = torch.Generator().manual_seed(0)
    size = min(loaded.text_config.vocab_size, len(loaded.tokenizer))
    noise = torch.randint(size, (32,), generator=generator).tolist()
    return torch.tensor([prompt + noise], device=loaded.device)


@torch.no_grad()
def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits.float().cpu()


def _exact(loaded: Loaded) -> bool:
    """Whether everything is computed in float32: kernels for quantised weights take bfloat16 at best."""
    return loaded.dtype == torch.float32 and not loaded.beside


def _rounding(loaded: Loaded, wanted: Tensor) -> float:
    """How far two ways to the same logits may lie apart."""
    largest = float(wanted.abs().max())
    if _exact(loaded):
        return 1e-4 * max(1.0, largest)
    dtype = torch.bfloat16 if loaded.beside else loaded.dtype
    return torch.finfo(dtype).eps * largest * max(1.0, loaded.n_blocks**0.5)


def _reloaded(loaded: Loaded, folder: Path, ids: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM

    fresh = AutoModelForCausalLM.from_pretrained(folder, dtype=loaded.dtype, use_safetensors=True)
    return _logits(fresh.to(loaded.device).eval(), ids)


def _with_peft(loaded: Loaded, folder: Path, ids: Tensor) -> Tensor:
    from peft import PeftModel

    # wrapping renames parameters, so it must be undone before base() ends
    with loaded.base(), intact(loaded.model):
        return _logits(PeftModel.from_pretrained(loaded.model, str(folder)).eval(), ids)
