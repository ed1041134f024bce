"""Files: complete when they exist, never silently replaced, plain modes, and a stdout that holds records only."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from shl.core import files
from shl.core.errors import Mismatch, ShlError
from shl.core.part import PartFile


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def umask():
    old = os.umask(0o027)
    yield
    os.umask(old)


def run(code: str, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, **kwargs)


def test_atomic_file_appears_complete_with_a_plain_mode(tmp_path, umask):
    target = tmp_path / "deep" / "a.txt"
    with files.atomic_file(target) as handle:
        handle.write("é\n")
        assert not target.exists()
    assert target.read_bytes() == "é\n".encode()
    assert mode(target) == 0o640
    assert os.listdir(target.parent) == ["a.txt"]


def test_a_failure_leaves_the_old_file_and_no_litter(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError), files.atomic_file(target, force=True) as handle:
        handle.write("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_existing_outputs_are_refused_without_force(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(ShlError, match="exists already") as caught, files.atomic_file(target):
        pass
    assert "--force" in caught.value.hint
    with files.atomic_file(target, force=True) as handle:
        handle.write("new")
    assert target.read_text() == "new"


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path):
    target = tmp_path / "a.txt"
    with pytest.raises(ShlError), files.atomic_file(target) as handle:
        handle.write("mine")
        target.write_text("theirs")
    assert target.read_text() == "theirs"


def test_a_link_stays_a_link_and_a_device_stays_a_device(tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_text("old")
    link.symlink_to(real)
    with files.atomic_file(link, force=True) as handle:
        handle.write("new")
    assert link.is_symlink() and real.read_text() == "new"
    with files.atomic_file("/dev/null") as handle:
        handle.write("gone")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_atomic_dir_is_published_at_once_with_plain_modes(tmp_path, umask):
    target = tmp_path / "out" / "adapter"
    with files.atomic_dir(target) as work:
        (work / "sub").mkdir(mode=0o700)
        (work / "sub" / "x").write_text("1")
        os.chmod(work / "sub" / "x", 0o600)
        assert not target.exists()
    assert mode(target) == mode(target / "sub") == 0o750
    assert mode(target / "sub" / "x") == 0o640
    assert os.listdir(target.parent) == ["adapter"]


def test_atomic_dir_replaces_only_what_shl_wrote(tmp_path):
    target = tmp_path / "adapter"
    with files.atomic_dir(target) as work:
        (work / "shl.json").write_text("1")
    with pytest.raises(ShlError, match="exists already"), files.atomic_dir(target):
        pass
    with files.atomic_dir(target, force=True) as work:
        (work / "shl.json").write_text("2")
    assert (target / "shl.json").read_text() == "2"
    assert os.listdir(tmp_path) == ["adapter"]

    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    with pytest.raises(ShlError, match="did not write"), files.atomic_dir(home, force=True):
        pass
    assert (home / "thesis.tex").exists()


def test_atomic_dir_failure_leaves_the_old_one(tmp_path):
    target = tmp_path / "adapter"
    with files.atomic_dir(target) as work:
        (work / "shl.json").write_text("1")
    with pytest.raises(KeyboardInterrupt), files.atomic_dir(target, force=True) as work:
        (work / "shl.json").write_text("2")
        raise KeyboardInterrupt
    assert (target / "shl.json").read_text() == "1"
    assert os.listdir(tmp_path) == ["adapter"]


def test_an_empty_directory_may_be_filled(tmp_path):
    target = tmp_path / "made-by-mkdir"
    target.mkdir()
    with files.atomic_dir(target) as work:
        (work / "shl.json").write_text("1")
    assert (target / "shl.json").exists()


def test_stdout_carries_records_only_whatever_libraries_print():
    code = (
        "import os, sys\n"
        "from shl.core.files import data_stdout\n"
        "with data_stdout() as out:\n"
        "    print('python noise')\n"
        "    os.write(1, b'native noise\\n')\n"
        "    os.system('echo child noise')\n"
        "    out.write('record é\\n')\n"
        "print('after')\n"
    )
    done = run(code, env={**os.environ, "PYTHONIOENCODING": "ascii:replace"})
    assert done.stdout == "record é\nafter\n"
    assert sorted(done.stderr.split("\n")) == ["", "child noise", "native noise", "python noise"]


def test_records_arrive_line_by_line():
    code = (
        "import sys\n"
        "from shl.core.files import data_stdout\n"
        "with data_stdout() as out:\n"
        "    out.write('first\\n')\n"
        "    sys.stdin.read()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"first\n"  # while the writer is still alive
        process.stdin.close()


def test_open_out_guards_stdout_when_records_go_to_a_file(tmp_path):
    target = tmp_path / "a.jsonl"
    code = (
        "import os, sys\n"
        "from shl.core.files import open_out\n"
        "with open_out(sys.argv[1]) as out:\n"
        "    os.write(1, b'noise\\n')\n"
        "    out.write('record\\n')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(target)], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr, target.read_text()) == ("", "noise\n", "record\n")


SETTINGS = {"seed": 0, "coeffs": (0.0, 1.0)}


class TestPartFile:
    """A resumed file is the file that an uninterrupted run would have written."""

    def begin(self, target: Path, lines: list[str], torn: str = "") -> None:
        part = PartFile(target, SETTINGS)
        with pytest.raises(KeyboardInterrupt), part.writer() as handle:
            for line in lines:
                handle.write(line + "\n")
            handle.write(torn)
            handle.flush()
            raise KeyboardInterrupt

    def test_renamed_when_complete(self, tmp_path):
        target = tmp_path / "a.jsonl"
        part = PartFile(target, SETTINGS, resume=True)
        with part.writer() as handle:
            handle.write("1\n")
            assert not target.exists()
        assert target.read_text() == "1\n"
        assert os.listdir(tmp_path) == ["a.jsonl"]
        assert PartFile(target, SETTINGS, resume=True).complete
        with pytest.raises(ShlError, match="exists already"):
            PartFile(target, SETTINGS)

    def test_resume_drops_the_torn_line(self, tmp_path):
        target = tmp_path / "a.jsonl"
        self.begin(target, ["1", "2", "3"], torn='{"half')
        part = PartFile(target, SETTINGS, resume=True)
        assert part.lines == 3
        with part.writer() as handle:
            handle.write("4\n")
        assert target.read_text() == "1\n2\n3\n4\n"

    def test_a_device_is_not_replaced(self):
        with pytest.raises(ShlError, match="not a plain file"):
            PartFile("/dev/null", SETTINGS, force=True)

    def test_not_continued_with_other_settings(self, tmp_path):
        target = tmp_path / "a.jsonl"
        self.begin(target, ["1"])
        with pytest.raises(Mismatch, match="another seed"):
            PartFile(target, SETTINGS | {"seed": 1}, resume=True)

    def test_not_silently_begun_again(self, tmp_path):
        target = tmp_path / "a.jsonl"
        self.begin(target, ["1"])
        with pytest.raises(ShlError, match="did not finish"):
            PartFile(target, SETTINGS)
        part = PartFile(target, SETTINGS | {"seed": 1}, force=True)
        with part.writer() as handle:
            handle.write("x\n")
        assert target.read_text() == "x\n"
        assert os.listdir(tmp_path) == ["a.jsonl"]
