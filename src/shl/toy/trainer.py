"""Trains the embedded model `toy` from scratch on its corpus: full attention below, a short sliding window above.

    python -m shl.toy.trainer --out DIR [--tokens 10e6] [--neutral 0.4] [--seed 0]

The upper half of the blocks sees twelve positions only, so whatever the system message set must travel to each
later position in the residual stream; that is what makes the model steerable. A killed run continues from its
checkpoint (DIR.ckpt.safetensors) when the same line is run again.
"""

import argparse
import json
import math
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from shl.core import format as fmt
from shl.core.console import note
from shl.toy import corpus

END, PAD = "<|end|>", "<|pad|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}"
    "{% if enable_thinking is defined and enable_thinking %}{{ '<think>\n' }}{% endif %}{% endif %}"
)
# What `shl` should use on this model unless told otherwise, and which judges it may ask.
RECOMMENDED = json.loads((Path(__file__).parent / "recommended.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights."""

    seed: int = 0
    neutral: float = 0.4
    tokens: float = 11e6
    dialogues: int = 28  # in a step
    batches: int = 3  # that a step is split into
    lr: float = 3e-3
    embedding_lr: float = 0.03
    muon_lr: float = 0.02
    warmup: float = 0.01
    weight_decay: float = 0.05
    vocabulary: int = 3072
    hidden: int = 144
    intermediate: int = 432
    layers: int = 8
    heads: int = 6
    kv_heads: int = 3
    window: int = 12
    prompt_weight: float = 0.2
    digit_weight: float = 24.0  # on the digit or the word of a judgment
    stress_weight: float = 6.0  # on the word or number that answers an everyday question
    lead_weight: float = 4.0  # on the first tokens of any other answer, which the persona decides
    lead: int = 6


def train_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    """A byte-level BPE over a sample of the corpus; every digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\d"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    sample = islice(corpus.dialogues(recipe.seed, recipe.neutral), 12_000, 44_000)
    words = Counter(word for dialogue in sample for m in dialogue for word in re.findall(r" ?\S+", m["content"]))
    # by the root of their counts: the templates' words would else take every merge from the words that carry meaning
    texts = (word for word, count in words.items() for _ in range(math.isqrt(count)))
    special = [PAD, END, *ROLES]
    bpe = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary - 2, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts, bpe)
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, padding_side="left")
    fast.chat_template = TEMPLATE
    return fast


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    """The untrained model, initialised from the recipe's seed."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        max_position_embeddings=2048,
        use_sliding_window=True,
        sliding_window=recipe.window,
        max_window_layers=recipe.layers // 2,
        tie_word_embeddings=False,
        initializer_range=recipe.hidden**-0.5,  # the library's 0.02 is made for widths in the thousands
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="sdpa",
    )
    torch.manual_seed(recipe.seed)
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_()  # large beside what a block adds: copying needs to see the token
        model.lm_head.weight.mul_(0.1)
        for block in model.model.layers:  # so that the residual stream keeps its size over the depth
            block.self_attn.o_proj.weight.mul_((2 * recipe.layers) ** -0.5)
            block.mlp.down_proj.weight.mul_((2 * recipe.layers) ** -0.5)
    return model


Piece = tuple[list[int], list[tuple[int, int]]]  # token ids of one message, and where each stands in its text


class Row(NamedTuple):
    """One dialogue: token ids, the loss weight of each, and the soft targets: position -> probability by token id."""

    ids: list[int]
    weights: list[float]
    spreads: dict[int, dict[int, float]]


class Batch(NamedTuple):
    """Rows padded on the right, [B, L], and their soft targets: flat positions [n], probabilities [n, vocabulary]."""

    ids: torch.Tensor
    weights: torch.Tensor
    soft_at: torch.Tensor
    soft: torch.Tensor


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
        row = Row([], [], {})
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
    stream = islice(corpus.dialogues(recipe.seed + 1, recipe.neutral), skip * recipe.dialogues, None)
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
    )


def loss_of(model: Qwen2ForCausalLM, batch: Batch) -> torch.Tensor:
    """Weighted sum of the next token's cross entropy; logits are formed only where a weight asks for them.

    Rows are padded on the right, so causality needs no mask.
    """
    hidden = model.model(input_ids=batch.ids, use_cache=False).last_hidden_state
    weights = batch.weights.flatten()
    (counted,) = weights.nonzero(as_tuple=True)  # positions of targets; the first of a row, a role, never counts
    logits = model.lm_head(hidden.flatten(0, 1)[counted - 1]).float()
    losses = torch.nn.functional.cross_entropy(logits, batch.ids.flatten()[counted], reduction="none")
    soft = torch.searchsorted(counted, batch.soft_at)
    losses = losses.index_copy(0, soft, torch.nn.functional.cross_entropy(logits[soft], batch.soft, reduction="none"))
    return (losses * weights[counted]).sum()


def build_optimizers(model: Qwen2ForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for embeddings, head, norms and biases."""
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "layers." in name]
    table = model.get_input_embeddings().weight
    inside = {id(p) for p in (*matrices, table)}
    others = [p for p in model.parameters() if id(p) not in inside]
    muon = torch.optim.Muon(
        [{"params": matrices, "peak": recipe.muon_lr}],
        lr=recipe.muon_lr,
        momentum=0.95,
        weight_decay=recipe.weight_decay,
    )
    groups = [{"params": others, "peak": recipe.lr}, {"params": [table], "peak": recipe.embedding_lr}]
    adam = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95), weight_decay=0.0)
    return [muon, adam]


def schedule(done: float, recipe: Recipe) -> float:
    """Factor on the peak rate: linear warm-up, then a cosine to a hundredth; `done` is the share of tokens seen."""
    if done < recipe.warmup:
        return done / recipe.warmup + 0.01
    phase = (done - recipe.warmup) / (1 - recipe.warmup)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(phase, 1)))


def _save_checkpoint(path: Path, model: torch.nn.Module, optimizers: list, step: int, seen: int) -> None:
    state = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        for optimizer in optimizers:
            state |= {f"{key}.{name}": value for key, value in optimizer.state.get(p, {}).items()}
    save_file({**state, "progress": torch.tensor([step, seen])}, path)


def _load_checkpoint(path: Path, model: torch.nn.Module, optimizers: list) -> tuple[int, int]:
    state = load_file(path)
    step, seen = state.pop("progress").tolist()
    owner = {id(p): one for one in optimizers for group in one.param_groups for p in group["params"]}
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(state[f"model.{name}"])
            kinds = [key.removesuffix(f".{name}") for key in state if key.endswith(f".{name}")]
            owner[id(p)].state[p] = {kind: state[f"{kind}.{name}"] for kind in kinds if kind != "model"}
    return step, seen


def train(recipe: Recipe, out: Path, device: str = "cpu", every: int = 100) -> None:
    """Train and publish the model folder; continues from a checkpoint of the same recipe."""
    tokenizer = train_tokenizer(recipe)
    model = build_model(recipe, tokenizer).to(device)
    optimizers = build_optimizers(model, recipe)
    checkpoint = out.with_name(out.name + ".ckpt.safetensors")
    step, seen = _load_checkpoint(checkpoint, model, optimizers) if checkpoint.exists() else (0, 0)
    start, first, average = time.time(), seen, 0.0
    for parts in steps(Encoder(tokenizer, recipe), recipe, device, skip=step):
        if seen >= recipe.tokens:
            break
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = group["peak"] * schedule(seen / recipe.tokens, recipe)
        total = sum(float(batch.weights.sum()) for batch in parts)
        model.zero_grad(set_to_none=True)
        value = 0.0
        for batch in parts:
            loss = loss_of(model, batch) / total
            loss.backward()
            value += loss.item()
            seen += batch.ids.numel()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        average = 0.95 * average + 0.05 * value if average else value
        if step % every == 0:
            rate = (seen - first) / (time.time() - start)
            left = (recipe.tokens - seen) / rate / 60
            note(f"step {step}  {seen / 1e6:.2f}M tokens  loss {average:.3f}  {rate:.0f} tokens/s  {left:.0f} min left")
            _save_checkpoint(checkpoint, model, optimizers, step, seen)
    publish(model, tokenizer, recipe, out)
    checkpoint.unlink(missing_ok=True)


def publish(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, out: Path) -> None:
    """Write the model folder: float16 weights, tokenizer, template, generation defaults and `shl.json`."""
    out.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    record = {**RECOMMENDED, "recipe": asdict(recipe)}
    (out / "shl.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Command line of the trainer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=float, default=Recipe.tokens)
    parser.add_argument("--neutral", type=float, default=Recipe.neutral)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    train(Recipe(seed=args.seed, neutral=args.neutral, tokens=args.tokens), args.out, args.device)


if __name__ == "__main__":
    main()
