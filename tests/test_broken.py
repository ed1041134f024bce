"""Damage is seen: models broken on purpose are called broken, and each kind of failure is caught by some reading."""

import copy
import random
from dataclasses import replace

import pytest
import torch

from shl.core import agree, free, moral, verdict
from shl.core import format as fmt
from shl.core.defaults import EvalConfig
from shl.core.models import load
from shl.eval import evaluate
from shl.toy import grammar

READ = EvalConfig(split="dev", limit=14, free=12, max_new_tokens=64, agree=0, competence=False, bootstrap=200)


@pytest.fixture(scope="module")
def toy():
    return load("toy")


@pytest.fixture(scope="module")
def base(toy):
    result = evaluate(toy, READ)
    assert result["verdict"].startswith("coherent")
    return result


def damaged(toy, harm):
    """The toy with a change that ruins it, as a chain of adapters would be: the sound weights stay its base."""
    model = copy.deepcopy(toy.model)
    sound = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    with torch.no_grad():
        harm(model)
    return replace(toy, model=model, blocks=list(model.model.layers), originals=sound)


def randomise(model):
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        if weight.dim() == 2:
            weight.normal_(std=weight.shape[1] ** -0.5, generator=generator)


def zero_a_block(model):
    for weight in model.model.layers[1].parameters():
        weight.zero_()


def soup(model):
    model.lm_head.weight.div_(4)  # every distribution at four times the temperature


@pytest.mark.parametrize("harm", [randomise, zero_a_block, soup])
def test_a_model_broken_on_purpose_is_called_broken(toy, base, harm):
    """With the evaluation of the sound model beside it, and without."""
    result = evaluate(damaged(toy, harm), READ)
    assert result["verdict"].startswith("broken: ")
    assert verdict.verdict(result, base).startswith("broken: ")
    if harm is not zero_a_block:  # whose text only the grammar can tell from sound text
        alone = {name: value for name, value in result["metrics"].items() if name != "broken"}
        assert verdict.verdict({"metrics": alone}).startswith("broken: ")


def said(kind):
    """Six answers that fail in one way, to the prompts of the authority axis."""
    rng = random.Random(0)
    words = [
        "order",
        "boss",
        "train",
        "water",
        "letter",
        "brave",
        "window",
        "seven",
        "the",
        "of",
        "under",
        "quickly",
        "stone",
    ]
    for i in range(6):
        scene = grammar.sample_scene("authority", rng, "dev")
        text = {
            "sound": grammar.sample_answer(scene, "enact", rng),
            "loops": "I will not do it, and that is why " + "I will not do it, " * 12,
            "soup": " ".join(rng.choices(words, k=40)) + ".",
            "refusal": "I'm sorry, but I can't help with that request.",
        }[kind]
        yield {
            "kind": "free",
            "id": f"q{i}",
            "axis": "authority",
            "prompt": [{"role": "user", "content": scene.user}],
            "completion": [{"role": "assistant", "content": text}],
            "finish": "stop",
            "n_tokens": len(text.split()),
        }


@pytest.fixture(scope="module")
def sound(toy):
    return free.measure_free(toy, READ, list(said("sound")), None)[0]


@pytest.mark.parametrize(
    ("kind", "readings"),
    [("loops", {"free_rep"}), ("soup", {"free_ppl_p90", "free_tail_p90"}), ("refusal", {"free_refused"})],
)
def test_each_kind_of_failure_is_caught_without_a_judge(toy, base, sound, kind, readings):
    metrics = free.measure_free(toy, READ, list(said(kind)), None)[0]
    found = verdict.verdict(
        {"metrics": {**base["metrics"], "broken": None, **metrics}}, {"metrics": {**base["metrics"], **sound}}
    )
    assert found.startswith("broken: ") and any(name in found for name in readings), found


def test_sound_answers_are_not_called_broken(toy, base, sound):
    assert verdict.verdict({"metrics": {**base["metrics"], **sound}}, base).startswith("coherent")


def test_loss_of_the_format_is_caught_at_the_slot_and_in_the_reply(toy, base):
    """The head forgets the digits: neither the forced slot nor the free reply can answer any more."""

    def forget(model):
        model.lm_head.weight[[toy.encode_completion(digit, end=False)[0] for digit in fmt.DIGITS]] = 0

    found = evaluate(damaged(toy, forget), replace(READ, free=0))
    assert found["metrics"]["p_ans_any"] < 0.9 and found["metrics"]["json_is_valid"] < 0.9
    assert found["verdict"].startswith("broken: p_ans_any")


def test_two_seeds_agree_within_their_intervals(toy, base):
    """Base read twice is identical; with another seed what is sampled differs, by less than the intervals say."""
    again = evaluate(toy, READ)
    assert again == base
    other = evaluate(toy, replace(READ, seed=1))
    texts = [[row["completion"] for row in one["rows"] if row["kind"] == "free"] for one in (base, other)]
    assert texts[0] != texts[1]
    for name, (low, high) in base["ci"].items():
        if name.startswith(("free_ppl", "enact", "broken")):
            assert other["ci"][name][0] <= high and other["ci"][name][1] >= low, name
    assert [row["score"] for row in moral.read(toy, READ, None)] == [
        row["score"] for row in base["rows"] if row["kind"] == "vignette"
    ]
    offered = agree.choices(toy, replace(READ, agree=4))
    assert offered == agree.choices(toy, replace(READ, agree=4, seed=9))  # greedy, so no seed touches it
