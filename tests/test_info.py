"""`describe` knows every artifact, without torch, and says what is broken."""

import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shl import info, results
from shl.core import records
from shl.core.errors import InputError
from shl.core.provenance import canonical, digest_tensors
from shl.core.tensors import save_safetensors

RECORD = {
    "id": "p/1/0",
    "prompt": [{"role": "user", "content": "hi"}],
    "completion": [{"role": "assistant", "content": "hello"}],
    "coeff": 1.0,
    "n_tokens": 3,
    "finish": "stop",
    "scores": {"ppl": 2.0},
}


def lines(path, rows):
    with open(path, "w", encoding="utf-8") as handle:
        for row in rows:
            records.write_record(handle, row)
    return path


def test_vector(tmp_path):
    meta = {"model": "toy", "layers": [4], "personas": {"pos": "be kind", "neg": None}}
    path = tmp_path / "v.safetensors"
    save_safetensors(path, {"layer4.v": torch.ones(8)}, {"shl": canonical(meta), "cfg": "{}"})
    facts = info.describe(path)
    assert facts["kind"] == "vector" and facts["layers"] == [4]
    assert facts["tensors"] == {"layer4.v": "F32 8"}
    assert facts["digest"] == digest_tensors(path, meta)
    assert "  pos: be kind" in info.lines(facts)


def test_adapter(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}))
    save_safetensors(tmp_path / "adapter_model.safetensors", {"a": torch.ones(4, 3), "b": torch.ones(3, 4)})
    (tmp_path / "shl.json").write_text(json.dumps({"parents": [{"path": "../r0"}]}))
    lines(tmp_path / "log.jsonl", [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}])
    facts = info.describe(tmp_path)
    assert (facts["kind"], facts["rank"], facts["numbers"]) == ("adapter", 4, 24)
    assert facts["log"] == {"lines": 2, "last": {"step": 2, "loss": 1.0}}
    assert facts["shl"]["parents"] == [{"path": "../r0"}]
    assert info.lines(facts)


def test_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_safetensors(tmp_path / "model.safetensors", {"a": torch.ones(4, 3, dtype=torch.bfloat16)})
    facts = info.describe(tmp_path)
    assert (facts["kind"], facts["numbers"], facts["dtypes"]) == ("model", 12, {"BF16": 1})


def test_completions(tmp_path):
    rows = [RECORD, RECORD | {"coeff": 0.0, "scores": {"ppl": 4.0}, "keep": False, "reasons": ["control"]}]
    facts = info.describe(lines(tmp_path / "c.jsonl", rows))
    assert facts["kind"] == "completions" and facts["coeff"] == {"1.0": 1, "0.0": 1}
    assert facts["scores"]["ppl"] == {"min": 2.0, "p50": 3.0, "p90": 4.0, "max": 4.0}
    assert facts["reasons"] == {"control": 1}
    assert info.describe(lines(tmp_path / "c.jsonl.part", rows))["kind"] == "unfinished completions"


ANSWER = {name: value for name, value in RECORD.items() if name != "coeff"} | {"kind": "free", "axis": "authority"}
ITEMS = [
    {"kind": "vignette", "id": "v", "foundation": "care", "reply": "{"},
    ANSWER | {"judge": {"broken": False, "stance": "enact", "narrates": False}},
    ANSWER | {"id": "p/2", "judge": {"broken": True, "stance": "none", "narrates": False}},
    {"kind": "facts", "id": "f", "user": "?", "answer": "a", "reply": "b", "right": False},
    {"kind": "sums", "id": "s", "user": "?", "answer": "2", "reply": "2", "right": True},
]


@given(st.permutations(ITEMS), st.integers(1, len(ITEMS)))
def test_the_items_of_an_evaluation_are_known_in_any_order(tmp_path_factory, rows, count):
    path = tmp_path_factory.mktemp("items") / "rows.jsonl"
    facts = info.describe(lines(path, rows[:count]))
    assert facts["kind"] == "evaluation items" and facts["lines"] == count
    assert sum(facts["items"].values()) == count
    if count == len(ITEMS):
        assert facts["items"] == {"facts": 1, "free": 2, "sums": 1, "vignette": 1} and facts["right"] == "1 of 2"
        assert facts["answers"]["scores"]["ppl"]["p50"] == 2.0
        assert facts["answers"]["broken"] == {"False": 1, "True": 1}


def test_a_completion_that_carries_a_kind_is_a_completion(tmp_path):
    """Keys of a prompt are carried into its record, so `kind` alone does not make an item of an evaluation."""
    for kind in ("free", "dilemma"):
        assert info.describe(lines(tmp_path / f"{kind}.jsonl", [RECORD | {"kind": kind}]))["kind"] == "completions"
    with pytest.raises(InputError, match=r"rows\.jsonl:1: prompt"):
        info.describe(lines(tmp_path / "rows.jsonl", [ANSWER | {"prompt": 1}]))


@pytest.mark.parametrize(
    ("row", "kind"), [({"user": "hi"}, "prompts"), ({"pos": "a", "neg": "b"}, "pairs"), ({"step": 1}, "jsonl")]
)
def test_other_lines(tmp_path, row, kind):
    assert info.describe(lines(tmp_path / "x.jsonl", [row]))["kind"] == kind


def test_ledger_evaluation_and_run_folder(tmp_path):
    results.append_row(tmp_path / "results.tsv", {"arm": "nll", "model": "toy"})
    assert info.describe(tmp_path / "results.tsv")["arms"] == {"nll": 1}
    (tmp_path / "eval.json").write_text(json.dumps({"suite": "mfv", "metrics": {"auth_nats": -1.5}}))
    assert info.describe(tmp_path / "eval.json")["kind"] == "evaluation"
    assert info.describe(tmp_path)["files"] == ["eval.json", "results.tsv"]


def test_what_is_broken_is_said(tmp_path):
    (tmp_path / "eval.json").write_text("{")
    (tmp_path / "notes.txt").write_text("hi")
    for path, message in [
        (tmp_path / "eval.json", "is not JSON"),
        (tmp_path / "notes.txt", "not a kind of file"),
        (tmp_path / "nope", "no such file"),
        (lines(tmp_path / "c.jsonl", [RECORD, RECORD | {"prompt": 1}]), "c.jsonl:2: prompt"),
    ]:
        with pytest.raises(InputError, match=message):
            info.describe(path)


def test_no_torch(tmp_path):
    save_safetensors(tmp_path / "v.safetensors", {"layer4.v": torch.ones(8)}, {"shl": "{}"})
    code = (
        f"import sys; from shl import info; info.describe({str(tmp_path / 'v.safetensors')!r})\n"
        "assert not {'torch', 'safetensors', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
