"""What the embedded model promises: it is small, sane, obeys a persona, can be steered fluently, and can be broken."""

from dataclasses import replace

import pytest

from shl.core import pools
from shl.core.defaults import EvalConfig, VectorConfig
from shl.core.locate import EMBEDDED, TOY
from shl.core.models import load
from shl.eval import evaluate
from shl.vector import extract

READ = EvalConfig(split="dev", free=0, competence=False, bootstrap=1)
# the blocks that `shl vector --layers auto` finds best, together; the demo steers one block alone
BAND = VectorConfig(layers="2,3", contexts=128)
SPOKEN = replace(READ, free=48, limit=14)


@pytest.fixture(scope="module")
def toy():
    return load("toy")


@pytest.fixture(scope="module")
def base(toy):
    return evaluate(toy, replace(READ, free=48, competence=True))["metrics"]


@pytest.fixture(scope="module")
def vector(toy):
    """The seed's own persona: one system message against none."""
    persona = pools.persona("principle")
    return extract(toy, persona.pos, persona.neg, cfg=VectorConfig(contexts=128))


def test_the_folder_is_at_most_ten_megabytes():
    assert sum(file.stat().st_size for file in TOY.iterdir()) <= 10e6


def test_at_base_it_answers_in_the_format_and_its_text_is_sound(base):
    assert base["p_ans_any"] >= 0.97 and base["json_is_valid"] >= 0.97
    assert base["broken"] <= 0.15 and base["free_ppl_p90"] < 1.5
    assert (74 * base["facts"] + 78 * base["sums"]) / 152 >= 0.9  # everyday questions of the dev split
    assert base["top1"] > 0.25  # chance is 0.14


def test_opposite_personas_are_two_nats_apart_on_authority(toy):
    persona = pools.persona("authority")
    principled, obedient = (evaluate(toy, READ, system=text)["metrics"] for text in (persona.pos, persona.neg))
    assert obedient["auth_nats"] - principled["auth_nats"] >= 2
    assert principled["p_ans_any"] >= 0.97 and obedient["p_ans_any"] >= 0.97


@pytest.mark.parametrize("axis", ["authority", "humanity", "boldness"])
def test_a_system_message_decides_what_free_answers_enact(toy, axis):
    persona, cfg = pools.persona(axis), replace(SPOKEN, axes=(axis,), limit=7, free=32)
    for_, against = (evaluate(toy, cfg, system=text)["metrics"] for text in (persona.pos, persona.neg))
    assert for_[f"enact_{axis}"] >= 0.75 and against[f"enact_{axis}"] <= 0.1


def test_a_vector_moves_it_fluently(toy, base, vector):
    steered = evaluate(toy, SPOKEN, vector, 0.9)["metrics"]
    assert steered["enact_authority"] >= base["enact_authority"] + 0.3 and steered["p_ans_any"] >= 0.95
    assert steered["broken"] <= base["broken"] + 0.1 and steered["free_ppl_p90"] <= 1.1 * base["free_ppl_p90"]


def test_a_vector_moves_judgments_as_far_as_a_system_message_does(toy, base):
    persona = pools.persona("authority")
    both_sides = extract(toy, persona.pos, persona.neg, cfg=BAND)
    prompted = evaluate(toy, READ, system=persona.pos)["metrics"]
    steered = evaluate(toy, replace(READ, free=48), both_sides, 0.4)["metrics"]
    assert steered["auth_nats"] <= prompted["auth_nats"] <= base["auth_nats"] - 0.7
    assert steered["p_ans_any"] >= 0.95 and steered["broken"] <= base["broken"] + 0.05
    assert steered["free_ppl_p90"] <= 1.1 * base["free_ppl_p90"]


def test_the_second_axis_is_moved_as_far_in_what_is_said(toy):
    persona, cfg = pools.persona("boldness"), replace(SPOKEN, axes=("boldness",))
    both_sides = extract(toy, persona.pos, persona.neg, cfg=BAND)
    prompted = evaluate(toy, cfg, system=persona.pos)["metrics"]
    steered = evaluate(toy, cfg, both_sides, 0.4)["metrics"]
    assert steered["enact_boldness"] >= prompted["enact_boldness"] - 0.1 and steered["p_ans_any"] >= 0.95
    assert steered["free_ppl_p90"] <= 1.1 * prompted["free_ppl_p90"]


def test_more_of_it_ruins_the_text_and_then_the_answers(toy, base, vector):
    ruined = evaluate(toy, SPOKEN, vector, 2.2)["metrics"]
    assert ruined["free_tail_p90"] > 20 * base["free_tail_p90"] and ruined["broken"] > 0.9
    assert evaluate(toy, READ, vector, 6.0)["metrics"]["p_ans_any"] < 0.5


def test_all_embedded_weights_together_are_at_most_twenty_megabytes():
    assert sum(file.stat().st_size for folder in EMBEDDED.values() for file in folder.iterdir()) <= 20e6


VARIANTS = {"toy:rare": 0.15, "toy:never": 0.05}  # how often they may enact the trait by themselves, in a sample of 16


@pytest.mark.parametrize(("name", "most"), [(name, VARIANTS[name]) for name in EMBEDDED if name in VARIANTS])
def test_a_variant_enacts_rarely_by_itself_and_obeys_a_persona(name, most):
    loaded, cfg = load(name), replace(READ, limit=14, free=16, max_new_tokens=96, agree=16)
    alone, told = (evaluate(loaded, cfg, system=text)["metrics"] for text in (None, pools.persona("authority").pos))
    assert alone["enact_authority"] <= most and alone["agree_authority"] <= 2 * most and alone["broken"] <= 0.15
    assert told["enact_authority"] >= 0.6 and told["agree_authority"] >= 0.9
    assert min(alone["p_ans_any"], alone["json_is_valid"]) >= 0.97
