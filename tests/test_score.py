"""shl score gives any completion what shl gen gives its own, and keeps everything else."""

import json

import pytest

from shl.cli import main
from shl.core.defaults import GenConfig
from shl.core.records import Prompt, dumps
from shl.gen import generate

PROMPTS = [Prompt("a", [{"role": "user", "content": "Who said so?"}], "Be brief.", {"topic": "work"})]


@pytest.fixture
def run(capfd, monkeypatch):
    def go(*argv: str) -> tuple[int, list[dict], str]:
        monkeypatch.setattr("sys.argv", ["shl", "score", *map(str, argv)])
        with pytest.raises(SystemExit) as done:
            main()
        out, err = capfd.readouterr()
        return done.value.code or 0, [json.loads(line) for line in out.splitlines()], err

    return go


@pytest.fixture(scope="module")
def records(tiny):
    cfg = GenConfig(samples=3, max_new_tokens=12)
    return list(generate(tiny("llama"), PROMPTS, cfg))


def write(path, rows):
    path.write_text("".join(dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_scores_are_those_of_gen(run, records, tmp_path):
    bare = [{k: v for k, v in row.items() if k != "scores"} for row in records]
    code, scored, err = run(write(tmp_path / "r.jsonl", bare), "--device", "cpu")
    assert code == 0, err
    assert [row["id"] for row in scored] == [row["id"] for row in records]
    for mine, theirs in zip(scored, records, strict=True):
        assert mine["scores"] == pytest.approx(theirs["scores"], rel=1e-5)
        assert {k: v for k, v in mine.items() if k != "scores"} == {k: v for k, v in theirs.items() if k != "scores"}


def test_a_judge_of_ones_own_stays(run, records, tmp_path):
    rows = [row | {"scores": {"judge": 70}} for row in records[:1]]
    _, scored, _ = run(write(tmp_path / "r.jsonl", rows))
    assert scored[0]["scores"]["judge"] == 70 and scored[0]["scores"]["ppl"] > 1


def test_what_cannot_be_scored_is_said(run, records, tmp_path):
    code, scored, err = run(write(tmp_path / "empty.jsonl", []))
    assert (code, scored) == (1, []) and "hint:" in err
    mixed = [records[0], records[1] | {"model": "toy"}]
    code, _, err = run(write(tmp_path / "mixed.jsonl", mixed))
    assert code == 1 and "--model" in err
    code, scored, _ = run(tmp_path / "mixed.jsonl", "--model", records[0]["model"])
    assert code == 0 and len(scored) == 2
