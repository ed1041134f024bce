"""One LoRA adapter as a PEFT directory: what is accepted, how it is read and written, and its digest."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shl.core import strict
from shl.core.errors import InputError, ShlError
from shl.core.files import refuse_links_out
from shl.core.provenance import check_adapter, digest_adapter, read_safetensors
from shl.core.tensors import save_safetensors

CONFIG, WEIGHTS, META = "adapter_config.json", "adapter_model.safetensors", "shl.json"
PREFIX = "base_model.model."
_LARGEST_SCALE = 1e6  # of lora_alpha; what is beyond it is damage
_NAME = re.compile(re.escape(PREFIX) + r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")

# What plain LoRA is: any other value of these keys means arithmetic that a sum of low-rank products does not express.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    **dict.fromkeys(("use_rslora", "use_dora", "use_qalora", "lora_bias"), (False,)),
    **dict.fromkeys(("modules_to_save", "target_parameters", "trainable_token_indices", "layer_replication"), ([], {})),
    **dict.fromkeys(("megatron_config", "alora_invocation_tokens", "use_bdlora", "arrow_config", "kasa_config"), ()),
    **dict.fromkeys(("velora_config", "monteclora_config"), ()),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),  # the others change the base weights as well
}


@dataclass
class Adapter:
    """One adapter directory in memory, and how strongly it is applied."""

    path: Path
    config: dict[str, Any] = field(repr=False)
    tensors: dict[str, Tensor] = field(repr=False)  # float32, under their PEFT names
    meta: dict[str, Any] = field(repr=False)
    digest: str
    scale: float = 1.0

    @property
    def parents(self) -> list[dict[str, Any]]:
        """The chain that this adapter was trained on, oldest first, as its directory records it."""
        return self.meta.get("parents", [])

    @property
    def modules(self) -> list[str]:
        """Paths of the modules that it changes."""
        return sorted({_NAME.fullmatch(name)["module"] for name in self.tensors})  # type: ignore[index]


def read_adapter(folder: Path | str, scale: float = 1.0) -> Adapter:
    """Read a PEFT directory of plain LoRA; anything else is refused with what to do about it."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    config = _read_config(folder)
    weights = _inside(folder, WEIGHTS)
    read_safetensors(weights)  # says what is wrong with a header better than the library
    digest = digest_adapter(weights, config)
    meta = _read_meta(folder)
    try:
        tensors = {name: tensor.float() for name, tensor in sorted(load_file(weights).items())}
    except SafetensorError as error:
        raise InputError(f"is not a safetensors file: {error}", where=str(weights)) from error
    _check_tensors(folder, tensors, config)
    check_adapter(folder, digest, meta)
    return Adapter(folder, config, tensors, meta, digest, scale)


def write_adapter(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], meta: Mapping[str, Any]
) -> str:
    """Write tensors, configuration and provenance into a directory that is not published yet; returns the digest."""
    save_safetensors(folder / WEIGHTS, tensors, {"format": "pt"})
    digest = digest_adapter(folder / WEIGHTS, config)
    for name, content in ((CONFIG, config), (META, {**meta, "digest": digest})):
        text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False)
        (folder / name).write_text(text + "\n", encoding="utf-8")
    return digest


def _inside(folder: Path, name: str) -> Path:
    """A file of the directory that exists and is not a link to somewhere else."""
    path = folder / name
    if not path.is_file():
        raise ShlError(f"{folder} is not an adapter: it has no {name}", hint=_absent_hint(folder, name))
    return refuse_links_out(folder, name)


def _absent_hint(folder: Path, name: str) -> str:
    if folder.is_file():
        return f"give the directory instead: --adapter {folder.parent}"
    if not folder.is_dir():
        return "there is no such directory; check the path"
    pickled = [p.name for p in (*folder.glob("adapter_model*.bin"), *folder.glob("adapter_model*.pt*"))]
    if name == WEIGHTS and pickled:
        return f"{pickled[0]} is a pickle, which can run code; load it with peft and save it again as safetensors"
    return f"an adapter directory holds {CONFIG} and {WEIGHTS}"


def _read_config(folder: Path) -> dict[str, Any]:
    path = _inside(folder, CONFIG)
    config = strict.read_object(path)
    for name, allowed in _PLAIN.items():
        value = config.get(name, "LORA" if name == "peft_type" else None)
        if value is not None and value not in allowed:
            raise ShlError(
                f"{folder} is not plain LoRA: its {name} is {json.dumps(value)}",
                hint="merge it into its model with peft's merge_and_unload, and give the result with --model",
            )
    if not strict.is_number(config.get("r")) or config["r"] < 1 or config["r"] != int(config["r"]):
        raise InputError("r is not a number of at least 1", where=str(path))
    _check_scale(path, "lora_alpha", config.get("lora_alpha"))
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(name) or {}, dict):
            raise InputError(f"{name} is not an object", where=str(path))
        for pattern, value in (config.get(name) or {}).items():
            _check_pattern(path, name, pattern)
            _check_scale(path, f"{name} of {pattern!r}", value)
    if not isinstance(config.get("fan_in_fan_out") or False, bool):
        raise InputError("fan_in_fan_out is not true or false", where=str(path))
    return config


def _check_scale(path: Path, name: str, value: Any) -> None:
    if not strict.is_number(value) or abs(value) > _LARGEST_SCALE:
        raise InputError(f"{name} is not a number up to {_LARGEST_SCALE:g}", where=str(path))


def _check_pattern(path: Path, name: str, pattern: str) -> None:
    """Patterns are regular expressions of a stranger's: one that does not compile, or could run for ever, is refused.

    Without a repeated group and with few repeats, matching takes at most cubic time in the length of a module's name.
    """
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise InputError(f"{name} holds {pattern!r}, which is no pattern: {error}", where=str(path)) from None
    if len(pattern) > 200 or re.search(r"\)[*+?{]", pattern) or len(re.findall(r"[*+{]", pattern)) > 2:
        raise InputError(
            f"{name} holds the pattern {pattern[:60]!r}, which is more than names and .* need",
            where=str(path),
            hint="write it without a repeated group, and with at most two of * + {",
        )


def _read_meta(folder: Path) -> dict[str, Any]:
    """What shl wrote about the adapter; empty for one that other software made."""
    if not (folder / META).exists():
        return {}
    path = _inside(folder, META)
    meta = strict.read_object(path)
    parents = meta.get("parents", [])
    known = isinstance(parents, list) and all(
        isinstance(one, dict)
        and isinstance(one.get("path"), str)
        and isinstance(one.get("digest"), str)
        and strict.is_number(one.get("scale", 1))
        and "\0" not in one["path"]
        for one in parents
    )
    if not known:
        raise InputError("parents is not a list of objects with path, digest and scale", where=str(path))
    if not isinstance(meta.get("config") or {}, dict):
        raise InputError("config is not an object", where=str(path))
    for name in ("model", "model_digest", "template"):
        if not isinstance(meta.get(name), str | None):
            raise InputError(f"{name} is not a string", where=str(path))
    return meta


def _check_tensors(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Every tensor is one of a fitting pair of finite matrices, of the rank that the configuration says."""
    where = str(folder / WEIGHTS)
    if not tensors:
        raise InputError("holds no tensors", where=where)
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None or tensor.ndim != 2:
            raise InputError(f"tensor {name!r} of shape {tuple(tensor.shape)} is not plain LoRA", where=where)
        if not torch.isfinite(tensor).all():
            raise InputError(f"tensor {name} holds numbers that are not finite", where=where)
        a, b = (f"{PREFIX}{match['module']}.lora_{side}.weight" for side in "AB")
        if a not in tensors or b not in tensors or tensors[a].shape[0] != tensors[b].shape[1]:
            raise InputError(f"{a} and lora_B do not make a pair", where=where)
        rank = by_pattern(config.get("rank_pattern"), match["module"], config["r"])
        if tensors[a].shape[0] != rank:
            raise InputError(f"tensor {a} has rank {tensors[a].shape[0]}; {CONFIG} says {rank:g}", where=where)


def by_pattern(patterns: Mapping[str, Any] | None, module: str, usual: Any) -> Any:
    """What PEFT's patterns by module name say about one module: the first that matches its path or its end."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return usual


def peft_config(
    model_path: str,
    modules: Sequence[str],
    rank: int,
    alpha: float,
    *,
    revision: str | None = None,
    fan_in_fan_out: bool = False,
) -> dict[str, Any]:
    """The adapter_config.json of plain LoRA on exactly these modules."""
    from peft import LoraConfig

    config = LoraConfig(
        r=rank,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
        target_modules=list(modules),
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=fan_in_fan_out,
        task_type="CAUSAL_LM",
        inference_mode=True,
        base_model_name_or_path=model_path,
        revision=revision,
    )
    return {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
