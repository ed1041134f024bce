"""Every architecture through vector, gen, train, bake and eval, asserting effects; what is refused says why."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from architectures import MAKERS, REFUSED
from conftest import make_tokenizer
from shl.bake import bake
from shl.core import running
from shl.core.batches import left_pad, positions_of
from shl.core.below import Passed
from shl.core.decode import Sampling, decode
from shl.core.defaults import EvalConfig, GenConfig, TrainConfig, VectorConfig
from shl.core.errors import ShlError
from shl.core.head import Head, final_states
from shl.core.hooks import Capture, Steering
from shl.core.lora import target_modules
from shl.core.models import load
from shl.core.records import Prompt
from shl.core.scores import nll_per_token
from shl.eval import evaluate
from shl.gen import generate
from shl.train import heal
from shl.vector import extract

IDS = [[1, 40, 41, 42], [1, *range(50, 65)], [1, 70, 71]]  # the second is longer than every sliding window
PROMPTS = [
    Prompt(f"p{i}", [{"role": "user", "content": text}])
    for i, text in enumerate(["Who said so?", "The guard said that the order came from above. Is he right?"])
]
every = pytest.mark.parametrize("kind", MAKERS)


def close(found, wanted):
    """Equal but for the last digits of float32."""
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * max(1.0, float(wanted.abs().max())))


def inputs(loaded, rows):
    ids, mask = left_pad(rows, loaded.device)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions_of(mask)}


def direction(loaded):
    return 3 * torch.randn(loaded.hidden, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model(input_ids=torch.tensor([ids]), use_cache=False, **kwargs).logits[0]


@every
def test_each_shift_is_the_coefficient_times_the_vector(tiny, kind):
    """`gen`: at the steered block the hidden state moves by c * v exactly, in each row by its own c, and at c = 0 by
    nothing"""
    loaded = tiny(kind)
    v, layer = direction(loaded), loaded.n_blocks // 2
    with torch.inference_mode(), Capture(loaded, [layer], "all") as read:
        before = read.run(**inputs(loaded, IDS))[layer]
        with Steering(loaded, {layer: v}) as steering, Capture(loaded, [layer], "all") as again:
            steering.set([0.0, 0.5, -2.0])
            after = again.run(**inputs(loaded, IDS))[layer]
    assert torch.equal(after, before + torch.tensor([0.0, 0.5, -2.0])[:, None, None] * v)


@every
def test_each_head_gives_the_models_own_logits(tiny, kind):
    """`gen`, `train`: logits made in chunks from hidden states are the model's own, with its caps, scales and biases"""
    loaded = tiny(kind)
    with torch.no_grad():
        mine = Head.of(loaded).logits(final_states(loaded, torch.tensor([IDS[1]]))[0])
    close(mine, logits(loaded.model, IDS[1]))


@every
def test_each_padded_row_is_as_if_alone(tiny, kind):
    """a row in a padded batch has the logits that it has alone"""
    loaded = tiny(kind)
    with torch.no_grad():
        together = loaded.model(**inputs(loaded, IDS), use_cache=False).logits[:, -1]
    close(together, torch.stack([logits(loaded.model, ids)[-1] for ids in IDS]))


@every
def test_each_step_from_the_cache_is_a_whole_pass(tiny, monkeypatch, kind):
    """`gen`: tokens of a steered batch, decoded with a cache while rows end, leave and enter, are those of whole
    passes"""
    loaded = tiny(kind)
    v, coeffs = {loaded.n_blocks // 2: direction(loaded)}, [0.0, 0.5, -2.0] * 3
    monkeypatch.setattr(running, "entering_pays", lambda device: True)
    ends = loaded.stop_ids | frozenset(range(0, 512, 6))
    prompts = [ids[:1] + [token + shift for token in ids[1:]] for shift in (0, 1, 2) for ids in IDS]
    with Steering(loaded, v) as steering:
        done = decode(
            loaded, prompts, seeds=[0] * 9, sampling=Sampling(max_new_tokens=6, greedy=True, until=ends),
            steering=steering, coeffs=coeffs, batch_size=3,
        )  # fmt: skip
        for ids, coeff, answer in zip(prompts, coeffs, done, strict=True):
            steering.set([coeff])
            whole = logits(loaded.model, ids + answer.ids)
            said = [answer.ids[i] if i < len(answer.ids) else None for i in range(len(answer.ids) + 1)]
            for token, at in zip(said, whole[len(ids) - 1 :], strict=True):
                if token is not None:
                    assert at[token] >= at.max() - 1e-4 * float(at.abs().max())
                elif answer.finish == "stop":
                    assert int(at.argmax()) in ends


@every
def test_each_score_begins_above_what_steering_leaves_alone(tiny, kind):
    """`gen`: scores that begin with the states that decoding had below the steered block are those of whole passes"""
    loaded = tiny(kind)
    layer = loaded.n_blocks // 2
    passed, sampling = Passed(loaded, layer), Sampling(max_new_tokens=6)
    with passed, Steering(loaded, {layer: direction(loaded)}) as steering:
        coeffs = [0.0, 0.5, -2.0]
        done = decode(loaded, IDS, seeds=[0] * 3, sampling=sampling, steering=steering, coeffs=coeffs, passed=passed)
    answers = [answer.ids for answer in done]
    assert all(passed.below.has(i, ids + answer) for i, (ids, answer) in enumerate(zip(IDS, answers, strict=True)))
    found = nll_per_token(loaded, IDS, answers, below=passed.below)
    for mine, whole in zip(found, nll_per_token(loaded, IDS, answers), strict=True):
        torch.testing.assert_close(mine, whole, rtol=1e-4, atol=1e-4)


@every
def test_each_loop_has_its_effects(tiny, tmp_path, kind):
    """`vector` is the difference of hidden states read one by one; `train` moves the logits; `bake`, as a checkpoint
    and as one LoRA, and the chain on the fly give the same logits; `eval` sees both the steering and the adapter"""
    loaded = tiny(kind)
    contexts = PROMPTS
    vector = extract(loaded, "You obey.", "You care about others.", contexts, VectorConfig(layers="0.4:0.6"))
    layer = max(vector.layers)
    wanted = _by_hand(loaded, layer, contexts)
    error = float((vector.layers[layer] - wanted).norm())
    assert error < 1e-5 * vector.meta["residual_norms"][str(layer)] and error < 1e-3 * float(wanted.norm())

    cfg = GenConfig(coeffs=(0.0, 1.0), max_new_tokens=6, batch_size=8)
    records = list(generate(loaded, PROMPTS, cfg, vector))
    assert [record["coeff"] for record in records] == [0.0, 1.0] * 2
    assert all(math.isfinite(record["scores"]["ppl"]) for record in records if record["scores"]["n_tokens"])
    alone = next(generate(loaded, PROMPTS[:1], GenConfig(coeffs=(0.0,), max_new_tokens=6)))
    assert alone["completion"] == records[0]["completion"]

    answers = [r | {"completion": [{"role": "assistant", "content": "She helped the old man."}]} for r in records]
    train = TrainConfig(rank=2, lr=2e-2, epochs=2, layers="0:1", holdout=0.0, batch_size=2, tau=0.0)
    log = heal(loaded, answers, train, tmp_path / "adapter").rows
    assert log[1]["nll"] > log[2]["nll"] and log[2]["kl_mean"] > 0 and log[0]["update_norm"] == 0
    chained = load(loaded.ref.path, [str(tmp_path / "adapter")], device="cpu")
    moved = logits(chained.model, IDS[1])
    assert (moved - logits(loaded.model, IDS[1])).abs().max() > 1e-3
    with chained.base():
        assert torch.equal(logits(chained.model, IDS[1]), logits(loaded.model, IDS[1]))

    assert bake(chained, tmp_path / "lora", as_="lora").error < 1e-3
    bake(chained, tmp_path / "model", verify=False)
    baked = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    close(logits(baked, IDS[1]), moved)

    small = EvalConfig(limit=7, free=0, json_tokens=2, bootstrap=2, batch_size=14)
    shift = vector * (20 / vector.norms[layer])
    readings = [
        evaluate(model, small, *how)["metrics"]["auth_nats"]
        for model, how in ((loaded, ()), (loaded, (shift, 1.0)), (chained, ()))
    ]
    assert len(set(readings)) == 3 and all(map(math.isfinite, readings))


def _by_hand(loaded, layer, contexts):
    """The mean difference of the block's output, from one pass without padding for each prompt."""
    found = []
    for persona in ("You obey.", "You care about others."):
        for context in contexts:
            ids = loaded.encode_prompt([{"role": "system", "content": persona}, *context.messages])
            with torch.inference_mode(), Capture(loaded, [layer]) as read:
                found.append(read.run(input_ids=torch.tensor([ids]))[layer][0])
    return (torch.stack(found[:2]) - torch.stack(found[2:])).mean(0)


def test_the_table_in_the_documentation_is_not_stale(tiny):
    import matrix

    made = matrix.page(matrix.table(tiny(kind) for kind in MAKERS))
    assert matrix.PAGE.read_text(encoding="utf-8") == made, "write it anew with: just models"


@pytest.fixture
def refused(tmp_path):
    """Saves one of the models that are refused, and gives its folder."""

    def save(kind):
        torch.manual_seed(0)
        REFUSED[kind]().save_pretrained(tmp_path / kind)
        make_tokenizer().save_pretrained(tmp_path / kind)
        return str(tmp_path / kind)

    return save


def test_what_is_no_decoder_with_a_cache_is_refused_when_it_is_loaded(refused):
    with pytest.raises(ShlError, match="is no decoder with a cache") as error:
        load(refused("mamba"), device="cpu")
    assert "docs/models.md" in error.value.hint
    with pytest.raises(ShlError, match="cannot load"):
        load(refused("t5"), device="cpu")


def test_unknown_arithmetic_behind_the_head_is_refused_where_the_head_is_needed(refused):
    loaded = load(refused("minicpm3"), device="cpu")
    plain = GenConfig(coeffs=(0.0,), max_new_tokens=2, score=False)
    assert list(generate(loaded, PROMPTS, plain))
    with pytest.raises(ShlError, match="does something to its logits"):
        list(generate(loaded, PROMPTS, GenConfig(coeffs=(0.0,), max_new_tokens=2)))


def test_what_peft_refuses_is_told_and_a_choice_of_modules_helps(refused, tmp_path):
    loaded = load(refused("falcon_h1"), device="cpu")
    record = {"id": "a", "prompt": PROMPTS[0].messages, "completion": [{"role": "assistant", "content": "Nobody."}]}
    with pytest.raises(ShlError, match="PEFT does not adapt") as error:
        heal(loaded, [record], TrainConfig(epochs=1, holdout=0.0), tmp_path / "a")
    assert "--target" in error.value.hint
    assert heal(loaded, [record], TrainConfig(epochs=1, holdout=0.0, targets=("q_proj",)), tmp_path / "a").path


def test_experts_and_routers_are_left_alone_and_it_is_said(tiny):
    loaded = tiny("glm4_moe")
    assert {path.split(".")[-1] for path in target_modules(loaded, "0:1")} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    with pytest.raises(ShlError, match="as 'down_proj', and experts are not adapted"):
        target_modules(loaded, "0:1", ["down_proj"])


def test_a_text_longer_than_a_table_of_positions_is_one_error(tiny):
    loaded = tiny("gpt2")
    with pytest.raises(ShlError, match="2050 tokens does not fit the 2048 positions"), torch.no_grad():
        logits(loaded.model, [5] * 2050)
    tokens = Sampling(max_new_tokens=9, greedy=True)
    with pytest.raises(ShlError, match="2049 tokens"):
        decode(loaded, [[1] + [5] * 2044, [1, 5]], seeds=[0, 0], sampling=tokens, batch_size=2)
