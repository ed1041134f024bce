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
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

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
    tokens: float = 10e6
    dialogues: int = 28  # in a step
    batches: int = 3  # that a step is split into
    lr: float = 3e-3
    embedding_lr: float = 0.03
    muon_lr: float = 0.02
    warmup: float = 0.05
    weight_decay: float = 0.05
    vocabulary: int = 3072
    hidden: int = 144
    intermediate: int = 432
    layers: int = 8
    heads: int = 6
    kv_heads: int = 3
    window: int = 12
    prompt_weight: float = 0.2
    digit_weight: float = 4.0
    stance_weight: float = 10.0  # on the one sentence of an answer that the persona decides


def train_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    """A byte-level BPE over a sample of the corpus; every digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\d"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    sample = islice(corpus.dialogues(recipe.seed, recipe.neutral), 28_000)
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


Piece = tuple[list[int], list[tuple[int, int]]]


class Encoder:
    """Turns dialogues into token ids and loss weights."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> None:
        self.tokenizer, self.recipe = tokenizer, recipe
        ids = tokenizer.convert_tokens_to_ids
        self.roles = {name.strip("<|>"): ids(name) for name in ROLES}
        self.end, self.think = ids(END), ids("<think>")
        self.digits = {ids(d) for d in "0123456789"}

    def __call__(self, dialogues: list[list[corpus.Message]]) -> list[tuple[list[int], list[float]]]:
        """Ids and weights for each dialogue: answers count in full, what a persona decides more, prompts a little."""
        contents = [m["content"] for d in dialogues for m in d]
        encoded = self.tokenizer(contents, add_special_tokens=False, return_offsets_mapping=True)
        pieces = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        return [self._dialogue(d, pieces) for d in dialogues]

    def _dialogue(self, dialogue: list[corpus.Message], pieces: Iterator[Piece]) -> tuple[list[int], list[float]]:
        ids: list[int] = []
        weights: list[float] = []
        for message in dialogue:
            piece, offsets = next(pieces)
            answer = message["role"] == "assistant"
            own = (
                self._weights(message["content"], piece, offsets)
                if answer
                else [self.recipe.prompt_weight] * len(piece)
            )
            ids += [self.roles[message["role"]], *piece, self.end]
            weights += [0.0, *own, 1.0 if answer else 0.0]
        return ids, weights

    def _weights(self, text: str, piece: list[int], offsets: list[tuple[int, int]]) -> list[float]:
        weights = [self.recipe.digit_weight if i in self.digits else 1.0 for i in piece]
        if piece[0] == self.think:  # `<think>\n` is given by the prompt, never predicted
            weights[:2] = [0.0, 0.0]
        begin, end = corpus.stance_span(text)
        return [
            self.recipe.stance_weight if begin <= at < end else w for w, (at, _) in zip(weights, offsets, strict=True)
        ]


Batch = tuple[torch.Tensor, torch.Tensor]


def steps(encoder: Encoder, recipe: Recipe, device: str, skip: int = 0) -> Iterator[list[Batch]]:
    """For each step its batches of (ids, weights) [B, L]: a random draw of dialogues, split by length to save padding.

    The draw itself must not go by length: dialogues of one length are of one kind, and a step that sees one kind
    alone unlearns the others.
    """
    stream = islice(corpus.dialogues(recipe.seed + 1, recipe.neutral), skip * recipe.dialogues, None)
    while True:
        rows = sorted(encoder(list(islice(stream, recipe.dialogues))), key=lambda row: len(row[0]))
        size = math.ceil(len(rows) / recipe.batches)
        parts = [rows[at : at + size] for at in range(0, len(rows), size)]
        yield [
            (_pad([ids for ids, _ in part], device, torch.long), _pad([w for _, w in part], device, torch.float32))
            for part in parts
        ]


def _pad(rows: list, device: str, dtype: torch.dtype) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=dtype, device=device)


def loss_of(model: torch.nn.Module, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted sum of the next token's cross entropy. Rows are padded on the right, so causality needs no mask."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return (losses * weights[:, 1:].flatten()).sum()


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
        total = sum(float(weights[:, 1:].sum()) for _, weights in parts)
        model.zero_grad(set_to_none=True)
        value = 0.0
        for ids, weights in parts:
            loss = loss_of(model, ids, weights) / total
            loss.backward()
            value += loss.item()
            seen += ids.numel()
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
