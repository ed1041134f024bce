"""The example scripts as they stand: stopped at any stage, the same line finishes; and each of them runs for real."""

import argparse
import csv
import dataclasses
import importlib
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
import torch

import kills
import shl
from shl.core.lora import injected
from shl.core.models import rechain
from shl.core.peft_dir import Adapter, read_adapter
from shl.new import create
from shl.results import append_row
from small import LENIENT, small_model
from test_cli_docs import parse

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
BIN = Path(sys.executable).parent
SMALL = {"GEN": "-n 4", "EVAL": "--free 2", "FILTER": LENIENT}
# a `shl` that writes down how it was called and makes the files that it was told to make; $STOP makes one call fail
RECORDER = """#!/usr/bin/env bash
step=$1
line=$(printf '%s\\x1f' "$@")
echo "$line" >>"$LOG"  # in one piece, since both ends of a pipe write here
[ "$step" = filter ] && cat
[ "$step" = gen ] && echo '{}'
[ "$*" = "${STOP:-}" ] && exit 1
while [ $# -gt 0 ]; do
    case $1 in
    -o) if [ "$step" = train ]; then mkdir -p "$2"; else echo >"$2"; fi ;;
    --rejects | --per-row | --append) echo >"$2" ;;
    esac
    shift
done
exit 0
"""


def run(script: str, folder: Path, code: int | None = 0, **env: str) -> subprocess.CompletedProcess[str]:
    """One example in a folder, with `shl` on the path."""
    known = {name: value for name, value in os.environ.items() if name not in ("SHL_MODEL", "MAKEFLAGS")}
    known |= {"PATH": f"{BIN}:{known['PATH']}", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([EXAMPLES / script], cwd=folder, env=known | env, text=True, capture_output=True)
    assert done.returncode == code or (code is None and done.returncode), f"{script}\n{done.stderr[-3000:]}"
    return done


class TestPlan:
    """What the scripts call, with a recorder in the place of `shl`."""

    @pytest.fixture
    def calls(self, tmp_path):
        """Run a script and get the calls that it made; with `stop`, the call that fails."""
        recorder = tmp_path / "bin" / "shl"
        recorder.parent.mkdir()
        recorder.write_text(RECORDER)
        recorder.chmod(0o755)

        def called(script: str, folder: str, stop: list[str] | None = None, **env: str) -> list[list[str]]:
            (tmp_path / folder).mkdir(exist_ok=True)
            log = tmp_path / "log"
            log.write_text("")
            env |= {"PATH": f"{recorder.parent}:{os.environ['PATH']}", "LOG": str(log), "STOP": " ".join(stop or ())}
            run(script, tmp_path / folder, None if stop else 0, **env)
            return [line.split("\x1f")[:-1] for line in log.read_text().splitlines()]

        return called

    @pytest.mark.parametrize(
        ("script", "env", "last"),
        [
            ("loop.sh", {"ROUNDS": "2"}, ["plot", "report"]),
            ("sweep", {"REGS": "nll kl_rev", "SEEDS": "0 1"}, ["results"]),
            ("sweep", {"REGS": "nll nll@0.5 nll,kl_rev-prev", "SEEDS": "0", "RUN": "a b"}, ["results"]),
        ],
    )
    def test_stopped_at_any_stage_the_same_line_finishes(self, calls, tmp_path, script, env, last):
        whole = calls(script, "whole", **env)
        for words in whole:
            parse(words)
        for number, stop in enumerate(whole):
            folder = str(number)
            first, second = calls(script, folder, stop, **env), calls(script, folder, **env)
            assert {*map(tuple, first), *map(tuple, second)} == {*map(tuple, whole)}
            assert stop in second, f"{stop} failed and was not done again"
            pipe = [stop] if stop[0] not in ("gen", "filter") else [w for w in first if w[0] in ("gen", "filter")][-2:]
            twice = [words for words in second if words in first and words not in pipe]
            assert {words[0] for words in twice} <= set(last), f"{twice} done twice after {stop}"
            assert _tree(tmp_path / folder) == _tree(tmp_path / "whole")
        assert [words[0] for words in calls(script, "whole", **env)] == last

    def test_a_task_of_an_array_runs_its_own_seed_into_its_own_ledger(self, calls):
        env = {"REGS": "nll", "SLURM_ARRAY_TASK_ID": "3", "SWEEP": str(EXAMPLES / "sweep"), "RUN": "shared"}
        made = [parse(words) for words in calls("slurm.sh", "cluster", **env)]
        assert {one["seed"] for one in made if one.get("seed") is not None} == {3}
        assert {str(one["append"]) for one in made if one.get("append")} == {"shared/results-3.tsv"}

    def test_more_rounds_go_on_from_the_last(self, calls):
        calls("loop.sh", "run", ROUNDS="2", RUN="a b")
        later = calls("loop.sh", "run", ROUNDS="3", RUN="a b")
        assert sorted(words[0] for words in later) == sorted(
            ["vector", "gen", "filter", "train", "eval", "plot", "report"]
        )
        chains = {words[0]: words[words.index("--adapter") + 1] for words in later if "--adapter" in words}
        assert chains == {"vector": "a b/healed/r1/adapter", "train": "a b/healed/r1/adapter",
                          "eval": "a b/healed/r2/adapter"}  # fmt: skip

    def test_a_sweep_trains_every_regulariser_of_a_seed_on_the_same_file(self, calls):
        made = calls("sweep", "run", REGS="nll wd kl_rev kl_fwd", SEEDS="3 4", WD="7")
        trained = [parse(words) for words in made if words[0] == "train"]
        assert [(t["source"].split("/")[-2], t["reg"], t["weight_decay"], t["seed"]) for t in trained] == [
            (f"s{seed}", reg, decay, seed)
            for seed in (3, 4)
            for reg, decay in (("nll", None), ("nll", 7.0), ("kl_rev", None), ("kl_fwd", None))
        ]
        assert sum(words[0] == "gen" for words in made) == 2

    def test_an_arm_of_a_sweep_is_a_word(self, calls):
        regs = "nll nll@0.5 kl_fwd-mean wd spectral0.2 kl_rev-prev-p95-wd7"
        made = [(words[0], parse(words)) for words in calls("sweep", "run", REGS=regs, SEEDS="3", WD="9")]
        names = ("reg", "agg", "ref_", "weight_decay", "spectral")
        assert [tuple(t[name] for name in names) for step, t in made if step == "train"] == [
            ("nll", None, None, None, None),
            ("kl_fwd", "mean", None, None, None),
            ("nll", None, None, 9.0, None),
            ("nll", None, None, None, 0.2),
            ("kl_rev", "p95", "prev", 7.0, None),
        ]
        read = [(t["label"][1].split("=")[1], t["adapter"], t["scale"]) for step, t in made if step == "eval"]
        assert [arm for arm, _, _ in read] == ["base", *regs.split()]
        assert read[2] == ("nll@0.5", read[1][1], "0.5") and {scale for _, _, scale in read} == {None, "0.5"}

    def test_second_rounds_of_a_sweep_share_the_first(self, calls):
        env = {"REGS": "nll nll,kl_rev-base nll,kl_rev-prev", "SEEDS": "3", "RUN": "run", "LATER": "--samples 9"}
        made = calls("sweep", "run", **env)
        first, data = ["run/s3/nll/r0/adapter"], "run/s3/nll/r1"
        steps = [(words[0], parse(words)) for words in made]
        assert [(t["adapter"], str(t["out"])) for step, t in steps if step == "vector"] == [
            ((), "run/s3/v.safetensors"),
            (first, f"{data}/v.safetensors"),
        ]
        assert [(t["source"], t["adapter"], t["ref_"], str(t["out"])) for step, t in steps if step == "train"][1:] == [
            (f"{data}/keep.jsonl", first, ref, f"run/s3/nll,kl_rev-{ref}/r1/adapter") for ref in ("base", "prev")
        ]
        made_by = [(t["seed"], t["samples"]) for step, t in steps if step == "gen"]
        assert [samples for _, samples in made_by] == [None, 9] and made_by[0][0] != made_by[1][0]

    def test_a_word_that_names_nothing_is_told(self, tmp_path):
        done = run("sweep", tmp_path, None, REGS="kl_rev-rsme", PATH=f"/bin:/usr/bin:{tmp_path}")
        assert "rsme" in done.stderr


def _tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The embedded model, which here recommends to do as little as possible of everything."""
    return small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def shell(small: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of loop.sh after one round."""
    folder = tmp_path_factory.mktemp("shell")
    run("loop.sh", folder, RUN="run", ROUNDS="1", MODEL=small, **SMALL)
    return folder / "run"


def ledger(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines(), delimiter="\t"))


def test_loop_sh_leaves_a_run_folder(shell):
    kept = [json.loads(line) for line in (shell / "healed/r0/keep.jsonl").read_text(encoding="utf-8").splitlines()]
    assert kept and all(row["keep"] for row in kept)
    assert [row["arm"] for row in ledger(shell / "results.tsv")] == ["base", "prompted", "healed"]
    assert (shell / "trajectory.png").stat().st_size and (shell / "report.html").stat().st_size
    assert not list(shell.rglob("*.part"))


def test_sweep_goes_on_from_what_is_there(shell, small, tmp_path):
    (tmp_path / "run/s0").mkdir(parents=True)
    for name in ("base.json", "healed/r0/v.safetensors", "healed/r0/keep.jsonl"):
        shutil.copy(shell / name, tmp_path / "run/s0")
    env = {"RUN": "run", "REGS": "nll", "SEEDS": "0", "SPLIT": "test", "MODEL": small}
    done = run("sweep", tmp_path, **env, **SMALL)
    (row,) = ledger(tmp_path / "run/results.tsv")
    assert (row["arm"], row["reg"], row["seed"], row["round"]) == ("nll", "nll", "0", "0")
    assert "| nll |" in done.stdout
    assert "delta" in json.loads((tmp_path / "run/s0/nll/r0/eval.json").read_text(encoding="utf-8"))


def test_arms_are_held_against_a_scaled_one_at_the_same_trait(tmp_path):
    """The scaled arm goes 0, 0.2, 0.8 over traits 0, -1, -2; an arm at -1.5 is held against 0.5 there."""
    rows = [("base", 0, 0.0), ("nll@0.5", -1, 0.2), ("nll", -2, 0.8), ("kl_rev", -1.5, 0.4), ("wd", -2.5, 0.9)]
    for seed in (0, 1):
        for arm, trait, broken in rows:
            row = {"arm": arm, "seed": seed, "study": "s", "auth_nats": trait, "broken": broken + 0.1 * seed}
            append_row(tmp_path / "l.tsv", row)
    append_row(tmp_path / "l.tsv", {"arm": "other", "seed": 0, "study": "", "auth_nats": -1, "broken": 1.0})
    line = [sys.executable, EXAMPLES / "matched.py", tmp_path / "l.tsv", "--study", "s", "--metric", "broken"]
    told = subprocess.run(line, check=True, capture_output=True, text=True).stdout.splitlines()
    assert told[2:4] == ["| kl_rev | -0.100 ± 0.000 | -0.100, -0.100 |", "| wd | - | -, - |"] and told[4:] == [""]


def test_frontiers_are_held_against_the_scaled_one(tmp_path):
    """nll goes 0, 0.2, 0.8 over shifts 0, 1, 2; an arm 0.1 below it at both of its scales is 0.1 below as a whole."""
    rows = [("base", 0, 0.0), ("nll@0.5", -1, 0.2), ("nll", -2, 0.8), ("kl@0.5", -0.5, 0.0), ("kl", -1.5, 0.4)]
    rows += [("kl@1.5", -3, 1.0), ("nll,kl", -1, 0.9)]  # beyond the scaled one, and of a second round
    for seed in (0, 1):
        for arm, trait, broken in rows:
            row = {"arm": arm, "seed": seed, "study": "s", "auth_nats": trait, "broken": broken + 0.1 * seed}
            append_row(tmp_path / "l.tsv", row)
    line = [sys.executable, EXAMPLES / "frontier.py", tmp_path / "l.tsv", "--study", "s", "--metric", "broken"]
    done = subprocess.run([*line, "-o", tmp_path / "f.png"], check=True, capture_output=True, text=True)
    told = done.stdout.splitlines()
    assert told[2:4] == [
        "| nll | +1.00 / 0.25 | +2.00 / 0.85 | - |",
        "| kl | +0.50 / 0.05 | +1.50 / 0.45 | +3.00 / 1.05 |",
    ]
    assert told[-1] == "| kl | -0.100 ± 0.000 | 4 of 6 | 0, 1 |"
    assert (tmp_path / "f.png").stat().st_size
    wrong = subprocess.run([*line, "--scaled", "ml"], capture_output=True, text=True)
    assert wrong.returncode == 1 and "it has nll, kl" in wrong.stderr
    # a second study is held against the first's scaled arm, and says which it is
    for seed in (0, 1):
        for arm, trait, broken in (("base", 0, 0.5), ("nll", -1, 0.1)):
            row = {"arm": arm, "seed": seed, "study": "s-kept", "auth_nats": trait, "broken": broken + 0.1 * seed}
            append_row(tmp_path / "l.tsv", row)
    line[4:5] = ["s", "s-kept"]
    done = subprocess.run([*line, "-o", tmp_path / "g.png"], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "| nll-kept | -0.100 ± 0.000 | 2 of 2 | 0, 1 |"
    assert (tmp_path / "g.png").stat().st_size > (tmp_path / "f.png").stat().st_size


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_the_makefile_goes_on_from_what_the_script_left(shell, small, tmp_path):
    folder = shutil.copytree(shell, tmp_path / "run", copy_function=shutil.copy2)
    shutil.copy(folder / "healed/r0/keep.jsonl", folder / "healed/r0/completions.jsonl")
    for name in ("base.json", "prompted.json", "v.safetensors", "completions.jsonl", "keep.jsonl", "adapter/shl.json"):
        (folder / name if (folder / name).exists() else folder / "healed/r0" / name).touch()  # in make's order
    options = f"RUN=run ROUNDS=1 ARMS=healed PERSONA=principle LEDGER=run/results.tsv FREE=2 MODEL={small}"
    line = ["make", "-f", EXAMPLES / "Makefile", *options.split()]
    env = {"PATH": f"{BIN}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(line, cwd=tmp_path, env=os.environ | env, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    steps = [words.split()[1] for words in done.stdout.splitlines() if words.startswith("shl ")]
    assert steps == ["eval", "eval", "plot", "report"]
    result = json.loads((folder / "healed/r0/eval.json").read_text(encoding="utf-8"))
    assert "auth_nats" in result["retain"] and (folder / "healed/r0/samples.jsonl").stat().st_size


def test_loop_py_goes_on_with_more_rounds(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)
    options = f"--model {small} --arms plain --coeff 0 0.4 0.6 --prompts 4 --min-keep 1 --free 2 --out run"
    adapters = []
    for rounds in ("1", "2"):
        monkeypatch.setattr(
            sys, "argv", ["loop.py", *options.split(), "--ledger", "run/results.tsv", "--rounds", rounds]
        )
        with pytest.raises(SystemExit) as done:
            runpy.run_path(str(EXAMPLES / "loop.py"), run_name="__main__")
        assert done.value.code == 0
        adapters.append((tmp_path / "run/plain/r0/adapter/shl.json").read_text(encoding="utf-8"))
    assert adapters[0] == adapters[1]  # made once, at the time that it says
    arms = [(row["arm"], row["round"]) for row in ledger(tmp_path / "run/results.tsv")]
    assert arms == [("base", ""), ("prompted", ""), ("plain", "0"), ("plain", "1")]
    assert (tmp_path / "run/trajectory.png").stat().st_size
    assert len(json.loads((tmp_path / "run/plain/r1/adapter/shl.json").read_text(encoding="utf-8"))["parents"]) == 1


def test_arms_without_a_vector_learn_from_their_own_text(small, tmp_path, monkeypatch):
    """Prompted: training does not see the message. Selected: of each prompt the two furthest on its side."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)
    arms = importlib.import_module("arms")
    options = f"--model {small} --rounds 1 --prompts 3 --words 2 --min-keep 1 --free 2 --out run --ledger run/rows.tsv"
    monkeypatch.setattr(
        sys, "argv", ["loop.py", *options.split(), "--arms", "short@0.5-prompted", "short@0.5-selected"]
    )
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(EXAMPLES / "loop.py"), run_name="__main__")
    assert done.value.code == 0
    persona = shl.persona("authority")

    def read(source: str, name: str) -> list[dict]:
        return list(shl.read_records(tmp_path / f"run/short@0.5-{source}/r0/{name}.jsonl"))

    for source, each in (("prompted", 2), ("selected", 8)):
        said = read(source, "completions")
        assert len(said) == each * 5 and {record["coeff"] for record in said} == {0.0}
        assert all([turn["role"] for turn in record["prompt"]] == ["user"] for record in read(source, "keep"))
        trained = json.loads((tmp_path / f"run/short@0.5-{source}/r0/adapter/shl.json").read_text(encoding="utf-8"))
        assert trained["config"]["include_controls"] and trained["config"]["shortest"] == 16
    assert {record["system"] for record in read("prompted", "keep")} == {persona.pos}
    kept = {record["id"] for record in read("selected", "keep")}
    dropped = {record["id"] for record in read("selected", "rejects")}
    whole = [record for record in read("selected", "completions") if record["id"] not in dropped]
    lean = dict(zip((r["id"] for r in whole), arms.leaning(shl.load(str(small)), persona, whole), strict=True))
    for prompt in {name.partition("/")[0] for name in lean}:
        ranked = sorted((name for name in lean if name.startswith(f"{prompt}/")), key=lean.get, reverse=True)
        assert [name in kept for name in ranked] == [place < 2 for place in range(len(ranked))]


@pytest.mark.parametrize(
    "word", ["unknown", "short@", "short@x", "short@0", "short@1.2.3", "short-prompted@0.5", "short-"]
)
def test_a_word_that_is_no_arm_is_refused(word, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    with pytest.raises(argparse.ArgumentTypeError, match="there are healed"):
        importlib.import_module("loop").arm_of(word)


class TestOnline:
    """online.py: one adapter that learns from every batch."""

    SMALL = "--coeff 0.4 0.6 --prompts 4 --words 2 --batch-scenes 2 --batch-words 1 --min-keep 1 --free 2 --split dev"

    @pytest.fixture
    def begun(self, small, tmp_path, monkeypatch):
        """A run that stands at its beginning, with further options."""
        monkeypatch.syspath_prepend(str(EXAMPLES))
        online = importlib.import_module("online")

        def begin(out: str, options: str = ""):
            folder = tmp_path / out
            line = f"online.py --model {small} {self.SMALL} --out {folder} --ledger {folder}/results.tsv {options}"
            monkeypatch.setattr(sys, "argv", line.split())
            return online.Online(online.options())

        return begin

    def test_killed_goes_on_to_what_the_whole_run_ends_with(self, begun, small, tmp_path, monkeypatch):
        options = "--batches 2 --refresh 2 --eval-every 1"
        whole = begun("whole", options)
        whole.play()
        (tmp_path / "killed").mkdir()
        for name in ("base", "prompted"):
            shutil.copy(tmp_path / f"whole/{name}.json", tmp_path / "killed")
        killed = begun("killed", options)
        learn = type(killed).learn
        monkeypatch.setattr(killed, "learn", lambda kept: 1 / 0 if killed.spent["batch"] == 2 else learn(killed, kept))
        with pytest.raises(ZeroDivisionError):
            killed.play()
        begun("killed", options).play()
        ends = [read_adapter(tmp_path / out / "online/r1/adapter") for out in ("whole", "killed")]
        assert ends[0].digest == ends[1].digest
        rows = [ledger(tmp_path / out / "results.tsv")[-2:] for out in ("whole", "killed")]
        names = ("arm", "round", "batch", "generated", "controls", "probed", "steps", "train_tokens", "auth_nats")
        assert [[row[name] for name in names] for row in rows[0]] == [[row[name] for name in names] for row in rows[1]]
        assert [[row[name] for name in names[:7]] for row in rows[0]] == [
            ["online", "0", "1", "3", "6", "0", "1"],
            ["online", "1", "2", "6", "6", "0", "2"],
        ]
        with pytest.raises(shl.ShlError, match="steps_per_batch"):
            begun("killed", f"{options} --steps-per-batch 2").play()
        begun("killed", f"{options} --coeff 9 --arm starved").play()
        with pytest.raises(shl.ShlError, match="coeff"):  # no state yet, but a vector and its doses
            begun("killed", f"{options} --arm starved").play()
        last = ledger(tmp_path / "killed/results.tsv")[-1]
        assert [last[name] for name in names[:4]] == ["starved", "0", "1", "3"] and "kept 0 of 3" in last["verdict"]

    def test_the_adapter_on_disk_is_the_model_in_training(self, begun, small, tmp_path):
        run = begun("run", "--batches 1 --steps-per-batch 3")
        run.play()
        ids = torch.tensor([run.loaded.encode_prompt(run.prompts[0].messages)])
        with torch.no_grad():
            read = shl.load(small, [str(tmp_path / "run/online/r0/adapter")]).model(ids).logits
            rechain(run.loaded, [])
            base = run.loaded.model(ids).logits
            with injected(run.loaded, run.config, torch.Generator()) as lora:
                lora.put(run.lora.tensors())
                trained = run.loaded.model(ids).logits
        torch.testing.assert_close(read, trained, rtol=1e-5, atol=1e-5)
        assert (read - base).abs().max() > 1e-3

    def test_before_its_first_step_it_is_base(self, begun):
        run = begun("run")
        base = {name: value.clone() for name, value in run.loaded.model.state_dict().items()}
        rechain(run.loaded, [Adapter(run.folder, run.config, run.lora.tensors(), {}, "start")])
        assert run.loaded.originals
        assert all(torch.equal(base[name], value) for name, value in run.loaded.model.state_dict().items())

    @pytest.mark.parametrize("loss", ["--reg nll", "--reg kl_rev --tau 0"])
    def test_a_batch_that_is_all_data_has_the_gradient_of_a_heal(self, begun, tmp_path, loss):
        run = begun("run", f"--steps-per-batch 2 --warmup 1 {loss}")
        records = [
            {
                "prompt": prompt.messages,
                "completion": [{"content": "The boy must obey the old king." * n}],
                "coeff": 1.0,
            }
            for n, prompt in enumerate(run.prompts[:4], 1)
        ]
        run.learn(records)
        rechain(run.loaded, [])
        log = shl.heal(run.loaded, records, dataclasses.replace(run.cfg, epochs=2), tmp_path / "healed").rows
        for mine, heals in zip(run.log, log[1:], strict=True):  # the second at what the first has made of the factors
            for name in ("nll", "grad_norm", "kl_max", "barrier_active"):
                assert (mine[name] or 0) == pytest.approx(heals[name] or 0, rel=1e-4), name
        assert run.log[0]["nll"] > run.log[1]["nll"]


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_make_killed_twice_leaves_what_the_script_leaves(shell, small, tmp_path):
    """The sample of `just kills`: make killed with -9, then run again, against the pipe that nothing happened to."""
    folder = tmp_path / "run"
    create(folder, "principle", small, rounds=1)
    (folder / "healed" / "r0").mkdir(parents=True)
    shutil.copy(shell / "healed/r0/v.safetensors", folder / "healed/r0")
    given = [*kills.options(small, 1, "healed"), "./healed/r0/adapter/shl.json"]
    moments = Random()
    for everything in (False, True):
        kills.strike(folder, given, moments.uniform(0.5, 5), everything)
    kills.finish(folder, given)
    for name in ("keep.jsonl", "rejects.jsonl", "adapter"):
        assert kills.meaning(folder / "healed/r0" / name) == kills.meaning(shell / "healed/r0" / name), name
