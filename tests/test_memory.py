"""Memory that runs out: half the batch, a word about it, and the same results as with room for all."""

import json
import math
import re
from contextlib import contextmanager

import pytest
import torch

from shl import cli
from shl.core import running
from shl.core.decode import Sampling, decode
from shl.core.defaults import DoseConfig, EvalConfig, GenConfig, TrainConfig, VectorConfig
from shl.core.errors import ShlError
from shl.core.memory import batched, ran_out
from shl.core.models import load
from shl.core.records import Prompt, dumps
from shl.core.scores import score
from shl.dose import by_kl
from shl.eval import evaluate
from shl.gen import generate
from shl.train import heal
from shl.vector import extract

CPU = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"
ERRORS = [
    MemoryError(),
    RuntimeError(CPU),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("MPS backend out of memory (MPS allocated: 17.00 GB)"),
]


@pytest.fixture
def model(tiny_model):
    """One of its own, since it remembers what fitted."""
    return load(str(tiny_model()), device="cpu")


@contextmanager
def room(loaded, rows, error=ERRORS[1], block=-1):
    """Room for so many rows at once: a pass over more fails in a block, the last, when much has been done."""

    def pre(module, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        if len(hidden) > rows:
            raise error

    handle = loaded.blocks[block].register_forward_pre_hook(pre, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def alike(a, b):
    """Equal but for the last digits of numbers."""
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-5)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(alike(a[name], b[name]) for name in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(alike, a, b))
    return a == b


PROMPTS = [Prompt(f"q{i}", [{"role": "user", "content": "Who said so? " * (i + 1)}]) for i in range(9)]
PERSONAS = "You care about people.", "You follow orders."
RECORDS = [
    {"id": f"p{i}", "prompt": prompt.messages, "coeff": 1.0, "finish": "stop",
     "completion": [{"role": "assistant", "content": "Nobody asked. " * (i + 1)}]} for i, prompt in enumerate(PROMPTS)
]  # fmt: skip
BRIEF = EvalConfig(limit=7, free=5, axes=("authority",), max_new_tokens=6, json_tokens=4, bootstrap=5)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_what_running_out_looks_like(error):
    assert ran_out(error)
    assert cli._explain(error)[::2] == ("out of memory", 1)


def test_what_it_does_not_look_like():
    assert not any(map(ran_out, (RuntimeError("shapes cannot be multiplied"), ValueError("out of memory"), None)))


def test_the_real_allocators():
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 58, dtype=torch.uint8)
    assert ran_out(error.value)
    with pytest.raises(MemoryError) as error:
        bytearray(1 << 62)
    assert ran_out(error.value)


class TestBatches:
    """The one loop that all steps use."""

    def work(self, most, asked):
        def work(rows):
            asked.append(len(rows))
            if len(rows) > most:
                raise MemoryError
            return [2 * row for row in rows]

        return work

    def test_every_row_once_in_order_and_never_again_too_many(self, model, capsys):
        asked = []
        for _ in range(2):
            got = list(batched(model, range(20), 16, self.work(3, asked), "counting"))
            assert [row for rows, _ in got for row in rows] == list(range(20))
            assert [two for _, twos in got for two in twos] == [2 * row for row in range(20)]
        assert asked == [16, 8, 4, *[2] * 10, *[2] * 10]
        assert capsys.readouterr().err.count("out of memory while counting") == 3
        assert next(batched(model, range(20), 16, self.work(99, asked), "other work"))[0] == range(16)

    def test_one_row_that_does_not_fit(self, model):
        with pytest.raises(ShlError, match="out of memory while counting, with one row at a time") as error:
            list(batched(model, range(4), 4, self.work(0, []), "counting"))
        assert "--dtype" in error.value.hint

    def test_other_errors_are_not_swallowed(self, model):
        with pytest.raises(ZeroDivisionError):
            list(batched(model, range(4), 4, lambda rows: 1 / 0, "counting"))


class TestSteps:
    """Each step with room for three rows gives what it gives with room for all."""

    @pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
    def test_gen(self, model, capsys, error):
        vector = extract(model, *PERSONAS, PROMPTS, VectorConfig())
        cfg = GenConfig(coeffs=(0.0, 1.0), max_new_tokens=12, batch_size=8)
        whole = list(generate(model, PROMPTS, cfg, vector))
        with room(model, 3, error):
            halved = list(generate(model, PROMPTS, cfg, vector))
        assert [row["completion"] for row in halved] == [row["completion"] for row in whole]
        assert alike(halved, whole)
        err = capsys.readouterr().err
        assert err.count("out of memory while decoding") == err.count("out of memory while scoring") == 2
        assert "decoding 4 rows at once: going on with 2" in err

    @pytest.mark.parametrize("entering", [False, True])
    def test_what_had_ended_when_memory_ran_out_stays(self, model, capsys, monkeypatch, entering):
        monkeypatch.setattr(running, "entering_pays", lambda device: entering)
        prompts, passes, told = [[1, *range(40, 40 + n)] for n in range(1, 25, 2)], [], []
        sampling = Sampling(max_new_tokens=30, until=frozenset(range(0, 512, 8)))

        def fail(module, args, kwargs):
            passes.append(len(args[0] if args else kwargs["hidden_states"]))
            if len(passes) == 25:
                assert 3 < len(told) < 11
                told.append(None)
                raise MemoryError

        whole = decode(model, prompts, seeds=range(12), sampling=sampling, batch_size=4)
        handle = model.blocks[-1].register_forward_pre_hook(fail, with_kwargs=True)
        again = decode(
            model, prompts, seeds=range(12), sampling=sampling, batch_size=4, on_finish=lambda i, _: told.append(i)
        )
        handle.remove()
        assert again == whole and sorted(told[: told.index(None)] + told[told.index(None) + 1 :]) == list(range(12))
        assert max(passes[25:]) == 2 and "decoding 4 rows at once: going on with 2" in capsys.readouterr().err

    def test_gen_that_rewinds(self, model):
        vector = extract(model, *PERSONAS, PROMPTS, VectorConfig())
        cfg = GenConfig(coeffs=(2.0,), max_new_tokens=24, batch_size=8, backtrack=True, max_surprise=0.5, rewind=4)
        whole = list(generate(model, PROMPTS, cfg, vector))
        assert any(row["trajectory"].get("rewinds") for row in whole)
        with room(model, 5):  # twins count
            assert alike(list(generate(model, PROMPTS, cfg, vector)), whole)

    def test_vector(self, model, capsys):
        whole = extract(model, *PERSONAS, PROMPTS, VectorConfig())
        with room(model, 3, block=0):  # the last is never reached
            halved = extract(model, *PERSONAS, PROMPTS, VectorConfig())
        assert all(torch.allclose(v, whole.layers[i], atol=1e-5) for i, v in halved.layers.items())
        assert "out of memory while reading hidden states" in capsys.readouterr().err

    def test_score(self, model, capsys):
        texts = [row["completion"][0]["content"] for row in RECORDS]
        whole = score(model, [row["prompt"] for row in RECORDS], texts)
        with room(model, 3):
            assert alike(score(model, [row["prompt"] for row in RECORDS], texts), whole)
        assert "out of memory while scoring 9 rows at once" in capsys.readouterr().err

    def test_eval(self, model, capsys):
        whole = evaluate(model, BRIEF)
        with room(model, 3):
            assert alike(evaluate(model, BRIEF), whole)
        err = capsys.readouterr().err
        assert all(f"out of memory while {what}" in err for what in ("reading answers", "decoding", "scoring"))

    def test_dose(self, model, capsys):
        vector = extract(model, *PERSONAS, PROMPTS, VectorConfig())
        cfg = DoseConfig(prompts=8, max_new_tokens=8, batch_size=8)
        whole = by_kl(model, vector, PROMPTS, 0.02, cfg)
        with room(model, 3):
            assert alike(by_kl(model, vector, PROMPTS, 0.02, cfg).readings, whole.readings)
        assert "out of memory while reading the probe" in capsys.readouterr().err

    @pytest.mark.parametrize("change", [{"reg": "kl_rev", "tau": 0.01}, {"reg": "nll", "grad_accum": 2}], ids=str)
    def test_train(self, model, tmp_path, capsys, change):
        cfg = TrainConfig(rank=2, epochs=2, lr=1e-2, batch_size=4, holdout=0.5, layers="0:1", **change)
        whole = heal(model, RECORDS, cfg, tmp_path / "whole").rows
        with room(model, 1):
            halved = heal(model, RECORDS, cfg, tmp_path / "halved").rows
        pressures = [(a.pop("pressure"), b.pop("pressure")) for a, b in zip(whole, halved, strict=True)]  # of one batch
        told = [(a.pop("should"), b.pop("should")) for a, b in zip(whole, halved, strict=True)]  # with that number
        assert alike(halved, whole) and len(pressures) == 3, (halved, whole)
        assert [len(one) for one, _ in told] == [len(one) for _, one in told]
        err = capsys.readouterr().err
        assert re.search(r"out of memory while training on \d rows at once: going on with 1", err)
        assert "out of memory while reading held-out" in err

    def test_not_even_one(self, model, tmp_path):
        model.head_checked = True  # else its one pass over a few tokens is the first that fails
        with room(model, 0), pytest.raises(ShlError, match="with one row at a time"):
            heal(model, RECORDS, TrainConfig(rank=2), tmp_path / "a")
        assert not list(tmp_path.iterdir())


def test_a_model_that_does_not_fit_is_told(tiny_model, monkeypatch):
    from transformers import AutoModelForCausalLM

    def fail(*args, **kwargs):
        raise RuntimeError(CPU)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(ShlError, match=r"cannot load .*: out of memory") as error:
        load(str(tiny_model()), device="cpu")
    assert "bfloat16" in error.value.hint and json.loads(dumps({"a": error.value.message}))
