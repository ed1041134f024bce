"""What healing learns from: kept records as token ids, split into training and held-out, in batches by length."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shl.core import console
from shl.core.defaults import TrainConfig
from shl.core.errors import ShlError
from shl.core.models import Loaded
from shl.core.provenance import digest_of
from shl.core.seeds import seed_of

POOL = 4  # batches are cut from this many at a time, sorted by length: little padding, and new company each epoch

ALIKE = 0.6  # rows shorter than this share of a part's longest go into the next: padding costs more than a pass


@dataclass(frozen=True)
class Example:
    """One completion to learn, as token ids."""

    prompt: list[int]
    completion: list[int]

    @property
    def ids(self) -> list[int]:
        """Prompt and completion."""
        return self.prompt + self.completion

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


def select(records: Iterable[dict[str, Any]], cfg: TrainConfig, source: str = "the records") -> list[dict[str, Any]]:
    """The records to learn from: kept ones, and without controls unless the configuration wants them."""
    seen = controls = 0
    used = []
    for record in records:
        seen += 1
        control = record.get("coeff") == 0 and not cfg.include_controls
        controls += control
        if record.get("keep") is not False and not control and record["completion"][0]["content"]:
            used.append(record)
    if used:
        return used
    if not seen:
        raise ShlError(f"{source} holds no records", hint="make some: shl gen --vec v.safetensors | shl filter")
    if controls == seen:  # text that no vector has spoken in: a persona as a mere prompt, most likely
        raise ShlError(f"all {seen} records of {source} are controls", hint="learn from them with --include-controls")
    raise ShlError(
        f"{source} holds {seen} records, and none to train on: all were dropped, are controls, or are empty",
        hint="look at the reasons with: shl filter --all, and try other coefficients or limits",
    )


def encode(loaded: Loaded, records: Sequence[dict[str, Any]], cfg: TrainConfig) -> list[Example]:
    """Records as ids; an answer that was cut by length gets no end label, and one too long is cut."""
    examples, cut = [], 0
    for record in records:
        prompt = loaded.encode_prompt(record["prompt"])
        text, whole = record["completion"][0]["content"], record.get("finish") != "length"
        room = cfg.max_len - len(prompt)
        if room < 1:
            raise ShlError(
                f"the prompt of {record.get('id', 'a record')} has {len(prompt)} tokens, and max_len is {cfg.max_len}",
                hint="raise --max-len, or leave that record out",
            )
        completion = loaded.encode_completion(text, end=whole)
        cut += len(completion) > room
        examples.append(Example(prompt, completion[:room]))
    if cut:
        console.warn(f"{cut} of {len(examples)} completions were cut at --max-len {cfg.max_len}")
    return examples


def split(
    records: Sequence[dict[str, Any]], examples: Sequence[Example], cfg: TrainConfig
) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples. A prompt is on one side only, whatever its coefficients and samples."""
    groups: dict[str, list[Example]] = {}
    for record, example in zip(records, examples, strict=True):
        groups.setdefault(digest_of(record["prompt"]), []).append(example)
    names = list(groups)
    generator = torch.Generator().manual_seed(seed_of(cfg.seed, "heal", "holdout"))
    wanted = int(cfg.holdout * len(examples))
    held: set[str] = set()
    for at in torch.randperm(len(names), generator=generator).tolist()[:-1]:  # one group is left to train on
        if sum(len(groups[name]) for name in held) + len(groups[names[at]]) <= wanted:
            held.add(names[at])
    sides: tuple[list[Example], list[Example]] = ([], [])
    for name, members in groups.items():
        sides[int(name in held)].extend(members)
    return sides


def batches(lengths: Sequence[int], size: int, generator: torch.Generator) -> list[list[int]]:
    """Indices in shuffled batches of similar length."""
    order = torch.randperm(len(lengths), generator=generator).tolist()
    made = []
    for at in range(0, len(order), size * POOL):
        pool = sorted(order[at : at + size * POOL], key=lambda i: lengths[i])
        made += [pool[i : i + size] for i in range(0, len(pool), size)]
    return [made[i] for i in torch.randperm(len(made), generator=generator).tolist()]


def by_length(examples: Sequence[Example]) -> list[Example]:
    """Longest first."""
    return sorted(examples, key=len, reverse=True)


def alike(examples: Sequence[Example]) -> list[list[Example]]:
    """A batch in parts that are padded little: computed apart, their gradients sum to that of the whole."""
    parts: list[list[Example]] = []
    for one in by_length(examples):
        if parts and len(one) >= ALIKE * len(parts[-1][0]):
            parts[-1].append(one)
        else:
            parts.append([one])
    return parts
