"""Bundled data: personas, prompt pools, extraction contexts and moral vignettes, read from shl/data."""

import json
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

from shl.core.errors import ShlError
from shl.core.format import FOUNDATIONS
from shl.core.records import Prompt, parse_prompt

SPLITS = ("dev", "test")
CONDITIONS = ("third", "first")


@dataclass(frozen=True)
class Persona:
    """A pair of system texts on one axis. Without `neg` the negative side has no system message at all."""

    name: str
    axis: str
    pos: str
    neg: str | None = None


@dataclass(frozen=True)
class Vignette:
    """One small wrong, told in the third and in the first person, labelled with its moral foundation."""

    id: str
    foundation: str
    third: str
    first: str
    split: str

    def text(self, condition: str) -> str:
        """The wording of one condition."""
        if condition not in CONDITIONS:
            raise ShlError(f"no condition {condition!r}", hint=f"choose from: {', '.join(CONDITIONS)}")
        return self.third if condition == "third" else self.first


def data(*parts: str) -> Traversable:
    """A file or folder of the package's data."""
    return files("shl").joinpath("data", *parts)


@cache
def personas() -> dict[str, Persona]:
    """Every bundled persona pair by name, in the order of the file."""
    table = tomllib.loads(data("personas.toml").read_text(encoding="utf-8"))
    found = [Persona(row["name"], row["axis"], row["pos"], row.get("neg")) for row in table["persona"]]
    return {persona.name: persona for persona in found}


def persona(name: str) -> Persona:
    """One bundled persona pair."""
    if name not in personas():
        raise ShlError(f"no persona {name!r}", hint=f"bundled: {', '.join(personas())}; or give a text of your own")
    return personas()[name]


def persona_of(axis: str) -> Persona | None:
    """The bundled persona of an axis, one with two sides if there is any; None where none is bundled."""
    found = sorted((one for one in personas().values() if one.axis == axis), key=lambda one: one.neg is None)
    return found[0] if found else None


def persona_texts() -> list[str]:
    """Both sides of every bundled persona: what a narrating answer would repeat."""
    return [side for one in personas().values() for side in (one.pos, one.neg) if side]


def pool_names() -> list[str]:
    """Names of the bundled prompt pools."""
    return sorted(file.name.removesuffix(".jsonl") for file in data("pools").iterdir() if file.name.endswith(".jsonl"))


def pool(name: str, split: str | None = None) -> list[Prompt]:
    """The prompts of one bundled pool, all of them or one split."""
    if name not in pool_names():
        raise ShlError(f"no prompt pool {name!r}", hint=f"bundled: {', '.join(pool_names())}; or give a file")
    rows = _rows("pools", f"{name}.jsonl")
    return [parse_prompt(row, f"pool {name}") for row in rows if split is None or row.get("split") == split]


def eval_pool(axis: str, split: str) -> list[Prompt]:
    """The held-out prompts of an axis: a pool of their own, or the rows of the axis's pool that carry the split."""
    name = f"{axis}-{split}"
    prompts = pool(name) if name in pool_names() else pool(axis, split)
    if not prompts:
        raise ShlError(f"pool {axis!r} has no prompts held out as {split!r}", hint=f"splits: {', '.join(SPLITS)}")
    return prompts


def contexts() -> list[Prompt]:
    """Diverse contexts for extraction; none holds the evaluation's format."""
    return [parse_prompt(row, "contexts.jsonl") for row in _rows("contexts.jsonl")]


def vignettes(split: str | None = None) -> list[Vignette]:
    """The bundled moral vignettes of one split, or of both."""
    if split is not None and split not in SPLITS:
        raise ShlError(f"no split {split!r}", hint=f"choose from: {', '.join(SPLITS)}")
    return [one for one in _all_vignettes() if split is None or one.split == split]


@cache
def _all_vignettes() -> tuple[Vignette, ...]:
    found = tuple(
        Vignette(row["id"], row["foundation"], row["third"], row["first"], row["split"])
        for row in _rows("vignettes.jsonl")
    )
    if stray := {one.foundation for one in found} - set(FOUNDATIONS):
        raise ShlError(f"vignettes.jsonl names foundations that do not exist: {', '.join(sorted(stray))}")
    return found


def _rows(*parts: str) -> Iterator[dict[str, Any]]:
    with data(*parts).open(encoding="utf-8") as lines:
        for line in lines:
            if line.strip():
                yield json.loads(line)
