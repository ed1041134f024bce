"""Vectors: what they measure, what their files hold, and their algebra."""

import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from shl.core.defaults import VectorConfig
from shl.core.errors import InputError, Mismatch, ShlError
from shl.core.provenance import canonical, digest_tensors, read_header
from shl.core.records import Pair, Prompt
from shl.vector import Vector, extract, extract_pairs

POS, NEG = "You care about people more than about rules.", "You follow orders."
CONTEXTS = [
    Prompt(f"c{i}", [{"role": "user", "content": text}])
    for i, text in enumerate(["Who said so?", "She thanked him twice, and then once more.", "Why?", "Answer in JSON."])
]
CFG = VectorConfig(layers="1,2")


def last_state(loaded, prompt, system, layer):
    messages = ([{"role": "system", "content": system}] if system else []) + prompt.messages
    ids = torch.tensor([loaded.encode_prompt(messages)])
    with torch.inference_mode():
        return loaded.model(ids, output_hidden_states=True).hidden_states[layer + 1][0, -1].float()


@pytest.fixture
def vector(tiny):
    return extract(tiny(), POS, NEG, CONTEXTS, CFG, name="care", axis="care")


@pytest.mark.parametrize("neg", [NEG, None])
def test_a_vector_is_the_mean_difference_at_the_last_token(each, neg):
    made = extract(each, POS, neg, CONTEXTS, VectorConfig(layers="0,1", batch_size=3))
    for layer, v in made.layers.items():
        difference = [last_state(each, p, POS, layer) - last_state(each, p, neg, layer) for p in CONTEXTS]
        torch.testing.assert_close(v, torch.stack(difference).mean(0), rtol=1e-4, atol=1e-4)
        below = torch.stack([last_state(each, p, neg, layer) for p in CONTEXTS]).norm(dim=-1).mean()
        assert made.meta["residual_norms"][str(layer)] == pytest.approx(below.item(), rel=1e-4)
        assert made.meta["norms"][str(layer)] == pytest.approx(v.norm().item(), rel=1e-5)


def test_the_batch_does_not_matter(tiny):
    one, many = (extract(tiny(), POS, NEG, CONTEXTS, replace(CFG, batch_size=n)) for n in (1, 8))
    for layer in one.layers:
        torch.testing.assert_close(one.layers[layer], many.layers[layer], rtol=1e-5, atol=1e-5)


def test_a_template_without_a_system_role_still_carries_the_persona(tiny):
    from conftest import REFUSING

    made = extract(tiny(template=REFUSING), POS, NEG, CONTEXTS, CFG)
    assert all(norm > 0 for norm in made.norms.values())


def test_the_same_persona_twice_is_an_error(tiny):
    with pytest.raises(ShlError, match="same prompt"):
        extract(tiny(), POS, POS, CONTEXTS, CFG)


def test_contexts_are_a_sample_that_the_seed_decides(tiny):
    def chosen(seed):
        return extract(tiny(), POS, NEG, CONTEXTS, replace(CFG, contexts=2, seed=seed)).meta["contexts"]

    assert chosen(0) == chosen(0) and chosen(0)["n"] == 2
    assert len({chosen(seed)["digest"] for seed in range(8)}) > 1


def test_a_contexts_own_system_text_stays_on_both_sides(tiny):
    own = [Prompt("c", CONTEXTS[0].messages, "Be brief.")]
    made = extract(tiny(), POS, None, own, CFG).layers[1]
    difference = last_state(tiny(), own[0], POS + "\n\nBe brief.", 1) - last_state(tiny(), own[0], "Be brief.", 1)
    torch.testing.assert_close(made, difference, rtol=1e-4, atol=1e-4)


def test_the_header_says_where_a_vector_came_from(vector, tiny):
    meta = vector.meta
    assert meta["personas"] == {"name": "care", "axis": "care", "pos": POS, "neg": NEG}
    assert (meta["method"], meta["layers"], meta["position"]) == ("mean-diff", [1, 2], "last")
    assert (meta["model"], meta["model_digest"], meta["adapters"]) == (tiny().ref.id, tiny().digest, [])
    assert meta["template"] == tiny().template_digest and meta["contexts"]["n"] == 4 and meta["version"]


def test_pairs_take_chats_and_strings(tiny):
    loaded = tiny()
    chats = extract_pairs(
        loaded, [Pair([{"role": "system", "content": POS}, *p.messages], p.messages) for p in CONTEXTS], CFG
    )
    persona = extract(loaded, POS, None, CONTEXTS, CFG)
    assert all(torch.equal(chats.layers[i], persona.layers[i]) for i in (1, 2))
    made = extract_pairs(loaded, [Pair("She helped", "She obeyed"), Pair("He asked", "He went")], CFG)
    ids = [torch.tensor([[1, *loaded.encode_completion(text, end=False)]]) for text in ("She helped", "She obeyed")]
    assert made.meta["pairs"]["n"] == 2 and "contexts" not in made.meta
    one = extract_pairs(loaded, [Pair("She helped", "She obeyed")], CFG).layers[1]
    with torch.inference_mode():
        a, b = (loaded.model(x, output_hidden_states=True).hidden_states[2][0, -1] for x in ids)
    torch.testing.assert_close(one, a - b, rtol=1e-4, atol=1e-4)


def test_models_without_a_template_give_vectors_too(tiny, stories):
    from shl.core.models import load

    for loaded in (tiny(chat=False), load(str(stories), device="cpu")):
        made = extract(loaded, POS, NEG, CONTEXTS, CFG)
        assert all(norm > 0 for norm in made.norms.values())


def test_a_file_gives_the_vector_back(vector, tmp_path):
    path = tmp_path / "v.safetensors"
    vector.save(path)
    again = Vector.load(path)
    assert again.meta == vector.meta and again.layers.keys() == vector.layers.keys()
    assert all(torch.equal(again.layers[i], vector.layers[i]) for i in vector.layers)
    assert again.digest == vector.digest == digest_tensors(path, read_header(path))


def test_the_same_vector_gives_the_same_bytes(vector, tmp_path):
    for name in ("a", "b", "c"):
        vector.save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()


def test_a_file_is_not_replaced_unasked(vector, tmp_path):
    vector.save(tmp_path / "v")
    with pytest.raises(ShlError, match="exists already"):
        vector.save(tmp_path / "v")
    vector.save(tmp_path / "v", force=True)


def test_paths_of_the_chain_are_relative_to_the_file(vector, tmp_path, monkeypatch):
    vector.meta["adapter_paths"] = [str(tmp_path / "r0" / "adapter"), str(tmp_path / "r1" / "adapter:0.5")]
    (tmp_path / "r1").mkdir()
    vector.save(tmp_path / "r1" / "v.safetensors")
    assert read_header(tmp_path / "r1" / "v.safetensors")["adapter_paths"] == ["../r0/adapter", "adapter:0.5"]
    moved = tmp_path / "moved"
    os.mkdir(moved)
    os.rename(tmp_path / "r1", moved / "r1")
    again = Vector.load(moved / "r1" / "v.safetensors")
    assert again.meta["adapter_paths"] == [str(moved / "r0" / "adapter"), str(moved / "r1" / "adapter:0.5")]
    assert again.digest == vector.digest


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("layer1.v", torch.tensor([1.0, float("nan")]), "layer1.v holds numbers that are not finite"),
        ("layer1.v", torch.zeros(2, 2), r"layer1.v is torch.float32 of shape \(2, 2\)"),
        ("layer1.v", torch.zeros(2, dtype=torch.float16), "layer1.v is torch.float16"),
        ("direction.1", torch.zeros(2), "'direction.1' is not called"),
    ],
)
def test_tensors_that_cannot_steer_are_refused(tmp_path, name, tensor, message):
    path = tmp_path / "bad.safetensors"
    save_file({name: tensor}, path, {"shl": canonical({})})
    with pytest.raises(InputError, match=message) as error:
        Vector.load(path)
    assert str(path) in str(error.value)


def test_files_that_are_no_vectors_are_refused(tmp_path):
    path = tmp_path / "bad.safetensors"
    save_file({"layer1.v": torch.zeros(2)}, path)
    with pytest.raises(InputError, match="shl header"):
        Vector.load(path)
    save_file({"layer1.v": torch.zeros(2), "layer2.v": torch.zeros(3)}, path, {"shl": canonical({})})
    with pytest.raises(InputError, match="different lengths"):
        Vector.load(path)
    save_file({}, path, {"shl": canonical({})})
    with pytest.raises(InputError, match="no tensors"):
        Vector.load(path)


def test_another_model_chain_or_template_is_a_mismatch(vector, tiny):
    vector.check(tiny())
    for name, wrong, what in (
        ("model_digest", "sha256:0", "another model"),
        ("adapters", ["sha256:0"], "another adapter chain"),
        ("template", "sha256:0", "another chat template"),
    ):
        other = Vector(vector.layers, {**vector.meta, name: wrong})
        with pytest.raises(Mismatch, match=what):
            other.check(tiny())
        other.check(tiny(), allow_mismatch=True)
    with pytest.raises(Mismatch, match="blocks of width"):
        Vector({99: vector.layers[1]}, vector.meta).check(tiny(), allow_mismatch=True)


def test_vectors_add_subtract_and_scale(vector):
    zero = vector - vector
    assert all(not v.any() for v in zero.layers.values()) and set(zero.norms.values()) == {0.0}
    twice, sum_ = 2.0 * vector, vector + vector
    assert all(torch.equal(twice.layers[i], sum_.layers[i]) for i in vector.layers)
    assert all(torch.equal((-vector).layers[i], -vector.layers[i]) for i in vector.layers)
    assert sum_.meta["norms"]["1"] == pytest.approx(2 * vector.meta["norms"]["1"])
    other = Vector({5: vector.layers[1]}, {**vector.meta, "personas": None})
    both = vector + other
    assert sorted(both.layers) == both.meta["layers"] == [1, 2, 5] and "personas" not in both.meta
    assert both.meta["terms"] == [[1.0, vector.digest], [1.0, other.digest]]


def test_vectors_of_different_models_do_not_add(vector):
    with pytest.raises(Mismatch, match="model_digest"):
        _ = vector + Vector(vector.layers, {**vector.meta, "model_digest": "sha256:0"})


def test_a_random_vector_is_as_long_and_follows_its_seed(vector):
    one, same, other = vector.random_like(0), vector.random_like(0), vector.random_like(1)
    for layer, v in vector.layers.items():
        assert one.layers[layer].norm().item() == pytest.approx(v.norm().item(), rel=1e-5)
        assert torch.equal(one.layers[layer], same.layers[layer])
        assert abs(torch.cosine_similarity(one.layers[layer], other.layers[layer], dim=0).item()) < 0.7
    assert one.meta["method"] == "random" and one.meta["model_digest"] == vector.meta["model_digest"]
