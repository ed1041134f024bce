"""Baking: what is written answers as the chain does, in plain transformers and in plain peft."""

import json

import pytest
import torch

import shl.bake
from shl.bake import bake
from shl.core.adapters import resolve_chain
from shl.core.errors import ShlError
from shl.core.models import find, load
from test_adapters import IDS, make_adapter


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture
def loaded(tiny_model, tmp_path):
    """The tiny Llama under a chain of three."""
    first = make_adapter(tmp_path / "r0", 0)
    second = make_adapter(tmp_path / "r1", 1, parents=[first])
    third = make_adapter(tmp_path / "r2", 2, parents=[first, second])
    return load(str(tiny_model()), [f"{third.path}:0.5"], device="cpu")


def test_a_baked_model_loads_in_plain_transformers(loaded, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = bake(loaded, tmp_path / "out", max_shard_size="100KB")
    assert result.error < 1e-4 and result.effect > 1e-2
    plain = AutoModelForCausalLM.from_pretrained(result.path, dtype=torch.float32)
    assert (logits(plain) - logits(loaded.model)).abs().max() < 1e-4
    tokenizer = AutoTokenizer.from_pretrained(result.path)
    assert tokenizer.chat_template == loaded.tokenizer.chat_template
    assert len(list(result.path.glob("*.safetensors"))) > 1 and (result.path / "generation_config.json").is_file()
    meta = json.loads((result.path / "shl.json").read_text())
    assert meta["baked"] == loaded.adapters and meta["model_digest"] == loaded.digest and meta["step"] == "bake"
    again = load(str(result.path), device="cpu")
    assert again.template_digest == loaded.template_digest and again.stop_ids == loaded.stop_ids
    assert again.digest != loaded.digest


def test_recommendations_travel_with_the_model(loaded, tmp_path):
    loaded.ref.recommended.update({"layers": "3,4", "train": {"lr": 0.1}, "step": "toy"})
    recommended = find(str(bake(loaded, tmp_path / "out", verify=False).path)).recommended
    assert (recommended["layers"], recommended["train"], recommended["step"]) == ("3,4", {"lr": 0.1}, "bake")


def test_a_baked_adapter_loads_in_plain_peft(loaded, tiny_model, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    result = bake(loaded, tmp_path / "out", as_="lora")
    assert result.error < 1e-4 and result.effect > 1e-2
    after = loaded.model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    base = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32)
    assert (logits(PeftModel.from_pretrained(base, str(result.path))) - logits(loaded.model)).abs().max() < 1e-4
    assert [one.parents for one in resolve_chain([result.path])] == [[]]
    again = load(str(tiny_model()), [str(result.path)], device="cpu")
    assert (logits(again.model) - logits(loaded.model)).abs().max() < 1e-4


@pytest.mark.parametrize("as_", ["model", "lora"])
def test_what_answers_differently_is_not_published(loaded, tmp_path, monkeypatch, as_):
    name = "_reloaded" if as_ == "model" else "_with_peft"
    monkeypatch.setattr(shl.bake, name, lambda loaded, folder, ids: torch.zeros(1))
    with pytest.raises(ShlError, match="answers differently"):
        bake(loaded, tmp_path / "out", as_=as_)
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


@pytest.mark.parametrize("as_", ["model", "lora"])
def test_short_floats(tiny_model, tmp_path, as_):
    adapter = make_adapter(tmp_path / "a")
    loaded = load(str(tiny_model()), [str(adapter.path)], device="cpu", dtype="bfloat16")
    result = bake(loaded, tmp_path / "out", as_=as_)
    if as_ == "model":  # merged weights are rounded once, so what is read back is what was in memory
        assert result.error == 0
    else:
        assert result.error < 0.1 * result.effect


def test_a_wrong_scale_shows_through_the_rounding_of_short_floats(tiny_model, tmp_path, monkeypatch):
    adapter = make_adapter(tmp_path / "r0")
    loaded = load(str(tiny_model()), [f"{adapter.path}:0.1"], device="cpu", dtype="bfloat16")
    whole = shl.bake.stack
    monkeypatch.setattr(
        shl.bake,
        "stack",
        lambda *args: (whole(*args)[0], whole(*args)[1] | {"lora_alpha": 2 * whole(*args)[1]["lora_alpha"]}),
    )
    with pytest.raises(ShlError, match="answers differently from the chain"):
        bake(loaded, tmp_path / "out", as_="lora")
    assert not (tmp_path / "out").exists()


def test_refusals(loaded, tiny, tmp_path):
    with pytest.raises(ShlError, match="chain is empty"):
        bake(tiny(), tmp_path / "out")
    with pytest.raises(ShlError, match="unknown kind"):
        bake(loaded, tmp_path / "out", as_="gguf")
    with pytest.raises(ShlError, match="exists already"):
        bake(loaded, tmp_path / "r0")
    with pytest.raises(ShlError, match="part of the chain"):
        bake(loaded, tmp_path / "r0", force=True)


def test_every_architecture_bakes(each, tmp_path):
    from shl.core.defaults import TrainConfig
    from shl.train import heal
    from test_train import make_records

    cfg = TrainConfig(rank=2, lr=1e-2, epochs=1, layers="0:1", holdout=0.0)
    path = heal(each, make_records(2), cfg, tmp_path / "a").path
    loaded = load(each.ref.path, [str(path)], device="cpu")
    for as_ in ("model", "lora"):
        assert bake(loaded, tmp_path / as_, as_=as_).error < 1e-4
