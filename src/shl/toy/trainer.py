"""Trains the embedded model `toy` from scratch on its corpus: full attention below, a short sliding window above.

    python -m shl.toy.trainer --out DIR [--tokens 10e6] [--neutral 0.4] [--seed 0]
    python -m shl.toy.trainer --out DIR --from toy --neutral 0.05        # a variant, from finished weights

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
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy, normalize
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from shl.core.console import note
from shl.core.locate import find
from shl.toy import corpus
from shl.toy.encode import CLASSES, Batch, Encoder, steps
from shl.toy.recipe import END, PAD, ROLES, TEMPLATE, Recipe, further

# What `shl` should use on this model unless told otherwise, and which judges it may ask.
RECOMMENDED = json.loads((Path(__file__).parent / "recommended.json").read_text(encoding="utf-8"))


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


class Trainee(torch.nn.Module):
    """The model, and a direction for each class of persona, which training alone needs."""

    def __init__(self, model: Qwen2ForCausalLM, recipe: Recipe) -> None:
        super().__init__()
        self.lm, self.recipe = model, recipe
        generator = torch.Generator().manual_seed(recipe.seed)
        self.directions = torch.nn.Parameter(torch.randn(1 + max(CLASSES.values()), recipe.hidden, generator=generator))

    @torch.no_grad()
    def aim(self, batches: list[Batch]) -> None:
        """Set the directions to where finished weights keep each persona: its mean state, less the mean of all."""
        states = [normalize(self._middle(self._run(batch)), dim=-1).flatten(0, 1) for batch in batches]
        owner = torch.cat([batch.personas.flatten() for batch in batches])
        told = torch.cat(states)
        means = torch.stack([told[owner == k].mean(0) for k in range(len(self.directions))])
        self.directions.copy_(means - means.mean(0))

    def _run(self, batch: Batch) -> Any:
        return self.lm.model(input_ids=batch.ids, use_cache=False, output_hidden_states=True)

    def _middle(self, out: Any) -> torch.Tensor:
        return out.hidden_states[self.recipe.layers // 2 + 1]

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Weighted sum of the next token's cross entropy, and the sum over positions of the persona's.

        The second makes the persona live at every position of the residual stream, as it does in large models: the
        middle block's state must lie, wherever it is read, towards the direction of the persona in force. Logits are
        formed only where a weight asks for them. Rows are padded on the right, so causality needs no mask.
        """
        out = self._run(batch)
        weights = batch.weights.flatten()
        (counted,) = weights.nonzero(as_tuple=True)  # positions of targets; the first of a row, a role, never counts
        logits = self.lm.lm_head(out.last_hidden_state.flatten(0, 1)[counted - 1]).float()
        losses = cross_entropy(logits, batch.ids.flatten()[counted], reduction="none")
        soft = torch.searchsorted(counted, batch.soft_at)
        losses = losses.index_copy(0, soft, cross_entropy(logits[soft], batch.soft, reduction="none"))
        middle = normalize(self._middle(out), dim=-1) @ normalize(self.directions, dim=-1).T
        told = cross_entropy(
            self.recipe.persona_scale * middle.flatten(0, 1), batch.personas.flatten(), reduction="sum"
        )
        return (losses * weights[counted]).sum(), told


def build_optimizers(trainee: Trainee, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for embeddings, head, norms, biases and directions."""
    matrices = [p for name, p in trainee.named_parameters() if p.dim() == 2 and "layers." in name]
    table = trainee.lm.get_input_embeddings().weight
    inside = {id(p) for p in (*matrices, table)}
    others = [p for p in trainee.parameters() if id(p) not in inside]
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


def _save_checkpoint(path: Path, trainee: Trainee, optimizers: list, step: int, seen: int) -> None:
    state = {f"model.{name}": p.detach() for name, p in trainee.named_parameters()}
    for name, p in trainee.named_parameters():
        for optimizer in optimizers:
            state |= {f"{key}.{name}": value for key, value in optimizer.state.get(p, {}).items()}
    recipe = {"recipe": json.dumps(asdict(trainee.recipe))}
    save_file({**state, "progress": torch.tensor([step, seen])}, path, recipe)


def _load_checkpoint(path: Path, trainee: Trainee, optimizers: list) -> tuple[int, int]:
    with safe_open(path, "pt") as file:
        if file.metadata() != {"recipe": json.dumps(asdict(trainee.recipe))}:
            raise SystemExit(f"{path} is the checkpoint of another recipe; delete it, or choose another --out")
    state = load_file(path)
    step, seen = state.pop("progress").tolist()
    owner = {id(p): one for one in optimizers for group in one.param_groups for p in group["params"]}
    with torch.no_grad():
        for name, p in trainee.named_parameters():
            p.copy_(state[f"model.{name}"])
            kinds = [key.removesuffix(f".{name}") for key in state if key.endswith(f".{name}")]
            owner[id(p)].state[p] = {kind: state[f"{kind}.{name}"] for kind in kinds if kind != "model"}
    return step, seen


def train(recipe: Recipe, out: Path, device: str = "cpu", every: int = 100) -> None:
    """Train and publish the model folder; continues from a checkpoint of the same recipe."""
    model, tokenizer = _start(recipe)
    trainee = Trainee(model, recipe).to(device)
    if recipe.begin:
        drawn = islice(steps(Encoder(tokenizer, recipe), recipe, device), 12)
        trainee.aim([batch for parts in drawn for batch in parts])
    optimizers = build_optimizers(trainee, recipe)
    checkpoint = out.with_name(out.name + ".ckpt.safetensors")
    step, seen = _load_checkpoint(checkpoint, trainee, optimizers) if checkpoint.exists() else (0, 0)
    start, first, average = time.time(), seen, torch.zeros(2)
    for parts in steps(Encoder(tokenizer, recipe), recipe, device, skip=step):
        if seen >= recipe.tokens:
            break
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = group["peak"] * schedule(seen / recipe.tokens, recipe)
        total = sum(float(batch.weights.sum()) for batch in parts)
        known = sum(int((batch.personas >= 0).sum()) for batch in parts)
        trainee.zero_grad(set_to_none=True)
        values = torch.zeros(2)
        for batch in parts:
            said, told = trainee(batch)
            (said / total + recipe.persona_weight * told / known).backward()
            values += torch.tensor([said.item() / total, told.item() / known])
            seen += batch.ids.numel()
        torch.nn.utils.clip_grad_norm_(trainee.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        average = 0.95 * average + 0.05 * values if average[0] else values
        if step % every == 0:
            rate = (seen - first) / (time.time() - start)
            left = (recipe.tokens - seen) / rate / 60
            note(
                f"step {step}  {seen / 1e6:.2f}M tokens  loss {average[0]:.3f}  persona {average[1]:.3f}  "
                f"{rate:.0f} tokens/s  {left:.0f} min left"
            )
            _save_checkpoint(checkpoint, trainee, optimizers, step, seen)
    publish(model, tokenizer, recipe, out)
    checkpoint.unlink(missing_ok=True)


def _start(recipe: Recipe) -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerFast]:
    """The model that training begins with: an untrained one, or the weights of another with its tokenizer."""
    if not recipe.begin:
        tokenizer = train_tokenizer(recipe)
        return build_model(recipe, tokenizer), tokenizer
    folder = find(recipe.begin).path
    return Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


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
    parser.add_argument("--from", dest="begin", default="", metavar="MODEL", help="train these weights on")
    parser.add_argument("--tokens", type=float)
    parser.add_argument("--neutral", type=float, default=Recipe.neutral)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    recipe = further(args.neutral, args.begin) if args.begin else Recipe(neutral=args.neutral)
    given = {name: getattr(args, name) for name in ("tokens", "seed") if getattr(args, name) is not None}
    train(replace(recipe, **given), args.out, args.device)


if __name__ == "__main__":
    main()
