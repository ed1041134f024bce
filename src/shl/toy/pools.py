"""Writes the bundled prompt pools and extraction contexts from the corpus grammar: python -m shl.toy.pools.

`<axis>.jsonl` holds scenes that training may have seen, `<axis>-dev.jsonl` and `<axis>-test.jsonl` scenes that it
has not. `words.jsonl` asks for one word on a small wrong: other wrongs and another form than the evaluation's.
Contexts are the hand-written general ones with scenes of every axis mixed in; none holds the evaluation's format.
"""

import json
import random
from pathlib import Path

from shl.core.format import FOUNDATIONS
from shl.toy import corpus, grammar
from shl.toy import lexicon as lx

DATA = Path(__file__).parents[1] / "data"
SIZE = 128
CONTEXT_SCENES = {"authority": 80, "humanity": 40, "boldness": 40}


def scenes(axis: str, split: str, size: int, seed: int) -> list[str]:
    """Up to `size` different user messages of one split of the axis."""
    rng = random.Random(f"{seed} {axis} {split}")
    found: dict[str, None] = {}
    for _ in range(50 * size):
        found.setdefault(grammar.sample_scene(axis, rng, split).user)
        if len(found) == size:
            break
    return list(found)


def words(size: int, seed: int) -> list[str]:
    """Small wrongs of every foundation in turn, each with the question for one word."""
    rng = random.Random(f"{seed} words")
    turns = [FOUNDATIONS[i % len(FOUNDATIONS)] for i in range(size)]
    return [f"{corpus.vignette(rng.choice(corpus.acts()[label]), rng)} {lx.WORD_QUESTION}" for label in turns]


def write(path: Path, rows: list[dict[str, str]]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    """Write every pool and the contexts."""
    (DATA / "pools").mkdir(exist_ok=True)
    for axis in grammar.AXES:
        for split in ("train", "dev", "test"):
            name = axis if split == "train" else f"{axis}-{split}"
            rows = [{"id": f"{name}-{i:03d}", "user": user} for i, user in enumerate(scenes(axis, split, SIZE, 0))]
            write(DATA / "pools" / f"{name}.jsonl", rows)
    write(DATA / "pools" / "words.jsonl", [{"id": f"words-{i:03d}", "user": u} for i, u in enumerate(words(SIZE, 0))])
    general = [json.loads(line) for line in (DATA / "contexts.jsonl").read_text(encoding="utf-8").splitlines()]
    users = [row["user"] for row in general if grammar.parse_prompt(row["user"]) is None]
    users += [user for axis, n in CONTEXT_SCENES.items() for user in scenes(axis, "train", n, 1)]
    random.Random(0).shuffle(users)
    write(DATA / "contexts.jsonl", [{"id": f"ctx-{i:03d}", "user": user} for i, user in enumerate(users)])


if __name__ == "__main__":
    main()
