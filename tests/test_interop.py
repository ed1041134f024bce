"""What other programs ask of our files, as conventions: PEFT both ways, vLLM's adapters and checkpoints, chat rows."""

import json

import pytest
import torch

from shl.bake import bake
from shl.core.adapters import read_adapter
from shl.core.defaults import TrainConfig
from shl.core.models import load
from shl.train import heal
from test_train import make_records

IDS = torch.tensor([[1, 40, 41, 42, 43, 44]])
# what vLLM's model classes of these families adapt, by the last part of a module's name
SERVED = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma3"])
def rounds(request, tiny, tmp_path_factory):
    """Two rounds of training, the second on the first, and the model under both."""
    out = tmp_path_factory.mktemp("rounds")
    base, cfg = tiny(request.param), TrainConfig(rank=3, lr=2e-2, epochs=1, layers="0:1", holdout=0.0)
    heal(base, make_records(4), cfg, out / "r0")
    heal(load(base.ref.path, [str(out / "r0")], device="cpu"), make_records(4), cfg, out / "r1")
    return base, out, load(base.ref.path, [str(out / "r1")], device="cpu")


def test_a_stack_is_an_adapter_that_vllm_serves(rounds, tmp_path):
    base, _, chained = rounds
    bake(chained, tmp_path / "stacked", as_="lora")
    config = json.loads((tmp_path / "stacked/adapter_config.json").read_text())
    adapter = read_adapter(tmp_path / "stacked")
    assert config["peft_type"] == "LORA" and config["bias"] == "none" and config["base_model_name_or_path"]
    assert not any(config.get(name) for name in ("use_dora", "use_rslora", "modules_to_save", "rank_pattern"))
    assert config["r"] == 6 and {t.shape[0] for n, t in adapter.tensors.items() if "lora_A" in n} == {6}
    assert {path.rpartition(".")[2] for path in adapter.modules} <= SERVED
    for name in adapter.tensors:  # base_model.model.<module>.lora_A.weight, the module as the base model calls it
        module = name.removeprefix("base_model.model.").rpartition(".lora_")[0]
        assert isinstance(base.model.get_submodule(module), torch.nn.Linear)


def test_a_baked_checkpoint_is_a_plain_one(rounds, tmp_path):
    _, _, chained = rounds
    bake(chained, tmp_path / "baked")
    names = {path.name for path in (tmp_path / "baked").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= names
    assert not any(name.endswith((".bin", ".pt", ".pth")) for name in names)
    config = json.loads((tmp_path / "baked/config.json").read_text())
    assert config["architectures"] == [type(chained.model).__name__] and "quantization_config" not in config
    assert (tmp_path / "baked/chat_template.jinja").is_file() or "chat_template" in (
        tmp_path / "baked/tokenizer_config.json"
    ).read_text()


def test_plain_peft_loads_a_first_round_and_a_later_one_on_its_baked_parent(rounds, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, out, chained = rounds
    once = load(base.ref.path, [str(out / "r0")], device="cpu")
    plain = AutoModelForCausalLM.from_pretrained(base.ref.path, dtype=torch.float32)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(plain, str(out / "r0"))), logits(once.model))
    bake(once, tmp_path / "parent")
    parent = AutoModelForCausalLM.from_pretrained(tmp_path / "parent", dtype=torch.float32)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(parent, str(out / "r1"))), logits(chained.model))


def test_an_adapter_made_by_peft_is_applied_as_peft_does(rounds, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base, _, _ = rounds
    plain = AutoModelForCausalLM.from_pretrained(base.ref.path, dtype=torch.float32)
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 2}, task_type="CAUSAL_LM",
        init_lora_weights=False,
    )  # fmt: skip
    made = get_peft_model(plain, config)
    made.save_pretrained(tmp_path / "theirs")
    chained = load(base.ref.path, [str(tmp_path / "theirs")], device="cpu")
    assert (logits(made) - logits(base.model)).abs().max() > 1e-2
    torch.testing.assert_close(logits(chained.model), logits(made.eval()), rtol=1e-4, atol=1e-4)
