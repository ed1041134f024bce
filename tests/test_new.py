"""A run folder: make plans every step of every arm in order, resumes, and is the loop that examples/Makefile runs."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from shl.core.errors import ShlError
from shl.core.records import read_prompts
from shl.new import create

ROOT = Path(__file__).parent.parent
make = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")


def plan(*argv: str, cwd: Path) -> list[str]:
    """The commands that make would run."""
    done = subprocess.run(["make", "-n", *argv], cwd=cwd, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return re.findall(r"^shl .*$", done.stdout, re.MULTILINE)


def test_the_folder_is_complete_and_never_replaced(tmp_path):
    names = create(tmp_path / "run", "humanity", "google/gemma-3-4b-it", 3)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == sorted(names)
    text = (tmp_path / "run/Makefile").read_text(encoding="utf-8")
    assert (
        "MODEL   ?= google/gemma-3-4b-it\n" in text
        and "AXIS    ?= humanity\n" in text
        and not re.search("@[A-Z]", text.split("SHELL")[0])  # everything is filled in
    )
    assert len(read_prompts(tmp_path / "run/prompts.jsonl")) == 128
    with pytest.raises(ShlError):
        create(tmp_path / "run")


def test_what_would_break_the_makefile_is_refused(tmp_path):
    for wrong in ({"persona": "nobody"}, {"model": "a$(shell id)"}, {"model": "a\nall: x"}, {"rounds": 0}):
        with pytest.raises(ShlError):
            create(tmp_path / "run", **wrong)
    assert not (tmp_path / "run").exists()


@make
def test_make_runs_every_step_of_every_arm(tmp_path):
    create(tmp_path / "run", rounds=2)
    lines = plan(cwd=tmp_path / "run")
    steps = [line.split()[1] for line in lines]
    counts = {step: steps.count(step) for step in set(steps)}
    assert counts == {"vector": 4, "gen": 4, "filter": 4, "train": 4, "eval": 2 + 8, "plot": 1, "report": 1}
    assert steps[-2:] == ["plot", "report"]
    later = [line for line in lines if "/r1/" in line and line.split()[1] in ("vector", "train")]
    assert [re.search(r"--adapter (\S+)", line)[1] for line in later] == [
        *["./healed@0.5/r0/adapter:0.5"] * 2, *["./plain/r0/adapter"] * 2
    ]  # fmt: skip
    ends = [line for line in lines if line.endswith("-o healed@0.5/r1/eval.json")]
    assert len(ends) == 1 and "--adapter healed@0.5/r1/adapter:0.5 " in ends[0]
    assert sum("--reg kl_rev" in line for line in lines) == sum("--reg nll" in line for line in lines) == 2
    assert len(plan("ROUNDS=5", "ARMS=plain", cwd=tmp_path / "run")) == 2 + 5 * 6 + 2


@make
def test_an_arm_on_prompted_text_is_the_same_loop_without_a_vector(tmp_path):
    create(tmp_path / "run", rounds=2)
    lines = plan("ARMS=healed@0.5-prompted", "SYSTEM=--system 'Be bold.'", cwd=tmp_path / "run")
    assert [line.split()[1] for line in lines[2:-2]] == ["gen", "filter", "train", "eval"] * 2
    first, later = ([line for line in lines if f"prompted/r{turn}/" in line] for turn in (0, 1))
    assert "--system 'Be bold.'" in lines[1] and "--system 'Be bold.'" in first[0] and "--vec" not in str(lines)
    assert "--keep-controls" in first[1] and "--include-controls" in first[2] and "--reg kl_rev" in first[2]
    assert "--adapter" not in first[0] and "--steered" not in first[3]
    before = "--adapter ./healed@0.5-prompted/r0/adapter:0.5 "
    assert before in later[0] and before in later[2]
    assert "--adapter healed@0.5-prompted/r1/adapter:0.5 " in later[3]


@make
def test_make_does_only_what_is_left(tmp_path):
    create(tmp_path / "run", rounds=1)
    for name in ("base.json", "prompted.json", "healed/r0/v.safetensors", "healed/r0/completions.jsonl"):
        path = tmp_path / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    steps = [line.split()[1] for line in plan("ARMS=healed", cwd=tmp_path / "run")]
    assert steps[0] == "filter" and steps[-3:] == ["eval", "plot", "report"]
    assert sorted(steps[1:3]) == ["eval", "train"] and len(steps) == 6


@make
def test_more_rounds_go_on_from_the_last(tmp_path):
    """make ROUNDS=3 after make ROUNDS=2: only the third round of each arm, and the pictures of all."""
    run = tmp_path / "run"
    create(run, rounds=2)
    names = ["base.json", "prompted.json"]
    parts = ("v.safetensors", "completions.jsonl", "keep.jsonl", "adapter/shl.json", "steered.json", "eval.json")
    names += [f"{arm}/r{turn}/{part}" for arm in ("healed@0.5", "plain") for turn in (0, 1) for part in parts]
    for at, name in enumerate([*names, "trajectory.png", "report.html"]):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).touch()
        os.utime(run / name, (2e9 + at, 2e9 + at))  # in make's order
    assert plan(cwd=run) == []
    lines = plan("ROUNDS=3", cwd=run)
    assert len(lines) == 2 * 6 + 2 and lines[-1].startswith("shl report")
    assert all("/r2/" in line for line in lines[:-2])
    assert sum("/r1/adapter" in line for line in lines) == 2 * 2  # vector and train of each arm start from there


@make
def test_the_example_is_the_same_loop(tmp_path):
    create(tmp_path / "run")
    ours = plan(cwd=tmp_path / "run")
    theirs = plan("-f", str(ROOT / "examples/Makefile"), "RUN=.", "LEDGER=./results.tsv", cwd=tmp_path / "run")
    strip = re.compile(r"\S*(prompts|authority)\.jsonl")
    assert [strip.sub("P", line) for line in theirs] == [strip.sub("P", line) for line in ours]
