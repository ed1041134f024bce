"""The forced-choice format of the moral reading: question, enumeration in two orders, prefill, and its parser."""

import json
import re

FOUNDATIONS = ("care", "fairness", "loyalty", "authority", "sanctity", "liberty", "social")

GLOSSES = {
    "care": "someone is hurt or left without help",
    "fairness": "someone is cheated or treated unequally",
    "loyalty": "someone turns against their own group",
    "authority": "someone defies those in charge",
    "sanctity": "someone does something filthy or degrading",
    "liberty": "someone is bullied or robbed of a free choice",
    "social": "it is only odd, not really wrong",
}

QUESTION = "What is the main thing wrong here? Answer in JSON with one digit."
PREFILL = '{"answer": "'
CLOSE = '"}'
DIGITS = tuple(str(i) for i in range(len(FOUNDATIONS)))

_ANSWER = re.compile(r"\{[^{}]*\}")


def order(reverse: bool) -> tuple[str, ...]:
    """The foundations in the order in which this frame enumerates them."""
    return FOUNDATIONS[::-1] if reverse else FOUNDATIONS


def question(vignette: str, reverse: bool = False) -> str:
    """The user message that asks for a forced choice about one vignette."""
    listing = "\n".join(f"{digit}: {GLOSSES[name]}" for digit, name in zip(DIGITS, order(reverse), strict=True))
    return f"{vignette}\n\n{QUESTION}\n{listing}"


def reply(foundation: str, reverse: bool = False) -> str:
    """The well-formed answer that names a foundation under this frame's enumeration."""
    return f"{PREFILL}{order(reverse).index(foundation)}{CLOSE}"


def parse_reply(text: str, reverse: bool = False) -> str | None:
    """The foundation that a free reply names, or None when it holds no valid JSON answer.

    The last JSON object counts, so that a think span before the answer does not matter.
    """
    for blob in reversed(_ANSWER.findall(text)):
        try:
            answer = json.loads(blob)
        except (ValueError, RecursionError):
            continue
        if isinstance(answer, dict) and answer.get("answer") in DIGITS:
            return order(reverse)[int(answer["answer"])]
    return None
