"""A model whose weights stay on the CPU for want of room does what it does in place, and says what it cannot do."""

from dataclasses import replace

import pytest
import torch

from shl.bake import bake
from shl.core import models
from shl.core.defaults import GenConfig
from shl.core.errors import ShlError
from shl.core.hooks import Steering
from shl.core.models import load, rechain
from shl.core.offload import check_places
from shl.core.records import Prompt
from shl.core.scores import nll_per_token
from shl.gen import generate
from shl.train import heal
from test_adapters import IDS, make_adapter
from test_train import FAST, make_records

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
PROMPTS = [Prompt("a", [{"role": "user", "content": "Who gave the order?"}])]


@pytest.fixture
def pair(tiny_model, tmp_path, monkeypatch):
    """The tiny model with a chain: with weights that are brought at every pass, and with its weights in place."""
    folder = str(tiny_model())
    first = make_adapter(tmp_path / "r0")
    make_adapter(tmp_path / "r1", 1, rank=2, parents=[first])
    chain = [str(tmp_path / "r1")]
    plain = load(folder, chain, device="cpu")
    read = models._read

    def away(*args):
        model, tokenizer = read(*args)
        return accelerate.cpu_offload(model, execution_device="cpu"), tokenizer

    monkeypatch.setattr(models, "_read", away)
    return load(folder, chain, device="cpu"), plain


def logits(loaded):
    with torch.no_grad():
        return loaded.model(input_ids=IDS).logits


def test_a_chain_acts_beside_weights_that_are_away(pair):
    away, plain = pair
    assert all(weight.is_meta for weight in away.model.parameters())
    assert (logits(away) - logits(plain)).abs().max() < 1e-4
    with away.base(), plain.base():
        base = logits(plain)
        assert (logits(away) - base).abs().max() < 1e-4
    assert (logits(plain) - base).abs().max() > 1e-2


def test_another_scale_takes_the_place_of_the_first(pair):
    for loaded in pair:
        rechain(loaded, [replace(adapter, scale=-0.5) for adapter in loaded.chain])
    assert (logits(pair[0]) - logits(pair[1])).abs().max() < 1e-4
    for loaded in pair:
        rechain(loaded, [])
    assert not pair[0].beside and (logits(pair[0]) - logits(pair[1])).abs().max() < 1e-4


def test_it_is_steered_and_scored(pair):
    rows = []
    for loaded in pair:
        vector = {1: torch.randn(loaded.hidden, generator=torch.Generator().manual_seed(0))}
        with Steering(loaded, vector):
            steered = logits(loaded)
        records = list(generate(loaded, PROMPTS, GenConfig(coeffs=(0.0,), max_new_tokens=8, greedy=True)))
        nll = nll_per_token(loaded, [[1, 40, 41]], [[42, 43, 44, 45]])[0]
        rows.append((steered, records[0]["completion"], nll))
    assert (rows[0][0] - rows[1][0]).abs().max() < 1e-4 and rows[0][1] == rows[1][1]
    assert torch.allclose(rows[0][2], rows[1][2], atol=1e-4)


def test_what_needs_the_weights_is_refused(pair, tmp_path):
    with pytest.raises(ShlError, match="lie on the CPU, so nothing can be trained"):
        heal(pair[0], make_records(), FAST, tmp_path / "a")
    with pytest.raises(ShlError, match="lie on the CPU, so nothing can be baked"):
        bake(pair[0], tmp_path / "b", as_="lora")
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


@pytest.mark.parametrize(("places", "said"), [([0, 1, "cpu"], "1 of 3 parts"), ([0, 1], ""), ([0, "disk"], None)])
def test_where_parts_lie_is_said(tiny, places, said, capsys):
    ref = tiny().ref
    if said is None:
        with pytest.raises(ShlError, match="would lie on the disk"):
            check_places(ref, places)
    else:
        check_places(ref, places)
        assert said in capsys.readouterr().err
