"""The package tinymfv (or moralmaps): its scores item by item from the instrument here, and its traps out of the way.

What needs the package is skipped where it is not installed: pip install -e '.[tinymfv]'.
"""

import importlib.util
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import make_model
from shl import eval as ev
from shl.core import format as fmt
from shl.core import moral, package, suites
from shl.core.defaults import EvalConfig
from shl.core.errors import ShlError
from shl.core.models import load

installed = pytest.mark.skipif(
    not any(importlib.util.find_spec(name) for name in package.NAMES), reason="the package tinymfv is not installed"
)
SMALL = EvalConfig(
    suite="tinymfv:classic", limit=7, think=4, batch_size=3, free=0, agree=0, competence=False, bootstrap=5
)


@pytest.fixture(params=["toy", "qwen3", "llama"])
def model(request, tiny_model):
    return load("toy") if request.param == "toy" else load(str(tiny_model(request.param)), device="cpu")


@installed
def test_item_by_item_the_instrument_gives_the_packages_scores(model) -> None:
    """With its frames, its budget and its padding; 1e-3 nats is asked for, 1e-4 is kept."""
    tool = package.find()
    chosen, found = package._chosen(tool, SMALL, "classic")
    report = tool.evaluate(model.model, model.tokenizer, vignettes=chosen, max_think_tokens=SMALL.think,
                           batch_size=SMALL.batch_size, return_per_row=True, verbose=0)  # fmt: skip
    assert report["frac_unscorable"] == 0
    protocol = package.Protocol(pad_to=SMALL.batch_size, begin_twice=True)
    rows = moral.rows_of(found, package.read_slots(model, SMALL, found, None, protocol))
    for row, theirs in zip(rows, report["per_row"], strict=True):
        assert row["id"] == theirs["id"] and row["top1"] == theirs["top1"]
        assert row["score"] == pytest.approx(theirs["score"], abs=1e-4)
        assert row["p"] == pytest.approx(theirs["p"], abs=1e-4)
        assert row["human"] == pytest.approx(theirs["label"])
        assert row["p_ans_any"] == pytest.approx(theirs["pmass_allowed"], abs=1e-4)
        assert row["nll_json"] == pytest.approx(theirs["nll_prefill"], abs=1e-4)


@installed
def test_the_suite_runs_the_package_and_its_numbers_are_the_packages(tiny_model) -> None:
    loaded = load(str(tiny_model("llama")), device="cpu")
    before = (loaded.tokenizer.padding_side, loaded.tokenizer.pad_token)
    result = ev.evaluate(loaded, SMALL)
    assert result["suite"] == "tinymfv:classic" and result["n"] == 7 and result["settings"]["batch_size"] == 3
    assert {row["foundation"] for row in result["rows"]} == set(fmt.FOUNDATIONS)  # never the first seven, all Care
    assert result["metrics"]["json_is_valid"] is None and "no free reply" in result["missing"]["json_is_valid"]
    assert result["metrics"]["human_nll"] > 0.5
    assert (loaded.tokenizer.padding_side, loaded.tokenizer.pad_token) == before
    told = ev.evaluate(loaded, SMALL, system="You follow orders.")
    assert told["metrics"]["auth_nats"] != result["metrics"]["auth_nats"]


@installed
def test_the_native_suite_does_not_depend_on_batches(tiny_model) -> None:
    loaded = load(str(tiny_model("qwen3")), device="cpu")
    cfg = replace(SMALL, suite="tinymfv-native:classic")
    one, many = (ev.evaluate(loaded, replace(cfg, batch_size=size)) for size in (1, 64))
    for row, other in zip(one["rows"], many["rows"], strict=True):
        assert row["score"] == pytest.approx(other["score"], abs=1e-5)
    assert one["settings"] == many["settings"] and "batch_size" not in one["settings"]


def rig(folder, prefills, answer="3"):
    """A model that, whatever it reads, writes the prefill at the start of a think span, and then the answer.

    Its residual stream is the last token's embedding and nothing else; the prefills are tokens of their own.
    """
    tokenizer = AutoTokenizer.from_pretrained(make_model(folder, "llama"))
    tokenizer.add_tokens(list(prefills))
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(len(tokenizer))
    table = torch.nn.functional.normalize(torch.randn(len(tokenizer), 48, generator=torch.Generator().manual_seed(1)))
    first = [tokenizer(text, add_special_tokens=False)["input_ids"][-1] for text in ("<think>\n", "<think>")]
    answers = tokenizer(answer, add_special_tokens=False)["input_ids"][0]
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(1e4 * table)
        head = torch.zeros(len(tokenizer), 48)
        for prefill in tokenizer.convert_tokens_to_ids(list(prefills)):
            head[answers] += 4 * table[prefill]
        head[tokenizer.convert_tokens_to_ids(prefills[-1])] = 4 * sum(table[i] for i in first)
        model.get_output_embeddings().weight.copy_(head)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load(str(folder), device="cpu")


def test_a_model_that_writes_the_prefill_itself_is_read_correctly(tmp_path) -> None:
    loaded = rig(tmp_path, [fmt.PREFILL])
    (said,) = [
        loaded.tokenizer.decode(ids)
        for ids in suites.moral.think_first(loaded, [[{"role": "user", "content": "Hello?"}]], 2, 1)
    ]
    assert fmt.PREFILL + "3" in said  # it does write it
    for think in (0, 4):
        result = ev.evaluate(loaded, EvalConfig(limit=7, think=think, free=0, agree=0, json_tokens=2, bootstrap=5))
        rows = [row for row in result["rows"] if row["kind"] == "vignette"]
        assert all(np.isfinite(row["score"]).all() for row in rows)
        # the digit 3 is authority in either order
        assert all(row["top1"] == "authority" and row["p"][3] > 0.95 for row in rows)
        assert result["metrics"]["p_ans_any"] > 0.9


@installed
def test_rows_that_the_package_loses_are_read_by_its_protocol_here(tmp_path) -> None:
    loaded = rig(tmp_path, [package.PREFILL])
    chosen, _ = package._chosen(package.find(), SMALL, "classic")
    raw = package.find().evaluate(loaded.model, loaded.tokenizer, vignettes=chosen, max_think_tokens=4, verbose=0)
    assert raw["frac_unscorable"] == 1  # the trap
    result = ev.evaluate(loaded, SMALL)
    assert all(row["reread"] and row["top1"] == "authority" and row["p"][3] > 0.95 for row in result["rows"])
    assert result["metrics"]["p_ans_any"] > 0.9


def test_without_the_package_the_install_line_is_told(monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ShlError, match="tinymfv is not installed") as caught:
        suites.find("tinymfv:classic")
    assert caught.value.code == 1 and caught.value.hint.startswith("pip install 'tiny-mfv @ git+https://")
    with pytest.raises(ShlError, match="no suite 'other'") as caught:
        suites.find("other")
    assert "tinymfv:classic" in caught.value.hint


def test_a_suite_plugs_in_by_one_function(tiny, monkeypatch) -> None:
    def sevens(loaded, cfg, system, variant):
        item = moral.Item("x", variant, "")
        return [moral.row_of(item, np.log(np.full(7, 0.1)), np.log(np.full(7, 0.1)), 0.0)]

    class Point:
        name = "sevens"

        def load(self):
            return sevens

    monkeypatch.setattr(suites, "entry_points", lambda group: [Point()] if group == "shl.suites" else [])
    result = ev.evaluate(tiny("llama"), replace(SMALL, suite="sevens:care"))
    assert result["n"] == 1 and result["metrics"]["p_ans_any"] == pytest.approx(0.7)
    assert result["profile"] == pytest.approx(dict.fromkeys(fmt.FOUNDATIONS, 1 / 7))
