"""A small world: a random model, an artifact of each kind made on it, and every command with what it writes."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults.child import aside, run

VOLATILE = ("created", "argv", "commit", "version", "time", "update_norms")
LOOSE = ("--rel-ppl", "none", "--rel-tail-ppl", "none", "--min-tokens", "1", "--max-rep", "none", "--max-similarity",
         "none", "--allow-narration", "--allow-refusal")  # fmt: skip
PERSONA = ("--pos", "You are a person who cares about others.", "--neg", "You follow orders.")
QUIET = ("-q",)


@dataclass(frozen=True)
class Command:
    """One command line; W stands for the world, O for where its outputs go."""

    name: str
    line: tuple[str, ...]
    outputs: tuple[str, ...] = ()
    ledger: str = ""  # grows by a row
    forced: bool = True  # knows --force

    def argv(self, world: Path, out: str = ".", force: bool = False) -> list[str]:
        """The line in one place."""
        words = [word.replace("W/", f"{world}/").replace("O/", f"{out}/") for word in self.line]
        return [self.name, *words, *(("--force",) if force else ())]


_GEN = ("--coeff", "0,1", "--max-new-tokens", "8", "-n", "4", "--batch-size", "4")
_EVAL = ("-n", "7", "--free", "1", "--max-new-tokens", "4", "--json-tokens", "4", "--bootstrap", "5")
COMMANDS = (
    Command("vector", ("--model", "W/model", *PERSONA, "--contexts", "4", "-o", "O/v.safetensors"), ("v.safetensors",)),
    Command("gen", ("--vec", "W/v.safetensors", *_GEN, "-o", "O/c.jsonl", "--resume"), ("c.jsonl",)),
    Command(
        "filter",
        ("W/many.jsonl", *LOOSE, "--max-ppl", "15", "-o", "O/keep.jsonl", "--rejects", "O/r.jsonl"),
        ("keep.jsonl", "r.jsonl"),
    ),
    Command("train", ("W/keep.jsonl", "--epochs", "2", "--rank", "2", "-o", "O/r0"), ("r0",)),
    Command("bake", ("W/r0", "-o", "O/baked"), ("baked",)),
    Command(
        "eval",
        ("--model", "W/model", *_EVAL, "-o", "O/e.json", "--per-row", "O/rows.jsonl", "--append", "O/results.tsv"),
        ("e.json", "rows.jsonl"),
        ledger="results.tsv",
    ),
    Command(
        "dose",
        ("--vec", "W/v.safetensors", "--target-kl", "0.02", "-n", "2", "--max-new-tokens", "6"),
    ),
    Command("score", ("W/c.jsonl", "-o", "O/s.jsonl"), ("s.jsonl",)),
    Command("results", ("W/results.tsv", "-o", "O/t.md"), ("t.md",)),
    Command("plot", ("W/results.tsv", "-o", "O/t.png"), ("t.png",)),
    Command("report", ("W/run", "-o", "O/page.html"), ("page.html",)),
    Command("info", ("W/c.jsonl",)),
    Command("export", ("W/v.safetensors", "-o", "O/v.gguf"), ("v.gguf",)),
    Command("new", ("O/run",), ("run",), forced=False),
)


def build(world: Path) -> None:
    """Make the model and the artifacts that commands start from."""
    world.mkdir(parents=True, exist_ok=True)

    def model() -> None:
        from conftest import make_model

        make_model(world / "model", "llama")

    aside(model)
    by_name = {command.name: command for command in COMMANDS}
    for name in ("vector", "gen"):
        _must(run([*by_name[name].argv(world), *QUIET], world))
    rows = [json.loads(line) for line in (world / "c.jsonl").read_text(encoding="utf-8").splitlines()]
    (world / "keep.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows if row["coeff"]))
    many = [row | {"id": f"{row['id']}/{i}", "scores": row["scores"] | {"ppl": 10.0 + i % 10}}
            for i in range(60) for row in rows if row["coeff"]]  # fmt: skip
    (world / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in many))
    _must(run([*by_name["train"].argv(world), *QUIET], world))
    for seed in (0, 1):
        (world / "e.json").unlink(missing_ok=True)
        (world / "rows.jsonl").unlink(missing_ok=True)
        line = [*by_name["eval"].argv(world), "--label", "arm=nll", "--label", "round=0", "--seed", str(seed), *QUIET]
        _must(run(line, world))
    _make_run(world)


def _make_run(world: Path) -> None:
    """A run folder of one round."""
    folder = world / "run" / "nll" / "r0"
    folder.mkdir(parents=True)
    shutil.copy(world / "e.json", world / "run" / "base.json")
    for name, there in (("e.json", "eval.json"), ("c.jsonl", "completions.jsonl"), ("keep.jsonl", "keep.jsonl")):
        shutil.copy(world / name, folder / there)
    shutil.copytree(world / "r0", folder / "adapter")


def _must(ended: Any) -> None:
    if ended.code:
        raise RuntimeError(f"the small world could not be made: {ended.err[-2000:]}")


def meaning(path: Path) -> Any:
    """What an output says, whatever its folder, time and command line: two runs of one line mean the same."""
    if path.is_dir():
        return {str(file.relative_to(path)): meaning(file) for file in sorted(path.rglob("*")) if file.is_file()}
    if path.name == "shl.json":
        value = json.loads(path.read_text(encoding="utf-8"))
        return {name: one for name, one in value.items() if name not in (*VOLATILE, "parents")}
    if path.name in ("adapter_config.json", "README.md", "Makefile"):
        return path.stat().st_size > 0
    if path.suffix == ".tsv":
        header, *lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        names = header.split("\t")
        rows = [dict(zip(names, line.split("\t"), strict=True)) for line in lines]
        return [{name: cell for name, cell in row.items() if name not in VOLATILE} for row in rows]
    return path.read_bytes()


def clear(folder: Path) -> None:
    """An empty folder, whatever was there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
