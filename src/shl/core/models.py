"""Models in memory: loaded with their adapter chain, their decoder blocks found, base weights within reach."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shl.core import layout, ranks
from shl.core.chat import Chat, Messages
from shl.core.errors import InputError, Mismatch, ShlError
from shl.core.locate import ModelRef, find, local_digest, parse_layers
from shl.core.memory import ran_out
from shl.core.offload import check_places, is_away
from shl.core.quantised import check_loadable, is_sealed, put_beside, take_away
from shl.core.strict import read_object

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from shl.core.adapters import Adapter
    from shl.core.vectors import Vector

__all__ = ["Loaded", "ModelRef", "chain_digests", "find", "load", "local_digest", "parse_layers"]


@dataclass
class Loaded:
    """A model ready for use: chain merged, evaluation mode, gradients off."""

    model: PreTrainedModel = field(repr=False)
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    ref: ModelRef
    digest: str
    chain: list[Adapter]
    device: torch.device
    dtype: torch.dtype
    blocks: list[nn.Module] = field(repr=False)
    blocks_at: str
    text_config: PreTrainedConfig = field(repr=False)
    originals: dict[str, Tensor] = field(default_factory=dict, repr=False)
    beside: dict[str, Any] = field(default_factory=dict, repr=False)  # modules that the chain acts beside, and how
    head_checked: bool = False
    graphs: bool = True  # no step has been found that cannot be a CUDA graph
    fits: dict[str, int] = field(default_factory=dict, repr=False)  # rows at once, where memory ran out with more
    _depth: int = 0

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return self.text_config.hidden_size

    @property
    def n_blocks(self) -> int:
        """Number of decoder blocks."""
        return len(self.blocks)

    @property
    def body(self) -> nn.Module:
        """The part that holds the blocks and ends with the last norm, before the head."""
        return self.model.get_submodule(self.blocks_at.rpartition(".")[0])

    @property
    def adapters(self) -> list[str]:
        """Digests of the chain, as artifacts record them."""
        return chain_digests(self.chain)

    @property
    def adapter_paths(self) -> list[str]:
        """Where the chain lies, oldest first, as `load` takes it."""
        return [os.path.abspath(adapter.path) + _scale(adapter) for adapter in self.chain]

    @cached_property
    def chat(self) -> Chat:
        """The tokenizer's template and its conventions."""
        return Chat(self.tokenizer)

    @property
    def template_digest(self) -> str:
        """Digest of the chat template."""
        return self.chat.template_digest

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Every token id that ends a completion."""
        config = self.model.generation_config
        eos = config.eos_token_id if config is not None else None
        named = eos if isinstance(eos, list) else [eos]
        return frozenset(i for i in (*named, self.tokenizer.eos_token_id, self.chat.end_id) if i is not None)

    @contextmanager
    def base(self) -> Iterator[None]:
        """Within this context the weights are those without the chain; re-entrant."""
        self._depth += 1
        if self._depth == 1:
            self._swap()
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._swap()

    @property
    def at_base(self) -> bool:
        """Whether the weights are those without the chain at the moment."""
        return self._depth > 0

    def _swap(self) -> None:
        params = dict(self.model.named_parameters()) if self.originals else {}
        for name, other in self.originals.items():
            self.originals[name], params[name].data = params[name].data, other

    def render(self, messages: Messages, *, think: bool = False) -> str:
        """The prompt as text."""
        return self.chat.render(messages, think=think)

    def encode_prompt(self, messages: Messages, think: bool = False) -> list[int]:
        """The prompt as token ids."""
        return self.chat.encode_prompt(messages, think=think)

    def encode_completion(self, text: str, end: bool) -> list[int]:
        """An answer as token ids, tokenised apart from its prompt."""
        return self.chat.encode_completion(text, end=end)


def load(
    model_id: str,
    adapters: Sequence[str] = (),
    *,
    revision: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    parents: bool = True,
    allow_mismatch: bool = False,
    trust_remote_code: bool = False,
    vector: Vector | None = None,
) -> Loaded:
    """Load a model in evaluation mode with its adapter chain merged into the weights.

    A chain, or a `vector` to be used with it, that was made for another model is refused before weights are read.
    """
    ref = find(model_id, revision)
    chain = _chain(adapters, parents)  # before anything heavy, so that a broken chain fails at once
    spread = device == "auto"
    where, precision = _place(None if spread else device, dtype)
    source = _source(ref, trust_remote_code)
    about = _config(ref, source)
    if check_loadable(ref, about):  # such weights are packed on their way to the device
        source["device_map"] = {"": str(where)}
    n_blocks, hidden = layout.sizes(about)
    if vector is not None:  # before a byte of the weights is read, even for their digest
        vector.check_fit(ref.id, n_blocks, hidden)
    digest = _digest(ref)
    _check_chain(ref, chain, digest, allow_mismatch)
    if vector is not None:
        vector.check_origin(digest, chain_digests(chain), allow_mismatch=allow_mismatch)
    model, tokenizer = _read(ref, where, precision, source | ({"device_map": _spreading()} if spread else {}))
    if spread and not is_away(first := model.get_input_embeddings().weight):
        where = first.device
    layout.check_decoder(model)
    config, (path, blocks) = model.config.get_text_config(), layout.blocks(model, n_blocks)
    loaded = Loaded(model, tokenizer, ref, digest, chain, where, precision, blocks, path, config)
    layout.guard_positions(model, loaded.body, config)
    _merge(loaded)
    return loaded


def _chain(specs: Sequence[str], parents: bool) -> list[Adapter]:
    if not specs:
        return []
    from shl.core.adapters import resolve_chain

    return resolve_chain(list(specs), parents=parents)


def chain_digests(chain: Sequence[Adapter]) -> list[str]:
    """The digests of a chain, oldest first, each with its scale when that is not 1."""
    return [adapter.digest + _scale(adapter) for adapter in chain]


def _scale(adapter: Adapter) -> str:
    return "" if adapter.scale == 1 else f":{adapter.scale:g}"


def _place(device: str | None, dtype: str | None) -> tuple[torch.device, torch.dtype]:
    import torch

    try:
        where = torch.device(device or (ranks.device() if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ShlError(f"unknown device {device!r}", hint="use cpu, cuda, cuda:1 or auto") from None
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (where.index or 0) >= there.get(where.type, 1):
        raise ShlError(
            f"there is no device {device}: PyTorch sees {there[where.type]} of that kind",
            hint="leave --device out, or install the PyTorch build for your GPU",
        )
    if dtype in ("4bit", "8bit", "int8", "int4"):
        raise ShlError(
            f"weights of {dtype} cannot be steered and merged exactly, and are not supported",
            hint="use --dtype bfloat16; for serving, quantise the baked checkpoint",
        )
    name = dtype or ("bfloat16" if where.type == "cuda" else "float32")
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ShlError(f"unknown dtype {name!r}", hint=f"use one of {', '.join(known)}")
    return where, known[name]


def _source(ref: ModelRef, trust_remote_code: bool) -> dict[str, Any]:
    """How the libraries are to fetch the model's files."""
    from shl.core.hub import cache_only

    only = ref.local or cache_only(ref)
    return {"revision": ref.revision, "trust_remote_code": trust_remote_code, "local_files_only": only}


def _config(ref: ModelRef, source: dict[str, Any]) -> PreTrainedConfig:
    """What the model is, without its weights."""
    from transformers import AutoConfig

    with _told(ref):
        return AutoConfig.from_pretrained(ref.path, **source)


def _read(
    ref: ModelRef, device: torch.device, dtype: torch.dtype, source: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    _refuse_stray_shards(ref)
    with _told(ref):
        tokenizer = AutoTokenizer.from_pretrained(ref.path, **source)
        model, report = AutoModelForCausalLM.from_pretrained(
            ref.path, dtype=dtype, use_safetensors=True, output_loading_info=True, **source
        )
    if missing := sorted(report["missing_keys"]):  # the library would go on with random numbers in their place
        raise ShlError(
            f"cannot load {ref.id}: {len(missing)} of its weights are missing, first of them {missing[0]}",
            hint="a file is missing or damaged; download or copy the model again",
        )
    if "device_map" not in source:
        model.to(device)
    elif device.type != "cpu":
        check_places(ref, list(model.hf_device_map.values()))
    return model.eval().requires_grad_(False), tokenizer


def _spreading() -> str:
    """How a model is laid over several GPUs; the library that does it is asked for first."""
    from importlib.util import find_spec

    if find_spec("accelerate") is None:
        raise ShlError("--device auto needs the package accelerate", hint="pip install accelerate")
    return "auto"


def _refuse_stray_shards(ref: ModelRef) -> None:
    """An index of weights names files of its own folder, and no others: those are what the digest covers."""
    for index in Path(ref.path).glob("*.safetensors.index.json") if ref.local else ():
        shards = read_object(index).get("weight_map")
        names = shards.values() if isinstance(shards, dict) else [None]
        for name in names:
            if not isinstance(name, str) or Path(name).name != name:
                raise InputError(f"names {name!r}, which is no file of this folder", where=str(index))


@contextmanager
def _told(ref: ModelRef) -> Iterator[None]:
    """What the libraries say about files that they cannot read, in one sentence."""
    try:
        yield
    except ShlError:
        raise
    except Exception as error:
        if ran_out(error):
            raise ShlError(
                f"cannot load {ref.id}: out of memory",
                hint="use --dtype bfloat16, another --device, or a smaller model",
            ) from error
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ShlError(f"cannot load {ref.id}: {reason}", hint=_load_hint(ref)) from error


def _load_hint(ref: ModelRef) -> str:
    if ref.local:
        return "the folder needs config.json, tokenizer files and *.safetensors weights of a causal language model"
    return "check the name and the network (HF_TOKEN for gated models), or give a local folder"


def _digest(ref: ModelRef) -> str:
    from shl.core.hub import commit_of

    if ref.local:
        return local_digest(Path(ref.path))
    return f"{ref.id}@{commit_of(ref) or ref.revision or 'main'}"


def _check_chain(ref: ModelRef, chain: Sequence[Adapter], digest: str, allow_mismatch: bool) -> None:
    """An adapter trained on another model is refused, even where its shapes would fit."""
    for adapter in chain:
        trained_on = adapter.meta.get("model_digest")
        if trained_on in (None, digest) or allow_mismatch:
            continue
        raise Mismatch(
            f"{adapter.path} was trained on {adapter.meta.get('model', 'another model')}, not on {ref.id}",
            hint="give that model with --model, or insist with --allow-mismatch",
        )


def rechain(loaded: Loaded, chain: Sequence[Adapter]) -> None:
    """Put another chain on the base weights, in place: the same adapters at other scales, say."""
    params = dict(loaded.model.named_parameters()) if loaded.originals else {}
    for name, weight in loaded.originals.items():
        params[name].data = weight
    loaded.originals.clear()
    take_away(loaded)
    loaded.chain = list(chain)
    _merge(loaded)


def _merge(loaded: Loaded) -> None:
    """Add the chain to the weights in float32; the untouched tensors stay for `Loaded.base`.

    Weights that are quantised, or on the CPU for want of room, are left alone: there the chain acts beside them.
    """
    if not loaded.chain:
        return
    import torch

    from shl.core.adapters import deltas

    params = dict(loaded.model.named_parameters())
    with torch.no_grad():
        for name, (a, b) in deltas(loaded.chain).items():
            if name in params and is_sealed(params[name]):
                put_beside(loaded, name.removesuffix(".weight"), a, b)
                continue
            if name not in params or params[name].shape != (b.shape[0], a.shape[1]):
                raise Mismatch(
                    f"the adapter changes {name}, which {loaded.ref.id} does not have in that shape",
                    hint="give the model that it was trained on with --model",
                )
            weight = params[name]
            delta = b.to(weight.device, torch.float32) @ a.to(weight.device, torch.float32)
            if not torch.isfinite(delta).all():
                raise ShlError(f"the adapters change {name} by numbers that are not finite", hint="look at their scale")
            loaded.originals[name] = weight.data
            weight.data = (weight.data.float() + delta).to(weight.dtype)
