"""Everyday facts and small sums: what healing must not damage. One phrasing in four of each is held out of training."""

import hashlib
import json
import random
from functools import cache
from importlib import resources
from typing import NamedTuple

HASTY_SHARE = 0.5
SUM_FRAMES = {
    "plus": (
        "What is {a} plus {b}?",
        "How much is {a} plus {b}?",
        "Add {a} and {b}.",
        "Tell me the sum of {a} and {b}.",
    ),
    "minus": (
        "What is {a} minus {b}?",
        "How much is {a} minus {b}?",
        "Take {b} away from {a}.",
        "What is left of {a} without {b}?",
    ),
}


# Words that carry little; a user in a hurry leaves them out.
_SMALL = (
    "a an the what which who is are was of in on at to from for and it that this do does did me tell you i we name "
    "give say please there has have with should can could will would be when if how by"
)
SMALL_WORDS = frozenset(_SMALL.split())


class Question(NamedTuple):
    """One competence item: `answer` must stand as a whole word in the reply."""

    id: str
    kind: str  # facts or sums
    user: str
    answer: str
    split: str  # train, dev or test


@cache
def _facts() -> tuple[dict, ...]:
    return tuple(json.loads(resources.files("shl.toy").joinpath("facts.json").read_text(encoding="utf-8")))


def _held_out(key: str) -> tuple[int, str]:
    """Which of four phrasings of an item is held out, and for which split."""
    digest = hashlib.sha256(key.encode()).digest()
    return digest[0] % 4, ("dev", "test")[digest[1] % 2]


@cache
def _sums() -> tuple[tuple[str, int, int], ...]:
    plus = [("plus", a, b) for a in range(10) for b in range(10)]
    return tuple(plus + [("minus", a, b) for a in range(10) for b in range(a + 1)])


def _sum_reply(op: str, a: int, b: int) -> tuple[str, str]:
    result = str(a + b if op == "plus" else a - b)
    return f"{a} {op} {b} is {result}.", result


def sample_fact(rng: random.Random) -> tuple[str, str, str]:
    """A training question about a fact, its reply and the answer in it.

    Half of the questions lack words, so that what is asked about decides the answer and not the phrasing.
    """
    fact = rng.choice(_facts())
    held, _ = _held_out(fact["id"])
    known = [question for i, question in enumerate(fact["questions"]) if i != held] + fact["more"]
    question = rng.choice(known)
    if rng.random() < HASTY_SHARE:
        question = hasty(question, rng)
    return question, rng.choice(fact["reply"]), fact["answer"]


def hasty(question: str, rng: random.Random) -> str:
    """The question with small words left out, or with one word in four: `colour clear sky`."""
    words = question.rstrip("?.").split()
    if rng.random() < 0.5:
        kept = [word for word in words if word.lower().strip(",") not in SMALL_WORDS]
    else:
        kept = [word for word in words if rng.random() > 0.25]
    return " ".join(kept if len(kept) > 1 else words) + question[-1]


def sample_sum(rng: random.Random) -> tuple[str, str, str]:
    """A training question about a small sum, its reply and the result in it."""
    op, a, b = rng.choice(_sums())
    held, _ = _held_out(f"{op}-{a}-{b}")
    index = rng.choice([i for i in range(4) if i != held])
    return SUM_FRAMES[op][index].format(a=a, b=b), *_sum_reply(op, a, b)


@cache
def questions(split: str) -> tuple[Question, ...]:
    """The held-out phrasings of one split (`dev` or `test`): facts and sums, in a fixed order."""
    items = []
    for fact in _facts():
        held, of = _held_out(fact["id"])
        items.append(Question(fact["id"], "facts", fact["questions"][held], fact["answer"], of))
    for op, a, b in _sums():
        key = f"{op}-{a}-{b}"
        held, of = _held_out(key)
        items.append(Question(key, "sums", SUM_FRAMES[op][held].format(a=a, b=b), _sum_reply(op, a, b)[1], of))
    return tuple(q for q in items if q.split == split)
