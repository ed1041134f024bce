"""The decode loop against transformers' generate and a batch-one loop with hooks; extraction against two toolkits.

A random Llama of 58 million parameters in float32, prompts of 24 to 40 random tokens, top-k 64 and top-p 0.95 sampling;
nothing ends early.

- shl-mixed: steering at four doses in one batch; shl-scored: the same with every completion scored under the base;
  shl-one: all rows at one dose; shl-plain: no vector. The loop of `shl gen`, every row with noise of its own.
- generate: transformers' generate, batched, left-padded, unsteered.
- single: a hook that adds the vector, generate at batch one, a prompt at a time: what most steering code does.
- shl-vector, repeng, steering-vectors: a vector from 256 pairs at every block that the toolkit reads. A peer runs in an
  environment of its own, made at first use.

Arms run in turn, and that again for each repeat; ratios are medians of the pairs within a repeat, with their range.
Seconds are those of the processor where there is one process, so that a busy machine disturbs little.

    python tests/bench/gen.py                       # decoding
    python tests/bench/gen.py --extraction          # extraction, with the peers
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
VOCAB, DOSES = 32_000, (0.0, 0.5, 1.0, 2.0)
DECODING = ("shl-mixed", "shl-scored", "shl-one", "shl-plain", "generate", "single")
EXTRACTION = ("shl-vector", "repeng", "steering-vectors")
PEERS = {  # what an environment of its own needs
    "repeng": ("torch==2.13.0", "repeng==0.4.0", "numpy<2", "transformers<5"),
    "steering-vectors": ("torch==2.13.0", "steering-vectors==0.12.2", "transformers<5", "numpy<3"),
}


def make_model(folder: Path) -> None:
    """Random weights with a tokenizer of as many words, as a folder that every toolkit loads."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=512, initializer_range=0.1, tie_word_embeddings=False,
        pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    words = {"<pad>": 0, "<s>": 1, **{f"w{i}": i for i in range(2, VOCAB)}}
    raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>").save_pretrained(folder)
    written = folder / "tokenizer_config.json"  # in the words of transformers 4, which the peers have
    config_of = json.loads(written.read_text(encoding="utf-8"))
    written.write_text(json.dumps(config_of | {"tokenizer_class": "PreTrainedTokenizerFast"}), encoding="utf-8")


def texts(n: int, seed: int, low: int, high: int) -> list[str]:
    """Random words, a token each."""
    rng = random.Random(seed)
    return [" ".join(f"w{rng.randrange(2, VOCAB)}" for _ in range(rng.randint(low, high))) for _ in range(n)]


# --- decoding ---


def arms(loaded: Any, args: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """What each arm does once."""
    import torch

    from shl.core.below import Passed
    from shl.core.decode import decode
    from shl.core.hooks import Steering
    from shl.core.sampling import Sampling
    from shl.core.scores import nll_per_token

    asked = [loaded.encode_prompt([{"role": "user", "content": text}]) for text in texts(args.rows, 1, 24, 40)]
    vector = {4: torch.randn(loaded.hidden, generator=torch.Generator().manual_seed(0))}
    sampling = Sampling(max_new_tokens=args.tokens)
    mixed = [DOSES[i % len(DOSES)] for i in range(args.rows)]

    def ours(coeffs: list[float] | None, scored: bool = False) -> None:
        passed = Passed(loaded, min(vector)) if scored else None  # as shl.gen does for a model without a chain
        with passed or nullcontext(), Steering(loaded, vector) as steering:
            said = decode(
                loaded, asked, seeds=list(range(args.rows)), sampling=sampling, batch_size=args.rows,
                steering=steering if coeffs else None, coeffs=coeffs, passed=passed,
            )  # fmt: skip
            assert all(one.n_tokens == args.tokens for one in said)
            steering.fired = 1
        if passed:
            nll_per_token(loaded, asked, [one.ids for one in said], args.rows, passed.below)

    def theirs(rows: list[list[int]], coeff: float | None = None) -> None:
        from shl.core.batches import left_pad

        ids, mask = left_pad(rows, loaded.device)
        hook = loaded.blocks[4].register_forward_hook(lambda m, a, out: out + coeff * vector[4]) if coeff else None
        with torch.inference_mode():
            out = loaded.model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=args.tokens, do_sample=True, top_k=64, top_p=0.95
            )
        if hook:
            hook.remove()
        assert out.shape[1] == ids.shape[1] + args.tokens

    def single() -> None:
        for row, coeff in zip(asked[: args.single], mixed, strict=False):
            theirs([row], coeff)

    return {
        "shl-mixed": lambda: ours(mixed),
        "shl-scored": lambda: ours(mixed, True),
        "shl-one": lambda: ours([1.0] * args.rows),
        "shl-plain": lambda: ours(None),
        "generate": lambda: theirs(asked),
        "single": single,
    }


def decoding(folder: Path, args: argparse.Namespace) -> list[dict[str, float]]:
    """Tokens per second of each arm, one object a repeat."""
    import torch

    from shl.core.models import load

    torch.set_num_threads(args.threads)
    loaded = load(str(folder), device="cpu", dtype="float32")
    every = arms(loaded, args)
    for name in args.arms:  # once for warmth
        every[name]() if name != "single" else None
    found = []
    for repeat in range(args.repeats):
        order = list(args.arms)
        random.Random(repeat).shuffle(order)
        rates = {}
        for name in order:
            started = _clock(args.threads)
            every[name]()
            rows = args.single if name == "single" else args.rows
            rates[name] = rows * args.tokens / (_clock(args.threads) - started)
        found.append(rates)
        print(f"repeat {repeat}: " + ", ".join(f"{name} {rates[name]:.0f}" for name in args.arms), flush=True)
    return found


def _clock(threads: int) -> float:
    return time.process_time() if threads == 1 else time.perf_counter()


# --- extraction ---

_REPENG = """
from repeng import ControlModel, ControlVector, DatasetEntry
control = ControlModel(model, list(range(len(model.model.layers))))
work = lambda: ControlVector.train(control, tokenizer, [DatasetEntry(p, n) for p, n in pairs], batch_size=32)
"""
_STEERING_VECTORS = """
from steering_vectors import train_steering_vector
tokenizer.padding_side = "right"
work = lambda: train_steering_vector(model, tokenizer, pairs, batch_size=32)
"""
_SHL = """
from shl.core.defaults import VectorConfig
from shl.core.models import load
from shl.core.records import Pair
from shl.vector import extract_pairs
loaded = load(folder, device="cpu", dtype="float32")
both = [Pair(p, n) for p, n in pairs]
work = lambda: extract_pairs(loaded, both, VectorConfig(layers="0.45:0.55"))
"""
_CHILD = """
import json, sys, time
folder, path, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
import torch
torch.set_num_threads(threads)
pairs = [tuple(pair) for pair in json.load(open(path))]
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(folder).float().eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
{toolkit}
clock = time.process_time if threads == 1 else time.perf_counter
started = clock()
work()
print("seconds", clock() - started)
"""


def extraction(folder: Path, args: argparse.Namespace) -> list[dict[str, float]]:
    """Vectors per second of each toolkit, one object a repeat; loading is not counted."""
    shared = texts(1, 7, 30, 30)[0]
    sides = [(f"{shared} w2 {text}", f"{shared} w3 {text}") for text in texts(256, 2, 20, 60)]
    path = folder / "pairs.json"
    path.write_text(json.dumps(sides), encoding="utf-8")
    code = {"shl-vector": _SHL, "repeng": _REPENG, "steering-vectors": _STEERING_VECTORS}
    found = []
    for repeat in range(args.repeats):
        rates = {}
        for name in args.arms:
            python = sys.executable if name == "shl-vector" else str(environment(name, Path(args.environments)))
            child = _CHILD.replace("{toolkit}", code[name])
            done = subprocess.run(
                [python, "-c", child, str(folder), str(path), str(args.threads)], capture_output=True, text=True
            )
            if done.returncode:
                raise SystemExit(f"{name}: {done.stderr[-1500:]}")
            rates[name] = 1 / float(done.stdout.rpartition("seconds")[2])
        found.append(rates)
        print(f"repeat {repeat}: " + ", ".join(f"{n} {1 / r:.2f} s" for n, r in rates.items()), flush=True)
    return found


def environment(peer: str, folder: Path) -> Path:
    """The interpreter of the peer's environment."""
    python = folder / peer / "bin" / "python"
    if not (folder / peer / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder / peer)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *PEERS[peer]], check=True)
        (folder / peer / "ready").touch()
    return python


def ratios(found: list[dict[str, float]], first: str, second: str) -> str:
    """Median and range over repeats of one rate over another."""
    values = sorted(rates[first] / rates[second] for rates in found)
    return f"{first} / {second}: {median(values):.3f} ({values[0]:.3f} to {values[-1]:.3f}, n = {len(values)})"


def main() -> None:
    """Print rates and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extraction", action="store_true", help="vectors instead of decoding")
    parser.add_argument("--arms", nargs="+")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--rows", type=int, default=64, help="prompts of a batch")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each")
    parser.add_argument("--single", type=int, default=4, help="prompts of the batch-one loop: it is slow")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--environments", default="build/bench", help="where the peers are installed")
    args = parser.parse_args()
    args.arms = args.arms or list(EXTRACTION if args.extraction else DECODING)
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        found = (extraction if args.extraction else decoding)(Path(folder), args)
    first = args.arms[0]
    for name in args.arms:
        print(f"{name}: {median(rates[name] for rates in found):.4g} a second")
    for name in args.arms[1:]:
        print(ratios(found, first, name))
    if "shl-scored" in args.arms and "generate" in args.arms:
        print(ratios(found, "shl-scored", "generate"))


if __name__ == "__main__":
    main()
