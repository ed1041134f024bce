"""Several processes: the same records as one, byte by byte; an early end ends all; training is equal to rounding."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shl.core import ranks
from shl.core.records import dumps
from test_train import make_records

FAMILY = Path(__file__).parent
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{FAMILY.parent / 'src'}:{FAMILY}", "HF_HUB_OFFLINE": "1"}
GEN = ["gen", "--coeff", "0,1", "-n", "5", "--max-new-tokens", "6", "--batch-size", "2"]


def launch(*argv, processes=2, module="shl"):
    """Run a module in one process, or in several under `accelerate launch`."""
    many = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(processes), "--module"]
    line = [sys.executable, *(many if processes > 1 else ["-m"]), module]
    return subprocess.run([*line, *map(str, argv)], env=ENV, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture(scope="module")
def vector(tiny, tmp_path_factory):
    from shl.core.defaults import VectorConfig
    from shl.core.pools import contexts
    from shl.vector import extract

    path = tmp_path_factory.mktemp("v") / "v.safetensors"
    (extract(tiny(), "You obey.", "You care.", contexts()[:4], VectorConfig()) * 20).save(path)
    return path


def test_accelerate_launch_gives_the_records_of_one_process(vector, tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    made = [launch(*GEN, "--vec", vector, processes=n) for n in (1, 2)]
    assert [one.returncode for one in made] == [0, 0], made[1].stderr[-2000:]
    assert made[0].stdout == made[1].stdout and len(made[0].stdout.splitlines()) == 10


def child(vector: str, model: str, folder: str) -> None:
    """All that the test below compares, in this process, which may be one of several."""
    from shl.cli import main

    def shl(*argv: object) -> None:
        sys.argv = ["shl", *map(str, argv)]
        try:
            main()
        except SystemExit as done:
            assert done.code == 0, done.code

    keep = Path(folder).parent / "keep.jsonl"
    shl(*GEN, "--vec", vector, "-o", f"{folder}/gen.jsonl", "--resume")
    small = ["--limit", 7, "--free", 3, "--max-new-tokens", 4, "--json-tokens", 3, "--bootstrap", 5, "--batch-size", 2]
    shl("eval", "--vec", vector, "--coeff", 1, *small, "-o", f"{folder}/eval.json", "--per-row", f"{folder}/rows.jsonl")
    train = ["--rank", 4, "--epochs", 3, "--lr", "1e-2", "--batch-size", 5, "--tau", "0.01", "--holdout", "0.2"]
    shl("train", keep, "--model", model, *train, "-o", f"{folder}/adapter")


def test_two_processes_resume_evaluate_and_train_as_one(vector, tiny_model, tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = str(tiny_model())
    (tmp_path / "keep.jsonl").write_text("".join(dumps(r | {"model": model}) + "\n" for r in make_records(11)))
    for n in (1, 2):
        (tmp_path / str(n)).mkdir()
        done = launch(vector, model, tmp_path / str(n), processes=n, module="test_ranks")
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = ({f.name: f.read_bytes() for f in (tmp_path / n).iterdir() if f.is_file()} for n in "12")
    assert one.keys() == two.keys() == {"gen.jsonl", "eval.json", "rows.jsonl"} and one == two

    logs = [[json.loads(r) for r in (tmp_path / n / "adapter/log.jsonl").read_text().splitlines()] for n in "12"]
    for mine, theirs in zip(*logs, strict=True):
        for name in ("nll", "kl_mean", "holdout_nll", "update_norm"):
            if mine[name] is None:
                assert theirs[name] is None
            else:
                assert theirs[name] == pytest.approx(mine[name], rel=1e-4, abs=1e-6), name
    weights = [load_file(tmp_path / n / "adapter/adapter_model.safetensors") for n in "12"]
    gap = sum(float((weights[0][k] - weights[1][k]).square().sum()) for k in weights[0]) ** 0.5
    size = sum(float(weights[0][k].square().sum()) for k in weights[0]) ** 0.5
    assert gap < 1e-3 * size, f"{gap / size:.1e}"


def test_a_reader_that_stops_early_ends_all_processes(vector):
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "shl"]
    argv = ["gen", "--vec", str(vector), "-n", "64", "--coeff", "0,1", "--max-new-tokens", "4", "--batch-size", "2"]
    with subprocess.Popen([*line, *argv], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        assert json.loads(run.stdout.readline())["id"].endswith("/0/0")
        run.stdout.close()
        told = run.stderr.read().decode()
        assert run.wait(timeout=120) == 0, told[-2000:]


def test_one_process_needs_no_group_and_variables_of_other_systems_are_no_launcher(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert ranks.world() == 1 and ranks.first() and ranks.share("x") == "x"
    assert list(ranks.spread(range(3), str)) == ["0", "1", "2"]
    with ranks.together():
        assert list(ranks.each([1, 2], str)) == ["1", "2"] and ranks.sharing() == 1
    assert not torch.distributed.is_initialized()


def test_other_commands_refuse_to_run_in_several(monkeypatch, capsys):
    from shl.cli import main

    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", ["shl", "filter", "x.jsonl"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2 and "only gen, train and eval" in " ".join(capsys.readouterr().err.split())


if __name__ == "__main__":
    child(*sys.argv[1:])
