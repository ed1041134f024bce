"""Text measures that need no model: repetition, narration of a persona, refusal boilerplate, near-duplicates."""

import re
import zlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import lru_cache

# An n-gram counts as repeated from this many occurrences on. Short n-grams need more of them, because ordinary prose
# says "of the" and the name of what it is about again and again, while a sentence said twice is already conspicuous.
WORD_REPEATS = {2: 8, 3: 6, 4: 4}
CHAR_REPEATS = {12: 8, 16: 7, 24: 5, 48: 2}

_WORD = re.compile(r"\w+(?:'\w+)*")
_SPACE = re.compile(r"\s+")
_CURLY = str.maketrans("\u2018\u2019", "''")

_NARRATION = re.compile(
    r"\b(?:"
    r"i(?:'m| am) (?:the (?:kind|sort|type) of |a |an )?(?:\w+ ){0,3}(?:someone|somebody|person) (?:who|that)\b"
    r"|as (?:someone|somebody|an? (?:\w+ ){0,3}person)(?: of \w+)?(?: who\b| that\b|, i\b)"
    r"|my (?:character|nature|personality) is\b"
    r"|(?:my|this|the) (?:persona|assigned role|character trait)\b"
    r"|i(?: was| am| have been|'m|'ve been) (?:told|asked|instructed|prompted|designed|made) to "
    r"(?:act|behave|pretend|role-?play|(?:answer|be|speak|respond) (?:as|like))\b"
    r"|i(?:'m| am) (?:playing|acting|answering|speaking) (?:as|the (?:role|part))\b"
    r"|my (?:instructions|system prompt) (?:say|says|is|are|tell|tells)\b"
    r")",
    re.IGNORECASE,
)

# Boilerplate about the request itself. "I will not do what he orders" is an answer, not a refusal, and must pass.
_REFUSAL = re.compile(
    r"\b(?:"
    r"i(?:'m| am)?(?: really| very| truly)? ?(?:sorry|afraid|apologi[sz]e),? (?:but )?(?:that )?"
    r"i(?: can(?:not|'t)|'m (?:not able|unable)| am (?:not able|unable)| won't)"
    r" (?:be able )?(?:to )?(?:help|assist|answer|discuss|provide|respond|comply|fulfil+|continue|do that|talk)"
    r"|i (?:can(?:not|'t)|won't|will not|am (?:not able|unable) to|'m (?:not able|unable) to)"
    r" (?:help|assist)(?: you)? (?:with|in) (?:that|this|your|such|any)\b"
    r"|i (?:can(?:not|'t)|won't|will not|am (?:not able|unable) to)"
    r" (?:answer|discuss|comply with|fulfil+|engage with|respond to|provide) (?:that|this|your|such|any)\b"
    r"|i(?:'d| would) (?:rather|prefer) not (?:to )?(?:answer|comment|discuss|talk about|say anything about)"
    r" (?:that|this|it|such)\b"
    r"|as an? (?:ai|artificial intelligence|(?:large )?language model)\b"
    r"|against my (?:guidelines|programming|policy|policies)\b"
    r")",
    re.IGNORECASE,
)

# One form for "you are", "I am", "I'm": a persona is written to "you" and narrated as "I".
_PERSON = {"you": "i", "me": "i", "your": "my", "yourself": "myself", "are": "be", "am": "be", "is": "be"}


def words(text: str) -> list[str]:
    """Lower-case words; an apostrophe inside a word belongs to it."""
    return _WORD.findall(text.lower().translate(_CURLY))


def repetition(text: str) -> float:
    """The largest share of the text that repeated word or character n-grams cover: 0 none, 1 all of it.

    Ordinary prose stays under 0.2; a text that has fallen into a loop is above 0.5. The character windows see loops
    inside one word and in scripts without spaces.
    """
    tokens, letters = words(text), _SPACE.sub(" ", text.lower()).strip()
    shares = [_covered(tokens, n, least) for n, least in WORD_REPEATS.items()]
    shares += [_covered(letters, n, least) for n, least in CHAR_REPEATS.items()]
    return max(shares)


def _covered(units: Sequence[str], n: int, least: int) -> float:
    """Share of the units that lie inside an n-gram occurring at least `least` times."""
    cut: Callable[[Sequence[str]], Hashable] = str if isinstance(units, str) else tuple  # a string is far smaller
    grams = [cut(units[i : i + n]) for i in range(len(units) - n + 1)]
    counts = Counter(grams)
    covered, end = 0, 0  # end: the first unit not yet counted
    for start, gram in enumerate(grams):
        if counts[gram] >= least:
            covered += start + n - max(start, end)
            end = start + n
    return covered / len(units) if units else 0.0


def distinct_n(text: str, n: int = 3) -> float:
    """Distinct word n-grams over all of them; 1.0 for a text too short to hold one."""
    tokens = words(text)
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def narration(text: str, persona_texts: Iterable[str] = ()) -> bool:
    """Does the text describe the persona instead of acting it out?

    True for a first-person claim of a trait, or when it repeats the persona's own words: six in a row, or half of
    the persona's word triples.
    """
    if _NARRATION.search(text.translate(_CURLY)):
        return True
    said = _impersonal(text)
    sixes, threes = _grams(said, 6), _grams(said, 3)
    return any(
        sixes & six or (len(three) >= 3 and len(three & threes) >= len(three) / 2)
        for six, three in map(_marks, persona_texts)
    )


def _impersonal(text: str) -> list[str]:
    plain = text.lower().translate(_CURLY).replace("i'm", "i am").replace("you're", "you are")
    return [_PERSON.get(word, word) for word in words(plain)]


@lru_cache(maxsize=256)
def _marks(persona: str) -> tuple[set[tuple[str, ...]], set[tuple[str, ...]]]:
    """What tells a persona's own words: its sixes and its triples. The same few personas meet every record."""
    words_of = _impersonal(persona)
    return _grams(words_of, 6), _grams(words_of, 3)


def _grams(tokens: list[str], n: int) -> set[tuple[str, ...]]:
    return {tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)}


def refusal(text: str) -> bool:
    """Boilerplate that declines to answer, looked for where it stands: at the beginning."""
    return _REFUSAL.search(text[:300].translate(_CURLY)) is not None


def shingles(text: str, n: int = 3) -> frozenset[int]:
    """Hashes of the word n-grams (of the words themselves when there are fewer): what similarity compares."""
    tokens = words(text)
    size = min(n, len(tokens))
    grams = (" ".join(tokens[i : i + size]) for i in range(len(tokens) - size + 1)) if size else ()
    return frozenset(zlib.crc32(gram.encode()) for gram in grams)


def similarity(a: frozenset[int], b: frozenset[int]) -> float:
    """Jaccard similarity of two sets of shingles. Two empty texts are the same text."""
    if not a and not b:
        return 1.0
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared)
