"""Healing: the loss against a plain implementation, laws of its start, what is learnt from, and what is written."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from shl import train
from shl.core import heal_loss
from shl.core.adapters import read_adapter, resolve_chain
from shl.core.defaults import TrainConfig
from shl.core.errors import ShlError
from shl.core.head import Head, final_states
from shl.core.heal_data import batches, encode, select, split
from shl.core.heal_loss import AGGS, aggregate, combine, token_losses
from shl.core.lora import injected, target_modules
from shl.core.models import load
from shl.core.peft_dir import WEIGHTS, peft_config
from shl.train import heal, schedule

FAST = TrainConfig(rank=4, lr=2e-2, epochs=2, batch_size=4, layers="0:1", holdout=0.25, tau=0.01)
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


def plain_loss(hidden, targets, lengths, weight, ref, reg, agg, lam, tau, cap=None):
    """The same loss on full tensors, as anybody would write it."""

    def log_probs(states):
        logits = states @ weight.T
        return (logits if cap is None else cap * torch.tanh(logits / cap)).log_softmax(-1)

    log_p, log_q = log_probs(hidden), log_probs(ref)
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


@pytest.mark.parametrize("chunk", [1, 7 * 50, 1 << 20])
@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("reg", ["nll", "kl_fwd", "kl_rev"])
def test_the_chunked_loss_is_the_plain_one(monkeypatch, reg, cap, chunk):
    monkeypatch.setattr(heal_loss, "CHUNK", chunk)
    torch.manual_seed(0)
    weight, hidden, ref = torch.randn(50, 8), torch.randn(20, 8), torch.randn(20, 8)
    targets, lengths = torch.randint(50, (20,)), [3, 10, 7]
    head = Head(weight, None, 1.0, cap)
    for agg in AGGS:
        mine, plain = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
        nll, kl = token_losses(mine, targets, head, None if reg == "nll" else ref, head, reg)
        parts = combine(nll, kl, lengths, reg, agg, 0.7, 0.5)
        wanted = plain_loss(plain, targets, lengths, weight, ref, reg, agg, 0.7, 0.5, cap)
        assert torch.allclose(parts.nll + parts.barrier, wanted, atol=1e-5)
        (parts.nll + parts.barrier).backward()
        wanted.backward()
        assert torch.allclose(mine.grad, plain.grad, atol=1e-6)


def test_the_gradient_is_the_slope():
    torch.manual_seed(0)
    head = Head(torch.randn(11, 5).double(), torch.randn(11).double(), 0.5, 4.0)
    hidden, ref, targets = torch.randn(4, 5).double(), torch.randn(4, 5).double(), torch.tensor([0, 3, 10, 2])
    for reg in ("kl_fwd", "kl_rev"):
        mine = hidden.clone().requires_grad_()
        total = sum(one.sum() for one in token_losses(mine, targets, head, ref, head, reg))
        total.backward()
        step = torch.zeros_like(hidden)
        step[1, 2] = 1e-2
        up, down = (
            sum(one.sum() for one in token_losses(hidden + moved, targets, head, ref, head, reg))
            for moved in (step, -step)
        )
        assert float(up - down) / 2e-2 == pytest.approx(float(mine.grad[1, 2]), rel=1e-2, abs=1e-3)


def test_a_loop_is_seen_in_order():
    """Four looping tokens among sixty: the mean hides them, and the others see them more and more."""
    kl = torch.full((60,), 0.03)
    kl[30:34] = torch.tensor([3.9, 4.5, 5.5, 8.1])
    seen = [float(aggregate(kl, agg)) for agg in ("mean", "rmse", "p95", "max")]
    assert seen == sorted(seen) and seen[0] < 0.5 < seen[1] and seen[3] == pytest.approx(8.1)
    assert all(float(aggregate(torch.full((60,), 0.03), agg)) == pytest.approx(0.03, rel=1e-4) for agg in AGGS)


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
        nll, kl = token_losses(hidden, ids[0, 1:], head, ref, head, "kl_rev")
        assert float(kl.detach().abs().max()) < 1e-6
        parts = combine(nll, kl, [len(nll)], "kl_rev", agg, 1.0, -1.0)  # a negative tau keeps the hinge open
        assert parts.fired == 1
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
        assert all(lora.norms()[path] == pytest.approx(float(full[path].norm()), rel=1e-5) for path in modules)
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
    with pytest.raises(ShlError, match="holds 3 records, and none"):
        heal(tiny(), make_records(3, coeff=0.0), FAST, tmp_path / "a")
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
    sound, calls = train.token_losses, itertools.count()

    def rigged(*args):
        nll, kl = sound(*args)
        return (nll * bad, kl) if next(calls) == 13 else (nll, kl)  # 1 call, then 3 + 1 an epoch

    monkeypatch.setattr(train, "token_losses", rigged)
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
