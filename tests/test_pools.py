"""Bundled data: what is there has the promised shape, and what is not there is named."""

import importlib.resources
from collections import Counter

import pytest

from shl.core import pools
from shl.core.errors import ShlError
from shl.core.format import FOUNDATIONS, QUESTION


@pytest.fixture
def own_data(tmp_path, monkeypatch):
    """A data folder of this test's making."""
    (tmp_path / "pools").mkdir()
    (tmp_path / "personas.toml").write_text(
        '[[persona]]\nname = "kind"\naxis = "authority"\npos = "You are kind."\nneg = "You obey."\n'
        '[[persona]]\nname = "free"\naxis = "love"\npos = "You are free."\n'
    )
    (tmp_path / "pools" / "authority.jsonl").write_text(
        '{"id": "a1", "user": "Help?", "split": "dev", "hard": 3}\n\n{"id": "a2", "user": "Wait?", "split": "test"}\n'
    )
    (tmp_path / "pools" / "love-test.jsonl").write_text('{"id": "l1", "user": "Love?", "system": "Be brief."}\n')
    monkeypatch.setattr(pools, "data", lambda *parts: tmp_path.joinpath(*parts))
    pools.personas.cache_clear()
    yield tmp_path
    pools.personas.cache_clear()


def test_personas_are_read_by_name(own_data) -> None:
    assert pools.persona("kind") == pools.Persona("kind", "authority", "You are kind.", "You obey.")
    assert pools.persona("free").neg is None
    assert pools.persona_texts() == ["You are kind.", "You obey.", "You are free."]
    with pytest.raises(ShlError, match="'cruel'") as caught:
        pools.persona("cruel")
    assert "kind, free" in caught.value.hint


def test_pools_and_their_splits(own_data) -> None:
    both = pools.pool("authority")
    assert [prompt.id for prompt in both] == ["a1", "a2"]
    assert both[0].messages == [{"role": "user", "content": "Help?"}]
    assert both[0].extra == {"split": "dev", "hard": 3}
    assert [prompt.id for prompt in pools.eval_pool("authority", "test")] == ["a2"]
    assert [prompt.system for prompt in pools.eval_pool("love", "test")] == ["Be brief."]
    with pytest.raises(ShlError, match="no prompts held out as 'train'"):
        pools.eval_pool("authority", "train")
    with pytest.raises(ShlError, match="no prompt pool 'nothing'"):
        pools.eval_pool("nothing", "test")


def test_vignettes_hold_their_promise() -> None:
    everything = pools.vignettes()
    assert Counter(one.foundation for one in everything) == Counter({name: 20 for name in FOUNDATIONS})
    assert len({one.id for one in everything}) == len(everything)
    assert len({one.third for one in everything} | {one.first for one in everything}) == 2 * len(everything)
    halves = [pools.vignettes(split) for split in pools.SPLITS]
    assert sorted(map(id, everything)) == sorted(id(one) for half in halves for one in half)
    for half in halves:
        assert set(Counter(one.foundation for one in half).values()) == {10}
    assert everything[0].text("first") == everything[0].first != everything[0].text("third")
    with pytest.raises(ShlError, match="condition 'second'"):
        everything[0].text("second")
    with pytest.raises(ShlError, match="no split 'train'"):
        pools.vignettes("train")


def test_contexts_never_hold_the_evaluations_format() -> None:
    contexts = pools.contexts()
    assert len(contexts) >= 256
    for prompt in contexts:
        said = prompt.messages[-1]["content"]
        assert QUESTION not in said and "{" not in said


def test_data_travels_with_the_package() -> None:
    assert (importlib.resources.files("shl") / "data" / "vignettes.jsonl").is_file()


def test_every_bundled_axis_has_held_out_prompts() -> None:
    for axis in {persona.axis for persona in pools.personas().values()}:
        for split in pools.SPLITS:
            assert pools.eval_pool(axis, split)
