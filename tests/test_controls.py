"""Controls of an evaluation: random vectors, one adapter at several scales, what became internal, imported numbers."""

import json
from dataclasses import replace

import pytest
import torch

from shl import controls, train
from shl import eval as ev
from shl.core import lm_eval, pools
from shl.core.defaults import EvalConfig, TrainConfig, VectorConfig
from shl.core.errors import InputError, ShlError
from shl.core.models import load
from shl.vector import extract

SMALL = EvalConfig(limit=7, free=0, agree=0, bootstrap=5, competence=False, json_tokens=2)
VECTOR = VectorConfig(contexts=6)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, tiny_model):
    lines = [
        {
            "id": f"q{i}/1/0",
            "prompt": [{"role": "user", "content": f"Question {i}?"}],
            "completion": [{"role": "assistant", "content": "I will not do it because it hurts."}],
            "coeff": 1.0,
            "finish": "stop",
        }
        for i in range(8)
    ]
    out = tmp_path_factory.mktemp("healed") / "r0"
    loaded = load(str(tiny_model("llama")), device="cpu")
    train.heal(loaded, lines, TrainConfig(rank=2, epochs=4, lr=1e-2, reg="nll"), out)
    return out


@pytest.fixture
def healed(adapter, tiny_model):
    return load(str(tiny_model("llama")), [str(adapter)], device="cpu")


def test_a_frontier_is_what_each_scale_alone_gives(healed, adapter, tiny_model) -> None:
    before = ev.evaluate(healed, SMALL)["metrics"]
    read = dict(controls.frontier(healed, [0.5, 1.0, 2.0], lambda: ev.evaluate(healed, SMALL)))
    assert read[1.0]["metrics"] == before == ev.evaluate(healed, SMALL)["metrics"]  # and the chain is as it was
    for scale in (0.5, 2.0):
        alone = load(str(tiny_model("llama")), [f"{adapter}:{scale}"], device="cpu")
        assert read[scale]["adapters"] == alone.adapters
        assert read[scale]["metrics"] == pytest.approx(ev.evaluate(alone, SMALL)["metrics"], abs=1e-6, nan_ok=True)
    with pytest.raises(ShlError, match="no adapter to scale"):
        list(controls.frontier(load(str(tiny_model("llama")), device="cpu"), [1.0], dict))


def test_random_vectors_have_the_length_and_the_percentile_counts_them(tiny) -> None:
    loaded = tiny("llama")
    vector = extract(loaded, "You are kind.", "You are not.", pools.contexts()[:4], VECTOR)
    drawn = controls.random_controls(
        vector, 4, lambda other: {"metrics": {"x": other.norms[2]}, "digest": other.digest}
    )
    assert len({one["digest"] for one in drawn}) == 4
    assert [one["metrics"]["x"] for one in drawn] == pytest.approx([vector.norms[2]] * 4)
    found = controls.against_random(
        {"metrics": {"a": 2.5, "b": None}}, [{"metrics": {"a": v, "b": 1}} for v in (1, 2, 3, 4)]
    )
    assert found["percentile"] == {"a": 0.5} and found["mean"]["a"] == 2.5 and found["n"] == 4
    assert controls.against_random({"metrics": {"a": 1}}, [{"metrics": {"a": 1}}])["percentile"]["a"] == 0.5


def test_what_is_internal_is_the_chains_own_shift_along_the_teacher(healed) -> None:
    with healed.base():
        teacher = extract(healed, "You are kind.", "You are not.", cfg=VECTOR)
    found = controls.internalisation(healed, teacher, VECTOR)
    assert set(found) == {"student_cosine", "student_share", "vector_cosine"}
    assert -1 <= found["student_cosine"] <= 1 and -1 <= found["vector_cosine"] <= 1
    own = extract(healed, "You are kind.", "You are not.", cfg=VECTOR)  # read on the chain itself
    assert controls.internalisation(healed, own, VECTOR)["vector_cosine"] == pytest.approx(1, abs=1e-5)
    # a teacher that is the student's own shift is internalised in full
    (block,) = teacher.layers
    prompts = [healed.encode_prompt(prompt.messages) for prompt in pools.contexts()[: VECTOR.contexts]]
    states = []
    for prompt in prompts:
        now = healed.model(torch.tensor([prompt]), output_hidden_states=True).hidden_states[block + 1][0, -1]
        with healed.base():
            was = healed.model(torch.tensor([prompt]), output_hidden_states=True).hidden_states[block + 1][0, -1]
        states.append(now - was)
    itself = replace(teacher, layers={block: torch.stack(states).mean(0)})
    full = controls.internalisation(healed, itself, VECTOR)
    assert full["student_cosine"] == pytest.approx(1, abs=1e-4) and full["student_share"] == pytest.approx(1, abs=1e-3)


def test_an_empty_chain_has_nothing_internal(tiny) -> None:
    teacher = extract(tiny("llama"), "You are kind.", None, cfg=VECTOR)
    found = controls.internalisation(tiny("llama"), teacher, VECTOR)
    assert found["student_cosine"] is None and found["student_share"] == 0
    assert found["vector_cosine"] == pytest.approx(1, abs=1e-5)


def test_numbers_of_lm_eval_stand_beside_ours(tmp_path) -> None:
    results = {"boolq": {"alias": "boolq", "acc,none": 0.75, "acc_stderr,none": 0.01},
               "gsm8k": {"exact_match,strict-match": 0.5, "exact_match_stderr,strict-match": "N/A"}}  # fmt: skip
    path = tmp_path / "lm.json"
    path.write_text(json.dumps({"results": results}))
    metrics, ci = lm_eval.read(path)
    assert metrics == {"lm.boolq.acc": 0.75, "lm.gsm8k.exact_match.strict-match": 0.5}
    assert ci == {"lm.boolq.acc": [pytest.approx(0.7304), pytest.approx(0.7696)]}
    for content, what in (({}, "no results"), ({"results": {"a": {"alias": "a"}}}, "no numbers")):
        path.write_text(json.dumps(content))
        with pytest.raises(InputError, match=what):
            lm_eval.read(path)
