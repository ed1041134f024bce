"""Finding and loading models, their blocks, and how messages become tokens."""

import json
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from conftest import REFUSING, TEMPLATE, make_tokenizer
from shl.core.adapters import PREFIX, peft_config, write_adapter
from shl.core.chat import Chat, fold_system, join_system, with_system
from shl.core.errors import Mismatch, ShlError
from shl.core.layout import blocks
from shl.core.models import find, load, local_digest, parse_layers
from shl.core.provenance import digest_files

USER = [{"role": "user", "content": "Who said so?"}]
SYSTEM = [{"role": "system", "content": "Be kind."}, *USER]


def test_a_missing_path_fails_at_once_with_a_hint():
    for name in (
        "./nowhere",
        "../nowhere",
        "/nowhere/at/all",
        "~/nowhere-at-all",
        "runs/r3/baked",
        "a model",
        "",
        "x/",
    ):
        with pytest.raises(ShlError, match="no model at") as error:
            find(name)
        assert "hub name" in error.value.hint


def test_a_folder_that_is_an_adapter_says_so(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ShlError) as error:
        find(str(tmp_path))
    assert f"--adapter {tmp_path}" in error.value.hint


def test_a_hub_name_is_not_looked_up():
    ref = find("some/model", "abc")
    assert (ref.id, ref.path, ref.revision, ref.local, ref.recommended) == (
        "some/model",
        "some/model",
        "abc",
        False,
        {},
    )


def test_a_folder_brings_its_recommendations(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model(), tmp_path / "m")
    (folder / "shl.json").write_text(json.dumps({"lr": 0.5}))
    assert find(str(folder)).recommended == {"lr": 0.5}


def test_the_digest_is_of_weights_and_configuration(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model(), tmp_path / "m")
    first = local_digest(folder)
    assert first == local_digest(tiny_model()) == digest_files([folder / "config.json", folder / "model.safetensors"])
    (folder / "shl.json").write_text("{}")
    assert local_digest(folder) == first
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    assert local_digest(folder) != first


@pytest.mark.parametrize(
    ("spec", "n", "expected"),
    [("0.45:0.55", 8, [4]), ("0.45:0.55", 34, [16, 17, 18]), ("0.2:0.8", 10, [2, 3, 4, 5, 6, 7, 8]),
     ("4,3,3", 8, [3, 4]), ("0", 1, [0]), ("0.45:0.55", 5, [2]), ("0.5:0.5", 3, [1]), ("0:1", 3, [0, 1, 2])],
)  # fmt: skip
def test_bands(spec, n, expected):
    assert parse_layers(spec, n) == expected


@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 100))
def test_a_band_is_never_empty(a, b, n):
    low, high = sorted((a, b))
    chosen = parse_layers(f"{low:.6f}:{high:.6f}", n)
    assert chosen == sorted(set(chosen)) and all(0 <= i < n for i in chosen) and chosen


@pytest.mark.parametrize("spec", ["x", "8", "-1", "1:2:3", "", "3;4", "nan:1"])
def test_bad_bands_are_errors(spec):
    with pytest.raises(ShlError):
        parse_layers(spec, 8)


def test_blocks_are_those_of_the_language_model(each):
    assert each.n_blocks == each.text_config.num_hidden_layers
    assert all("Vision" not in type(block).__name__ and "Siglip" not in type(block).__name__ for block in each.blocks)
    assert not each.model.training and not any(p.requires_grad for p in each.model.parameters())


def test_an_unknown_layout_names_what_was_looked_for():
    with pytest.raises(ShlError, match="cannot find the 4 decoder blocks of Linear") as error:
        blocks(nn.Linear(2, 2), 4)
    assert "transformer.h" in error.value.hint


def test_a_broken_folder_is_a_short_error(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ShlError, match="cannot load") as error:
        load(str(tmp_path))
    assert "safetensors" in error.value.hint and "\n" not in str(error.value)


def test_unknown_device_and_dtype(tiny_model):
    for wrong in ({"dtype": "int3"}, {"device": "abacus"}):
        with pytest.raises(ShlError, match="unknown"):
            load(str(tiny_model()), **wrong)


def test_base_swaps_weights_and_is_reentrant(tiny_model):
    loaded = load(str(tiny_model()), device="cpu")
    name = "model.layers.0.self_attn.q_proj.weight"
    weight = loaded.model.get_parameter(name)
    original = weight.data.clone()
    loaded.originals[name] = weight.data
    weight.data = original + 1
    with loaded.base():
        assert torch.equal(weight.data, original)
        with loaded.base():
            assert torch.equal(weight.data, original)
        assert torch.equal(weight.data, original)
    assert torch.equal(weight.data, original + 1)
    with pytest.raises(ZeroDivisionError), loaded.base():
        _ = 1 / 0
    assert torch.equal(weight.data, original + 1)


def make_adapter(folder, loaded, module="model.layers.1.mlp.up_proj", rank=3, **meta):
    """A random adapter on one module, and the change it makes to the weight."""
    rows, columns = loaded.model.get_submodule(module).weight.shape
    generator = torch.Generator().manual_seed(rank)
    a, b = torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator)
    names = {f"{PREFIX}{module}.lora_A.weight": a, f"{PREFIX}{module}.lora_B.weight": b}
    folder.mkdir()
    write_adapter(folder, names, peft_config(loaded.ref.path, [module], rank, 2 * rank), meta)
    return 2 * b @ a


def test_a_chain_is_merged_and_base_is_within_reach(tiny, tmp_path):
    plain, name = tiny(), "model.layers.1.mlp.up_proj.weight"
    one = make_adapter(tmp_path / "one", plain, rank=3)
    two = make_adapter(tmp_path / "two", plain, rank=4)
    specs = [str(tmp_path / "one"), f"{tmp_path / 'two'}:0.5"]
    loaded = load(plain.ref.id, specs, device="cpu")
    weight, base = loaded.model.get_parameter(name), plain.model.get_parameter(name)
    torch.testing.assert_close(weight.data, base.data + one + 0.5 * two)
    with loaded.base():
        assert torch.equal(weight.data, base.data)
    assert loaded.adapters[1].endswith(":0.5") and loaded.adapter_paths == specs
    assert load(plain.ref.id, loaded.adapter_paths, device="cpu").adapters == loaded.adapters
    assert loaded.digest == plain.digest


def test_an_adapter_for_another_model_is_refused(tiny, tmp_path):
    make_adapter(tmp_path / "a", tiny(), model="other", model_digest="sha256:0")
    with pytest.raises(Mismatch, match="was trained on other"):
        load(tiny().ref.id, [str(tmp_path / "a")], device="cpu")
    assert load(tiny().ref.id, [str(tmp_path / "a")], device="cpu", allow_mismatch=True).chain
    with pytest.raises(Mismatch, match="does not have in that shape"):
        make_adapter(tmp_path / "b", tiny("qwen2"), module="model.layers.6.mlp.up_proj")
        load(tiny().ref.id, [str(tmp_path / "b")], device="cpu")


def test_the_beginning_of_text_stands_there_once(tiny):
    for chat in (True, False):
        ids = tiny(chat=chat).encode_prompt(SYSTEM)
        assert ids[0] == 1 and ids.count(1) == 1 and 2 not in ids


def test_a_closing_token_that_a_tokenizer_adds_is_taken_off():
    from tokenizers import processors

    tokenizer = make_tokenizer(chat=False)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    ids = Chat(tokenizer).encode_prompt(USER)
    assert ids[0] == 1 and ids[-1] != 2


def test_without_a_template_the_texts_are_joined(tiny):
    assert tiny(chat=False).render(SYSTEM) == "Be kind.\nWho said so?\n"
    assert tiny(chat=False).chat.end_id == 2


def test_the_template_is_applied_and_thinking_is_off_unless_asked_for(tiny):
    assert tiny().render(SYSTEM) == "<bos><|system|>Be kind.<|end|>\n<|user|>Who said so?<|end|>\n<|assistant|>"
    assert tiny().render(USER, think=True).endswith("<|assistant|><think>")


def test_an_answer_that_is_begun_goes_on(tiny):
    begun = [*USER, {"role": "assistant", "content": "Nobody"}]
    assert tiny().render(begun).endswith("<|assistant|>Nobody")
    assert tiny(chat=False).render(begun) == "Who said so?\nNobody"


@pytest.mark.parametrize(
    "template", [REFUSING, TEMPLATE.replace("m in messages", "m in messages if m.role != 'system'")]
)
def test_a_template_without_a_system_role_gets_it_in_the_user_turn(template):
    chat = Chat(make_tokenizer(template=template))
    assert chat.render(SYSTEM) == "<bos><|user|>Be kind.\n\nWho said so?<|end|>\n<|assistant|>"
    assert chat.render(USER) == "<bos><|user|>Who said so?<|end|>\n<|assistant|>"


def test_templates_differ_by_digest(tiny):
    digests = {tiny().template_digest, tiny(chat=False).template_digest, tiny(template=REFUSING).template_digest}
    assert len(digests) == 3


def test_the_end_of_turn_closes_a_completion_and_stops_one(tiny):
    loaded = tiny()
    assert loaded.chat.end_id == 3 and loaded.stop_ids == {2, 3}
    assert loaded.encode_completion("Nobody.", end=True) == [*loaded.encode_completion("Nobody.", end=False), 3]


def test_a_template_that_closes_with_plain_text_falls_back_on_the_end_of_text():
    assert Chat(make_tokenizer(template=TEMPLATE.replace("<|end|>", " over"))).end_id == 2


def test_no_end_token_at_all_is_an_error():
    tokenizer = make_tokenizer(chat=False)
    tokenizer.eos_token = None
    with pytest.raises(ShlError, match="no token that ends"):
        Chat(tokenizer).encode_completion("x", end=True)


def test_system_texts():
    assert with_system(SYSTEM, None) == USER and with_system(USER, "Be kind.") == SYSTEM
    assert with_system(SYSTEM, "Be stern.")[0]["content"] == "Be stern."
    assert join_system(None, "", None) is None and join_system("a", None, "b") == "a\n\nb"
    assert fold_system(SYSTEM[:1]) == [{"role": "user", "content": "Be kind."}]


@given(st.text(max_size=60))
def test_decoding_undoes_encoding(text):
    chat = Chat(_TOKENIZER)
    assert chat.decode(chat.encode_completion(text, end=False)) == text


_TOKENIZER = make_tokenizer()


def test_the_story_model_loads(stories):
    loaded = load(str(stories), device="cpu")
    assert loaded.n_blocks == 5 and loaded.hidden == 64 and loaded.stop_ids == {2}
    assert loaded.encode_prompt(USER).count(1) == 1
