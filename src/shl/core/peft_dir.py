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

from shl.core.errors import InputError, ShlError
from shl.core.provenance import digest_tensors
from shl.core.tensors import save_safetensors

CONFIG, WEIGHTS, META = "adapter_config.json", "adapter_model.safetensors", "shl.json"
PREFIX = "base_model.model."
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
    from safetensors.torch import load_file

    folder = Path(folder)
    config = _read_config(folder)
    weights = _inside(folder, WEIGHTS)
    digest = digest_tensors(weights, _header(config))
    tensors = {name: tensor.float() for name, tensor in sorted(load_file(weights).items())}
    _check_tensors(folder, tensors)
    return Adapter(folder, config, tensors, _read_meta(folder), digest, scale)


def write_adapter(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], meta: Mapping[str, Any]
) -> str:
    """Write tensors, configuration and provenance into a directory that is not published yet; returns the digest."""
    save_safetensors(folder / WEIGHTS, tensors, {"format": "pt"})
    digest = digest_tensors(folder / WEIGHTS, _header(config))
    for name, content in ((CONFIG, config), (META, {**meta, "digest": digest})):
        text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False)
        (folder / name).write_text(text + "\n", encoding="utf-8")
    return digest


def _header(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a configuration that says how the tensors act. Names of folders and versions do not."""
    return {
        "r": config.get("r"),
        "lora_alpha": config.get("lora_alpha"),
        "rank_pattern": config.get("rank_pattern") or {},
        "alpha_pattern": config.get("alpha_pattern") or {},
        "fan_in_fan_out": bool(config.get("fan_in_fan_out")),
    }


def _inside(folder: Path, name: str) -> Path:
    """A file of the directory that exists and is not a link to somewhere else."""
    path = folder / name
    if not path.is_file():
        raise ShlError(f"{folder} is not an adapter: it has no {name}", hint=_absent_hint(folder, name))
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ShlError(
            f"{path} is a link to a file outside its directory",
            hint=f"copy the adapter with its files: cp -rL {folder} COPY",
        )
    return path


def _absent_hint(folder: Path, name: str) -> str:
    if folder.is_file():
        return f"give the directory instead: --adapter {folder.parent}"
    if not folder.is_dir():
        return "there is no such directory; check the path"
    pickled = [p.name for p in (*folder.glob("adapter_model*.bin"), *folder.glob("adapter_model*.pt*"))]
    if name == WEIGHTS and pickled:
        return f"{pickled[0]} is a pickle, which can run code; load it with peft and save it again as safetensors"
    return f"an adapter directory holds {CONFIG} and {WEIGHTS}"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"is not JSON: {error}", where=str(path)) from error
    if not isinstance(content, dict):
        raise InputError("is not a JSON object", where=str(path))
    return content


def _read_config(folder: Path) -> dict[str, Any]:
    config = _read_json(_inside(folder, CONFIG))
    for name, allowed in _PLAIN.items():
        value = config.get(name, "LORA" if name == "peft_type" else None)
        if value is not None and value not in allowed:
            raise ShlError(
                f"{folder} is not plain LoRA: its {name} is {json.dumps(value)}",
                hint="merge it into its model with peft's merge_and_unload, and give the result with --model",
            )
    for name in ("r", "lora_alpha"):
        if isinstance(config.get(name), bool) or not isinstance(config.get(name), int | float):
            raise InputError(f"{name} is not a number", where=str(folder / CONFIG))
    return config


def _read_meta(folder: Path) -> dict[str, Any]:
    """What shl wrote about the adapter; empty for one that other software made."""
    if not (folder / META).exists():
        return {}
    meta = _read_json(_inside(folder, META))
    parents = meta.get("parents", [])
    known = isinstance(parents, list) and all(
        isinstance(one, dict)
        and isinstance(one.get("path"), str)
        and isinstance(one.get("digest"), str)
        and isinstance(one.get("scale", 1), int | float)
        for one in parents
    )
    if not known:
        raise InputError("parents is not a list of objects with path, digest and scale", where=str(folder / META))
    return meta


def _check_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Every tensor is one of a fitting pair of finite matrices."""
    where = str(folder / WEIGHTS)
    if not tensors:
        raise InputError("holds no tensors", where=where)
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None or tensor.ndim != 2:
            raise InputError(f"{name} of shape {tuple(tensor.shape)} is not plain LoRA", where=where)
        if not torch.isfinite(tensor).all():
            raise InputError(f"{name} holds numbers that are not finite", where=where)
        a, b = (f"{PREFIX}{match['module']}.lora_{side}.weight" for side in "AB")
        if a not in tensors or b not in tensors or tensors[a].shape[0] != tensors[b].shape[1]:
            raise InputError(f"{a} and lora_B do not make a pair", where=where)


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
