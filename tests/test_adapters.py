"""Adapter directories and chains: what is read and refused, how parents come along, and the exact sum."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shl.bake import bake
from shl.core.adapters import deltas, factors, parse_spec, resolve_chain, stack
from shl.core.errors import InputError, Mismatch, ShlError
from shl.core.models import load
from shl.core.peft_dir import CONFIG, META, PREFIX, WEIGHTS, peft_config, read_adapter, write_adapter

IDS = torch.tensor([[5, 9, 200, 31, 7, 77, 120, 44]])
Q, DOWN = "model.layers.1.self_attn.q_proj", "model.layers.2.mlp.down_proj"
SHAPES = {Q: (48, 48), DOWN: (48, 96)}


def make_adapter(folder, seed=0, modules=(Q, DOWN), rank=4, alpha=8.0, parents=(), size=0.05, **changes):
    """A random adapter for the tiny Llama, with a record of its parents when there are any."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module in modules:
        out, inner = SHAPES[module]
        tensors[f"{PREFIX}{module}.lora_A.weight"] = torch.randn(rank, inner, generator=generator) * size
        tensors[f"{PREFIX}{module}.lora_B.weight"] = torch.randn(out, rank, generator=generator) * size * 4
    entries = [{"path": os.path.relpath(one.path, folder), "digest": one.digest, "scale": one.scale} for one in parents]
    folder.mkdir(parents=True)
    write_adapter(folder, tensors, {**peft_config("base", modules, rank, alpha), **changes}, {"parents": entries})
    return read_adapter(folder)


@pytest.fixture
def chain(tmp_path):
    """Three rounds, each trained on those before it, over different modules."""
    first = make_adapter(tmp_path / "r0" / "adapter", 0)
    second = make_adapter(tmp_path / "r1" / "adapter", 1, modules=(Q,), rank=2, parents=[first])
    third = make_adapter(tmp_path / "r2" / "adapter", 2, alpha=4, rank=3, parents=[first, second])
    return [first, second, third]


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def on_base(tiny_model, specs, **kwargs):
    return logits(load(str(tiny_model()), [str(spec) for spec in specs], device="cpu", **kwargs).model)


def digests(specs, **kwargs):
    return [one.digest for one in resolve_chain(specs, **kwargs)]


def test_writing_and_reading_keeps_everything(tmp_path):
    made = make_adapter(tmp_path / "a")
    again = read_adapter(tmp_path / "a")
    assert again.digest == made.digest == again.meta["digest"] and again.modules == sorted(SHAPES)
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in made.tensors.items())


def test_the_digest_is_of_meaning_and_not_of_names(tmp_path):
    made = make_adapter(tmp_path / "a")
    copy = shutil.copytree(tmp_path / "a", tmp_path / "b")
    config = json.loads((copy / CONFIG).read_text())
    (copy / CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": "elsewhere"}))
    assert read_adapter(copy).digest == made.digest
    (copy / CONFIG).write_text(json.dumps({**config, "lora_alpha": 9}))
    with pytest.raises(InputError, match="was changed after it was written"):
        read_adapter(copy)
    (copy / META).unlink()
    assert read_adapter(copy).digest != made.digest
    assert make_adapter(tmp_path / "c", seed=1).digest != made.digest


@pytest.mark.parametrize(
    ("key", "value"),
    [("use_rslora", True), ("use_dora", True), ("bias", "all"), ("modules_to_save", ["lm_head"]), ("lora_bias", True),
     ("init_lora_weights", "pissa"), ("peft_type", "LOHA"), ("target_parameters", ["x"])],
)  # fmt: skip
def test_what_is_not_plain_lora_is_refused(tmp_path, key, value):
    make_adapter(tmp_path / "a")
    path = tmp_path / "a" / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(ShlError, match=f"not plain LoRA: its {key}") as error:
        read_adapter(tmp_path / "a")
    assert "merge_and_unload" in error.value.hint


def test_a_pickle_is_refused(tmp_path):
    make_adapter(tmp_path / "a")
    (tmp_path / "a" / WEIGHTS).rename(tmp_path / "a" / "adapter_model.bin")
    with pytest.raises(ShlError, match=r"no adapter_model\.safetensors") as error:
        read_adapter(tmp_path / "a")
    assert "pickle" in error.value.hint


def test_links_out_of_the_directory_are_refused(tmp_path):
    make_adapter(tmp_path / "a")
    (tmp_path / "a" / WEIGHTS).rename(tmp_path / "elsewhere")
    (tmp_path / "a" / WEIGHTS).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ShlError, match="link to a file outside") as error:
        read_adapter(tmp_path / "a")
    assert "cp -rL" in error.value.hint


def test_broken_directories_are_short_errors(tmp_path):
    with pytest.raises(ShlError, match="is not an adapter") as error:
        read_adapter(tmp_path / "nowhere")
    assert "no such directory" in error.value.hint
    make_adapter(tmp_path / "a")
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    name = f"{PREFIX}{Q}.lora_A.weight"
    for bad, what in (
        ({**tensors, name: tensors[name] * float("nan")}, "not finite"),
        ({**tensors, f"{PREFIX}{Q}.lora_magnitude_vector": torch.ones(3)}, "not plain LoRA"),
        ({name: tensors[name]}, "do not make a pair"),
        ({**tensors, name: tensors[name][:2].contiguous()}, "do not make a pair"),
    ):
        save_file(bad, tmp_path / "a" / WEIGHTS)
        with pytest.raises(InputError, match=what):
            read_adapter(tmp_path / "a")
    (tmp_path / "a" / CONFIG).write_text("[]")
    with pytest.raises(InputError, match="not a JSON object"):
        read_adapter(tmp_path / "a")


def test_specs(tmp_path):
    (tmp_path / "with:1").mkdir()
    assert parse_spec("a/b") == (Path("a/b"), None) and parse_spec("a:0.5") == (Path("a"), 0.5)
    assert parse_spec("a:-1") == (Path("a"), -1.0) and parse_spec("c:/a") == (Path("c:/a"), None)
    assert parse_spec(tmp_path / "with:1") == (tmp_path / "with:1", None)
    for wrong in ("a:nan", "a:inf", ":1"):
        with pytest.raises(ShlError):
            parse_spec(wrong)


def test_a_directory_brings_its_parents_once(chain):
    wanted = [one.digest for one in chain]
    assert digests([chain[2].path]) == wanted
    assert digests([chain[0].path, chain[2].path]) == digests([chain[2].path, chain[1].path]) == wanted
    assert digests([chain[2].path], parents=False) == wanted[2:]
    assert digests(["none"]) == digests([]) == []
    with pytest.raises(ShlError, match="stands alone"):
        resolve_chain(["none", chain[0].path])


def test_a_run_folder_can_be_moved(chain, tmp_path):
    shutil.copytree(tmp_path, tmp_path.parent / f"{tmp_path.name}-moved")
    shutil.rmtree(tmp_path / "r0")
    moved = tmp_path.parent / f"{tmp_path.name}-moved" / "r2" / "adapter"
    assert digests([moved]) == [one.digest for one in chain]
    with pytest.raises(ShlError, match="which is gone") as error:
        resolve_chain([chain[2].path])
    assert "--no-parents" in error.value.hint


def test_a_parent_that_changed_is_a_mismatch(chain, tmp_path):
    shutil.rmtree(tmp_path / "r0")
    make_adapter(tmp_path / "r0" / "adapter", seed=9)
    with pytest.raises(Mismatch, match="changed since"):
        resolve_chain([chain[2].path])


def test_scales(chain, tmp_path):
    def scales(*specs):
        return [one.scale for one in resolve_chain(specs)]

    assert scales(f"{chain[2].path}:0.5") == [1, 1, 0.5]
    assert scales(f"{chain[0].path}:0.25", chain[2].path) == [0.25, 1, 1]
    assert scales(chain[2].path, f"{chain[0].path}:-1") == [-1, 1, 1]
    half = make_adapter(tmp_path / "half" / "adapter", 7, parents=[replace(chain[0], scale=0.5)])
    assert scales(half.path) == scales(chain[0].path, half.path) == [0.5, 1]
    assert scales(f"{chain[0].path}:1", half.path) == [1, 1]
    with pytest.raises(Mismatch, match="at different scales"):
        scales(chain[1].path, half.path)
    with pytest.raises(ShlError, match="at two scales"):
        scales(f"{chain[0].path}:1", f"{chain[0].path}:-1")


def test_scale_one_is_itself_and_opposites_cancel(chain, tiny_model):
    path = chain[0].path
    plain = on_base(tiny_model, [path])
    assert torch.equal(on_base(tiny_model, [f"{path}:1"]), plain)
    loaded = load(str(tiny_model()), device="cpu")
    base = logits(loaded.model)
    assert (plain - base).abs().max() > 1e-2
    cancelled = deltas([chain[0], replace(chain[0], scale=-1.0)])
    assert all((both.b @ both.a).abs().max() < 1e-6 for both in cancelled.values())
    for name, (a, b) in cancelled.items():
        loaded.model.get_parameter(name).data += b @ a
    assert (logits(loaded.model) - base).abs().max() < 1e-5


def test_the_rank_concatenation_is_the_sum(chain):
    total = deltas(chain)
    for module in (Q, DOWN):
        wanted = sum(both[module].b @ both[module].a for both in map(factors, chain) if module in both)
        both = total[f"{module}.weight"]
        assert torch.allclose(both.b @ both.a, wanted, atol=1e-6)
    assert total[f"{Q}.weight"].a.shape == (4 + 2 + 3, 48)


def test_a_chain_on_the_fly_equals_plain_peft_and_the_stack(chain, tiny_model, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    fly = on_base(tiny_model, [chain[2].path])
    model = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32)
    for one in chain:  # merged one after the other, as plain peft does it
        model = PeftModel.from_pretrained(model, str(one.path)).merge_and_unload()
    assert (logits(model) - fly).abs().max() < 1e-4
    (tmp_path / "stacked").mkdir()
    tensors, config = stack(resolve_chain([chain[2].path]), str(tiny_model()))
    write_adapter(tmp_path / "stacked", tensors, config, {})
    assert (on_base(tiny_model, [tmp_path / "stacked"]) - fly).abs().max() < 1e-4
    fresh = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32)
    assert (logits(PeftModel.from_pretrained(fresh, str(tmp_path / "stacked"))) - fly).abs().max() < 1e-4


def test_a_chain_in_bfloat16_is_one_model_here_and_within_its_rounding_in_plain_peft(chain, tiny_model, tmp_path):
    """On the fly, merged and stacked are the same bits: one sum in float32, rounded once. What peft rounds more often
    lies within 4 eps of the largest logit, as docs/formats.md says."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    loaded = load(str(tiny_model()), [str(chain[2].path)], device="cpu", dtype="bfloat16")
    fly, near = logits(loaded.model), 4 * torch.finfo(torch.bfloat16).eps
    near *= float(fly.abs().max())
    assert (fly - on_base(tiny_model, [], dtype="bfloat16")).abs().max() > near  # or it would tell nothing
    for kind in ("model", "lora"):
        bake(loaded, tmp_path / kind, as_=kind)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    assert torch.equal(logits(merged), fly)
    assert torch.equal(on_base(tiny_model, [tmp_path / "lora"], dtype="bfloat16"), fly)
    assert (on_base(tiny_model, [chain[2].path]) - fly).abs().max() < near

    beside = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.bfloat16)
    assert (logits(PeftModel.from_pretrained(beside, str(tmp_path / "lora"))) - fly).abs().max() < near
    model = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.bfloat16)
    for one in chain:  # merged one after the other: rounded three times
        model = PeftModel.from_pretrained(model, str(one.path)).merge_and_unload()
    assert (logits(model) - fly).abs().max() < near


def test_alpha_patterns_and_transposed_layers(tmp_path):
    one = make_adapter(tmp_path / "a", alpha_pattern={"q_proj": 2})
    other = make_adapter(tmp_path / "b")
    assert torch.allclose(factors(one)[Q].b * 4, factors(other)[Q].b)
    assert torch.equal(factors(one)[DOWN].b, factors(other)[DOWN].b)
    conv = deltas([make_adapter(tmp_path / "c", fan_in_fan_out=True)])[f"{DOWN}.weight"]
    plain = deltas([other])[f"{DOWN}.weight"]
    assert torch.allclose(conv.b @ conv.a, (plain.b @ plain.a).T, atol=1e-6)
    with pytest.raises(ShlError, match="mixes"):
        stack([other, read_adapter(tmp_path / "c")], "base")


def test_a_broken_record_of_parents_is_an_error(tmp_path):
    make_adapter(tmp_path / "a")
    (tmp_path / "a" / META).write_text('{"parents": [{"path": "../b"}]}')
    with pytest.raises(InputError, match="parents is not a list"):
        read_adapter(tmp_path / "a")
