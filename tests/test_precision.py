"""Short floats and placement: what is added is what was asked for; a model laid out by a device map is the same."""

import math

import pytest
import torch

from shl.bake import bake
from shl.core.defaults import EvalConfig, GenConfig, TrainConfig, VectorConfig
from shl.core.errors import ShlError
from shl.core.hooks import Capture, Steering
from shl.core.models import load
from shl.core.records import Prompt
from shl.eval import evaluate
from shl.gen import generate
from shl.train import heal
from shl.vector import extract
from test_train import make_records

PROMPTS = [Prompt(f"p{i}", [{"role": "user", "content": text}]) for i, text in enumerate(["Who said so?", "Why?"])]
IDS = torch.tensor([[1, *range(40, 56)]])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["qwen3", "gemma3", "gpt2"])
def test_a_round_in_short_floats(tiny_model, tmp_path, kind, dtype):
    folder = str(tiny_model(kind))
    loaded = load(folder, device="cpu", dtype=dtype)
    short = getattr(torch, dtype)
    assert {p.dtype for p in loaded.model.parameters()} == {short}
    vector = extract(loaded, "You obey.", "You care about others.", PROMPTS, VectorConfig())
    assert all(v.dtype == torch.float32 for v in vector.layers.values())  # kept in full, rounded once where it is added

    layer, v = loaded.n_blocks // 2, torch.randn(loaded.hidden, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), Capture(loaded, [layer], "all") as read:
        before = read.run(input_ids=IDS)[layer]
        with Steering(loaded, {layer: v}) as steering, Capture(loaded, [layer], "all") as again:
            steering.set([0.75])
            after = again.run(input_ids=IDS)[layer]
    assert after.dtype == short and torch.equal(after, before + (0.75 * v).to(short))

    records = list(generate(loaded, PROMPTS, GenConfig(coeffs=(0.0, 1.0), max_new_tokens=4), vector))
    assert all(math.isfinite(one["scores"]["ppl"]) for one in records if one["scores"]["n_tokens"])
    made = heal(
        loaded, make_records(4), TrainConfig(rank=2, lr=1e-2, epochs=2, layers="0:1", holdout=0.0), tmp_path / "a"
    )
    assert made.rows[2]["nll"] < made.rows[1]["nll"]
    chained = load(folder, [str(tmp_path / "a")], device="cpu", dtype=dtype)
    assert bake(chained, tmp_path / "baked").error == 0  # merged in float32 and rounded once, as in memory
    found = evaluate(chained, EvalConfig(limit=7, free=0, json_tokens=2, bootstrap=2))["metrics"]
    assert math.isfinite(found["auth_nats"])


def test_a_device_map_gives_the_same_model(tiny_model, tiny):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    spread, plain = load(str(tiny_model()), device="auto", dtype="float32"), tiny()
    with torch.no_grad():
        for ids in (IDS, IDS[:, :3]):
            assert torch.allclose(
                spread.model(input_ids=ids.to(spread.device)).logits.cpu(), plain.model(input_ids=ids).logits, atol=1e-4
            )
    cfg = GenConfig(coeffs=(0.0,), max_new_tokens=6, greedy=True)
    mine, theirs = (list(generate(model, PROMPTS, cfg)) for model in (spread, plain))
    assert [one["completion"] for one in mine] == [one["completion"] for one in theirs]


def test_a_device_map_needs_accelerate(tiny_model, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ShlError, match="needs the package accelerate"):
        load(str(tiny_model()), device="auto")


def test_quantised_weights_are_one_clear_error(tiny_model):
    with pytest.raises(ShlError, match="weights of 4bit cannot be steered") as error:
        load(str(tiny_model()), device="cpu", dtype="4bit")
    assert "bfloat16" in error.value.hint
