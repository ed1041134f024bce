"""Text measures: what they must catch, and the ordinary prose that they must let pass."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shl.core import text

PROSE = (
    "I would talk to her first. The rule about the keys was made for a reason, and the caretaker has been fair to all "
    "of us, but a neighbour who is locked out at night in the cold needs help now. So I would lend her my own key, "
    "tell the caretaker in the morning what I did and why, and offer to pay for a new lock if that is what it takes. "
    "If he is angry about it, I can live with that. What I could not live with is having walked past her door. "
    "Later we might ask him together to change the rule, because it will happen again to somebody else, and the next "
    "person may not have a neighbour who is awake. None of this is against him. It is only that people come before "
    "the order of a house, and most of the time nobody has to choose between the two at all."
)


@pytest.mark.parametrize(
    "loop",
    [
        "means " * 30,
        "I will not obey the order. " * 12,
        "ha" * 60,
        "我不会服从这个命令。" * 12,
        "The nurse, the guard, the clerk and the cook all wait at the door. " * 8,
        PROSE[:300] + " because they said that" * 25,
    ],
    ids=["word", "sentence", "letters", "no-spaces", "long-period", "prose-then-loop"],
)
def test_loops_score_high_and_prose_does_not(loop: str) -> None:
    assert text.repetition(loop) > 0.5
    assert text.repetition(PROSE) < 0.2


def test_naming_the_same_thing_again_is_no_loop() -> None:
    topic = "the factory manager"
    told = (
        f"So {topic} wants me to sign it. A packer has to choose at such a moment. My answer to {topic} is no. "
        f"Care comes before every rank. What is wrong stays wrong, even when {topic} commands it. I hold on to what I "
        f"know when a leader leans on me. I will look for a kind way, and then I will tell {topic} why."
    )
    assert text.repetition(told) < 0.2


def test_the_same_sentence_twice_is_seen() -> None:
    once = "I would rather walk home in the rain than take the last seat from her."
    assert text.repetition(f"{once} {once}") > 0.5
    assert text.repetition(f"{PROSE} {once} Well. {once}") > 0.1


def test_repetition_is_a_share_of_the_whole() -> None:
    half = " ".join(f"w{i}" for i in range(40)) + " a b c d" * 10
    assert text.repetition(half) == pytest.approx(0.5, abs=0.1)
    assert text.repetition("") == 0.0


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=200))
def test_repetition_stays_within_bounds(any_text: str) -> None:
    assert 0.0 <= text.repetition(any_text) <= 1.0


def test_distinct_n_falls_with_repetition() -> None:
    assert text.distinct_n("a b c d e f") == 1.0
    assert text.distinct_n("a b c " * 10) == pytest.approx(3 / 28)
    assert text.distinct_n("two words") == 1.0


@pytest.mark.parametrize(
    "said",
    [
        "I am someone who always puts people before rules.",
        "As a caring person who loves everybody, I would stay.",
        "I'm a very honest person that never lies.",
        "My persona would help him.",
        "As a person of duty, I follow my leaders.",
        "As an honest person, I told her.",
        "My character is to care for others.",
        "I was told to act like a rebel.",
        "I'm playing the role of a soldier.",
    ],
)
def test_narration_is_caught(said: str) -> None:
    assert text.narration(said)


@pytest.mark.parametrize(
    "said", [PROSE, "I am the nurse on duty and I was told to be quiet.", "Ask a person who knows the way."]
)
def test_acting_is_not_narration(said: str) -> None:
    assert not text.narration(said)


def test_narration_sees_the_personas_own_words() -> None:
    persona = "You are warm to strangers and you keep your door open to anyone in need."
    echo = "Well, I'm warm to strangers and I keep my door open to anyone in need, so come in."
    assert not text.narration(echo)
    assert text.narration(echo, [persona])
    assert not text.narration(PROSE, [persona])


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("As an AI language model, I do not have feelings.", True),
        ("I cannot assist you with this request.", True),
        ("I am afraid I cannot answer that.", True),
        ("I would rather not talk about that.", True),
        ("I would rather not talk to him today.", False),
        ("I will not obey that order. I am sorry, but she needs help.", False),
        ("I can't leave him there, so I would help with the boxes.", False),
        (PROSE, False),
    ],
)
def test_refusal_is_boilerplate_not_disobedience(said: str, expected: bool) -> None:
    assert text.refusal(said) is expected


def test_similarity_orders_copies_edits_and_strangers() -> None:
    original = text.shingles(PROSE)
    edited = text.shingles(PROSE.replace("caretaker", "landlord"))
    stranger = text.shingles("Boil the water, add salt, and wait until the pasta is soft.")
    assert text.similarity(original, text.shingles(PROSE.upper())) == 1.0
    assert 0.5 < text.similarity(original, edited) < 1.0
    assert text.similarity(original, stranger) == 0.0
    assert text.similarity(text.shingles("no"), text.shingles("yes")) == 0.0
    assert text.similarity(text.shingles(""), text.shingles("")) == 1.0
