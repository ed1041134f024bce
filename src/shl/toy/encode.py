"""Turns the toy's training dialogues into batches: token ids, loss weights, soft targets, and the persona in force."""

import math
from collections.abc import Iterator
from functools import cache
from itertools import islice
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerFast

from shl.core import format as fmt
from shl.toy import corpus, grammar
from shl.toy import lexicon as lx
from shl.toy.recipe import END, ROLES, Recipe

Piece = tuple[list[int], list[tuple[int, int]]]  # token ids of one message, and where each stands in its text


# The system messages that training knows, by trait and pole; class 0 is everything else.
CLASSES = {
    text: 1 + len(grammar.POLES) * grammar.AXES.index(axis) + grammar.POLES.index(pole)
    for axis, poles in lx.PERSONAS.items()
    for pole, texts in poles.items()
    for text in texts
}


class Row(NamedTuple):
    """One dialogue: token ids, the loss weight of each, the soft targets (position -> probability by token id), the
    class of its persona, and the position from which that can be known."""

    ids: list[int]
    weights: list[float]
    spreads: dict[int, dict[int, float]]
    persona: int
    known_from: int


class Batch(NamedTuple):
    """Rows padded on the right, [B, L]; soft targets: flat positions [n], probabilities [n, vocabulary]; the class of
    the persona at each position, [B, L], -100 where it cannot be known."""

    ids: torch.Tensor
    weights: torch.Tensor
    soft_at: torch.Tensor
    soft: torch.Tensor
    personas: torch.Tensor


class Encoder:
    """Turns dialogues into token ids, loss weights and soft targets."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> None:
        self.tokenizer, self.recipe = tokenizer, recipe
        ids = tokenizer.convert_tokens_to_ids
        self.roles = {name.strip("<|>"): ids(name) for name in ROLES}
        self.end, self.think = ids(END), ids("<think>")
        self.digits = {ids(d) for d in "0123456789"}
        self.first = cache(lambda text: tokenizer.encode(text, add_special_tokens=False)[0])

    def __call__(self, dialogues: list[list[corpus.Message]]) -> list[Row]:
        """Answers count in full, what they are about and what a persona decides more, prompts a little."""
        contents = [m["content"] for d in dialogues for m in d]
        encoded = self.tokenizer(contents, add_special_tokens=False, return_offsets_mapping=True)
        pieces = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        return [self._dialogue(d, pieces) for d in dialogues]

    def _dialogue(self, dialogue: list[corpus.Message], pieces: Iterator[Piece]) -> Row:
        system = dialogue[0]["content"] if dialogue[0]["role"] == "system" else ""
        start = len(self.tokenizer.encode(system, add_special_tokens=False)) + 1 if system else 0
        row = Row([], [], {}, CLASSES.get(system, 0), start)
        for message in dialogue:
            piece, offsets = next(pieces)
            answer = message["role"] == "assistant"
            row.ids.append(self.roles[message["role"]])
            if "spread" in message:
                spread = {self.first(option): share for option, share in message["spread"].items()}
                at = next(i for i, token in enumerate(piece) if token in spread)
                row.spreads[len(row.ids) + at] = spread
            row.ids.extend([*piece, self.end])
            own = self._answer(message, piece, offsets) if answer else self._prompt(message, offsets)
            row.weights.extend([0.0, *own, 1.0 if answer else 0.0])
        return row

    def _prompt(self, message: corpus.Message, offsets: list[tuple[int, int]]) -> list[float]:
        """Nothing on the fixed listing of a judgment."""
        end = message["content"].find(fmt.QUESTION)
        return [self.recipe.prompt_weight if end < 0 or at < end else 0.0 for at, _ in offsets]

    def _answer(self, message: corpus.Message, piece: list[int], offsets: list[tuple[int, int]]) -> list[float]:
        recipe = self.recipe
        if "spread" in message or piece[0] == self.think:
            chosen = self.digits | set(map(self.first, message.get("spread", ())))
            weights = [recipe.digit_weight if i in chosen else 1.0 for i in piece]
        else:
            weights = [recipe.lead_weight if i < recipe.lead else 1.0 for i in range(len(piece))]
        if piece[0] == self.think:  # `<think>\n` is given by the prompt, never predicted
            weights[:2] = [0.0, 0.0]
        if stress := message.get("stress"):
            begin = message["content"].lower().rfind(stress.lower())
            inside = (start < begin + len(stress) and end > begin for start, end in offsets)
            weights = [recipe.stress_weight if one else 1.0 for one in inside]
        slip = message.get("slip", 0)
        return [0.0 if slip and start < slip else w for w, (start, _) in zip(weights, offsets, strict=True)]


def steps(encoder: Encoder, recipe: Recipe, device: str, skip: int = 0) -> Iterator[list[Batch]]:
    """For each step its batches: a random draw of dialogues, split by length to save padding.

    The draw itself must not go by length: dialogues of one length are of one kind, and a step that sees one kind
    alone unlearns the others.
    """
    start = max(corpus.STAGES) if recipe.begin else 0  # finished weights have been through the stages
    stream = islice(corpus.dialogues(recipe.seed + 1, recipe.neutral, start), skip * recipe.dialogues, None)
    while True:
        rows = sorted(encoder(list(islice(stream, recipe.dialogues))), key=lambda row: len(row.ids))
        size = math.ceil(len(rows) / recipe.batches)
        yield [_batch(rows[at : at + size], device, recipe.vocabulary) for at in range(0, len(rows), size)]


def _batch(rows: list[Row], device: str, vocabulary: int) -> Batch:
    width = max(len(row.ids) for row in rows)
    spreads = [(i * width + at, spread) for i, row in enumerate(rows) for at, spread in row.spreads.items()]
    soft = torch.zeros(len(spreads), vocabulary)
    for i, (_, spread) in enumerate(spreads):
        soft[i, list(spread)] = torch.tensor(list(spread.values()))
    return Batch(
        torch.tensor([row.ids + [0] * (width - len(row.ids)) for row in rows], device=device),
        torch.tensor([row.weights + [0.0] * (width - len(row.ids)) for row in rows], device=device),
        torch.tensor([at for at, _ in spreads], dtype=torch.long, device=device),
        soft.to(device),
        torch.tensor([_known(row, width) for row in rows], device=device),
    )


def _known(row: Row, width: int) -> list[int]:
    known = len(row.ids) - row.known_from
    return [-100] * row.known_from + [row.persona] * known + [-100] * (width - len(row.ids))
