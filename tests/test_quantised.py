"""Quantised bases: refused where they cannot be read, and trained and stacked without a change of their weights."""

import json
import shutil
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from shl.bake import bake
from shl.core.errors import ShlError
from shl.core.models import _merge, load
from shl.train import heal
from test_adapters import IDS, SHAPES, make_adapter
from test_train import FAST, make_records


class Codes(nn.Linear):
    """A linear map that stores eight-bit codes and one scale, as libraries for quantisation do."""

    @classmethod
    def of(cls, plain):
        made = cls(plain.in_features, plain.out_features, bias=False)
        made.scale = float(plain.weight.abs().max()) / 127
        codes = (plain.weight / made.scale).round().to(torch.int8)
        made.weight = nn.Parameter(codes, requires_grad=False)
        return made

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


def coded(folder, chain=()):
    """The tiny model with some of its maps coded, and the same in floats."""
    models = []
    for codes in (True, False):
        loaded = load(str(folder), device="cpu")
        for path in SHAPES:
            parent, _, name = path.rpartition(".")
            made = Codes.of(loaded.model.get_submodule(path))
            if not codes:
                plain = nn.Linear(made.in_features, made.out_features, bias=False)
                plain.weight.data = made.weight.float() * made.scale
                made = plain
            setattr(loaded.model.get_submodule(parent), name, made.requires_grad_(False))
        loaded.chain = list(chain)
        _merge(loaded)
        models.append(loaded)
    return models


def logits(loaded):
    with torch.no_grad():
        return loaded.model(input_ids=IDS).logits


def codes_of(loaded):
    return {path: loaded.model.get_submodule(path).weight.clone() for path in SHAPES}


def test_a_chain_acts_beside_codes_as_it_does_inside_floats(tiny_model, tmp_path):
    first = make_adapter(tmp_path / "r0")
    second = make_adapter(tmp_path / "r1", 1, rank=2, parents=[first])
    chain = [first, replace(second, scale=0.5)]
    codes, floats = coded(tiny_model(), chain)
    base, _ = coded(tiny_model())
    assert list(codes.beside) == sorted(SHAPES) and not floats.beside
    assert (logits(codes) - logits(floats)).abs().max() < 1e-4
    with codes.base():
        assert torch.equal(logits(codes), logits(base))
    assert (logits(codes) - logits(base)).abs().max() > 1e-2
    assert all(torch.equal(kept, codes_of(base)[path]) for path, kept in codes_of(codes).items())


def test_training_on_codes_leaves_them_alone(tiny_model, tmp_path):
    chain = [make_adapter(tmp_path / "r0")]
    codes, floats = coded(tiny_model(), chain)
    before = codes_of(codes)
    result, wanted = (heal(one, make_records(), FAST, tmp_path / f"{i}") for i, one in enumerate((codes, floats)))
    assert result.rows[-1]["holdout_nll"] == pytest.approx(wanted.rows[-1]["holdout_nll"], rel=1e-2)
    assert result.rows[0]["holdout_kl_mean"] > 1e-3 < wanted.rows[0]["holdout_kl_mean"]  # the base is without chain
    assert all(torch.equal(kept, before[path]) for path, kept in codes_of(codes).items())
    with pytest.raises(ShlError, match="quantised") as error:
        bake(codes, tmp_path / "baked")
    assert "--as lora" in error.value.hint
    assert bake(codes, tmp_path / "stacked", as_="lora").error < 1e-4


def with_config(folder, copy, method):
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "load_in_4bit": True, "bits": 4}
    (copy / "config.json").write_text(json.dumps(config))
    return str(copy)


def test_what_cannot_be_read_is_said_before_the_weights_are_opened(tiny_model, tmp_path):
    with pytest.raises(ShlError, match="quantised by gptq, which shl does not know") as error:
        load(with_config(tiny_model(), tmp_path / "gptq", "gptq"), device="cpu")
    assert "bitsandbytes" in error.value.hint
    if find_spec("bitsandbytes") is None:
        with pytest.raises(ShlError, match="bitsandbytes, which is not installed") as error:
            load(with_config(tiny_model(), tmp_path / "bnb", "bitsandbytes"), device="cpu")
        assert "pip install bitsandbytes" in error.value.hint


def test_four_bits_for_real(tiny_model, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import AutoTokenizer, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=512, **sizes)).save_pretrained(tmp_path / "floats")
    packed = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "floats", quantization_config=packed, dtype=torch.float32)
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny_model()).save_pretrained(tmp_path / "model")
    loaded = load(str(tmp_path / "model"), device="cpu")
    before = logits(loaded)
    first = heal(loaded, make_records(), FAST, tmp_path / "r0")
    assert first.rows[-1]["nll"] < first.rows[1]["nll"] and torch.equal(logits(loaded), before)
    chain = load(str(tmp_path / "model"), [str(first.path)], device="cpu")
    second = heal(chain, make_records(), FAST, tmp_path / "r1")
    assert second.rows[0]["holdout_kl_mean"] > 1e-6
    whole = load(str(tmp_path / "model"), [str(second.path)], device="cpu")
    assert (logits(whole) - before).abs().max() > 1e-3
    with whole.base():
        assert torch.equal(logits(whole), before)
    result = bake(whole, tmp_path / "stacked", as_="lora")
    assert result.error < 0.05 * result.effect
