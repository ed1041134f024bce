"""`describe` knows every artifact, without torch, and says what is broken."""

import json
import subprocess
import sys

import pytest
import torch

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
