"""The command line as a user meets it: streams, exit codes, errors with a next step, and where settings come from."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from shl import cli
from shl.cli import common
from shl.core import records
from shl.core.defaults import FilterConfig, GenConfig, TrainConfig, VectorConfig
from shl.core.errors import BelowGate, Mismatch, ShlError
from shl.core.locate import ModelRef

SHL = [sys.executable, "-m", "shl"]
PERSONA = ["--pos", "You are a person who cares about others.", "--neg", "You follow orders."]


class Result(NamedTuple):
    code: int
    out: str
    err: str


Shl = Callable[..., Result]


@pytest.fixture
def shl(monkeypatch, capfd, tmp_path) -> Shl:
    """Run one command in this process, through the error boundary, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SHL_MODEL", raising=False)

    def run(*argv: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["shl", *map(str, argv)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as done:
            cli.main()
        out, err = capfd.readouterr()
        return Result(done.value.code or 0, out, err)

    return run


def record(number: int = 0, **changes) -> dict:
    words = f"I would first talk with person {number} and then help the {number * 7} others quietly."
    return {
        "id": f"p{number}/1/0",
        "prompt": [{"role": "user", "content": f"question {number}"}],
        "completion": [{"role": "assistant", "content": words}],
        "coeff": 1.0,
        "model": "toy",
        "adapters": [],
        "n_tokens": 20,
        "finish": "stop",
        "scores": {"ppl": 2.0, "ppl_tail": 2.0},
    } | changes


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(records.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


PLAIN = ["--rel-ppl", "none", "--rel-tail-ppl", "none", "--max-similarity", "none"]


class TestBoundary:
    """Errors become exit codes and a line that says what to type next."""

    def test_a_user_error_has_a_hint_and_no_traceback(self, shl):
        done = shl("filter", "nope.jsonl")
        assert (done.code, done.out) == (1, "")
        assert done.err.startswith("shl: error: nope.jsonl: no such file\nhint: check the path")
        done = shl("results", "nope.tsv")
        assert "\nhint: add rows with: shl eval --append nope.tsv\n" in done.err

    @pytest.mark.parametrize(
        ("argv", "said"),
        [
            (("gen", "--vec", "."), "is a directory, not a vector"),
            (("gen", "--device", "cuda:99", "-n", "1"), "there is no device cuda:99"),
            (("filter", "nope.jsonl"), "no such file"),
            (("filter", "."), "is a directory"),
            (("info", "nope"), "check the path"),
            (("new", "."), "choose another name"),
            (("eval", "--append", "."), "is a folder, not a ledger"),
            (("results", __file__), "columns: "),
        ],
    )
    def test_every_mistake_has_its_next_step(self, shl, tmp_path, monkeypatch, argv, said):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "mine").write_text("mine")
        done = shl(*argv)
        assert done.code == 1 and said in done.err and "\nhint: " in done.err and not done.out, done.err
        assert len(done.err) < 1500 and "Traceback" not in done.err

    def test_nothing_to_filter_is_said(self, shl, tmp_path):
        (tmp_path / "none.jsonl").write_text("")
        done = shl("filter", tmp_path / "none.jsonl")
        assert done.code == 3 and "there are no records to filter" in done.err and not done.out

    def test_debug_shows_the_traceback(self, shl, monkeypatch):
        monkeypatch.setenv("SHL_DEBUG", "1")
        assert "Traceback" in shl("filter", "nope.jsonl").err

    @pytest.mark.parametrize(
        "argv",
        [
            ("filtr",),
            ("filter", "--nope"),
            ("filter", "--limit", "0"),
            ("filter", "x", "--max-ppl", "many"),
            ("vector",),
            ("vector", "-o", "v"),
            ("vector", "--pos", "a", "--persona", "b", "-o", "v"),
            ("gen", "--resume"),
            ("gen", "--coeff", "1;2"),
            ("eval", "--coeff", "1"),
            ("eval", "--label", "arm"),
            ("bake", "a", "-o", "b", "--as", "gguf"),
            ("gen", "--model", ""),  # of a variable that is not set: another model would be no help
            ("gen", "--coeff", "0,nan"),
            ("filter", "x", "--max-ppl", "nan"),  # every comparison with which is false
            ("filter", "x", "--rel-ppl", "inf"),
            ("train", "x", "-o", "y", "--alpha", "nan"),
            ("eval", "--vec", "v.safetensors", "--coeff", "inf"),
            ("dose", "--vec", "v.safetensors", "--target-kl", "inf"),
        ],
    )
    def test_wrong_usage_is_2(self, shl, argv):
        done = shl(*argv)
        assert done.code == 2 and not done.out and "Traceback" not in done.err

    @pytest.mark.parametrize(
        ("error", "code", "said"),
        [
            (ShlError("broken", hint="mend it"), 1, "shl: error: broken\nhint: mend it\n"),
            (BelowGate("too few"), 3, "shl: error: too few\n"),
            (MemoryError(), 1, "out of memory"),
            (OSError(28, "No space left on device"), 1, "No space left"),
            (RuntimeError("serializing: No space left on device (os error 28)"), 1, "hint: make room"),
            (KeyboardInterrupt(), 130, ""),
            (BrokenPipeError(), 0, ""),
        ],
    )
    def test_exit_codes(self, shl, monkeypatch, error, code, said):
        monkeypatch.setattr("shl.info.describe", lambda path: (_ for _ in ()).throw(error))
        done = shl("info", "x")
        assert done.code == code and said in done.err and "Traceback" not in done.err

    def test_ctrl_c_that_native_code_turns_into_an_error_is_130(self, shl, monkeypatch):
        def describe(path):
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(5)
            except KeyboardInterrupt:
                raise ValueError("what some extension makes of it") from None

        monkeypatch.setattr("shl.info.describe", describe)
        done = shl("info", "x")
        assert done.code == 130 and not done.err

    def test_ctrl_c_where_no_exception_can_go_is_130(self, shl, monkeypatch):
        class Dying:
            def __del__(self):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(5)

        def describe(path):
            Dying()
            for _ in range(500):
                time.sleep(0.01)
            return {}

        monkeypatch.setattr("shl.info.describe", describe)
        done = shl("info", "x")
        assert done.code == 130 and not done.err

    def test_a_bug_keeps_its_traceback(self, shl, monkeypatch):
        monkeypatch.setattr("shl.info.describe", lambda path: {}["oops"])
        done = shl("info", "x")
        assert done.code == 1 and "KeyError: 'oops'" in done.err and "bug in shl" in done.err

    def test_every_command_help_exits_0(self, shl):
        for name in ("vector", "gen", "filter", "train", "bake", "eval", "results", "plot", "info"):
            assert shl(name, "-h").code == 0


class TestStreams:
    """stdout carries records or nothing, and a reader that stops early is success."""

    def test_filter_on_a_terminal_prints_help_and_exits_2(self):
        leader, follower = os.openpty()
        done = subprocess.run([*SHL, "filter"], stdin=follower, capture_output=True, text=True, check=False)
        os.close(leader), os.close(follower)
        assert done.returncode == 2 and done.stdout == "" and "Usage: shl filter" in done.stderr

    def test_every_line_of_stdout_is_a_record_while_stderr_is_a_terminal(self, tmp_path):
        source = write(tmp_path / "c.jsonl", [record(i) for i in range(5)])
        leader, follower = os.openpty()
        command = [*SHL, "filter", str(source), *PLAIN]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=follower, check=True)
        os.close(follower), os.close(leader)
        assert [json.loads(line)["keep"] for line in done.stdout.splitlines()] == [True] * 5

    @pytest.mark.parametrize("unbuffered", ["", "1"])
    def test_a_reader_that_stops_early_is_success(self, tmp_path, unbuffered):
        source = write(tmp_path / "c.jsonl", [record(i) for i in range(5000)])
        env = os.environ | {"PYTHONUNBUFFERED": unbuffered}
        writer = subprocess.Popen(
            [*SHL, "filter", str(source), *PLAIN], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env
        )
        assert json.loads(writer.stdout.readline())
        writer.stdout.close()
        assert (writer.wait(30), writer.stderr.read()) == (0, b"")

    def test_limit_stops_the_writer_upstream(self, tmp_path):
        endless = (
            "import itertools, json, os, sys\n"
            f"row = json.loads({json.dumps(json.dumps(record()))})\n"
            "try:\n"
            "    for i in itertools.count():\n"
            "        row['completion'][0]['content'] = f'I would help person {i} and ask what {i * 7} others need.'\n"
            "        print(json.dumps(row), flush=True)\n"
            "except BrokenPipeError:\n"
            "    sys.stderr.write(str(i))\n"
            "    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)\n"  # what is left goes nowhere, without a word at exit
        )
        upstream = subprocess.Popen([sys.executable, "-c", endless], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        done = subprocess.run(
            [*SHL, "filter", "--limit", "7", *PLAIN], stdin=upstream.stdout, capture_output=True, text=True, check=True
        )
        upstream.stdout.close()
        assert len(done.stdout.splitlines()) == 7
        assert int(upstream.stderr.read() or 0) < 5000 and upstream.wait(30) in (0, 120)

    def test_ctrl_c_is_130(self, tmp_path):
        waiting = subprocess.Popen([*SHL, "filter"], stdin=subprocess.PIPE, stderr=subprocess.PIPE)
        time.sleep(1.5)
        waiting.send_signal(signal.SIGINT)
        assert waiting.wait(30) == 130
        assert b"Traceback" not in waiting.stderr.read()


class TestFilter:
    """`shl filter` end to end; what counts as incoherent is tested with the step."""

    def test_kept_dropped_and_annotated(self, shl, tmp_path):
        source = write(tmp_path / "c.jsonl", [record(0), record(1, n_tokens=2), record(2)])
        done = shl("filter", source, *PLAIN, "--rejects", "r.jsonl", "-o", "keep.jsonl")
        assert (done.code, done.out) == (0, "")
        assert [r["id"] for r in records.read_records(tmp_path / "keep.jsonl")] == ["p0/1/0", "p2/1/0"]
        (rejected,) = records.read_records(tmp_path / "r.jsonl")
        assert rejected["reasons"] == ["short"]
        lines = shl("filter", source, *PLAIN, "--all").out.splitlines()
        assert [json.loads(line)["keep"] for line in lines] == [True, False, True]

    def test_below_the_gate_is_3_and_publishes_no_keep_file(self, shl, tmp_path):
        source = write(tmp_path / "c.jsonl", [record(0), record(1, n_tokens=2)])
        done = shl("filter", source, *PLAIN, "--min-keep", "2", "-o", "keep.jsonl", "--rejects", "r.jsonl")
        assert done.code == 3 and "--min-keep 2" in done.err
        assert sorted(os.listdir(tmp_path)) == ["c.jsonl", "r.jsonl"]

    def test_no_rows_is_below_the_default_gate(self, shl, tmp_path):
        assert shl("filter", write(tmp_path / "c.jsonl", [])).code == 3

    def test_existing_output_is_refused(self, shl, tmp_path):
        source = write(tmp_path / "c.jsonl", [record(0)])
        (tmp_path / "keep.jsonl").write_text("mine")
        assert "--force" in shl("filter", source, *PLAIN, "-o", "keep.jsonl").err
        assert (tmp_path / "keep.jsonl").read_text() == "mine"
        assert shl("filter", source, *PLAIN, "-o", "keep.jsonl", "--force").code == 0

    def test_where(self, shl, tmp_path):
        rows = [record(i, scores={"ppl": 2.0, "ppl_tail": 2.0, "judge": 10 * i}) for i in range(4)]
        done = shl("filter", write(tmp_path / "c.jsonl", rows), *PLAIN, "--where", "scores.judge>=20")
        assert [json.loads(line)["id"] for line in done.out.splitlines()] == ["p2/1/0", "p3/1/0"]

    def test_quiet_is_quiet(self, shl, tmp_path):
        assert shl("filter", write(tmp_path / "c.jsonl", [record(0)]), *PLAIN, "-q").err == ""


class TestSettings:
    """Flag, input artifact, environment, the model's own recommendations, default; only None is "not given"."""

    ref = ModelRef("m", "m", None, {"coeffs": [0, 2], "layers": [4], "train": {"layers": "0:1", "lr": 0.01}, "lr": 1})

    def test_a_recommendation_beats_the_default_and_a_flag_beats_both(self):
        assert common.settle(GenConfig, {}, "gen", self.ref).coeffs == (0, 2)
        assert common.settle(GenConfig, {"coeffs": (1.0,)}, "gen", self.ref).coeffs == (1.0,)
        assert common.settle(GenConfig, {"coeffs": None, "samples": 2}, "gen").coeffs == GenConfig.coeffs

    def test_layers_at_the_top_are_the_vectors_and_a_section_is_the_steps_own(self):
        assert common.settle(VectorConfig, {}, "vector", self.ref).layers == "4"
        trained = common.settle(TrainConfig, {}, "train", self.ref)
        assert (trained.layers, trained.lr) == ("0:1", 0.01)

    def test_zero_false_and_empty_are_given(self):
        cfg = common.settle(GenConfig, {"temperature": 0.0, "score": False, "system": ""})
        assert (cfg.temperature, cfg.score, cfg.system) == (0.0, False, "")

    def test_none_as_a_word_switches_a_limit_off(self):
        assert common.settle(FilterConfig, {"max_rep": common.limit("none", "--max-rep")}).max_rep is None
        assert common.settle(FilterConfig, {"max_rep": common.limit(None, "--max-rep")}).max_rep == FilterConfig.max_rep

    def test_an_unknown_recommendation_is_an_error(self):
        with pytest.raises(ShlError, match="recommends rnak"):
            common.settle(TrainConfig, {}, "train", ModelRef("m", "m", None, {"train": {"rnak": 1}}))

    def test_the_artifact_beats_the_environment_and_a_flag_must_repeat_it(self, tiny_model, monkeypatch):
        llama, qwen = str(tiny_model("llama")), str(tiny_model("qwen2"))
        monkeypatch.setenv("SHL_MODEL", qwen)
        assert common.find_model(common.Where()).id == qwen
        assert common.find_model(common.Where(), {"model": llama}).id == llama
        assert common.find_model(common.Where(model=llama), {"model": llama}).id == llama
        with pytest.raises(Mismatch, match="was made for model"):
            common.find_model(common.Where(model=qwen), {"model": llama})
        assert common.find_model(common.Where(model=qwen, allow_mismatch=True), {"model": llama}).id == qwen

    def test_the_same_files_under_another_name_are_the_same_model(self, tiny_model, tmp_path, monkeypatch):
        from shl.core.locate import local_digest

        llama = tiny_model("llama")
        (tmp_path / "link").symlink_to(llama)
        made_for = {"model": str(llama), "model_digest": local_digest(llama)}
        monkeypatch.chdir(tmp_path)
        assert common.find_model(common.Where(model="link"), made_for).id == str(tmp_path / "link")

    def test_the_empty_chain_is_written_none(self):
        assert common.chain_given(None) is None
        assert common.chain_given(["none"]) == []
        assert common.chain_given(["a", "b:0.5"]) == ["a", "b:0.5"]


@pytest.fixture(scope="module")
def vector(tiny_model, tmp_path_factory) -> Path:
    """A vector made by the command line itself."""
    out = tmp_path_factory.mktemp("vector") / "deep" / "v.safetensors"
    command = [*SHL, "vector", "--model", str(tiny_model("llama")), *PERSONA, "--contexts", "8", "-o", str(out)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "steering vector" in done.stderr
    return out


GEN = ["--coeff", "0,1", "--max-new-tokens", "6", "-n", "6"]


class TestPipeline:
    """The commands on a tiny random model: the files fit together, and the model travels with the vector."""

    def test_vector_is_not_replaced(self, shl, vector, tiny_model):
        done = shl("vector", "--model", tiny_model("llama"), *PERSONA, "-o", vector)
        assert done.code == 1 and "exists already" in done.err

    def test_gen_needs_no_model_and_writes_records_in_order(self, shl, vector, tiny_model):
        done = shl("gen", "--vec", vector, *GEN)
        rows = [json.loads(line) for line in done.out.splitlines()]
        assert done.code == 0, done.err
        for row in rows:
            records.check_record(row)
        assert [row["coeff"] for row in rows] == [0.0, 1.0] * 6
        assert {row["model"] for row in rows} == {str(tiny_model("llama"))}
        assert len({row["id"] for row in rows}) == 12

    def test_recommended_coefficients_are_for_vectors(self, shl, tiny_model):
        """A model that recommends coefficients can be heard without a vector all the same."""
        (tiny_model() / "shl.json").write_text('{"gen": {"coeffs": [0, 0.5]}}')
        try:
            done = shl("gen", "--model", tiny_model(), "--pool", "authority", "-n", "2", "--max-new-tokens", "4")
            assert [json.loads(line)["coeff"] for line in done.out.splitlines()] == [0, 0]
        finally:
            (tiny_model() / "shl.json").unlink()

    def test_gen_refuses_another_model_before_loading_it(self, shl, vector, tiny_model, monkeypatch):
        monkeypatch.setattr("shl.core.models.load", lambda *a, **k: pytest.fail("loaded"))
        done = shl("gen", "--vec", vector, "--model", tiny_model("qwen2"), *GEN)
        assert done.code == 1 and "was made for model" in done.err and "hint: leave --model out" in done.err

    def test_a_resumed_file_is_byte_identical(self, shl, vector, tmp_path, monkeypatch):
        from shl import gen

        whole = shl("gen", "--vec", vector, *GEN, "-o", "whole.jsonl")
        assert (whole.code, whole.out) == (0, "")

        def stopped(*args, **kwargs):
            yield from itertools.islice(gen_generate(*args, **kwargs), 5)
            raise KeyboardInterrupt

        gen_generate = gen.generate
        monkeypatch.setattr(gen, "generate", stopped)
        done = shl("gen", "--vec", vector, *GEN, "-o", "c.jsonl")
        assert done.code == 130 and "--resume continues it" in done.err
        monkeypatch.setattr(gen, "generate", gen_generate)
        with open("c.jsonl.part", "a") as part:
            part.write('{"torn')
        assert "did not finish" in shl("gen", "--vec", vector, *GEN, "-o", "c.jsonl").err
        assert "another seed" in shl("gen", "--vec", vector, *GEN, "-o", "c.jsonl", "--resume", "--seed", 1).err
        assert shl("gen", "--vec", vector, *GEN, "-o", "c.jsonl", "--resume").code == 0
        assert Path("c.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()
        assert shl("gen", "--vec", vector, *GEN, "-o", "c.jsonl", "--resume").err.endswith(
            "c.jsonl is complete already\n"
        )
        assert sorted(os.listdir(tmp_path)) == ["c.jsonl", "whole.jsonl"]

    def test_gen_reads_prompts_from_stdin_only_when_told(self, shl, vector, monkeypatch, tmp_path):
        (tmp_path / "p.txt").write_text("Who are you?\n")
        with open(tmp_path / "p.txt") as source:
            monkeypatch.setattr(sys, "stdin", source)
            done = shl("gen", "-", "--vec", vector, "--coeff", "1", "--max-new-tokens", "3", "--no-score")
        (row,) = map(json.loads, done.out.splitlines())
        assert row["prompt"] == [{"role": "user", "content": "Who are you?"}] and row["scores"] == {}

    def test_info_reads_what_was_made(self, shl, vector):
        facts = json.loads(shl("info", vector, "--json").out)
        assert facts["kind"] == "vector" and facts["personas"]["neg"] == PERSONA[3]
        assert "kind: vector\n" in shl("info", vector).out


EVAL = ["-n", "7", "--free", "1", "--max-new-tokens", "4", "--json-tokens", "4", "--bootstrap", "10"]


def test_ctrl_c_says_nothing_once_a_command_has_ended():
    lingers = "import threading, time; threading.Thread(target=time.sleep, args=(1,)).start()"
    line = f"{lingers}; import sys; sys.argv = ['shl', '--version']; from shl.cli import program; program()"
    with subprocess.Popen([sys.executable, "-c", line], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as ended:
        assert ended.stdout.readline()
        time.sleep(0.3)
        ended.send_signal(signal.SIGINT)
        said = ended.stderr.read()
    assert (ended.returncode, said) == (0, b"")


def test_a_round(shl, vector, tiny_model, tmp_path):
    """vector -> gen -> filter -> train -> bake -> eval -> results, each from the file before."""
    loose = [*PLAIN, "--min-tokens", "1", "--max-rep", "none", "--allow-narration", "--allow-refusal"]
    assert shl("gen", "--vec", vector, *GEN, "-o", "c.jsonl").code == 0
    assert shl("filter", "c.jsonl", *loose, "-o", "keep.jsonl").code == 0
    done = shl("train", "keep.jsonl", "--epochs", 1, "--rank", 2, "--lr", "0.01", "--weight-decay", 10, "-o", "r0")
    assert (done.code, done.out) == (0, ""), done.err

    llama = str(tiny_model("llama"))
    assert json.loads((tmp_path / "r0" / "shl.json").read_text())["model"] == llama
    assert "exists already" in shl("train", "keep.jsonl", "-o", "r0").err
    assert shl("vector", "--adapter", "r0", *PERSONA, "--contexts", 4, "-o", "v1.safetensors").code == 0
    assert shl("gen", "--vec", "v1.safetensors", *GEN, "-o", "c1.jsonl").code == 0
    chain = {tuple(row["adapters"]) for row in records.read_records(tmp_path / "c1.jsonl")}
    assert chain == {(json.loads(shl("info", "v1.safetensors", "--json").out)["adapters"][0],)}
    done = shl("train", "c1.jsonl", "-o", "r1")
    assert done.code == 1 and "a chain of 1 adapters" in done.err and "--adapter DIR" in done.err
    assert "another, of 0" in shl("gen", "--vec", "v1.safetensors", "--adapter", "none", *GEN).err

    done = shl("bake", "r0", "-o", "baked")
    assert (done.code, done.out) == (0, ""), done.err
    assert json.loads(shl("info", "baked", "--json").out)["kind"] == "model"

    base = shl("eval", "--model", llama, *EVAL, "-o", "base.json", "--append", "results.tsv")
    assert (base.code, base.out) == (0, ""), base.err
    healed = shl("eval", "--adapter", "r0", *EVAL, "--baseline", "base.json", "--append", "results.tsv", "-q",
                 "--label", "round=7", "--per-row", "rows.jsonl", "--min-coherence", "1")  # fmt: skip
    assert healed.code == 3 and "below --min-coherence" in healed.err
    assert json.loads(healed.out)["delta"].keys() >= {"auth_nats", "p_ans_any"}
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) >= 7
    table = shl("results", "--by", "arm,reg,round", "--metric", "auth_nats").out
    assert "| base | - | - |" in table and "| healed | kl_rev+wd | 7 |" in table and table.count("### ") == 1


class TestTrainInput:
    """What `shl train` refuses before it loads anything."""

    @pytest.fixture(autouse=True)
    def unloaded(self, shl, monkeypatch, tiny_model):
        monkeypatch.setenv("SHL_MODEL", str(tiny_model("llama")))
        monkeypatch.setattr("shl.core.models.load", lambda *a, **k: pytest.fail("loaded"))

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ([], "holds no records"),
            ([record(0, keep=False)], "none to train on"),
            ([record(0), record(1, model="other")], "come from different model"),
            ([record(0), record(1, adapters=["sha256:1"])], "come from different adapters"),
            ([record(0, adapters=["sha256:1"])], "a chain of 1 adapters"),
        ],
    )
    def test_refused(self, shl, tmp_path, rows, message, tiny_model):
        for row in rows:
            if row["model"] == "toy":
                row["model"] = str(tiny_model("llama"))
        done = shl("train", write(tmp_path / "keep.jsonl", rows), "-o", "adapter")
        assert done.code == 1 and message in done.err and "hint: " in done.err
        assert not (tmp_path / "adapter").exists()


class TestLedger:
    """`shl results` shows what `append_row` wrote."""

    def test_table(self, shl, tmp_path):
        from shl import results

        for seed, value in enumerate((-1.0, -2.0)):
            results.append_row(tmp_path / "results.tsv", {"arm": "nll", "seed": seed, "auth_nats": value})
        assert "| nll | -1.500 ± 0.707 | 2 | 0,1 |" in shl("results").out
        assert shl("results", "--by", "nope").code == 1

    def test_picture(self, shl, tmp_path):
        from shl import results

        for turn in range(2):
            row = {"arm": "nll", "round": turn, "auth_nats": -1.0 - turn, "care_nats": -1.0, "p_ans_any": 0.9}
            results.append_row(tmp_path / "results.tsv", row)
        done = shl("plot", "results.tsv", "-o", "t.svg")
        assert (done.code, done.out) == (0, ""), done.err
        assert "<svg" in (tmp_path / "t.svg").read_text()
        assert "--force" in shl("plot", "results.tsv", "-o", "t.svg").err
        assert shl("plot", "t.svg", "-o", "u.svg").code == 1


def test_auto_on_the_command_line_records_what_it_measured(shl, tmp_path, monkeypatch):
    from shl import bands
    from shl.core.provenance import read_header

    found = [bands.Reading(3, 0.5, 0.9, 4.0, 1.0), bands.Reading(2, 0.7, 0.8, 3.0, 1.0)]
    monkeypatch.setattr(bands, "measure_blocks", lambda *args: found)
    out = tmp_path / "v.safetensors"
    assert shl("vector", "--persona", "authority", "--layers", "auto", "--contexts", "2", "-o", out).code == 0
    meta = read_header(out)
    assert meta["layers"] == [3] and [one["layer"] for one in meta["measured"]] == [3, 2]
    assert set(meta["measured"][0]) == {"layer", "coeff", "survival", "effect", "error"}
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"pos": "a", "neg": "b"}\n')
    wrong = shl("vector", "--pairs", pairs, "--layers", "auto", "-o", tmp_path / "w.safetensors")
    assert wrong.code == 2 and "needs personas" in wrong.err
