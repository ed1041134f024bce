"""Healing: the loss against a plain implementation, laws of its start, what is learnt from, and what is written."""

import itertools
import json
import math
import re
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from shl.core import heal_loss, heal_run, vocabulary
from shl.core.adapters import read_adapter, resolve_chain
from shl.core.below import Below
from shl.core.defaults import TrainConfig
from shl.core.errors import ShlError
from shl.core.head import Head, completion_states, final_states
from shl.core.heal_data import Example, alike, batches, encode, select, split
from shl.core.heal_loss import AGGS, aggregate, combine, token_losses
from shl.core.heal_run import Run, schedule
from shl.core.lora import first_block, injected, target_modules
from shl.core.models import load
from shl.core.peft_dir import WEIGHTS, peft_config
from shl.core.vocabulary import Reference
from shl.train import heal

FAST = TrainConfig(rank=4, lr=2e-2, epochs=2, batch_size=4, layers="0:1", holdout=0.25, tau=0.01, on_policy=0)
TEXTS = ("Nobody asked why.", "She helped the old man, and he thanked her.", "The order came from above.", "I won't.")


def make_records(n=12, **changes):
    return [
        {
            "id": f"p{i}/1/0",
            "prompt": [{"role": "user", "content": f"Case {i}: who said so?"}],
            "completion": [{"role": "assistant", "content": TEXTS[i % len(TEXTS)]}],
            "coeff": 1.0,
            "finish": "stop",
            "vector": "sha256:v",
            **changes,
        }
        for i in range(n)
    ]


def weights(loaded):
    return {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}


def rows_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


# --- the loss ---


def plain_loss(hidden, targets, lengths, head, ref_head, ref, reg, agg, lam, tau):
    """The same loss on full tensors, as anybody would write it."""

    def log_probs(states, head):
        logits = states @ head.weight.T
        logits = head.factor * (logits if head.bias is None else logits + head.bias)
        return (logits if head.cap is None else head.cap * torch.tanh(logits / head.cap)).log_softmax(-1)

    log_p, log_q = log_probs(hidden, head), log_probs(ref, ref_head)
    nll = functional.nll_loss(log_p, targets, reduction="none")
    kl = {
        "kl_rev": (log_p.exp() * (log_p - log_q)).sum(-1),
        "kl_fwd": (log_q.exp() * (log_q - log_p)).sum(-1),
        "nll": torch.zeros(len(nll)),
    }[reg]
    total = 0.0
    for one_nll, one_kl in zip(nll.split(lengths), kl.split(lengths), strict=True):
        total = total + one_nll.mean()
        if reg != "nll":
            total = total + lam * torch.relu(aggregate(one_kl, agg) - tau)
    return total / len(lengths)


REGS = ("nll", "kl_fwd", "kl_rev")


def random_case(cap=None, factor=1.0, bias=False, same=True):
    """Heads and states in float64, in which two ways of counting must agree to many digits."""
    torch.manual_seed(0)
    weight, other = torch.randn(50, 8).double(), torch.randn(50, 8).double()
    shift = torch.randn(50).double() if bias else None
    head = Head(weight, shift, factor, cap)
    ref_head = head if same else Head(other, shift, factor, cap)
    return head, ref_head, torch.randn(20, 8).double(), torch.randn(20, 8).double(), torch.randint(50, (20,))


@pytest.mark.parametrize("chunk", [1, 7 * 20, 1 << 20])
@pytest.mark.parametrize("kind", [{}, {"cap": 3.0}, {"same": False}, {"factor": 0.5, "bias": True}], ids=str)
@pytest.mark.parametrize("reg", REGS)
def test_the_chunked_loss_is_the_plain_one(monkeypatch, reg, kind, chunk):
    """Values and gradients, whichever rows' gradients were expected to be needed."""
    monkeypatch.setattr(vocabulary, "CHUNK", {"cpu": chunk})
    head, ref_head, hidden, ref, targets = random_case(**kind)
    lengths = [3, 10, 7]
    known = Reference.of(ref_head, ref, reg)
    expected = torch.arange(20) < 9
    for agg in AGGS:
        for tau, eager in ((0.5, None), (0.5, expected), (1e3, expected), (2.0, ~expected)):
            mine, plain = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
            nll, kl = token_losses(mine, targets, head, None if reg == "nll" else known, reg, eager)
            parts = combine(nll, kl, lengths, reg, agg, 0.7, tau)
            wanted = plain_loss(plain, targets, lengths, head, ref_head, ref, reg, agg, 0.7, tau)
            assert torch.allclose(parts.nll + parts.barrier, wanted, rtol=1e-9)
            (parts.nll + parts.barrier).backward()
            wanted.backward()
            assert torch.allclose(mine.grad, plain.grad, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("reg", ["kl_fwd", "kl_rev"])
def test_the_loss_in_short_floats_is_the_plain_one_of_the_same_states(reg):
    head, _, hidden, ref, targets = random_case()
    short = Head(head.weight.bfloat16(), None, 1.0, None)
    rows = hidden.bfloat16().requires_grad_()
    nll, kl = token_losses(rows, targets, short, Reference.of(short, ref.bfloat16(), reg), reg)
    parts = combine(nll, kl, [20], reg, "rmse", 1.0, 0.0)
    exact = Head(short.weight.double(), None, 1.0, None)
    plain = rows.detach().double().requires_grad_()
    wanted = plain_loss(plain, targets, [20], exact, exact, ref.bfloat16().double(), reg, "rmse", 1.0, 0.0)
    assert torch.allclose((parts.nll + parts.barrier).double(), wanted, rtol=1e-5)
    (parts.nll + parts.barrier).backward()
    wanted.backward()
    assert torch.allclose(rows.grad.double(), plain.grad, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("reg", ["kl_fwd", "kl_rev"])
def test_the_likeliest_tokens_alone_give_a_lower_bound_that_all_of_them_reach(monkeypatch, reg):
    monkeypatch.setattr(vocabulary, "CHUNK", {"cpu": 7 * 20})
    monkeypatch.setattr(heal_loss, "GATHERED", 5 * 8 * 3)
    head, _, hidden, ref, targets = random_case(factor=0.3)  # flat enough that no share is beyond float32

    def kl_of(top):
        rows = hidden.clone().requires_grad_()
        kl = token_losses(rows, targets, head, Reference.of(head, ref, reg, top), reg)[1]
        kl.sum().backward()
        return kl.detach(), rows.grad

    (few, _), (many, _), (most, slope), (whole, wanted) = kl_of(3), kl_of(12), kl_of(49), kl_of(0)
    assert (few < many + 1e-9).all() and (many < most + 1e-9).all() and few.sum() < 0.9 * whole.sum()
    assert torch.allclose(most, whole) and torch.allclose(slope, wanted, atol=1e-6)
    by_hand = (ref @ head.weight.T).topk(3).indices.sort().values
    assert torch.equal(Reference.of(head, ref, reg, 3).top.sort().values, by_hand)


def test_the_gradient_is_the_slope():
    head, _, hidden, ref, targets = random_case(cap=4.0, factor=0.5, bias=True)
    for reg in ("kl_fwd", "kl_rev"):
        known = Reference.of(head, ref, reg)

        def summed(rows, reg=reg, known=known):
            return sum(one.sum() for one in token_losses(rows, targets, head, known, reg))

        assert torch.autograd.gradcheck(summed, (hidden.clone().requires_grad_(),))


def test_a_loop_is_seen_in_order():
    """Four looping tokens among sixty: the mean hides them, and the others see them more and more."""
    kl = torch.full((60,), 0.03)
    kl[30:34] = torch.tensor([3.9, 4.5, 5.5, 8.1])
    seen = [float(aggregate(kl, agg)) for agg in ("mean", "rmse", "p95", "max")]
    assert seen == sorted(seen) and seen[0] < 0.5 < seen[1] and seen[3] == pytest.approx(8.1)
    assert all(float(aggregate(torch.full((60,), 0.03), agg)) == pytest.approx(0.03, rel=1e-4) for agg in AGGS)


@pytest.mark.parametrize("agg", ["mean", "rmse"])
def test_a_short_completion_counts_as_one_that_goes_on_without_divergence(agg):
    """With `shortest`, one word that changes weighs what it weighs in a text of that length; others are as ever."""
    kl = torch.tensor([2.0, 0.5, 0.0])
    longer = torch.cat([kl, torch.zeros(13)])
    assert float(aggregate(kl, agg, 16)) == pytest.approx(float(aggregate(longer, agg)))
    assert float(aggregate(longer, agg, 16)) == pytest.approx(float(aggregate(longer, agg)))
    assert float(aggregate(longer, agg, 4)) == float(aggregate(longer, agg))
    nll = torch.ones(19)
    parts = combine(nll, torch.cat([kl, longer]), [3, 16], "kl_rev", agg, 1.0, 0.3, shortest=16)
    assert parts.fired[0] == parts.fired[1]
    assert combine(nll[:3], kl, [3], "kl_rev", agg, 1.0, 0.3).fired == [True]


def test_shortest_is_in_the_loss_of_a_training(tiny, tmp_path):
    """Long enough a floor takes the barrier away; where nothing can be averaged it is refused."""
    cfg = replace(FAST, reg="kl_rev", agg="rmse", tau=0.05, lam=3.0)
    held, free = (heal(tiny(), make_records(), replace(cfg, shortest=n), tmp_path / f"{n}") for n in (1, 10**9))
    assert held.rows[-1]["barrier_active"] > 0 and free.rows[-1]["barrier_active"] == 0
    nll = heal(tiny(), make_records(), replace(cfg, reg="nll"), tmp_path / "nll")
    assert free.digest != held.digest and free.rows[-1]["nll"] == pytest.approx(nll.rows[-1]["nll"], rel=1e-4)
    with pytest.raises(ShlError, match="shortest does nothing to agg max"):
        heal(tiny(), make_records(), replace(cfg, agg="max", shortest=2), tmp_path / "x")


@pytest.mark.parametrize("agg", AGGS)
def test_divergence_is_zero_and_its_gradient_finite_at_step_zero(tiny, agg):
    loaded = tiny()
    head = Head.of(loaded)
    ids = torch.tensor([[1, 20, 33, 47, 90, 120]])
    modules = target_modules(loaded, "0:1")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        ref = final_states(loaded, ids)[0, :-1]
    with injected(loaded, peft_config("m", modules, 4, 8), generator) as lora:
        hidden = final_states(loaded, ids)[0, :-1]
        nll, kl = token_losses(hidden, ids[0, 1:], head, Reference.of(head, ref), "kl_rev")
        assert float(kl.detach().abs().max()) < 1e-6
        parts = combine(nll, kl, [len(nll)], "kl_rev", agg, 1.0, -1.0)  # a negative tau keeps the hinge open
        assert parts.fired == [True]
        parts.barrier.backward()
        assert all(torch.isfinite(p.grad).all() for p in lora.parameters)
        assert float(lora.operator_norm()) == 0
        lora.operator_norm().backward()
        assert all(torch.isfinite(p.grad).all() for p in lora.parameters)


def test_norms_of_the_update(tiny):
    loaded = tiny()
    modules = target_modules(loaded, "0:1", ["q_proj", "mlp.down_proj"])
    with injected(loaded, peft_config("m", modules, 3, 12), torch.Generator().manual_seed(0)) as lora:
        for one in lora.b.values():
            torch.nn.init.normal_(one)
        full = {path: 4 * lora.b[path].detach() @ lora.a[path].detach() for path in modules}
        assert all(lora.sizes().norms[path] == pytest.approx(float(full[path].norm()), rel=1e-5) for path in modules)
        wanted = torch.stack([torch.linalg.matrix_norm(one, 2) for one in full.values()]).mean()
        mine = lora.operator_norm()
        assert torch.allclose(mine, wanted, rtol=1e-4)
        mine.backward()
        leaf = lora.a[modules[0]].detach().clone().requires_grad_()
        torch.linalg.matrix_norm(4 * lora.b[modules[0]].detach() @ leaf, 2).div(len(modules)).backward()
        assert torch.allclose(lora.a[modules[0]].grad, leaf.grad, atol=1e-4)


def test_the_learning_rate_rises_and_falls():
    rates = [schedule(step, 40, 0.1) for step in range(40)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[3:] == sorted(rates[3:], reverse=True) and 0 < rates[-1] < 0.01
    assert schedule(0, 1, 0.1) == 1


# --- the data ---


def test_controls_and_dropped_rows_are_left_out():
    records = make_records(6)
    records[0]["keep"], records[1]["keep"], records[2]["coeff"] = False, True, 0.0
    records[3]["completion"][0]["content"] = ""
    del records[4]["coeff"]
    assert [one["id"][:2] for one in select(records, FAST)] == ["p1", "p4", "p5"]
    assert len(select(records, replace(FAST, include_controls=True))) == 4


def test_nothing_to_train_on_says_what_to_do(tiny, tmp_path):
    with pytest.raises(ShlError, match=r"keep\.jsonl holds no records") as error:
        heal(tiny(), [], FAST, tmp_path / "a", source="keep.jsonl")
    assert error.value.code == 1 and "shl gen" in error.value.hint
    with pytest.raises(ShlError, match=r"all 3 records of p\.jsonl are controls") as error:
        heal(tiny(), make_records(3, coeff=0.0), FAST, tmp_path / "a", source="p.jsonl")
    assert "--include-controls" in error.value.hint
    with pytest.raises(ShlError, match="holds 3 records, and none"):
        heal(tiny(), make_records(3, keep=False), FAST, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_only_whole_answers_get_an_end_label(tiny, capsys):
    loaded = tiny()
    stop, cut = encode(loaded, [make_records(1)[0], make_records(1, finish="length")[0]], FAST)
    assert stop.completion == [*cut.completion, loaded.chat.end_id] and stop.prompt == cut.prompt
    short = encode(loaded, make_records(1), replace(FAST, max_len=len(stop) - 2))[0]
    assert short.completion == stop.completion[:-2] and "were cut" in capsys.readouterr().err
    with pytest.raises(ShlError, match="max_len"):
        encode(loaded, make_records(1), replace(FAST, max_len=3))


def test_a_prompt_is_held_out_with_all_its_rows(tiny):
    records = [{**one, "id": f"{k}"} for one in make_records(8) for k in range(3)]
    train, held = split(records, encode(tiny(), records, FAST), FAST)
    assert len(held) == 6 and len(train) == 18
    assert not {tuple(one.prompt) for one in train} & {tuple(one.prompt) for one in held}
    assert split(records[:3], encode(tiny(), records[:3], FAST), FAST)[1] == []


def test_batches_hold_every_row_once_and_similar_lengths():
    lengths = [10 * (i % 7) for i in range(30)]
    made = batches(lengths, 4, torch.Generator().manual_seed(0))
    assert sorted(i for batch in made for i in batch) == list(range(30)) and max(map(len, made)) == 4
    assert made == batches(lengths, 4, torch.Generator().manual_seed(0))
    waste = sum(max(lengths[i] for i in batch) - lengths[i] for batch in made for i in batch)
    assert waste < 0.2 * sum(lengths)


def test_parts_of_a_batch_hold_all_of_it_and_little_padding():
    rows = [Example([0] * n, [1]) for n in (3, 100, 90, 5, 4, 30)]
    parts = alike(rows)
    assert sorted(map(len, (one for part in parts for one in part))) == sorted(map(len, rows))
    assert [[len(one) - 1 for one in part] for part in parts] == [[100, 90], [30], [5, 4, 3]]


# --- training ---


@pytest.fixture(scope="module")
def healed(tiny_model, tmp_path_factory):
    """One training, its log and the model it was done on."""
    out = tmp_path_factory.mktemp("run") / "r0" / "adapter"
    loaded = load(str(tiny_model()), device="cpu")
    before = weights(loaded)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    result = heal(loaded, make_records(), FAST, out)
    return loaded, before, torch.equal(state, torch.get_rng_state()), result


def test_training_learns_and_reports(healed):
    _, _, _, result = healed
    first, last = result.rows[0], result.rows[-1]
    assert last["nll"] < result.rows[1]["nll"] and last["holdout_nll"] < first["holdout_nll"]
    assert first["update_norm"] == 0 == first["step"] and first["nll"] is None and first["holdout_kl_max"] < 1e-5
    assert last["update_norm"] == pytest.approx(result.update_norm, rel=1e-5) and result.update_norm > 0
    assert 0 < last["kl_mean"] < last["kl_p95"] < last["kl_max"] and 0 < last["barrier_active"] <= 1
    assert last["pressure"] > 0 and last["grad_norm"] > 0 and last["operator_norm"] > 0
    assert (result.n_train, result.n_holdout, result.steps) == (9, 3, 6) and rows_of(result.path) == result.rows


def test_the_model_is_left_as_it_was(healed):
    loaded, before, rng_untouched, _ = healed
    after = weights(loaded)
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert rng_untouched and not any(p.requires_grad for p in loaded.model.parameters())
    assert "peft_config" not in vars(loaded.model) and not loaded.model.training
    assert not any("lora" in name for name, _ in loaded.model.named_modules())


def test_the_directory_says_where_it_came_from(healed):
    loaded, _, _, result = healed
    adapter = read_adapter(result.path)
    meta = adapter.meta
    assert sorted(p.name for p in result.path.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "log.jsonl", "shl.json",
    ]  # fmt: skip
    assert meta["digest"] == adapter.digest == result.digest and meta["step"] == "train" and meta["parents"] == []
    assert meta["model_digest"] == loaded.digest and meta["config"]["lr"] == FAST.lr and meta["n_records"] == 12
    assert meta["vectors"] == ["sha256:v"] and meta["coeffs"] == [1.0] and meta["data"].startswith("sha256:")
    assert adapter.config["base_model_name_or_path"] == loaded.ref.path
    assert adapter.config["r"] == 4 and adapter.config["lora_alpha"] == 8


def test_plain_peft_loads_it_with_the_logits_of_the_chain(healed, tiny_model):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    _, before, _, result = healed
    ids = torch.tensor([[1, 20, 33, 47, 90, 120]])
    model = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32)
    with torch.no_grad():
        plain = PeftModel.from_pretrained(model, str(result.path))(input_ids=ids).logits
        fly = load(str(tiny_model()), [str(result.path)], device="cpu")
        assert (fly.model(input_ids=ids).logits - plain).abs().max() < 1e-4
        with fly.base():
            assert (fly.model(input_ids=ids).logits - plain).abs().max() > 1e-2
            assert all(torch.equal(tensor, before[name]) for name, tensor in fly.model.state_dict().items())


def test_the_same_seed_gives_the_same_bytes(healed, tiny_model, tmp_path):
    _, _, _, result = healed
    loaded = load(str(tiny_model()), device="cpu")
    again = heal(loaded, make_records(), FAST, tmp_path / "a")
    other = heal(loaded, make_records(), replace(FAST, seed=1), tmp_path / "b")
    for name in (WEIGHTS, "log.jsonl", "adapter_config.json"):
        assert (again.path / name).read_bytes() == (result.path / name).read_bytes()
    assert again.digest == result.digest != other.digest


def test_base_and_prev_agree_in_the_first_round_and_differ_later(healed, tiny_model, tmp_path):
    loaded, _, _, result = healed
    prev = replace(FAST, ref="prev")
    assert heal(loaded, make_records(), prev, tmp_path / "p0").digest == result.digest
    chain = load(str(tiny_model()), [str(result.path)], device="cpu")
    by_base = heal(chain, make_records(), FAST, tmp_path / "base")
    by_prev = heal(chain, make_records(), prev, tmp_path / "prev")
    assert by_base.digest != by_prev.digest
    assert by_prev.rows[0]["holdout_kl_max"] < 1e-5 < 1e-2 < by_base.rows[0]["holdout_kl_max"]
    parents = read_adapter(by_base.path).parents
    assert [one["digest"] for one in parents] == [result.digest]
    assert [one.digest for one in resolve_chain([by_base.path])] == [result.digest, by_base.digest]


@pytest.mark.parametrize(
    "change",
    [{"reg": "nll"}, {"reg": "kl_fwd", "agg": "mean"}, {"agg": "p95", "weight_decay": 0.5}, {"agg": "max"},
     {"spectral": 0.1}, {"grad_accum": 2}, {"holdout": 0.0}, {"targets": ("q_proj", "v_proj")}],
    ids=str,
)  # fmt: skip
def test_every_variant_trains(tiny, tmp_path, change, capsys):
    cfg = replace(FAST, **change)
    result = heal(tiny(), make_records(), cfg, tmp_path / "a")
    last = result.rows[-1]
    assert math.isfinite(last["nll"]) and last["nll"] < result.rows[1]["nll"]
    assert (last["barrier_active"] is None) == (cfg.reg == "nll") and (last["holdout_nll"] is None) == (not cfg.holdout)
    assert {name.rpartition(".")[2] for name in read_adapter(result.path).modules} >= set(cfg.targets)


EVERYTHING = replace(
    FAST, reg="kl_rev", agg="p95", weight_decay=0.1, spectral=0.01, ref_top_k=8, lam_decay=0.5, checkpointing=True,
    grad_accum=2, patience=3, on_policy=2, layers="1,2", epochs=3, batch_size=2,
)  # fmt: skip


def test_all_options_combine(tiny, tmp_path):
    result = heal(tiny(), make_records(), EVERYTHING, tmp_path / "a")
    last, meta = result.rows[-1], read_adapter(result.path).meta
    assert last["own_kl_mean"] > 0 and last["operator_norm"] > 0 and last["holdout_kl_max"] > 0
    assert [row["own_kl_mean"] for row in result.rows[:-1]] == [None] * (len(result.rows) - 1)
    assert meta["operator_norms"].keys() == meta["update_norms"].keys() and meta["lam"] == 1.0
    assert {name.split("layers.")[1][0] for name in meta["update_norms"]} == {"1", "2"}
    assert all(0 < meta["operator_norms"][name] <= norm * (1 + 1e-5) for name, norm in meta["update_norms"].items())


def test_checkpointing_saves_memory_and_changes_nothing(tiny, tmp_path):
    plain, twice = (
        heal(tiny(), make_records(), replace(FAST, layers="2,3", epochs=1, checkpointing=on), tmp_path / f"{on}")
        for on in (False, True)
    )
    assert twice.digest == plain.digest


def test_states_from_below_are_those_of_a_whole_pass(each):
    """Every architecture: a pass that begins at a later block ends in the same states and gradients."""
    examples = [Example([1, 20, 33], [47, 90]), Example([1, 20], [33, 47, 90, 120, 7])]
    modules = target_modules(each, "0.5:1")
    with injected(each, peft_config("m", modules, 2, 4), torch.Generator().manual_seed(0)) as lora:
        for factor in lora.b.values():
            torch.nn.init.normal_(factor, std=0.1)

        def states():
            lora.b[modules[0]].grad = None
            found = completion_states(each, [(one.prompt, one.completion) for one in examples])[0]
            found.square().sum().backward()
            return found.detach(), lora.b[lora.modules[0]].grad.clone()

        wanted = states()
        for p in lora.parameters:
            p.grad = None
        below = Below(each, first_block(each, modules))
        assert below.first > 0
        below.remember(examples, 1)
        with below.standing_in():
            below.use([id(one) for one in examples])
            found = states()
        for p in lora.parameters:
            p.grad = None
    assert not any("forward" in vars(block) for block in each.blocks)
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


def test_a_lora_layer_computes_what_peft_computes(tiny):
    loaded = tiny()
    ids = torch.tensor([[1, 20, 33, 47, 90, 120]])
    modules = target_modules(loaded, "0:1")
    with injected(loaded, peft_config("m", modules, 4, 8), torch.Generator().manual_seed(0)) as lora:
        for factor in lora.b.values():
            torch.nn.init.normal_(factor, std=0.1)
        found = []
        for _ in range(2):
            final_states(loaded, ids).square().sum().backward()
            found.append([p.grad.clone() for p in lora.parameters])
            for p in lora.parameters:
                p.grad = None
            for path in modules:
                vars(loaded.model.get_submodule(path)).pop("forward", None)  # from now on PEFT's own
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max())) for a, b in zip(*found, strict=True))


def test_the_weight_of_the_barrier_falls_over_rounds(healed, tiny_model, tmp_path):
    chain = load(str(tiny_model()), [str(healed[3].path)], device="cpu")
    half = heal(chain, make_records(), replace(FAST, lam_decay=0.5), tmp_path / "a")
    plain = heal(chain, make_records(), replace(FAST, lam=0.5), tmp_path / "b")
    assert half.digest == plain.digest and read_adapter(half.path).meta["lam"] == 0.5


def test_training_stops_when_the_held_out_nll_rises_and_keeps_the_best(tiny, tmp_path):
    cfg = replace(FAST, reg="nll", lr=0.3, epochs=8, patience=2)
    result = heal(tiny(), make_records(), cfg, tmp_path / "a")
    meta, held = read_adapter(result.path).meta, [row["holdout_nll"] for row in result.rows]
    assert meta["epochs_run"] < 8 and meta["epoch_kept"] == held.index(min(held)) == meta["epochs_run"] - 2
    with pytest.raises(ShlError, match="held out"):
        heal(tiny(), make_records(), replace(cfg, holdout=0.0), tmp_path / "b")


class Killed(BaseException):
    """The process ended here."""


def killed(*_):
    """What stands for work in which the process ends."""
    raise Killed


@pytest.mark.parametrize("cfg", [replace(FAST, epochs=3), EVERYTHING], ids=["plain", "everything"])
def test_what_was_killed_goes_on_after_its_last_epoch_with_the_same_bytes(tiny, tmp_path, monkeypatch, cfg):
    whole = heal(tiny(), make_records(), cfg, tmp_path / "whole")
    update, out = Run._update, tmp_path / "a"
    last = whole.steps - 1

    def fatal(self, *args):
        if self.step == last:
            raise Killed
        update(self, *args)

    monkeypatch.setattr(Run, "_update", fatal)
    with pytest.raises(Killed):
        heal(tiny(), make_records(), cfg, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.part", "whole"]
    seen = []
    monkeypatch.setattr(Run, "_update", lambda self, *args: (seen.append(self.step), update(self, *args))[1])
    with pytest.raises(ShlError, match=r"a\.part is left from a training with another config"):
        heal(tiny(), make_records(), replace(cfg, lr=1e-3), out)
    again = heal(tiny(), make_records(), cfg, out)
    assert seen[0] == whole.steps // cfg.epochs * (cfg.epochs - 1) and seen[-1] == last  # one epoch, no more
    for name in (WEIGHTS, "log.jsonl"):
        assert (again.path / name).read_bytes() == (whole.path / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "whole"]


def test_a_state_that_is_damaged_or_not_wanted_is_not_continued(tiny, tmp_path, monkeypatch):
    part = tmp_path / "a.part"
    part.write_bytes(b"0" * 40)
    with pytest.raises(ShlError, match=r"a\.part"):
        heal(tiny(), make_records(), FAST, tmp_path / "a")
    with monkeypatch.context() as patch:
        patch.setattr("shl.train.own_answers", killed)
        with pytest.raises(Killed):
            heal(tiny(), make_records(), FAST, tmp_path / "a", force=True)
    sound = part.read_bytes()
    size = 8 + int.from_bytes(sound[:8], "little")
    number = re.search(rb'holdout_nll\\": ?\d', sound).end() - 1  # of the log
    for at in (number, size + 1, (size + len(sound)) // 2, len(sound) - 1):  # log, first and middle tensor, last byte
        part.write_bytes(sound[:at] + bytes([sound[at] ^ 1]) + sound[at + 1 :])
        with pytest.raises(ShlError, match=r"a\.part: was damaged after it was written: its digest differs") as error:
            heal(tiny(), make_records(), FAST, tmp_path / "a")
        assert "--force" in error.value.hint and not (tmp_path / "a").exists()
    part.write_bytes(sound)
    heal(tiny(), make_records(), FAST, tmp_path / "a")
    assert not part.exists()


def test_the_log_says_what_should_be_so_and_whether_it_is(tiny, tmp_path, capsys):
    sound = heal(tiny(), make_records(), replace(FAST, on_policy=2), tmp_path / "a").rows
    assert [row["should"] for row in sound[:-1]] == [[]] * (len(sound) - 1)
    told = {one["should"].split(" (")[0]: one["holds"] for one in sound[-1]["should"]}
    assert told["KL starts at 0"] and told["held-out nll falls"] and told["the barrier is active in part"]
    assert any(name.startswith("KL on the student's own text") for name in told)
    inert = heal(tiny(), make_records(), replace(FAST, tau=1e6), tmp_path / "b").rows[-1]["should"]
    assert [one["holds"] for one in inert if one["should"].startswith("the barrier is active")] == [False]
    assert "SHOULD: " in capsys.readouterr().err


def test_regularisers_hold_the_update_back(tiny, tmp_path):
    def norm(name, **change):
        return heal(tiny(), make_records(), replace(FAST, epochs=4, **change), tmp_path / name).rows[-1]

    plain = norm("nll", reg="nll")
    assert norm("kl", lam=10.0)["holdout_kl_mean"] < 0.7 * plain["holdout_kl_mean"]
    assert norm("wd", reg="nll", weight_decay=20.0)["update_norm"] < 0.9 * plain["update_norm"]
    assert norm("sp", reg="nll", spectral=3.0)["operator_norm"] < 0.7 * plain["operator_norm"]


def test_a_barrier_that_never_fires_is_said_aloud(tiny, tmp_path, capsys):
    heal(tiny(), make_records(), replace(FAST, tau=1e6), tmp_path / "a")
    assert "the barrier never fired" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_leaves_nothing(tiny, tmp_path):
    loaded = tiny()
    before = weights(loaded)
    with pytest.raises(ShlError, match=r"is (nan|inf)") as error:
        heal(loaded, make_records(), replace(FAST, lr=1e30), tmp_path / "a")
    assert "--lr" in error.value.hint and not list(tmp_path.iterdir())
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.model.state_dict().items())
    with pytest.raises(ShlError, match="did not move"):
        heal(loaded, make_records(), replace(FAST, lr=0.0), tmp_path / "a")


@pytest.mark.parametrize("lr", [1e20, math.inf])
def test_an_update_that_ruins_the_model_in_the_last_step_leaves_the_last_good_adapter(tiny, tmp_path, lr):
    out = tmp_path / "a"
    heal(tiny(), make_records(), FAST, out)
    good = {file.name: file.read_bytes() for file in out.iterdir()}
    last = replace(FAST, lr=lr, epochs=1, batch_size=64)  # one step, whose loss was sound before it
    with pytest.raises(
        ShlError, match=r"^(the adapter|holdout_nll) is nan at step 1 of 1; no epoch had ended, so nothing"
    ) as error:
        heal(tiny(), make_records(), last, out, force=True)
    assert "--lr" in error.value.hint and [path.name for path in tmp_path.iterdir()] == ["a"]
    assert {file.name: file.read_bytes() for file in out.iterdir()} == good


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_runs_away_later_keeps_the_adapter_of_the_last_sound_epoch(tiny, tmp_path, monkeypatch, bad):
    sound, calls = heal_run.token_losses, itertools.count()

    def rigged(*args):
        nll, kl = sound(*args)
        return (nll * bad, kl) if next(calls) == 13 else (nll, kl)  # 1 call, then 3 + 1 an epoch

    monkeypatch.setattr(heal_run, "token_losses", rigged)
    cfg, out = replace(FAST, epochs=4), tmp_path / "a"
    for name in ("a.epoch3", "a.epoch3-2"):
        calls = itertools.count()
        with pytest.raises(ShlError, match=rf"is (nan|inf) at step 9 of 12; the adapter of epoch 3.*{name}$") as error:
            heal(tiny(), make_records(), cfg, out)
        assert "--lr" in error.value.hint and not out.exists()
        assert [row["epoch"] for row in rows_of(tmp_path / name)] == [0, 1, 2, 3]
        kept = load(tiny().ref.path, [str(tmp_path / name)], device="cpu")  # whole, and known by its digest
        assert kept.chain[0].meta["stopped"] in error.value.message and kept.chain[0].meta["n_train"] == 9
    assert rows_of(tmp_path / "a.epoch3") == rows_of(tmp_path / "a.epoch3-2")
    assert len(list(tmp_path.iterdir())) == 2
    monkeypatch.undo()
    heal(tiny(), make_records(), cfg, out)  # the same line again, mended
    assert rows_of(out)[:4] == rows_of(tmp_path / "a.epoch3")


@pytest.mark.parametrize(
    "change", [{"reg": "kl"}, {"agg": "median"}, {"ref": "self"}, {"rank": 0}, {"holdout": 1.0}, {"targets": ("x",)}]
)
def test_wrong_settings_are_errors(tiny, tmp_path, change):
    with pytest.raises(ShlError) as error:
        heal(tiny(), make_records(2), replace(FAST, **change), tmp_path / "a")
    assert error.value.hint


def test_an_existing_output_is_kept_unless_forced(healed, tiny, tiny_model):
    _, _, _, result = healed
    with pytest.raises(ShlError, match="exists already"):
        heal(tiny(), make_records(2), FAST, result.path)
    loaded = load(str(tiny_model()), [str(result.path)], device="cpu")
    with pytest.raises(ShlError, match="part of the chain"):
        heal(loaded, make_records(2), FAST, result.path, force=True)


def test_every_architecture_trains_in_its_language_model_only(each, tmp_path):
    result = heal(each, make_records(4), replace(FAST, epochs=1, layers="0.5:1"), tmp_path / "a")
    modules = read_adapter(result.path).modules
    assert modules and not any("vision" in name for name in modules)
    assert len({name.split("layers.")[1].split(".")[0] for name in modules}) == each.n_blocks // 2
    fly = load(each.ref.path, [str(result.path)], device="cpu")
    assert fly.adapters == [result.digest]
