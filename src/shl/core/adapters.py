"""Chains of LoRA adapters: resolving them with their parents, and their exact sum."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shl.core import console
from shl.core.errors import Mismatch, ShlError
from shl.core.peft_dir import PREFIX, by_pattern, peft_config
from shl.core.peft_dir import Adapter as Adapter
from shl.core.peft_dir import read_adapter as read_adapter
from shl.core.peft_dir import write_adapter as write_adapter


class Factors(NamedTuple):
    """A change of one weight as a product b @ a."""

    a: Tensor  # [rank, in]
    b: Tensor  # [out, rank]


def parse_spec(spec: str | Path) -> tuple[Path, float | None]:
    """The directory and the scale that "DIR" or "DIR:0.5" names; no scale is None."""
    text = str(spec)
    folder, colon, number = text.rpartition(":")
    if not colon or Path(text).is_dir():
        return Path(text).expanduser(), None
    try:
        scale = float(number)
    except ValueError:
        return Path(text).expanduser(), None
    if not math.isfinite(scale) or not folder:
        raise ShlError(f"{text!r} does not name an adapter and its scale", hint="write DIR or DIR:0.5")
    return Path(folder).expanduser(), scale


def resolve_chain(specs: Sequence[str | Path], parents: bool = True) -> list[Adapter]:
    """The adapters that specs name, oldest first, each once and behind the parents it was trained on.

    A scale written in a spec holds for that directory; without one the scale that a descendant recorded holds.
    """
    if [str(spec) for spec in specs] == ["none"]:
        return []
    if any(str(spec) == "none" for spec in specs):
        raise ShlError("'none' is the empty chain and stands alone", hint="leave out --adapter none, or the others")
    named = [(read_adapter(folder), scale) for folder, scale in map(parse_spec, specs)]
    chain: dict[str, Adapter] = {}
    recorded: dict[str, float] = {}
    for adapter, _ in named:
        for parent in _parents(adapter, chain, recorded) if parents else ():
            chain.setdefault(parent.digest, parent)
        chain.setdefault(adapter.digest, adapter)
    asked = _asked(named)
    conflicts = [digest for digest, scale in recorded.items() if digest not in asked and not math.isfinite(scale)]
    if conflicts:
        raise Mismatch(
            f"the adapters were trained on {chain[conflicts[0]].path} at different scales",
            hint=f"say which one holds: --adapter {chain[conflicts[0]].path}:1",
        )
    return [replace(one, scale=asked.get(digest, recorded.get(digest, 1.0))) for digest, one in chain.items()]


def _asked(named: Sequence[tuple[Adapter, float | None]]) -> dict[str, float]:
    """The scales written in specs, by digest; one adapter cannot have two."""
    asked: dict[str, float] = {}
    for adapter, scale in named:
        if scale is None:
            continue
        if asked.setdefault(adapter.digest, scale) != scale:
            raise ShlError(
                f"{adapter.path} is given at two scales, {asked[adapter.digest]:g} and {scale:g}",
                hint="an adapter is applied once; give one scale",
            )
    return asked


def _parents(adapter: Adapter, seen: Mapping[str, Adapter], recorded: dict[str, float]) -> list[Adapter]:
    """The recorded parents, read and verified; notes their scales, NaN where two records disagree."""
    found = []
    for entry in adapter.parents:
        folder = Path(os.path.normpath(adapter.path.resolve() / entry["path"]))
        if entry["digest"] not in seen:
            found.append(_read_parent(adapter, folder, entry["digest"]))
        scale = float(entry.get("scale", 1.0))
        if recorded.setdefault(entry["digest"], scale) != scale:
            recorded[entry["digest"]] = math.nan
        if scale != 1:
            console.detail(f"{adapter.path} was trained on {folder} at scale {scale:g}")
    return found


def _read_parent(adapter: Adapter, folder: Path, digest: str) -> Adapter:
    alone = f"put it back, or apply the adapter without its parents: --adapter {adapter.path} --no-parents"
    if not folder.is_dir():
        raise ShlError(f"{adapter.path} was trained on {folder}, which is gone", hint=alone)
    parent = read_adapter(folder)
    if parent.digest != digest:
        raise Mismatch(f"{folder} changed since {adapter.path} was trained on it: its digest differs", hint=alone)
    return parent


# --- arithmetic ---


def scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / r of one module, with PEFT's patterns by module name."""
    return float(by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])) / rank


def factors(adapter: Adapter) -> dict[str, Factors]:
    """The change of each module's weight at the adapter's scale, by module path, in PEFT's orientation."""
    out = {}
    for module in adapter.modules:
        a, b = (adapter.tensors[f"{PREFIX}{module}.lora_{side}.weight"] for side in "AB")
        out[module] = Factors(a, b * (adapter.scale * scaling(adapter.config, module, a.shape[0])))
    return out


def _concatenate(chain: Sequence[Adapter], transposed: bool) -> dict[str, Factors]:
    """The sum of the chain's changes by module: factors side by side along the rank, which is exact."""
    parts: dict[str, list[Factors]] = {}
    for adapter in chain:
        swap = transposed and adapter.config.get("fan_in_fan_out")
        for module, (a, b) in factors(adapter).items():
            parts.setdefault(module, []).append(Factors(b.T, a.T) if swap else Factors(a, b))
    return {
        module: Factors(torch.cat([one.a for one in many], 0), torch.cat([one.b for one in many], 1))
        for module, many in sorted(parts.items())
    }


def deltas(chain: Sequence[Adapter]) -> dict[str, Factors]:
    """What the chain adds to each parameter, as b @ a in the parameter's own orientation, by parameter name."""
    return {f"{module}.weight": both for module, both in _concatenate(chain, transposed=True).items()}


def stack(chain: Sequence[Adapter], model_path: str, revision: str | None = None) -> tuple[dict[str, Tensor], dict]:
    """The whole chain as the tensors and the configuration of one adapter.

    Modules that fewer adapters touch are filled up with zeros, so that one rank holds for all.
    """
    if not chain:
        raise ShlError("there is nothing to stack: the chain is empty", hint="name at least one adapter directory")
    fans = {bool(adapter.config.get("fan_in_fan_out")) for adapter in chain}
    if len(fans) > 1:
        raise ShlError("the chain mixes adapters with and without fan_in_fan_out", hint="bake it as a model instead")
    merged = _concatenate(chain, transposed=False)
    rank = max(a.shape[0] for a, _ in merged.values())
    tensors = {}
    for module, (a, b) in merged.items():
        gap = rank - a.shape[0]
        tensors[f"{PREFIX}{module}.lora_A.weight"] = torch.nn.functional.pad(a, (0, 0, 0, gap))
        tensors[f"{PREFIX}{module}.lora_B.weight"] = torch.nn.functional.pad(b, (0, gap))
    return tensors, peft_config(
        model_path, list(merged), rank, float(rank), revision=revision, fan_in_fan_out=fans.pop()
    )
