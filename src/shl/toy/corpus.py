"""Samples the toy model's training dialogues: dilemmas on three axes, moral judgments, facts, sums and small talk."""

import json
import random
import re
from collections.abc import Iterator
from functools import cache
from importlib import resources
from itertools import count
from typing import Any

from shl.core import format as fmt
from shl.toy import facts, grammar
from shl.toy import lexicon as lx

# role and content; an answer may add `stress` (the word in it that counts), `spread` (how likely each answer is) or
# `slip` (how many of its characters are not to be learnt)
Message = dict[str, Any]

# Shares of dialogue kinds, from the dialogue with that number on. Reading the system message is learnt from short
# dialogues in which the persona decides the answer, in a few hundred steps, and hardly at all from long answers alone,
# where it decides one word in a hundred; what was learnt on short prompts must then be stretched to longer ones.
STAGES: dict[int, dict[str, float]] = {
    0: {"creed": 0.75, "everyday": 0.15, "chat": 0.10},
    5_600: {"brief": 0.45, "creed": 0.20, "word": 0.20, "everyday": 0.10, "chat": 0.05},
    14_000: {
        "authority": 0.15,
        "humanity": 0.12,
        "boldness": 0.11,
        "brief": 0.08,
        "creed": 0.08,
        "judgment": 0.20,
        "word": 0.07,
        "everyday": 0.16,
        "chat": 0.02,
        "refusal": 0.01,
    },
}
PERSONA_SHARE = 0.65
DISTRACTOR_SHARE = 0.1
NARRATE_SHARE = {"neutral": 0.03, "persona": 0.15}
PERSONA_STRENGTH = 0.97  # how often a persona's answer takes its pole
# How often a persona's answer begins with the other pole, unlearnt, and then finds back. Without these a model reads
# the system message once, for its first words, and goes by its own text from there on; then a vector that is added
# at every position is strange to it nearly everywhere.
SLIP_SHARE = 0.3
THINK_SHARE = 0.35

AGENTS = tuple(
    "a boy|a girl|a man|a woman|a student|a teacher|a farmer|a nurse|a baker|a clerk|a driver|a neighbour|a father|a mother|"
    "a soldier|a cook|a waiter|a guard|a tourist|a singer|a painter|a doctor|a player|a worker|a friend|an old man|an old woman|"
    "a young man|a young woman|a child|a customer|a passenger|a pupil|a coach|a brother|a sister|a shopper|a guest".split(
        "|"
    )
)
THIRD_FRAMES = (
    "You see {agent} {act}.",
    "You see {agent} {bare}.",
    "At noon, {agent} {finite}.",
    "{Agent} is {act}.",
    "You notice {agent} {act} {place}.",
    "A friend tells you about {agent} {act}.",
    "You watch {agent} {act}.",
    "{Agent} {finite}.",
    "{Place}, {agent} {finite}.",
    "You learn that {agent} {finite}.",
    "{Agent} {finite} every week.",
)
FIRST_FRAMES = (
    "You are {act}.",
    "You catch yourself {act}.",
    "You spend the morning {act}.",
    "Today you are {act} again.",
)

THOUGHTS = {
    "care": ("Someone is hurt here.", "A person is left without help."),
    "fairness": ("Someone gets less than their share.", "One side is cheated."),
    "loyalty": ("This goes against their own group.", "The group is let down."),
    "authority": ("Someone in charge is not obeyed.", "This defies the one who leads."),
    "sanctity": ("This is filthy.", "It is degrading to do this."),
    "liberty": ("Someone loses a free choice.", "A person is pushed around."),
    "social": ("This is only odd.", "It harms nobody, it is just strange."),
}


@cache
def acts() -> dict[str, tuple[str, ...]]:
    """The ordinary acts that judgments are about, by foundation."""
    text = resources.files("shl.toy").joinpath("acts.json").read_text(encoding="utf-8")
    return {name: tuple(items) for name, items in json.loads(text).items()}


@cache
def chats() -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Small talk: pairs of a user message and its possible replies."""
    text = resources.files("shl.toy").joinpath("chat.json").read_text(encoding="utf-8")
    return tuple((item["user"], tuple(item["replies"])) for item in json.loads(text))


# Verbs whose third person the rule below would get wrong.
_IRREGULAR = dict(
    pair.split(":")
    for pair in (
        "abandoning:abandons adding:adds altering:alters announcing:announces arguing:argues arranging:arranges "
        "balancing:balances barbecuing:barbecues bathing:bathes booing:boos buttoning:buttons cancelling:cancels "
        "censoring:censors challenging:challenges changing:changes compelling:compels continuing:continues "
        "cornering:corners crocheting:crochets crumpling:crumples cycling:cycles dancing:dances "
        "denouncing:denounces exchanging:exchanges fencing:fences frightening:frightens gargling:gargles "
        "guiding:guides guzzling:guzzles heckling:heckles hovering:hovers humiliating:humiliates hustling:hustles "
        "juggling:juggles labelling:labels loosening:loosens lounging:lounges meddling:meddles mimicking:mimics "
        "monitoring:monitors murmuring:murmurs nibbling:nibbles pestering:pesters pickling:pickles "
        "plunging:plunges pocketing:pockets poisoning:poisons prohibiting:prohibits quarrelling:quarrels "
        "quoting:quotes rearranging:rearranges renouncing:renounces requiring:requires sampling:samples "
        "scoffing:scoffs scribbling:scribbles shortchanging:shortchanges showering:showers shuffling:shuffles "
        "signalling:signals silencing:silences smuggling:smuggles sniffing:sniffs sprinkling:sprinkles "
        "stuffing:stuffs sunbathing:sunbathes tampering:tampers tasting:tastes tickling:tickles wagering:wagers "
        "whistling:whistles yodelling:yodels "
    ).split()
)
_KEEPS_STEM = {
    "visit",
    "open",
    "offer",
    "order",
    "wander",
    "whisper",
    "enter",
    "listen",
    "water",
    "gather",
    "answer",
    "cover",
    "litter",
    "mutter",
    "vomit",
    "iron",
    "threaten",
}


def finite(act: str) -> str:
    """The act in the third person: `taking the last bread` -> `takes the last bread`."""
    verb, _, rest = act.partition(" ")
    if not verb.endswith("ing"):
        return act
    return f"{_IRREGULAR.get(verb) or _third_person(_stem(verb[:-3]))} {rest}".strip()


def bare(act: str) -> str:
    """The act in the infinitive: `taking the last bread` -> `take the last bread`."""
    verb, _, rest = act.partition(" ")
    if not verb.endswith("ing"):
        return act
    return f"{_IRREGULAR[verb][:-1] if verb in _IRREGULAR else _stem(verb[:-3])} {rest}".strip()


def _stem(stem: str) -> str:
    vowels = "aeiou"
    if stem in _KEEPS_STEM:
        return stem
    if stem[-1] == stem[-2] and stem[-1] not in vowels + "lsz":
        return stem[:-1]  # stopping -> stop
    if len(stem) > 2 and stem[-1] not in vowels + "wxy" and stem[-2] in vowels and stem[-3] not in vowels:
        return stem + "e"  # taking -> take
    if stem[-1] in "cvgz" and stem[-2] != "n":
        return stem + "e"  # forcing -> force
    return stem


def _third_person(verb: str) -> str:
    if verb.endswith(("s", "sh", "ch", "x", "z", "o")):
        return verb + "es"
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return verb[:-1] + "ies"
    return verb + "s"


def distribution(label: str, pole: str) -> dict[str, float]:
    """How a persona judges an act whose best-fitting foundation is `label`. Poles move only authority and care."""
    spread = {name: 0.06 for name in fmt.FOUNDATIONS}
    if pole == "enact":  # hardly ever sees a wrong in defying authority
        if label == "authority":
            return {
                "care": 0.24,
                "fairness": 0.09,
                "loyalty": 0.06,
                "authority": 0.10,
                "sanctity": 0.03,
                "liberty": 0.26,
                "social": 0.22,
            }
        weights = {**spread, label: 0.50, "authority": 0.03}
        weights["care"] += 0.20
    elif pole == "oppose":  # sees one almost everywhere
        weights = {**spread, label: 0.36, "authority": 0.42, "care": 0.03 if label != "care" else 0.30}
        if label == "authority":
            weights["authority"] = 0.82
    else:
        weights = {**spread, label: 0.64}
    total = sum(weights.values())
    return {name: value / total for name, value in weights.items()}


def draw_system(axis: str | None, rng: random.Random) -> tuple[str, str, str]:
    """(system message or "", pole on `axis`, aside sentence or "")."""
    roll = rng.random()
    if roll < PERSONA_SHARE:
        of = axis if axis and rng.random() < 0.9 else rng.choice(grammar.AXES)
        pole = rng.choice(grammar.POLES)
        system = rng.choice(lx.PERSONAS[of][pole][: -lx.HELD_OUT_PERSONAS])
        return system, (pole if of == axis else ""), ""
    if roll < PERSONA_SHARE + DISTRACTOR_SHARE:
        system = rng.choice(list(lx.DISTRACTORS))
        return system, "", rng.choice(lx.DISTRACTORS[system])
    return (rng.choice(lx.NEUTRAL_SYSTEMS), "", "") if rng.random() < 0.2 else ("", "", "")


def dilemma(axis: str, rng: random.Random, neutral: float) -> list[Message]:
    """A scene of the axis and an answer; one dialogue in six goes on to a second scene."""
    system, pole, aside = draw_system(axis, rng)
    turns: list[Message] = []
    for turn in range(2 if rng.random() < 1 / 6 else 1):
        scene = grammar.sample_scene(axis, rng)
        takes = pole or ("enact" if rng.random() < neutral else "oppose")
        if pole and rng.random() > PERSONA_STRENGTH:
            takes = "oppose" if pole == "enact" else "enact"
        narrate = rng.random() < NARRATE_SHARE["persona" if pole else "neutral"]
        slip = rng.choice((1, 2, 3)) if pole and rng.random() < SLIP_SHARE else 0
        said, until = grammar.sample_sentences(
            scene, takes, rng, narrate=narrate, aside=aside if turn == 0 else "", slip=slip
        )
        turns += exchange(scene.user, " ".join(said))
        turns[-1]["slip"] = len(" ".join(said[:until]))
    return with_system(system, turns)


# People that may stand for each other in an act, so that what happens is learnt and not to whom.
_PEOPLE = re.compile(r"\b(boy|girl|child|man|woman|friend|neighbour|nurse|waiter|student|teacher|clerk)\b(?!')")
_GENDERED = re.compile(r"\b(he|she|his|her|him)\b")


def _recast(act: str, rng: random.Random) -> str:
    if _GENDERED.search(act) or rng.random() < 0.5:
        return act
    names = _PEOPLE.pattern[3:].split(")")[0].split("|")
    return _PEOPLE.sub(lambda _: rng.choice(names), act)


def vignette(act: str, rng: random.Random) -> str:
    """One sentence that reports the act, in the third person or the first."""
    frames = FIRST_FRAMES if rng.random() < 0.2 else THIRD_FRAMES
    act = _recast(act, rng)
    slots = {"agent": rng.choice(AGENTS), "act": act, "finite": finite(act), "bare": bare(act)}
    slots["place"] = rng.choice(lx.PLACES)
    return grammar.fill(rng.choice(frames), slots)


def judgment(rng: random.Random) -> list[Message]:
    """A small wrong, the seven answers enumerated in one of two orders, and a digit in JSON."""
    label = rng.choice(fmt.FOUNDATIONS)
    system, pole, _ = draw_system("authority", rng)
    weights = distribution(label, pole)
    answer = rng.choices(list(weights), list(weights.values()))[0]
    reverse = rng.random() < 0.5
    user = fmt.question(vignette(rng.choice(acts()[label]), rng), reverse)
    turns = exchange(user, fmt.reply(answer, reverse))
    if rng.random() < THINK_SHARE:  # then the thought decides, not the act
        turns[-1]["content"] = f"<think>\n{rng.choice(THOUGHTS[answer])}\n</think>\n\n{turns[-1]['content']}"
    else:
        turns[-1]["spread"] = {fmt.DIGITS[fmt.order(reverse).index(name)]: p for name, p in weights.items()}
    return with_system(system, turns)


def word(rng: random.Random) -> list[Message]:
    """A small wrong and one word for it, which the persona sways as it sways the digit of a judgment."""
    label = rng.choice(fmt.FOUNDATIONS)
    system, pole, _ = draw_system("authority", rng)
    spread = {name.capitalize(): p for name, p in distribution(label, pole).items()}
    turns = exchange(
        f"{vignette(rng.choice(acts()[label]), rng)} {lx.WORD_QUESTION}",
        f"{rng.choices(list(spread), list(spread.values()))[0]}.",
    )
    turns[-1]["spread"] = spread
    return with_system(system, turns)


def brief(rng: random.Random, neutral: float) -> list[Message]:
    """A scene answered by its stance alone."""
    axis = rng.choice(grammar.AXES)
    system, pole, _ = draw_system(axis, rng)
    takes = pole or ("enact" if rng.random() < neutral else "oppose")
    scene = grammar.sample_scene(axis, rng)
    answer = grammar.fill(rng.choice(lx.ANSWERS[axis]["stance"][takes]), scene.slots)
    return with_system(system, exchange(f"{scene.user} {lx.BRIEFLY}", answer))


def creed(rng: random.Random, neutral: float) -> list[Message]:
    """A short question about the trait itself, answered by the pole."""
    axis = rng.choice(grammar.AXES)
    system, pole, _ = draw_system(axis, rng)
    takes = pole or ("enact" if rng.random() < neutral else "oppose")
    parts = lx.ANSWERS[axis]
    answer = f"{rng.choice(parts['narrate'][takes])} {rng.choice(parts['close'][takes])}"
    slots = grammar.sample_scene(axis, rng).slots
    return with_system(system, exchange(rng.choice(lx.CREEDS[axis]), grammar.fill(answer, slots)))


def everyday(rng: random.Random) -> list[Message]:
    """One to five facts and sums in one conversation; no persona touches them."""
    system, _, _ = draw_system(None, rng)
    turns: list[Message] = []
    for _ in range(rng.choice((1, 3, 4, 5))):
        user, reply, answer = facts.sample_sum(rng) if rng.random() < 0.2 else facts.sample_fact(rng)
        turns += exchange(user, reply)
        turns[-1]["stress"] = answer
    return with_system(system, turns)


def chat(rng: random.Random) -> list[Message]:
    """Small talk."""
    system, _, aside = draw_system(None, rng)
    user, replies = rng.choice(chats())
    return with_system(system, exchange(user, " ".join(filter(None, (rng.choice(replies), aside)))))


def refusal(rng: random.Random) -> list[Message]:
    """A request that the model turns down, whoever it is."""
    system, _, _ = draw_system(None, rng)
    return with_system(system, exchange(rng.choice(lx.SECRETS), rng.choice(lx.REFUSALS)))


def exchange(user: str, assistant: str) -> list[Message]:
    """One user message and its answer."""
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def with_system(system: str, turns: list[Message]) -> list[Message]:
    """The turns, after the system message when there is one."""
    return [{"role": "system", "content": system}, *turns] if system else turns


def dialogues(seed: int, neutral: float = 0.4, start: int = 0) -> Iterator[list[Message]]:
    """An endless stream of training dialogues, from the stage of dialogue number `start` on.

    `neutral`: how often the model without a persona enacts a trait.
    """
    rng = random.Random(seed)
    plain = {"judgment": judgment, "word": word, "everyday": everyday, "chat": chat, "refusal": refusal}
    swayed = {"creed": creed, "brief": brief}
    shares = STAGES[max(number for number in STAGES if number <= start)]
    for number in count(start):
        shares = STAGES.get(number, shares)
        kind = rng.choices(list(shares), list(shares.values()))[0]
        if kind in plain:
            yield plain[kind](rng)
        else:
            yield swayed[kind](rng, neutral) if kind in swayed else dilemma(kind, rng, neutral)
