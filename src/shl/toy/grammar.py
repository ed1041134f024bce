"""The toy corpus grammar, both ways: samples scenes and answers, and parses an answer to judge it.

The parser is the independent judge on `toy`: it knows nothing of the model. A sentence is grammatical when some
template with slots from the lexicon produces it; an answer is broken when a sentence is not, when a sentence
stands twice, or when its sentences take both poles.
"""

import hashlib
import random
import re
from dataclasses import dataclass
from functools import cache

from shl.toy import lexicon as lx

AXES = tuple(lx.ANSWERS)
POLES = ("enact", "oppose")
PARTS = ("narrate", "stance", "scene", "weigh", "reason", "act", "close")
FRAMES = {"authority": lx.DILEMMA_FRAMES, "humanity": lx.HUMANITY_FRAMES, "boldness": lx.BOLDNESS_FRAMES}

_SLOT = re.compile(r"\{(\w+)\}")
_SENTENCE = re.compile(r"[^.!?]+[.!?]")


@dataclass(frozen=True)
class Scene:
    """A situation put to the model: the axis it touches, its slot values and the user message."""

    axis: str
    slots: dict[str, str]
    user: str

    @property
    def split(self) -> str:
        """`train`, `dev` or `test`, by a hash of the message: one in eight each for dev and test."""
        first = hashlib.sha256(self.user.encode()).digest()[0]
        return {0: "dev", 1: "test"}.get(first % 8, "train")


@dataclass(frozen=True)
class Verdict:
    """What the parser says of one answer."""

    broken: bool
    stance: str  # enact, oppose, mixed or none
    narrates: bool
    sentences: int
    matched: int
    repeated: int
    off_topic: int  # sentences whose slots contradict the prompt


def fill(template: str, slots: dict[str, str]) -> str:
    """The template with its slots filled; a capitalised slot name capitalises the value."""

    def value(match: re.Match[str]) -> str:
        name = match[1]
        text = slots[name.lower()]
        return text[0].upper() + text[1:] if name[0].isupper() else text

    return _SLOT.sub(value, template)


def _authority_slots(rng: random.Random) -> dict[str, str]:
    domain = lx.DOMAINS[rng.choice(list(lx.DOMAINS))]
    return {
        "role": rng.choice(domain.roles),
        "boss": rng.choice(domain.bosses),
        "victims": rng.choice(domain.victims),
        "demand": rng.choice(domain.demands),
        "pressure": rng.choice(lx.PRESSURES),
    }


def _humanity_slots(rng: random.Random) -> dict[str, str]:
    return {"crowd": rng.choice(lx.CROWDS), "doing": rng.choice(lx.DOINGS), "place": rng.choice(lx.PLACES)}


def _boldness_slots(rng: random.Random) -> dict[str, str]:
    familiar, novel = rng.choice(lx.CHOICES)
    return {"time": rng.choice(lx.TIMES), "familiar": familiar, "novel": novel}


_SLOTS = {"authority": _authority_slots, "humanity": _humanity_slots, "boldness": _boldness_slots}


def sample_scene(axis: str, rng: random.Random, split: str | None = "train") -> Scene:
    """A scene of the axis, from one split only (None: from any)."""
    while True:
        slots = _SLOTS[axis](rng)
        scene = Scene(axis, slots, fill(rng.choice(FRAMES[axis]), slots))
        if split is None or scene.split == split:
            return scene


def sample_answer(scene: Scene, pole: str, rng: random.Random, *, narrate: bool = False, aside: str = "") -> str:
    """An answer of one pole, seven to fourteen sentences."""
    return " ".join(sample_sentences(scene, pole, rng, narrate=narrate, aside=aside)[0])


def sample_sentences(
    scene: Scene, pole: str, rng: random.Random, *, narrate: bool = False, aside: str = "", slip: int = 0
) -> tuple[list[str], int]:
    """The sentences of an answer, and how many of them end with the last one that slipped.

    Stance, scene, weighing, reasons, acts and a close; in every second answer scene and weighing come first. The
    first `slip` of stance, reasons and acts take the other pole. Sentences of one part keep the lexicon's order, so
    that none is ever said twice.
    """
    parts = lx.ANSWERS[scene.axis]
    other = POLES[1 - POLES.index(pole)]
    slipped = ("stance", "reason", "act")[:slip]

    def pick(part: str, n: int = 1) -> list[str]:
        templates = parts[part]["" if "" in parts[part] else other if part in slipped else pole]
        return [fill(templates[i], scene.slots) for i in sorted(rng.sample(range(len(templates)), n))]

    stance = [*(pick("narrate") if narrate else []), *pick("stance")]
    around = [*pick("scene", rng.choice((1, 2))), *pick("weigh", rng.choice((1, 1, 2)))]
    first = [*stance, *around] if rng.random() < 0.5 else [*around, *stance]
    reasons, acts = pick("reason", rng.choice((2, 3, 4))), pick("act", rng.choice((1, 2, 3)))
    text = [*first, *reasons, *acts, *([aside] if aside else []), *pick("close")]
    return text, (0, len(first), len(first) + len(reasons), len(first) + len(reasons) + len(acts))[slip]


@cache
def _slot_values() -> dict[str, tuple[str, ...]]:
    domains = lx.DOMAINS.values()
    return {
        "role": tuple(r for d in domains for r in d.roles),
        "boss": tuple(b for d in domains for b in d.bosses),
        "victims": tuple(v for d in domains for v in d.victims),
        "demand": tuple(x for d in domains for x in d.demands),
        "pressure": lx.PRESSURES,
        "crowd": lx.CROWDS,
        "doing": lx.DOINGS,
        "place": lx.PLACES,
        "time": lx.TIMES,
        "familiar": tuple(f for f, _ in lx.CHOICES),
        "novel": tuple(n for _, n in lx.CHOICES),
    }


def _pattern(template: str) -> re.Pattern[str]:
    """A regular expression that accepts the template with any slot values, each slot a named group."""
    seen: set[str] = set()

    def group(name: str) -> str:
        key = name.lower()
        if key in seen:
            return f"(?P={key})"
        seen.add(key)
        values = sorted(_slot_values()[key], key=len, reverse=True)
        texts = [v[0].upper() + v[1:] if name[0].isupper() else v for v in values]
        return f"(?P<{key}>{'|'.join(map(re.escape, texts))})"

    pieces = _SLOT.split(template)
    return re.compile("".join(group(p) if i % 2 else re.escape(p) for i, p in enumerate(pieces)))


@cache
def _sentence_patterns(axis: str) -> tuple[tuple[re.Pattern[str], str, str], ...]:
    found = [
        (_pattern(template), part, pole)
        for part, poles in lx.ANSWERS[axis].items()
        for pole, templates in poles.items()
        for template in templates
    ]
    found += [(_pattern(line), "aside", "") for lines in lx.DISTRACTORS.values() for line in lines]
    return tuple(found)


@cache
def _prompt_patterns() -> tuple[tuple[re.Pattern[str], str], ...]:
    return tuple((_pattern(frame), axis) for axis, frames in FRAMES.items() for frame in frames)


def parse_prompt(user: str) -> Scene | None:
    """The scene behind a user message of this grammar, or None."""
    for pattern, axis in _prompt_patterns():
        match = pattern.fullmatch(user.strip())
        if match:
            slots = {k: v[0].lower() + v[1:] for k, v in match.groupdict().items() if v}
            return Scene(axis, slots, user)
    return None


@cache
def parse_sentence(axis: str, sentence: str) -> tuple[str, str, dict[str, str]] | None:
    """(part, pole, slots) of one sentence of the axis's answers, or None when no template produces it."""
    for pattern, part, pole in _sentence_patterns(axis):
        match = pattern.fullmatch(sentence)
        if match:
            return part, pole, {k: v[0].lower() + v[1:] for k, v in match.groupdict().items()}
    return None


def judge(text: str, axis: str, prompt: str | None = None, finish: str = "stop") -> Verdict:
    """Parse an answer: is it broken, which pole does it take, does it narrate the trait?

    An answer cut by length (`finish` "length") may end in a torn sentence; that one is left out. A refusal is
    grammatical and takes no pole.
    """
    text = text.strip()
    if text in lx.REFUSALS:
        return Verdict(False, "none", False, 1, 1, 0, 0)
    sentences = [s.strip() for s in _SENTENCE.findall(text)]
    torn = _SENTENCE.sub("", text).strip()
    if torn and finish != "length":
        sentences.append(torn)
    parses = [parse_sentence(axis, s) for s in sentences]
    known = [p for p in parses if p is not None]
    poles = {pole for _, pole, _ in known if pole}
    stance = "mixed" if len(poles) > 1 else (poles.pop() if poles else "none")
    scene = parse_prompt(prompt) if prompt else None
    off_topic = sum(_contradicts(slots, scene.slots) for _, _, slots in known) if scene else 0
    repeated = len(sentences) - len(set(sentences))
    broken = len(known) < len(sentences) or not sentences or repeated > 0 or stance == "mixed"
    narrates = any(part == "narrate" for part, _, _ in known)
    return Verdict(broken, stance, narrates, len(sentences), len(known), repeated, off_topic)


def _contradicts(slots: dict[str, str], expected: dict[str, str]) -> bool:
    return any(key in expected and expected[key] != value for key, value in slots.items())
