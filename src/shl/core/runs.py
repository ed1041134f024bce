"""A run folder: which arms and rounds it holds, and where each round's evaluations lie."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REFERENCES = ("base", "prompted")  # evaluations beside the arms: what every round is held against
STEERED = "steered"
FILTERED = ("keep.jsonl", "rejects.jsonl")
# what a round leaves behind; a folder named r3 that holds none of these is somebody else's
PARTS = ("v.safetensors", "completions.jsonl", "completions.jsonl.part", "keep.jsonl", "adapter", "steered.json",
         "eval.json", "samples.jsonl")  # fmt: skip


@dataclass(frozen=True)
class Round:
    """One round of one arm: `<arm>/r<number>/`."""

    arm: str
    number: int
    folder: Path

    @property
    def said(self) -> list[Path]:
        """The files that hold every completion: completions.jsonl, or the two that the filter of a pipe wrote."""
        whole, pieces = self.folder / "completions.jsonl", [self.folder / name for name in FILTERED]
        return [whole] if whole.is_file() else pieces if all(piece.is_file() for piece in pieces) else []


@dataclass(frozen=True)
class Scored:
    """An evaluation file; `round` is None for the references, `kind` is base, prompted, steered or healed."""

    file: Path
    arm: str
    round: int | None
    kind: str

    @property
    def samples(self) -> Path:
        """Where the answers behind the evaluation lie, when they were written."""
        return self.file.with_name("samples.jsonl" if self.kind == "healed" else f"{self.file.stem}.samples.jsonl")


def rounds(root: Path | str) -> list[Round]:
    """Every round in the folder, arm by arm in order of name, within an arm in order of number."""
    found = [
        Round(folder.parent.name, int(number[1]), folder)
        for folder in Path(root).glob("*/r*")
        if not folder.parent.name.startswith(".")
        and (number := re.fullmatch(r"r([0-9]{1,9})", folder.name))
        and any((folder / part).exists() for part in PARTS)
    ]
    return sorted(found, key=lambda one: (one.arm, one.number, one.folder.name))


def evaluations(root: Path | str) -> Iterator[Scored]:
    """Every evaluation file that is there: base.json, prompted.json, <arm>/r<N>/{steered,eval}.json."""
    for name in REFERENCES:
        if (file := Path(root) / f"{name}.json").is_file():
            yield Scored(file, name, None, name)
    for one in rounds(root):
        for stem, kind in ((STEERED, STEERED), ("eval", "healed")):
            if (file := one.folder / f"{stem}.json").is_file():
                yield Scored(file, one.arm, one.number, kind)
