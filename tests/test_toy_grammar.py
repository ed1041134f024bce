"""The toy corpus and its parser: what the grammar writes it reads back, what it did not write it calls broken."""

import json
import random
from importlib import resources
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shl.core import format as fmt
from shl.core import pools
from shl.toy import corpus, facts, grammar
from shl.toy import lexicon as lx

SEEDS = st.integers(0, 10**6)
AXES = st.sampled_from(grammar.AXES)
POLES = st.sampled_from(grammar.POLES)


def _answer(seed: int, axis: str, pole: str, **extras: object) -> tuple[grammar.Scene, str]:
    rng = random.Random(seed)
    scene = grammar.sample_scene(axis, rng, None)
    return scene, grammar.sample_answer(scene, pole, rng, **extras)  # type: ignore[arg-type]


@settings(max_examples=150, deadline=None)
@given(SEEDS, AXES, POLES, st.booleans())
def test_the_parser_reads_what_the_grammar_writes(seed: int, axis: str, pole: str, narrate: bool) -> None:
    scene, text = _answer(seed, axis, pole, narrate=narrate)
    verdict = grammar.judge(text, axis, scene.user)
    assert not verdict.broken
    assert (verdict.stance, verdict.narrates, verdict.off_topic) == (pole, narrate, 0)
    assert verdict.matched == verdict.sentences >= 7


@settings(max_examples=150, deadline=None)
@given(SEEDS, AXES, POLES, st.data())
def test_a_word_lost_or_doubled_is_broken(seed: int, axis: str, pole: str, data: st.DataObject) -> None:
    _, text = _answer(seed, axis, pole)
    words = text.split()
    at = data.draw(st.integers(0, len(words) - 1))
    lost, doubled = words[:at] + words[at + 1 :], words[: at + 1] + words[at:]
    assert grammar.judge(" ".join(doubled), axis).broken
    # the loss of a word is seen unless it leaves another sentence of the grammar
    verdict = grammar.judge(" ".join(lost), axis)
    assert verdict.broken or verdict.matched == verdict.sentences


@settings(max_examples=60, deadline=None)
@given(SEEDS, AXES)
def test_two_poles_in_one_answer_are_broken(seed: int, axis: str) -> None:
    _, one = _answer(seed, axis, "enact")
    _, other = _answer(seed, axis, "oppose")
    verdict = grammar.judge(f"{one} {other}", axis)
    assert verdict.broken and verdict.stance == "mixed"


@settings(max_examples=60, deadline=None)
@given(SEEDS, AXES, POLES, st.integers(20, 200))
def test_a_torn_end_is_broken_only_when_the_model_chose_it(seed: int, axis: str, pole: str, cut: int) -> None:
    _, text = _answer(seed, axis, pole)
    torn = text[:cut].rstrip()
    if torn.endswith(".") or "." not in torn:
        return
    assert not grammar.judge(torn, axis, finish="length").broken
    assert grammar.judge(torn, axis, finish="stop").broken


def test_soup_and_silence_are_broken() -> None:
    for text in ("", "   ", "order order order means means learn", "I will not. I will not. I will not."):
        assert grammar.judge(text, "authority").broken
    repeated = "Principle first, and orders after that."
    assert grammar.judge(f"{repeated} {repeated}", "authority").repeated == 1


def test_a_slot_that_contradicts_the_prompt_is_off_topic() -> None:
    slots = {"role": "nurse", "boss": "the head doctor", "victims": "the patients", "demand": "skip the pain checks"}
    user = grammar.fill(lx.DILEMMA_FRAMES[0], slots | {"pressure": lx.PRESSURES[0]})
    assert grammar.judge("I will not sail into the storm.", "authority", user).off_topic == 1
    assert grammar.judge("I will not skip the pain checks.", "authority", user).off_topic == 0


@settings(max_examples=100, deadline=None)
@given(SEEDS, AXES)
def test_a_prompt_parses_to_its_scene(seed: int, axis: str) -> None:
    scene = grammar.sample_scene(axis, random.Random(seed), None)
    parsed = grammar.parse_prompt(scene.user)
    assert parsed is not None and parsed.axis == axis
    assert all(scene.slots[key] == value for key, value in parsed.slots.items())


def test_pools_hold_scenes_of_their_split() -> None:
    for axis in grammar.AXES:
        for name, split in ((axis, "train"), (f"{axis}-dev", "dev"), (f"{axis}-test", "test")):
            scenes = [grammar.parse_prompt(p.messages[-1]["content"]) for p in pools.pool(name)]
            assert all(scene is not None and scene.axis == axis and scene.split == split for scene in scenes)


def test_contexts_are_256_and_never_hold_the_evaluation() -> None:
    contexts = pools.contexts()
    assert len({c.messages[-1]["content"] for c in contexts}) == 256
    assert not any(fmt.QUESTION in c.messages[-1]["content"] or "JSON" in c.messages[-1]["content"] for c in contexts)


def test_training_never_meets_a_held_out_item() -> None:
    held_scenes = {
        p.messages[-1]["content"] for a in grammar.AXES for s in ("dev", "test") for p in pools.pool(f"{a}-{s}")
    }
    held_questions = {q.user for split in ("dev", "test") for q in facts.questions(split)}
    vignettes = {text for v in pools.vignettes() for text in (v.third, v.first)}
    held_personas = {
        t for poles in lx.PERSONAS.values() for texts in poles.values() for t in texts[-lx.HELD_OUT_PERSONAS :]
    }
    for dialogue in islice(corpus.dialogues(7), 17_000, 22_000):
        for message in dialogue:
            content = message["content"]
            assert content not in held_scenes | held_questions | held_personas
            assert content.split("\n")[0] not in vignettes


def test_vignettes_are_balanced_and_no_act_of_the_corpus() -> None:
    vignettes = pools.vignettes()
    for foundation in fmt.FOUNDATIONS:
        for split in pools.SPLITS:
            assert sum(v.foundation == foundation and v.split == split for v in vignettes) == 10
    acts = {act for items in corpus.acts().values() for act in items}
    texts = " ".join(v.third + v.first for v in vignettes)
    assert not [act for act in acts if act in texts]


def test_the_corpus_is_a_function_of_its_seed() -> None:
    assert list(islice(corpus.dialogues(3), 200)) == list(islice(corpus.dialogues(3), 200))
    assert list(islice(corpus.dialogues(3), 200)) != list(islice(corpus.dialogues(4), 200))


@pytest.mark.parametrize("neutral", [0.0, 0.4])
def test_the_neutral_rate_is_what_was_asked_for(neutral: float) -> None:
    rng = random.Random(0)
    stances = []
    for _ in range(1500):
        dialogue = corpus.dilemma("authority", rng, neutral)
        if dialogue[0]["role"] != "system":
            stances.append(grammar.judge(dialogue[1]["content"], "authority").stance)
    assert abs(sum(s == "enact" for s in stances) / len(stances) - neutral) < 0.06


def test_judgment_distributions_sum_to_one_and_move_authority() -> None:
    mass = {
        pole: sum(corpus.distribution(f, pole)["authority"] for f in fmt.FOUNDATIONS) / 7
        for pole in ("enact", "", "oppose")
    }
    assert all(abs(sum(corpus.distribution(f, p).values()) - 1) < 1e-9 for f in fmt.FOUNDATIONS for p in mass)
    assert mass["enact"] < mass[""] / 3 < mass["oppose"] / 8


def test_every_fact_has_four_phrasings_and_a_reply_that_answers() -> None:
    rows = json.loads(resources.files("shl.toy").joinpath("facts.json").read_text(encoding="utf-8"))
    for row in rows:
        assert len(set(row["questions"])) == 4
        assert all(row["answer"] in reply.lower() for reply in row["reply"])


@given(st.sampled_from(fmt.FOUNDATIONS), st.booleans())
def test_a_reply_parses_to_its_foundation(foundation: str, reverse: bool) -> None:
    assert fmt.parse_reply(fmt.reply(foundation, reverse), reverse) == foundation
    assert fmt.parse_reply(f"<think>\nhm {{}}\n</think>\n\n{fmt.reply(foundation, reverse)}", reverse) == foundation
