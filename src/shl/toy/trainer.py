"""Trains the embedded model `toy` from scratch on its corpus: full attention below, a short sliding window above.

    python -m shl.toy.trainer --out DIR [--tokens 10e6] [--neutral 0.4] [--seed 0]

The upper half of the blocks sees twelve positions only, so whatever the system message set must travel to each
later position in the residual stream; that is what makes the model steerable. A killed run continues from its
checkpoint (DIR.ckpt.safetensors) when the same line is run again.
"""

import argparse
import json
import math
import random
import time
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
    batch_tokens: int = 3072
    lr: float = 3e-3
    warmup: float = 0.05
    weight_decay: float = 0.05
    vocabulary: int = 1536
    hidden: int = 144
    intermediate: int = 432
    layers: int = 8
    heads: int = 6
    kv_heads: int = 3
    window: int = 12
    prompt_weight: float = 0.1
    digit_weight: float = 4.0


def train_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    """A byte-level BPE over a sample of the corpus; every digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\d"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    sample = islice(corpus.dialogues(recipe.seed, recipe.neutral), 6000)
    texts = (message["content"] for dialogue in sample for message in dialogue)
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
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="sdpa",
    )
    torch.manual_seed(recipe.seed)
    return Qwen2ForCausalLM(config)


class Encoder:
    """Turns dialogues into token ids and loss weights."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> None:
        self.tokenizer, self.recipe = tokenizer, recipe
        ids = tokenizer.convert_tokens_to_ids
        self.roles = {name.strip("<|>"): ids(name) for name in ROLES}
        self.end, self.think = ids(END), ids("<think>")
        self.digits = {ids(d) for d in "0123456789"}

    def __call__(self, dialogues: list[list[corpus.Message]]) -> list[tuple[list[int], list[float]]]:
        """Ids and weights for each dialogue: answers count in full, digits in them more, prompts a little."""
        contents = [m["content"] for d in dialogues for m in d]
        pieces = iter(self.tokenizer(contents, add_special_tokens=False)["input_ids"])
        return [self._dialogue(d, pieces) for d in dialogues]

    def _dialogue(self, dialogue: list[corpus.Message], pieces: Iterator[list[int]]) -> tuple[list[int], list[float]]:
        ids: list[int] = []
        weights: list[float] = []
        for message in dialogue:
            piece = next(pieces)
            answer = message["role"] == "assistant"
            ids += [self.roles[message["role"]], *piece, self.end]
            weights += [
                0.0,
                *(self._weights(piece) if answer else [self.recipe.prompt_weight] * len(piece)),
                1.0 if answer else 0.0,
            ]
        return ids, weights

    def _weights(self, piece: list[int]) -> list[float]:
        weights = [self.recipe.digit_weight if i in self.digits else 1.0 for i in piece]
        if piece[0] == self.think:  # `<think>\n` is given by the prompt, never predicted
            weights[:2] = [0.0, 0.0]
        return weights


def batches(encoder: Encoder, recipe: Recipe, device: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches of about `batch_tokens` tokens, rows of like length together: (ids, weights) [B, L]."""
    stream = corpus.dialogues(recipe.seed + 1, recipe.neutral)
    rng = random.Random(recipe.seed)
    while True:
        rows = sorted(encoder(list(islice(stream, 1024))), key=lambda row: len(row[0]))
        groups: list[list[tuple[list[int], list[float]]]] = [[]]
        for row in rows:
            if (len(groups[-1]) + 1) * len(row[0]) > recipe.batch_tokens:
                groups.append([])
            groups[-1].append(row)
        rng.shuffle(groups)
        for group in groups:
            yield (
                _pad([ids for ids, _ in group], device, torch.long),
                _pad([w for _, w in group], device, torch.float32),
            )


def _pad(rows: list, device: str, dtype: torch.dtype) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=dtype, device=device)


def loss_of(model: torch.nn.Module, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted cross entropy of the next token. Rows are padded on the right, so causality needs no mask."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    w = weights[:, 1:].flatten()
    return (losses * w).sum() / w.sum()


def learning_rate(done: float, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine to a hundredth; `done` is the share of tokens seen."""
    if done < recipe.warmup:
        return recipe.lr * (done / recipe.warmup + 0.01)
    phase = (done - recipe.warmup) / (1 - recipe.warmup)
    return recipe.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(phase, 1))))


def _save_checkpoint(
    path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int, seen: int
) -> None:
    state = {f"model.{k}": p.detach() for k, p in model.named_parameters()}
    for name, p in model.named_parameters():
        moments = optimizer.state[p]
        state |= {f"m.{name}": moments["exp_avg"], f"v.{name}": moments["exp_avg_sq"]}
    save_file({**state, "progress": torch.tensor([step, seen])}, path)


def _load_checkpoint(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    state = load_file(path)
    step, seen = state["progress"].tolist()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(state[f"model.{name}"])
            optimizer.state[p] = {
                "step": torch.tensor(float(step)),
                "exp_avg": state[f"m.{name}"].to(p),
                "exp_avg_sq": state[f"v.{name}"].to(p),
            }
    return step, seen


def train(recipe: Recipe, out: Path, device: str = "cpu", every: int = 100) -> None:
    """Train and publish the model folder; continues from a checkpoint of the same recipe."""
    tokenizer = train_tokenizer(recipe)
    model = build_model(recipe, tokenizer).to(device)
    decay = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=recipe.lr,
        betas=(0.9, 0.95),
    )
    checkpoint = out.with_name(out.name + ".ckpt.safetensors")
    step, seen = _load_checkpoint(checkpoint, model, optimizer) if checkpoint.exists() else (0, 0)
    stream = islice(batches(Encoder(tokenizer, recipe), recipe, device), step, None)
    start, first, average = time.time(), seen, 0.0
    for ids, weights in stream:
        if seen >= recipe.tokens:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(seen / recipe.tokens, recipe)
        loss = loss_of(model, ids, weights)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step, seen = step + 1, seen + ids.numel()
        average = 0.95 * average + 0.05 * loss.item() if average else loss.item()
        if step % every == 0:
            rate = (seen - first) / (time.time() - start)
            left = (recipe.tokens - seen) / rate / 60
            note(f"step {step}  {seen / 1e6:.2f}M tokens  loss {average:.3f}  {rate:.0f} tokens/s  {left:.0f} min left")
            _save_checkpoint(checkpoint, model, optimizer, step, seen)
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
