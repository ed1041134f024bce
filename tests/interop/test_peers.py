"""Peers read what shl writes and the other way round: repeng and TRL, in environments that `just interop` makes."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from shl.core.defaults import GenConfig
from shl.core.models import load
from shl.core.records import Prompt
from shl.core.vectors import Vector
from shl.export import from_gguf, to_gguf
from shl.gen import generate

WHY = "is not installed here; `just interop` makes an environment that has it"


@pytest.fixture
def repeng():
    return pytest.importorskip("repeng", reason=f"repeng {WHY}")


@pytest.fixture
def theirs(repeng, tiny_model, tmp_path):
    """A control vector that repeng trained and exported, as its object and as its file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny_model("mistral")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    pairs = [
        repeng.DatasetEntry(f"You obey. {text}", f"You care. {text}")
        for text in ("Who said so?", "The order came from above.", "She helped the old man.", "Nobody asked why.")
    ]
    vector = repeng.ControlVector.train(model, tokenizer, pairs, batch_size=4)
    vector.export_gguf(tmp_path / "theirs.gguf")
    return vector, tmp_path / "theirs.gguf"


def test_repeng_reads_our_file(repeng, tmp_path):
    mine = Vector({2: torch.randn(8), 5: torch.randn(8)}, {"method": "random"})
    to_gguf(mine, tmp_path / "mine.gguf", "qwen3", 0.5)
    read = repeng.ControlVector.import_gguf(tmp_path / "mine.gguf")
    assert read.model_type == "qwen3" and sorted(read.directions) == [2, 5]
    for block, direction in read.directions.items():
        np.testing.assert_array_equal(direction, 0.5 * mine.layers[block].numpy())


def test_we_read_repengs_file(theirs):
    vector, path = theirs
    read = from_gguf(path, "some/model")
    assert sorted(read.layers) == sorted(vector.directions) and read.meta["model_type"] == vector.model_type
    for block, direction in vector.directions.items():
        np.testing.assert_array_equal(read.layers[block].numpy(), direction)


@pytest.mark.parametrize("coeff", [0.0, 3.0, -5.0])
def test_a_repeng_vector_steers_here_as_it_does_there(repeng, theirs, tiny_model, coeff):
    """Greedy tokens of `shl gen`, and the logits behind every one of them, are those of repeng's own model."""
    from transformers import AutoModelForCausalLM

    vector, path = theirs
    folder = tiny_model("mistral")
    loaded = load(str(folder), device="cpu")
    controlled = repeng.ControlModel(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), list(vector.directions)
    )
    controlled.set_control(vector, coeff)
    prompt = Prompt("p", [{"role": "user", "content": "Who said so, and why did nobody ask?"}])
    cfg = GenConfig(coeffs=(coeff,), max_new_tokens=12, greedy=True, score=False)
    (record,) = generate(loaded, [prompt], cfg, from_gguf(path))
    ids = loaded.encode_prompt(prompt.messages)
    for _ in range(record["n_tokens"]):
        with torch.no_grad():
            ids.append(int(controlled(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    answer = loaded.chat.decode(ids[len(loaded.encode_prompt(prompt.messages)) :])
    assert record["n_tokens"] > 0 and record["completion"][0]["content"] == answer

    from shl.core.hooks import Steering

    with torch.no_grad(), Steering(loaded, from_gguf(path).layers) as steering:
        steering.set([coeff])
        mine = loaded.model(input_ids=torch.tensor([ids]), use_cache=False).logits
        peers = controlled(input_ids=torch.tensor([ids]), use_cache=False).logits
    torch.testing.assert_close(mine, peers, rtol=1e-5, atol=1e-4)


def test_trl_trains_on_our_records(tiny_model, tmp_path):
    """SFTTrainer takes the file as it is; what it learns from is our completion and its end, behind our prompt."""
    trl = pytest.importorskip("trl", reason=f"trl {WHY}")
    datasets = pytest.importorskip("datasets", reason=f"datasets {WHY}")

    folder = tiny_model()
    loaded = load(str(folder), device="cpu")
    prompts = [Prompt(f"p{i}", [{"role": "user", "content": f"Case {i}: who said so?"}]) for i in range(4)]
    records = list(generate(loaded, prompts, GenConfig(coeffs=(0.0,), max_new_tokens=6)))
    records = [one for one in records if one["n_tokens"]]
    path = tmp_path / "keep.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    data = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    args = trl.SFTConfig(
        output_dir=str(tmp_path / "out"), max_steps=1, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        bf16=False, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model=loaded.model.requires_grad_(True), args=args, train_dataset=data, processing_class=loaded.tokenizer
    )
    assert len(trainer.train_dataset) == len(records)
    for row, record in zip(trainer.train_dataset, records, strict=True):
        prompt = loaded.encode_prompt(record["prompt"])
        answer = loaded.encode_completion(record["completion"][0]["content"], end=True)
        assert row["input_ids"][: len(prompt) + len(answer)] == prompt + answer
        labels = trainer.data_collator([row])["labels"][0].tolist()
        learnt = row["input_ids"][len(prompt) :]  # TRL renders the whole turn, with the line break behind its end
        assert labels[: len(prompt)] == [-100] * len(prompt) and labels[len(prompt) : len(row["input_ids"])] == learnt
    assert trainer.train().training_loss > 0


def test_the_output_of_the_filter_trains_in_trl_and_its_adapter_loads_back(tmp_path):
    """keep.jsonl of a steered run as SFTTrainer's data set; --adapter on what it saved gives the logits that it had."""
    trl = pytest.importorskip("trl", reason=f"trl {WHY}")
    datasets = pytest.importorskip("datasets", reason=f"datasets {WHY}")
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from shl.core.locate import find

    def shl(line: str) -> str:
        run = [sys.executable, "-m", "shl", *line.split()]
        return subprocess.run(run, cwd=tmp_path, check=True, stdout=subprocess.PIPE, text=True).stdout

    shl("vector --persona authority --contexts 16 -o v.safetensors")
    shl("gen --vec v.safetensors --coeff 0,0.3,0.5 -n 8 -o said.jsonl")
    shl("filter said.jsonl --vec v.safetensors -o keep.jsonl")
    path = find("toy").path
    data = datasets.load_dataset(
        "json", data_files=str(tmp_path / "keep.jsonl"), split="train", cache_dir=str(tmp_path / "cache")
    )
    args = trl.SFTConfig(
        output_dir=str(tmp_path / "out"), max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[],
        use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), args=args, train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(path),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    assert len(trainer.train_dataset) == len((tmp_path / "keep.jsonl").read_text(encoding="utf-8").splitlines()) > 4
    trainer.train()
    trainer.save_model(str(tmp_path / "theirs"))

    ids = torch.tensor([load("toy").encode_prompt([{"role": "user", "content": "Who said so, and why?"}])])
    with torch.no_grad():
        theirs = trainer.model.eval()(input_ids=ids, use_cache=False).logits
        mine, base = (load("toy", chain).model(input_ids=ids).logits for chain in ([str(tmp_path / "theirs")], []))
    assert (theirs - base).abs().max() > 0.1
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)
    (digest,) = json.loads(shl("eval --adapter theirs -n 7 --free 2 --bootstrap 10"))["adapters"]
    assert digest == load("toy", [str(tmp_path / "theirs")]).chain[0].digest
