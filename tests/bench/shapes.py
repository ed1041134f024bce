"""Time and peak memory of every command on a model of a real shape with random weights, against a 24 GB card.

    python tests/bench/shapes.py gemma-3-4b qwen3-4b       # on a GPU, in bfloat16
    python tests/bench/shapes.py --tiny gemma-3-4b         # the same lines on the CPU, to see that they run

Prints a markdown table. Random weights say nothing about quality; sizes, times and memory are those of the real model.
Needs about 10 GB of disk for a shape.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent))
from conftest import _TEXT, make_tokenizer

BUDGET = 24e9
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma-3-4b": (
        "Gemma3",
        {"vocab_size": 262208, "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
         "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "sliding_window": 1024},
    ),
    "qwen3-4b": (
        "Qwen3",
        {"vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
         "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True},
    ),
}  # fmt: skip
TINY = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip


def make_random(name: str, tiny: bool) -> Any:
    """The shape as a model with random weights, in bfloat16, on the GPU where there is one."""
    family, sizes = SHAPES[name]
    text = f"{family}TextConfig" if hasattr(transformers, f"{family}TextConfig") else f"{family}Config"
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = getattr(transformers, text)(**sizes | (TINY if tiny else {}) | ids)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return getattr(transformers, f"{family}ForCausalLM")._from_config(config, dtype=torch.bfloat16)


def make(name: str, folder: Path, tiny: bool) -> Path:
    """The shape with random weights, in bfloat16, and a tokenizer that covers a part of its vocabulary."""
    if (folder / "config.json").is_file():
        return folder
    model = make_random(name, tiny)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def lines(model: Path, out: Path, tiny: bool) -> list[list[str]]:
    """Every command of a round."""
    few = tiny or not torch.cuda.is_available()
    where = ["--dtype", "bfloat16"]
    less = ["-n", "7", "--free", "2"] if few else []
    vec, gen, keep, adapter = (str(out / name) for name in ("v.safetensors", "gen.jsonl", "keep.jsonl", "adapter"))
    off = [text for name in ("max-rep", "rel-ppl", "rel-tail-ppl", "rel-nats") for text in (f"--{name}", "none")]
    size = ["-n", "4"] if few else ["-n", "64"]
    tokens = ["--max-new-tokens", "16" if few else "256"]
    return [
        ["vector", "--model", str(model), "--persona", "authority", "-o", vec, *where],
        ["gen", "--vec", vec, "--coeff", "0,1", *size, *tokens, "-o", gen, *where],
        ["score", gen, "-o", str(out / "scored.jsonl"), *where],
        ["filter", gen, "--min-tokens", "1", *off, "-o", keep],
        ["train", str(texts(out, 4 if few else 64)), "--epochs", "1" if few else "3", "-o", adapter, *where],
        ["bake", adapter, "-o", str(out / "baked"), "--dtype", "bfloat16"],
        ["bake", adapter, "--as", "lora", "-o", str(out / "stacked"), "--dtype", "bfloat16"],
        ["eval", "--adapter", adapter, *less, "-o", str(out / "eval.json"), *where],
    ]  # fmt: skip


def texts(out: Path, n: int) -> Path:
    """Completions of some hundred tokens: random weights write hardly any that a tokenizer could read again."""
    words = [word for text in _TEXT for word in text.split()]
    rng, path = random.Random(0), out / "texts.jsonl"
    with path.open("w", encoding="utf-8") as handle:
        for i in range(n):
            prompt = [{"role": "user", "content": f"Case {i}: who said so?"}]
            said = " ".join(rng.choices(words, k=16 if n < 64 else 160))
            record = {
                "id": f"{i}/1/0",
                "prompt": prompt,
                "completion": [{"role": "assistant", "content": said}],
                "coeff": 1.0,
            }
            handle.write(json.dumps(record) + "\n")
    return path


def measure(line: list[str]) -> tuple[float, float]:
    """Seconds and peak bytes of one command, in this process: of the GPU, or without one of the process so far."""
    from shl.cli import main

    gc.collect()
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    begun = time.monotonic()
    sys.argv = ["shl", *line, "-f"]
    try:
        main()
    except SystemExit as done:
        if done.code:
            raise SystemExit(f"shl {' '.join(line)} ended with {done.code}") from None
    peak = torch.cuda.max_memory_reserved() if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return time.monotonic() - begun, float(peak)


def run() -> None:
    """Measure the shapes that are named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shapes", nargs="+", choices=sorted(SHAPES))
    parser.add_argument("--out", type=Path, default=Path("runs/shapes"))
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    place = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{place}, torch {torch.__version__}, transformers {transformers.__version__}, bfloat16\n")
    table = ["| shape | command | seconds | peak GB | of 24 GB |", "| --- | --- | --- | --- | --- |"]
    for name in args.shapes:
        model = make(name, args.out / name / ("tiny" if args.tiny else "model"), args.tiny)
        for line in lines(model, args.out / name, args.tiny):
            seconds, peak = measure(line)
            told = " ".join(line[:1] + (["--as", "lora"] if "lora" in line else []))
            table.append(f"| {name} | `shl {told}` | {seconds:.1f} | {peak / 1e9:.1f} | {peak / BUDGET:.0%} |")
            print(table[-1], file=sys.stderr, flush=True)
    print("\n" + "\n".join(table))


if __name__ == "__main__":
    run()
