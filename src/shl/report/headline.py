"""The headline: did each arm move, did it stay sane, what does it say now. Rules only, no choice by hand."""

from __future__ import annotations

from typing import Any

from shl.core.metrics import metric
from shl.report.scores import Row
from shl.report.words import MINUS, show

QUOTE = 90  # characters of an answer in a sentence
FATES = {"broken": "broke", "collapsed": "collapsed"}  # verdicts that are no good news, as verbs
LEAST = 0.05  # a smaller shift of the prompt is no denominator


def headline(rows: list[Row], names: list[str], says: dict[str, Any] | None, arms: list[str]) -> dict[str, Any]:
    """The title in one sentence, and a sentence with the numbers for each arm, read from its last evaluation."""
    base = next((row for row in rows if row["kind"] == "base"), None)
    prompted = next((row for row in rows if row["kind"] == "prompted"), None)
    cards = [_card(arm, rows, names, base, prompted, says) for arm in arms]
    title = "; ".join(f"{' and '.join(same)} {short}" for short, same in _alike(cards)) or "No arm has a round yet"
    return {"title": title + ".", "arms": cards}


def _alike(cards: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """Arms by what is said of them, so that it is said once."""
    found: dict[str, list[str]] = {}
    for card in cards:
        found.setdefault(card["short"], []).append(card["arm"])
    return list(found.items())


def _card(
    arm: str, rows: list[Row], names: list[str], base: Row | None, prompted: Row | None, says: dict[str, Any] | None
) -> dict[str, Any]:
    """What one arm came to."""
    last = next((row for row in reversed(rows) if row["arm"] == arm and row["kind"] == "healed"), None)
    if last is None:
        return {"arm": arm, "round": None, "short": "has no evaluation", "sentence": "No round was evaluated.",
                "moved": "unknown", "sane": None}  # fmt: skip
    moved = _moved(last, base, prompted, names)
    sane = _sane(last)
    fate = FATES.get(_word(last), "broke")
    told = (_motion(moved, last, base, prompted, names), _sanity(last, sane, base), _spoken(says, arm, last["round"]))
    return {
        "arm": arm,
        "round": last["round"],
        "short": _short(moved, sane, fate),
        "sentence": " ".join(filter(None, told)),
        "moved": moved,
        "sane": sane,
    }


def _moved(last: Row, base: Row | None, prompted: Row | None, names: list[str]) -> str:
    """towards, away, moved (no prompted row says which way is which), still, or unknown.

    A shift counts when the 95% intervals of the arm and of base do not overlap.
    """
    name = names[0] if names else ""
    shift = last["delta"].get(name)
    if base is None or shift is None:
        return "unknown"
    one, other = last["ci"].get(name), base["ci"].get(name)
    if one is None or other is None or (one[0] <= other[1] and other[0] <= one[1]):
        return "still"
    meant = (prompted["delta"] if prompted else {}).get(name)
    if not meant:
        return "moved"
    return "towards" if shift * meant > 0 else "away"


def _sane(last: Row) -> bool | None:
    """What the verdict of the evaluation says."""
    return True if _word(last) == "coherent" else False if _word(last) in FATES else None


def _word(last: Row) -> str:
    return str(last["verdict"]).partition(":")[0]


def _short(moved: str, sane: bool | None, fate: str) -> str:
    """The clause of the title. In broken answers a trait that did not move towards the persona cannot be read."""
    motion = {"towards": "moved", "moved": "moved", "away": "moved away from the persona",
              "still": "did not clearly move"}.get(moved)  # fmt: skip
    if sane is None:
        return motion or "was measured, but not against base"
    if sane and moved in ("towards", "moved"):
        return f"{motion} and stayed coherent"
    if sane:
        return "stayed coherent" if motion is None else f"stayed coherent but {motion}"
    return f"{motion} but {fate}" if moved in ("towards", "moved") else fate


def _motion(moved: str, last: Row, base: Row | None, prompted: Row | None, names: list[str]) -> str:
    """The trait's numbers: base, the arm, and how much of the prompt's shift that is."""
    told = []
    for name in names[:2]:
        if (value := last["metrics"].get(name)) is None:
            continue
        was = base["metrics"].get(name) if base else None
        start = f"{show(name, was)} → " if was is not None else ""
        told.append(f"{metric(name).short} {start}{show(name, value)}{_share(name, last, prompted)}")
    lead = {"towards": "It moved towards the persona", "away": "It moved away from the persona",
            "moved": "It moved", "still": "It did not clearly move"}.get(moved, "Measured")  # fmt: skip
    return f"{lead}: {', '.join(told) or 'no trait was measured'}."


def _share(name: str, last: Row, prompted: Row | None) -> str:
    """The shift as a share of the shift that the persona as a prompt makes."""
    shift, meant = last["delta"].get(name), (prompted["delta"] if prompted else {}).get(name)
    if shift is None or meant is None or abs(meant) < LEAST:
        return ""
    return f" ({_percent(shift / meant)} of the prompt's shift)"


def _percent(share: float) -> str:
    return f"{share:.0%}".replace("-", MINUS)


def _sanity(last: Row, sane: bool | None, base: Row | None) -> str:
    """The verdict, as a sentence."""
    if sane is None:
        return "Its evaluation has no verdict on coherence."
    if sane:
        return "It is coherent: no reading of coherence is outside its bounds."
    why = last["verdict"].partition(":")[2].strip()
    told = f"It broke, out of bounds: {why}." if _word(last) == "broken" else f"It {FATES[_word(last)]}: {why}."
    return told + (" Base is out of bounds itself." if base is not None and _sane(base) is False else "")


def _spoken(says: dict[str, Any] | None, arm: str, turn: int) -> str:
    """The beginning of the arm's representative answer, and after which round, when that is not the last."""
    answer = next((one for one in (says or {}).get("answers", ()) if one["arm"] == arm), None)
    if answer is None:
        return ""
    when = "It says now" if answer["round"] == turn else f"After round {answer['round']} it said"
    return f"{when}: “{_clip(answer['text'])}”"


def _clip(text: str) -> str:
    """The beginning of a text, cut at a word."""
    flat = " ".join(text.split())
    return flat if len(flat) <= QUOTE else flat[:QUOTE].rsplit(" ", 1)[0] + " …"
