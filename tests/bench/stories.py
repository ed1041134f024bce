"""The whole loop on a story model that has no chat template: personas are openings of stories.

    python tests/bench/stories.py MODEL [--out runs/stories] [--seeds 100 101 102]

MODEL is a folder with a small causal language model of children's stories, such as stories260K. Each seed runs
`shl vector --pairs`, gen, filter, train, bake and eval as commands, and then reads the trait where it cannot be talked
around: ln p(a glad ending) - ln p(a sad ending) behind openings that no step has seen, of every arm.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

NAMES = ["Lily", "Tom", "Mia", "Ben", "Sara", "Max", "Anna", "Tim"]
PLACES = ["the park", "the garden", "the shop", "the beach", "her room", "the farm"]
GLAD = ["was very happy and laughed all day.", "had a lot of fun with her friends.", "smiled and was glad."]
SAD = ["was very sad and cried all day.", "was all alone and had no friends.", "cried and was scared."]
OPENINGS = [
    "Once upon a time, {} went to {}.",
    "One day, {} was at {}.",
    "{} liked to play at {}.",
    "In the morning {} ran to {}.",
]
WORDS = {"glad": ("happy", "fun", "smil", "glad", "laugh"), "sad": ("sad", "cry", "cri", "scared", "alone")}
ENDINGS = [("happy", "sad"), ("glad", "scared"), ("so happy", "so sad"), ("having fun", "crying")]


def opening(i: int) -> str:
    """One of 192 neutral openings."""
    return OPENINGS[i % 4].format(NAMES[i // 4 % 8], PLACES[i // 32 % 6])


def shl(*argv: object, ok: tuple[int, ...] = (0,)) -> None:
    """One command; its speech goes to stderr."""
    done = subprocess.run([sys.executable, "-m", "shl", *map(str, argv)], check=False)
    if done.returncode not in ok:
        raise SystemExit(f"shl {argv[0]} ended with {done.returncode}")


def write(path: Path, rows: list[dict]) -> Path:
    """JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def loop(model: str, out: Path, seed: int) -> dict[str, object]:
    """One seed through every command; what it moved."""
    out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    order = rng.permutation(192)
    fit, ask, held = order[:64], order[64:128], order[128:]
    pairs = [
        {side: f"{opening(i)} {NAMES[i // 4 % 8]} {ends[i % 3]} Then" for side, ends in (("pos", GLAD), ("neg", SAD))}
        for i in fit
    ]
    prompts = write(out / "prompts.jsonl", [{"user": opening(i)} for i in ask])
    vec, here = out / "v.safetensors", ["--model", model]
    shl("vector", *here, "--pairs", write(out / "pairs.jsonl", pairs), "--layers", "3", "-o", vec, "--seed", seed, "-f")
    common = ["--seed", seed, "-q"]
    shl(
        "gen",
        prompts,
        "--vec",
        vec,
        "--coeff",
        "0,2,3,4",
        "--samples",
        2,
        "--max-new-tokens",
        80,
        *common,
        "-f",
        "-o",
        out / "gen.jsonl",
    )
    shl("filter", out / "gen.jsonl", "-f", "-o", out / "keep.jsonl", "--min-keep", 16, ok=(0, 3))
    arms: dict[str, list[object]] = {"base": here}
    # placebo: the same training on what the model says without steering
    lines = (out / "gen.jsonl").read_text(encoding="utf-8").splitlines()
    controls = write(out / "controls.jsonl", [row for line in lines if (row := json.loads(line))["coeff"] == 0])
    train = ["--rank", 8, "--lr", "1e-3", "--epochs", 4, *common, "-f", "-o"]
    for arm in ("placebo", "nll", "kl_rev"):
        data, reg = (controls, "nll") if arm == "placebo" else (out / "keep.jsonl", arm)
        adapter = out / arm
        shl("train", data, "--reg", reg, *(["--include-controls"] if arm == "placebo" else []), *train, adapter)
        shl("bake", adapter, "-q", "-f", "-o", out / f"{arm}-baked")
        arms[arm] = ["--model", out / f"{arm}-baked"]
    small = ["--limit", 14, "--free", 4, "--max-new-tokens", 40, "--json-tokens", 8, "--bootstrap", 20]
    shl("eval", *here, *small, *common, "-f", "-o", out / "base.json")
    shl("eval", "--model", out / "kl_rev-baked", *small, *common, "-f", "-o", out / "healed.json")
    return {**readings(model, out, vec, held), "kept": sum(1 for _ in open(out / "keep.jsonl", encoding="utf-8"))}


def readings(model: str, out: Path, vec: Path, held: np.ndarray) -> dict[str, float]:
    """The trait of each arm, and the perplexity of its own free stories under the base model."""
    from shl.core.decode import Sampling, decode
    from shl.core.hooks import Steering
    from shl.core.models import load
    from shl.core.scores import nll_per_token, score
    from shl.core.vectors import Vector

    base = load(model, device="cpu")
    vector = Vector.load(vec)
    asked = [[{"role": "user", "content": opening(i)}] for i in held]
    found = {}
    for arm in ("base", "steered 2", "steered 4", "steered 8", "placebo", "nll", "kl_rev"):
        loaded = base if arm == "base" or arm.startswith("steered") else load(str(out / f"{arm}-baked"), device="cpu")
        with Steering(loaded, vector.layers) as steering:
            steering.set([float(arm.split()[1]) if arm.startswith("steered") else 0.0])
            gap = [
                -sum(float(n.sum()) for n in nll_per_token(loaded, *_endings(loaded, asked, glad)))
                + sum(float(n.sum()) for n in nll_per_token(loaded, *_endings(loaded, asked, sad)))
                for glad, sad in ENDINGS
            ]
            said = decode(
                loaded, [loaded.encode_prompt(one) for one in asked], seeds=list(range(len(asked))),
                sampling=Sampling(max_new_tokens=80),
            )  # fmt: skip
        found[arm] = float(np.mean(gap)) / len(asked)
        ppl = [one["ppl"] for one in score(base, asked, [one.text for one in said]) if one["ppl"]]
        for name, words in WORDS.items():
            found[f"{arm} {name}"] = float(np.mean([any(word in one.text for word in words) for one in said]))
        found[f"{arm} ppl p90"] = float(np.quantile(ppl, 0.9))
    return found


def _endings(loaded: Any, asked: list, word: str) -> tuple[list, list]:
    before = loaded.encode_completion("At the end of the day everybody was", end=False)
    after = loaded.encode_completion(f" {word}.", end=False)
    return [loaded.encode_prompt(one) + before for one in asked], [after for _ in asked]


def main() -> None:
    """Run the seeds, and print one row for each and the mean."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, default=Path("runs/stories"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[100, 101, 102])
    args = parser.parse_args()
    rows = [loop(args.model, args.out / f"s{seed}", seed) for seed in args.seeds]
    for name in rows[0]:
        values = np.array([row[name] for row in rows], dtype=float)
        print(f"{name:22} {values.mean():8.3f} +- {values.std():.3f}   {' '.join(f'{v:.3f}' for v in values)}")


if __name__ == "__main__":
    main()
