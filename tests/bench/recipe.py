"""A round of the recipe in docs/results.md at a real size with random weights: time and peak memory by command.

    python tests/bench/recipe.py gemma-3-4b qwen3-4b --cap 24      # on a GPU, which refuses more than 24 GB
    python tests/bench/recipe.py gemma-3-4b --tiny                 # on the CPU, to see that it runs

`shl new` writes the run folder and `make` runs it, each command in a process of its own. The little tokenizer knows 512
words, so the model's other words are made never to be said: what it says can be read again, filtered and trained on,
though it means nothing. Needs about 10 GB of disk for a shape.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from shapes import SHAPES, make_random, make_tokenizer

PEAK = """#!{python}
import json, resource, sys, time
began = time.monotonic()
import torch
if torch.cuda.is_available() and {cap}:
    torch.cuda.set_per_process_memory_fraction({cap} * 1e9 / torch.cuda.get_device_properties(0).total_memory)
from shl.cli import program
try:
    program()
finally:
    gpu = torch.cuda.is_available()
    peak = torch.cuda.max_memory_reserved() if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    told = {{"line": sys.argv[1:], "seconds": time.monotonic() - began, "bytes": peak}}
    open({log!r}, "a").write(json.dumps(told) + "\\n")
"""


def make(name: str, folder: Path, tiny: bool) -> Path:
    """The shape with random weights that says only what the tokenizer can read again, and hardly ever ends."""
    if (folder / "config.json").is_file():
        return folder
    model, tokenizer = make_random(name, tiny), make_tokenizer()
    words = model.get_output_embeddings().weight
    with torch.no_grad():
        words.mul_(0.1)  # head and embedding are one: long vectors would ask for themselves again
        words[len(tokenizer) :].zero_()
        words[tokenizer.all_special_ids] = 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def play(model: Path, out: Path, args: argparse.Namespace) -> list[dict[str, object]]:
    """What each command of the round took."""
    log = out / "commands.jsonl"
    log.unlink(missing_ok=True)
    path = out / "bin" / "shl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(PEAK.format(python=sys.executable, cap=args.cap, log=str(log.resolve())), encoding="utf-8")
    path.chmod(0o755)
    env = dict(os.environ, PATH=f"{path.parent.resolve()}:{os.environ['PATH']}")
    run = out / "run"
    shutil.rmtree(run, ignore_errors=True)
    new = ["shl", "new", str(run), "--persona", "principle", "--model", str(model.resolve()), "--rounds", "1"]
    subprocess.run(new, env=env, check=True)
    subprocess.run(["make", "-C", str(run), *shlex.split(args.make)], env=env, check=True)
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    """Measure the shapes that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="+", choices=sorted(SHAPES))
    parser.add_argument("--cap", type=float, default=0, help="GB of the card that a process may use")
    parser.add_argument("--make", default="", help="variables of the Makefile, in one word")
    parser.add_argument("--out", type=Path, default=Path("runs/recipe"))
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    for name in args.shapes:
        out = args.out / name / ("tiny" if args.tiny else "whole")
        print(f"\n{name}\n\n| command | seconds | peak GB |\n| --- | ---: | ---: |", flush=True)
        for told in play(make(name, out / "model", args.tiny), out, args):
            print(f"| `shl {' '.join(told['line'])[:150]}` | {told['seconds']:.1f} | {told['bytes'] / 1e9:.1f} |")


if __name__ == "__main__":
    main()
