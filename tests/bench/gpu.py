"""Decoding and training on a GPU, at 4B shapes with random weights in bfloat16, against what the card can do.

    python tests/bench/gpu.py decode gemma-3-4b qwen3-4b     # tokens a second by batch, against transformers' generate
    python tests/bench/gpu.py profile gemma-3-4b             # where the time of a step goes
    python tests/bench/gpu.py train gemma-3-4b --batch-size 8 4      # 64 completions of 512 tokens, six epochs

The bound of decoding is the time in which the card copies what a step has to read: every weight once, and the keys and
values of the tokens before it, which is on average the prompt and half of the answer.

That of training is the time of its products at the rate of a large product of matrices: the blocks forward once for the
reference; then, each epoch, forward and backward from the first trained block on, and the head over completions forward
and backward, and once more for the reference where the barrier is open. Adapters themselves are left out.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from bare import bare, trained
from shapes import SHAPES, make_random

PROMPT = 64
CUDA = torch.cuda.is_available()


def wait() -> float:
    """The time, when everything before is done."""
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def copy_rate(n: int) -> float:
    """Bytes a second, read and written, of a copy on the device."""
    a = torch.randint(0, 255, (n,), dtype=torch.uint8, device="cuda" if CUDA else "cpu")
    b = torch.empty_like(a)
    return 2 * n / min(_timed(lambda: b.copy_(a)) for _ in range(6))


def product_rate(n: int) -> float:
    """Operations a second of a product of two square matrices in bfloat16."""
    a, b = (torch.randn(n, n, dtype=torch.bfloat16, device="cuda" if CUDA else "cpu") for _ in range(2))
    return 2 * n**3 / min(_timed(lambda: a @ b) for _ in range(6))


def _timed(work: Any) -> float:
    began = wait()
    work()
    return wait() - began


def loaded_of(name: str, tiny: bool) -> Any:
    """The shape with random weights, without files."""
    model = make_random(name, tiny).eval().requires_grad_(False)
    model.generation_config.eos_token_id = None
    return bare(model, _Words())


class _Words:
    """As much of a tokenizer as decoding asks for."""

    eos_token_id = bos_token_id = None
    chat_template = None

    def decode(self, ids: list[int], **kwargs: Any) -> str:
        return " ".join(map(str, ids))


def prompts(n: int, vocab: int) -> list[list[int]]:
    """Random ids."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, vocab, (n, PROMPT), generator=generator).tolist()


def ours(loaded: Any, rows: int, tokens: int, batch: int | None = None) -> None:
    """Steered at four doses in one batch, sampled; rows that do not fit into it wait, and enter as others end."""
    from shl.core.decode import Sampling, decode
    from shl.core.hooks import Steering

    vector = {loaded.n_blocks // 2: torch.randn(loaded.hidden, generator=torch.Generator().manual_seed(0))}
    sampling = Sampling(max_new_tokens=tokens, endless=True)
    with Steering(loaded, vector) as steering:
        said = decode(
            loaded, prompts(rows, loaded.text_config.vocab_size), seeds=range(rows), sampling=sampling,
            steering=steering, coeffs=[(0.0, 0.5, 1.0, 2.0)[i % 4] for i in range(rows)], batch_size=batch or rows,
        )  # fmt: skip
    assert all(one.n_tokens == tokens for one in said)


def theirs(loaded: Any, rows: int, tokens: int) -> None:
    """transformers' generate, sampled, unsteered."""
    ids = torch.tensor(prompts(rows, loaded.text_config.vocab_size), device=loaded.device)
    with torch.inference_mode():
        out = loaded.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=True, top_k=64,
            top_p=0.95, pad_token_id=0,
        )  # fmt: skip
    assert out.shape[1] == PROMPT + tokens


def bytes_of_step(loaded: Any, rows: int, tokens: int) -> float:
    """What has to be read for one token of each row: weights, and the states of the tokens before, on average."""
    model, config = loaded.model, loaded.text_config
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    if not config.tie_word_embeddings:
        weights -= model.get_input_embeddings().weight.nbytes
    state = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * loaded.dtype.itemsize
    return weights + rows * state * (PROMPT + tokens / 2)


def decode_bench(args: argparse.Namespace) -> None:
    """A table of tokens a second."""
    rate = copy_rate(int(4e9) if CUDA else int(1e8))
    print(f"copy: {rate / 1e12:.2f} TB/s\n")
    print("| shape | rows | shl tok/s | generate tok/s | shl / generate | bound tok/s | of the bound |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name in args.shapes:
        loaded = loaded_of(name, args.tiny)
        ours(loaded, 2, 16)  # compiles kernels
        theirs(loaded, 2, 4)
        for rows in args.rows:
            print(f"| {name} | {rows} | {' | '.join(_row(loaded, rows, args, rate))} |", flush=True)
        del loaded
        if CUDA:
            torch.cuda.empty_cache()


def _row(loaded: Any, rows: int, args: argparse.Namespace, rate: float) -> list[str]:
    """What the table tells of one batch."""
    prompts = rows * args.waves
    whole = min(_timed(lambda: ours(loaded, prompts, args.tokens, rows)) for _ in range(2))
    peer = _timed(lambda: theirs(loaded, rows, args.peer_tokens)) / args.peer_tokens
    bound = rate / bytes_of_step(loaded, rows, args.tokens) * rows
    mine = prompts * args.tokens / whole
    return [f"{mine:.0f}", f"{rows / peer:.0f}", f"{mine * peer / rows:.1f}", f"{bound:.0f}", f"{mine / bound:.0%}"]


def profile_bench(args: argparse.Namespace) -> None:
    """Kernels of a decoding call by the time that they take."""
    for name in args.shapes:
        loaded, rows = loaded_of(name, args.tiny), args.rows[0]
        ours(loaded, rows, 16)
        told = told_by_profiler(lambda n=rows, model=loaded: ours(model, n, args.tokens))
        print(f"{name}, {rows} rows, {args.tokens} tokens\n" + told)
        del loaded


def told_by_profiler(work: Any) -> str:
    """The 25 operations that take most time."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if CUDA else [])]) as seen:
        began = wait()
        work()
        lines = [f"{wait() - began:.2f} s"]
    took = "self_device_time_total" if CUDA else "self_cpu_time_total"
    for one in sorted(seen.key_averages(), key=lambda event: -getattr(event, took))[:25]:
        lines.append(f"{getattr(one, took) / 1e3:9.1f} ms {one.count:7d} x  {one.key[:100]}")
    return "\n".join(lines)


def operations(loaded: Any, first: int, rows: int, completion: int, epochs: int, opened: bool) -> float:
    """What the products of a training come to, see above."""
    blocks = [sum(p.numel() for p in block.parameters() if p.dim() == 2) for block in loaded.blocks]
    head = loaded.model.get_output_embeddings().weight.numel() * rows * completion
    tokens = rows * (PROMPT + completion)
    return 2 * sum(blocks) * tokens + epochs * (4 * sum(blocks[first:]) * tokens + (6 if opened else 4) * head)


def train_bench(args: argparse.Namespace) -> None:
    """Time and memory of a round's training, barrier shut and open."""
    rate = product_rate(8192 if CUDA else 512)
    rows, completion, epochs = (8, 16, 2) if args.tiny else (64, 512, args.epochs)
    print(f"product: {rate / 1e12:.0f} TFLOP/s; {rows} completions of {completion} tokens, {epochs} epochs\n")
    print("| shape | batch | barrier | blocks computed | s | completion tok/s | peak GB | model alone | of the bound |")
    print("| --- | ---: | --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for name in args.shapes:
        loaded = loaded_of(name, args.tiny)
        alone = torch.cuda.memory_allocated() if CUDA else 0
        fit(loaded, rows // 4, completion, 1, True, False, args.batch_size[0])  # compiles and warms
        if args.profile:
            told = told_by_profiler(partial(fit, loaded, rows // 4, completion, 1, True, False, args.batch_size[0]))
            print(f"{name}: an epoch of {rows // 4} rows, barrier open\n{told}\n", file=sys.stderr)
        for size in args.batch_size:
            for opened, twice in ((True, False), (False, False), (True, True)):
                if CUDA:
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                seconds, first = fit(loaded, rows, completion, epochs, opened, twice, size)
                peak = torch.cuda.max_memory_reserved() if CUDA else 0
                bound = operations(loaded, first, rows, completion, epochs, opened) / rate
                print(
                    f"| {name} | {size} | {'open' if opened else 'shut'} | {'twice' if twice else 'once'} "
                    f"| {seconds:.1f} | {rows * completion * epochs / seconds:.0f} | {peak / 1e9:.1f} "
                    f"| {alone / 1e9:.1f} | {bound / seconds:.0%} |",
                    flush=True,
                )
        del loaded


def fit(
    loaded: Any, rows: int, completion: int, epochs: int, opened: bool, twice: bool, size: int
) -> tuple[float, int]:
    """Seconds of the loop of `shl train` at its defaults, and the first block trained."""
    from shl.core.defaults import TrainConfig
    from shl.core.lora import target_modules

    barrier = {"tau": 0.0, "lam": 1e-3} if opened else {"tau": 1e9}
    cfg = TrainConfig(epochs=epochs, batch_size=size, holdout=0.0, checkpointing=twice, **barrier)
    vocab = loaded.text_config.vocab_size
    texts = torch.randint(3, vocab, (rows, PROMPT + completion), generator=torch.Generator().manual_seed(2)).tolist()
    modules = target_modules(loaded, cfg.layers, cfg.targets)
    began = wait()
    trained(loaded, cfg, [(row[:PROMPT], row[PROMPT:]) for row in texts], modules)
    return wait() - began, min(int(name.split("layers.")[1].split(".")[0]) for name in modules)


def main() -> None:
    """Run a part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["decode", "profile", "train"])
    parser.add_argument("shapes", nargs="+", choices=sorted(SHAPES))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 16, 64, 256])
    parser.add_argument("--waves", type=int, default=1, help="prompts for each row of the batch")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--peer-tokens", type=int, default=64, help="new tokens of generate, whose rate hardly changes")
    parser.add_argument("--batch-size", nargs="+", type=int, default=[8], help="of train")
    parser.add_argument("--epochs", type=int, default=6, help="of train")
    parser.add_argument("--profile", action="store_true", help="of train: where the time of an epoch goes")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that it runs")
    args = parser.parse_args()
    print(f"{torch.cuda.get_device_name() if CUDA else 'CPU'}, torch {torch.__version__}, bfloat16")
    {"decode": decode_bench, "profile": profile_bench, "train": train_bench}[args.part](args)


if __name__ == "__main__":
    main()
