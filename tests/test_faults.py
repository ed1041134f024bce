"""A sample of the faults that `just faults` does in full: struck, starved, raced or cut off, nothing is lost."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shl.core import files, litter
from shl.core.errors import ShlError
from shl.core.part import PartFile
from shl.results import append_row, read_rows

TESTS = Path(__file__).parent


@pytest.mark.slow
def test_every_command_survives_a_sample_of_faults():
    """In an interpreter of its own, which has no threads and can be forked."""
    path = {"PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-m", "faults", "--sample"], env=os.environ | path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert ", 0 defects," in done.stdout and "| gen | three at once | 1 |" in done.stdout


def test_training_killed_in_the_middle_goes_on_to_the_same_bytes(tiny_model, tmp_path):
    """A real kill -9 of the command, and then the same line."""
    rows = [
        {"id": f"p{i}/1/0", "prompt": [{"role": "user", "content": f"Case {i}?"}], "coeff": 1.0, "finish": "stop",
         "completion": [{"role": "assistant", "content": "She helped the old man, and he thanked her."}]}
        for i in range(8)
    ]  # fmt: skip
    (tmp_path / "keep.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = [sys.executable, "-m", "shl", "train", "keep.jsonl", "--model", str(tiny_model()), "--epochs", "30"]
    line += ["--rank", "2", "--on-policy", "0", "-o"]
    begun = subprocess.Popen([*line, "a"], cwd=tmp_path, stderr=subprocess.DEVNULL)
    while not (tmp_path / "a.part").exists() and begun.poll() is None:
        time.sleep(0.002)
    begun.kill()
    assert begun.wait() == -signal.SIGKILL and not (tmp_path / "a").exists()
    again = subprocess.run([*line, "a"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "a.part: going on after epoch " in again.stderr
    subprocess.run([*line, "b"], cwd=tmp_path, capture_output=True, check=True)
    for name in ("adapter_model.safetensors", "adapter_config.json", "log.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "keep.jsonl"]


class TestLitter:
    """What killed runs leave is swept by the next run of the same output, and what is held is left alone."""

    @pytest.fixture(autouse=True)
    def old(self, monkeypatch):
        monkeypatch.setattr(litter, "YOUNG", 0.0)

    def test_swept(self, tmp_path):
        stale, folder = tmp_path / ".v.json.abcd1234.tmp", tmp_path / ".v.json.wxyz9876.tmp"
        stale.write_text("half")
        folder.mkdir()
        (folder / "x").write_text("half")
        others = [tmp_path / name for name in (".w.json.abcd1234.tmp", ".v.json.abcd1234.bak", "v.json.abcd1234.tmp")]
        for other in others:
            other.write_text("not ours")
        with files.atomic_file(tmp_path / "v.json") as handle:
            handle.write("whole")
        assert not stale.exists() and not folder.exists()
        assert all(other.exists() for other in others) and (tmp_path / "v.json").read_text() == "whole"

    def test_not_from_under_a_run_that_goes_on(self, tmp_path):
        with files.atomic_file(tmp_path / "v.json", force=True) as first:
            first.write("first")
            with files.atomic_file(tmp_path / "v.json") as second:
                second.write("second")
        assert (tmp_path / "v.json").read_text() == "first" and os.listdir(tmp_path) == ["v.json"]

    def test_young_litter_may_be_about_to_be_held(self, tmp_path, monkeypatch):
        monkeypatch.setattr(litter, "YOUNG", 60.0)
        (tmp_path / ".v.json.abcd1234.tmp").write_text("half")
        litter.sweep(tmp_path / "v.json")
        assert (tmp_path / ".v.json.abcd1234.tmp").exists()

    def test_the_only_copy_is_kept(self, tmp_path):
        old = tmp_path / ".r0.abcd1234.old"
        old.mkdir()
        litter.sweep(tmp_path / "r0")  # killed between two renames of --force
        assert old.exists()
        (tmp_path / "r0").mkdir()
        litter.sweep(tmp_path / "r0")
        assert not old.exists()

    def test_a_link_is_not_followed(self, tmp_path):
        (tmp_path / "mine").write_text("mine")
        (tmp_path / ".v.json.abcd1234.tmp").symlink_to(tmp_path / "mine")
        litter.sweep(tmp_path / "v.json")
        assert (tmp_path / "mine").read_text() == "mine"


class TestNames:
    """A name that somebody else took meanwhile is never replaced without force, however late that happens."""

    def test_a_file(self, tmp_path):
        target = tmp_path / "v.json"
        with pytest.raises(ShlError, match="exists already"), files.atomic_file(target) as handle:
            handle.write("mine")
            target.write_text("theirs")
        assert target.read_text() == "theirs" and os.listdir(tmp_path) == ["v.json"]

    def test_a_directory(self, tmp_path):
        target = tmp_path / "r0"
        with pytest.raises(ShlError, match="exists already"), files.atomic_dir(target) as work:
            (work / "shl.json").write_text("mine")
            target.mkdir()
            (target / "shl.json").write_text("theirs")
        assert (target / "shl.json").read_text() == "theirs" and os.listdir(tmp_path) == ["r0"]

    def test_where_a_file_cannot_have_two_names(self, tmp_path, monkeypatch):
        def cannot(*_):
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", cannot)
        with files.atomic_file(tmp_path / "v.json") as handle:
            handle.write("x")
        assert os.listdir(tmp_path) == ["v.json"]

    def test_a_directory_in_the_place_of_a_file(self, tmp_path):
        with pytest.raises(ShlError, match="is a directory"), files.atomic_file(tmp_path):
            pass


class TestUnfinished:
    """One process at a time grows an output, and what it begins with is sound."""

    def test_a_second_process_is_told(self, tmp_path):
        target = tmp_path / "c.jsonl"
        first = PartFile(target, {})
        with pytest.raises(ShlError, match="another process is writing"):
            PartFile(target, {}, force=True)
        with first.writer() as handle:
            handle.write("1\n")
        assert PartFile(target, {}, resume=True).complete and os.listdir(tmp_path) == ["c.jsonl"]

    def test_a_process_that_was_killed_holds_nothing(self, tmp_path):
        target = tmp_path / "c.jsonl"
        code = (
            "import sys, time\nfrom shl.core.part import PartFile\n"
            "with PartFile(sys.argv[1], {}).writer() as lines:\n"
            "    lines.write('1\\n')\n    print('on', flush=True)\n    sys.stderr.write('on\\n')\n    time.sleep(60)\n"
        )
        running = subprocess.Popen([sys.executable, "-c", code, str(target)], stderr=subprocess.PIPE)
        assert running.stderr.readline()
        with pytest.raises(ShlError, match="another process is writing"):
            PartFile(target, {}, resume=True)
        running.kill()
        running.wait()
        part = PartFile(target, {}, resume=True)
        with part.writer() as handle:
            handle.write("2\n")
        assert part.lines == 1 and target.read_text() == "1\n2\n" and os.listdir(tmp_path) == ["c.jsonl"]

    def test_a_damaged_line_and_what_follows_are_made_again(self, tmp_path, capsys):
        target = tmp_path / "c.jsonl"
        (tmp_path / "c.jsonl.part").write_bytes(b'{"a": 1}\n\0\0\0\0\n{"a": 3}\n')
        (tmp_path / "c.jsonl.part.json").write_text("{}")
        part = PartFile(target, {}, resume=True)
        assert part.lines == 1 and ":2 was damaged" in capsys.readouterr().err

    def test_a_kill_between_the_last_steps(self, tmp_path):
        target = tmp_path / "c.jsonl"
        target.write_text("{}\n")
        os.link(target, tmp_path / "c.jsonl.part")
        (tmp_path / "c.jsonl.part.json").write_text("{}")
        (tmp_path / ".c.jsonl.lock").write_text("")
        assert PartFile(target, {}, resume=True).complete and os.listdir(tmp_path) == ["c.jsonl"]

    @pytest.mark.parametrize("plan", ["{", "[]", ""])
    def test_damaged_settings(self, tmp_path, plan):
        (tmp_path / "c.jsonl.part").write_text("{}\n")
        (tmp_path / "c.jsonl.part.json").write_text(plan)
        with pytest.raises(ShlError) as error:
            PartFile(tmp_path / "c.jsonl", {}, resume=True)
        assert "--force" in error.value.hint

    def test_nothing_begun_leaves_nothing_behind(self, tmp_path):
        target = tmp_path / "c.jsonl"
        with pytest.raises(ShlError, match="cannot load"), PartFile(target, {}).writer():
            raise ShlError("cannot load the model")
        assert not os.listdir(tmp_path)
        (tmp_path / "c.jsonl.part").write_text("")  # killed before the first line
        PartFile(target, {"seed": 1})


def test_a_row_that_does_not_fit_on_the_disk_is_not_there_by_halves(tmp_path, monkeypatch):
    path = tmp_path / "results.tsv"
    append_row(path, {"a": 1, "b": "x" * 50})
    before, fsync = path.read_bytes(), os.fsync

    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        append_row(path, {"a": 2, "b": "y" * 50})
    assert path.read_bytes() == before
    monkeypatch.setattr(os, "fsync", fsync)
    append_row(path, {"a": 2, "b": "y"})
    assert len(read_rows(path)) == 2


def test_what_waits_is_a_lock_and_not_a_file(tmp_path):
    (tmp_path / ".c.jsonl.lock").write_text("")  # a dead process has left it
    litter.Claim(tmp_path / "c.jsonl").release()
    assert not os.listdir(tmp_path)
