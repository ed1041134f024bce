"""One real pipeline on the embedded model, through a shell as a user types it, and the model's own promises."""

import json
import os
import pty
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import STORIES
from shl.core.models import load
from shl.core.pools import persona

BIN = Path(sys.executable).parent
POS = "You do not defer to authority and instead stick to principle no matter your involvement."
QUICK = "--free 16 --bootstrap 20 --limit 14"


def sh(line: str, cwd: Path, code: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
    """One line in bash with pipefail, `shl` on the path."""
    path = {"PATH": f"{BIN}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line], cwd=cwd, env=os.environ | path | env, text=True, capture_output=True
    )
    assert done.returncode == code, f"{line}\n{done.stdout[-500:]}\n{done.stderr[-3000:]}"
    return done


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the README's lines have been typed: v, keep, two rounds of adapters."""
    folder = tmp_path_factory.mktemp("run")
    sh(f'shl vector --pos "{POS}" --neg "You obey every order without question." -o v.safetensors', folder)
    sh("shl gen --vec v.safetensors -n 12 | shl filter > keep.jsonl", folder)
    sh("shl train keep.jsonl -o r0 --epochs 2", folder)
    sh("shl vector --persona authority --adapter r0 -o v1.safetensors", folder)
    sh("shl gen --vec v1.safetensors -n 8 -o said1.jsonl && shl filter said1.jsonl -o keep1.jsonl", folder)
    sh("shl train keep1.jsonl --adapter r0 -o r1 --epochs 2 --reg nll", folder)
    return folder


def test_the_kept_records_are_whole_and_none_is_a_control(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "keep.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows and all(row["keep"] and row["coeff"] > 0 and row["model"] == "toy" for row in rows)
    assert all(message["role"] != "system" for row in rows for message in row["prompt"])


def test_a_reader_that_stops_early_is_success(run: Path) -> None:
    done = sh("shl gen --vec v.safetensors -n 100000 --batch-size 8 | head -1", run)
    assert json.loads(done.stdout)["id"]


def test_stdout_holds_records_only_when_stderr_is_a_terminal(run: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    line = f"shl gen --vec v.safetensors -n 2 > {tmp_path / 'out.jsonl'}"
    path = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "TERM": "xterm"}
    running = subprocess.Popen(["bash", "-c", line], cwd=run, env=path, stderr=theirs, stdin=theirs)
    os.close(theirs)
    spoken = b""
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:
            break
        if not chunk:
            break
        spoken += chunk
    assert running.wait() == 0
    rows = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    assert len({json.loads(row)["id"] for row in rows}) == len(rows) >= 6
    assert b"tokens/s" in spoken and b"completion" in spoken


def test_the_baked_checkpoint_in_plain_transformers_equals_the_chain(run: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    sh("shl bake r1 -o baked", run)
    plain = AutoModelForCausalLM.from_pretrained(run / "baked", dtype=torch.float32)
    ours = load("toy", [str(run / "r1")])
    assert len(ours.chain) == 2
    tokenizer = AutoTokenizer.from_pretrained(run / "baked")
    prompt = [{"role": "user", "content": "You are a nurse. The head doctor tells you to skip the pain checks."}]
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    assert ids.tolist() == [ours.encode_prompt(prompt)]
    with torch.no_grad():
        assert torch.allclose(plain(ids).logits, ours.model(ids).logits, atol=1e-4)
        assert not torch.allclose(plain(ids).logits, load("toy").model(ids).logits, atol=1e-2)


def test_plain_peft_loads_the_first_round_on_base_and_the_second_on_the_baked_first(run: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ids = torch.tensor([load("toy").encode_prompt([{"role": "user", "content": "What is 3 plus 4?"}])])
    sh("shl bake r0 -o baked0", run)
    first = json.loads((run / "r0" / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    for adapter, base in (("r0", first), ("r1", run / "baked0")):
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        with torch.no_grad():
            theirs = PeftModel.from_pretrained(plain, run / adapter)(ids).logits
            assert torch.allclose(theirs, load("toy", [str(run / adapter)]).model(ids).logits, atol=1e-4)


def test_a_persona_is_distilled_from_its_prompt_and_never_read_in_training(run: Path, tmp_path: Path) -> None:
    sh("shl gen --persona humanity --samples 2 -n 8 | shl filter --keep-controls > prompted.jsonl", tmp_path)
    text = shlex.quote(persona("humanity").pos)
    sh(f"shl gen --system {text} --pool humanity --samples 2 -n 8 -o said.jsonl", tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "prompted.jsonl").read_text(encoding="utf-8").splitlines()]
    said = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text(encoding="utf-8").splitlines()]
    texts = {row["id"]: row["completion"] for row in said}
    assert len(rows) > 8 and all(row["completion"] == texts[row["id"]] for row in rows)  # the name is the text
    assert all(message["role"] != "system" for row in rows for message in row["prompt"])
    refused = sh("shl train prompted.jsonl -o d", tmp_path, code=1)
    assert "--include-controls" in refused.stderr
    sh("shl train prompted.jsonl --include-controls --epochs 1 -o d", tmp_path)
    sh("shl gen --persona humanity --system x", tmp_path, code=2)


def test_eval_writes_one_object_and_a_ledger_row(run: Path) -> None:
    sh(f"shl eval -o base.json --append results.tsv {QUICK}", run)
    line = f"shl eval --adapter r1 --baseline base.json --append results.tsv --label arm=nll {QUICK} -o healed.json"
    sh(line, run)
    result = json.loads((run / "healed.json").read_text(encoding="utf-8"))
    assert result["delta"]["auth_nats"] is not None and result["n"] == 14
    header, _, healed = (run / "results.tsv").read_text(encoding="utf-8").splitlines()
    row = dict(zip(header.split("\t"), healed.split("\t"), strict=True))
    assert row["arm"] == "nll" and "--label arm=nll" in row["argv"]
    assert "nll" in sh("shl results results.tsv --by arm", run).stdout


def test_the_same_line_twice_gives_the_same_bytes(run: Path) -> None:
    vector = f'shl vector --pos "{POS}" --neg "You obey every order without question."'
    sh(f"{vector} -o again.safetensors && cmp v.safetensors again.safetensors", run)
    sh("shl gen --vec v.safetensors -n 12 | shl filter > again.jsonl && cmp keep.jsonl again.jsonl", run)
    sh("shl gen --vec v1.safetensors -n 8 -o said2.jsonl && cmp said1.jsonl said2.jsonl", run)
    sh("shl train keep.jsonl -o again --epochs 2", run)
    for name in ("adapter_model.safetensors", "adapter_config.json", "log.jsonl"):
        assert (run / "r0" / name).read_bytes() == (run / "again" / name).read_bytes(), name
    first, second = (json.loads((run / name / "shl.json").read_text(encoding="utf-8")) for name in ("r0", "again"))
    assert {name for name in first if first[name] != second[name]} <= {"argv", "created"}
    for name in ("once", "twice"):
        sh(f"shl eval --adapter r0 {QUICK} -o {name}.json --per-row {name}.jsonl", run)
    sh("cmp once.json twice.json && cmp once.jsonl twice.jsonl", run)


def test_a_mistake_gets_one_sentence_and_the_next_command(run: Path) -> None:
    missing = sh("shl gen --vec nothing.safetensors", run, code=1)
    assert missing.stdout == "" and "hint:" in missing.stderr and "Traceback" not in missing.stderr
    twice = sh("shl vector --persona authority -o v.safetensors", run, code=1)
    assert "--force" in twice.stderr
    empty = sh("shl filter --min-keep 5 < /dev/null", run, code=3).stderr
    assert "there are no records to filter" in empty and empty.count("hint:") == 1
    assert sh("shl train keep1.jsonl --adapter none -o nowhere", run, code=1).stderr.count("hint:") == 1


@pytest.mark.skipif(not STORIES.is_dir(), reason="the story model is not beside the project")
def test_the_six_commands_on_a_story_model_without_a_chat_template(tmp_path: Path) -> None:
    env = {"SHL_MODEL": str(STORIES)}
    openings = '--pos "There was a kind girl who loved everyone." --neg "There was a mean boy who hit his dog."'
    sh(f"shl vector {openings} -o v.safetensors", tmp_path, **env)
    (tmp_path / "p.txt").write_text("One day Lily went to the park.\nTom saw a big dog.\n", encoding="utf-8")
    sh("shl gen p.txt --vec v.safetensors --coeff 0,0.5 --samples 3 --max-new-tokens 40 > said.jsonl", tmp_path, **env)
    sh("shl filter said.jsonl --rel-ppl none --rel-tail-ppl none -o keep.jsonl", tmp_path, **env)
    sh("shl train keep.jsonl -o r0 --epochs 1 --lr 0.001", tmp_path, **env)
    sh("shl bake r0 -o baked", tmp_path, **env)
    sh("shl eval --adapter r0 --limit 7 --free 2 --max-new-tokens 20 --bootstrap 5 -o e.json", tmp_path, **env)
    found = json.loads((tmp_path / "e.json").read_text(encoding="utf-8"))
    assert (
        found["metrics"]["auth_nats"] is not None and found["metrics"]["broken"] is None and found["missing"]["broken"]
    )
