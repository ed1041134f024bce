"""Generation: one order, one id, texts that follow from seeds alone, and records that say everything."""

from dataclasses import replace

import pytest

from shl import gen
from shl.core import pools, running
from shl.core.below import Below
from shl.core.defaults import GenConfig, VectorConfig
from shl.core.errors import Mismatch, ShlError
from shl.core.models import load
from shl.core.records import Prompt, check_record, dumps
from shl.core.scores import score
from shl.gen import count, generate
from shl.vector import Vector, extract

POS, NEG = "You care about people more than about rules.", "You follow orders."
PROMPTS = [
    Prompt("a", [{"role": "user", "content": "Who said so?"}], None, {"pool": "x", "seed": "theirs"}),
    Prompt("b", [{"role": "user", "content": "She thanked him twice, and then once more. Why?"}], "Be brief."),
    Prompt("c", [{"role": "user", "content": "Answer!"}]),
]
CFG = GenConfig(coeffs=(0.0, 1.0, 0.5), samples=2, max_new_tokens=10)
IDS = [f"{p}/{c}/{s}" for p in "abc" for c in ("0", "1", "0.5") for s in (0, 1)]


@pytest.fixture(scope="module")
def loaded(tiny):
    return tiny("qwen2")


@pytest.fixture(scope="module")
def vector(loaded):
    return extract(loaded, POS, NEG, PROMPTS, VectorConfig())


@pytest.fixture(scope="module")
def records(loaded, vector):
    return list(generate(loaded, PROMPTS, CFG, vector))


def texts(records):
    return {r["id"]: r["completion"][0]["content"] for r in records}


def test_the_order_is_prompt_coefficient_sample(records, vector):
    assert [r["id"] for r in records] == IDS
    assert count(3, CFG, True) == 18 and count(3, replace(CFG, limit=2), True) == 12
    assert count(3, GenConfig(), False) == 3


def test_records_are_complete_and_hold_no_persona(records, vector, loaded):
    for record in records:
        check_record(record)
        assert POS not in dumps(record) and NEG not in dumps(record)
        assert (record["model"], record["adapters"], record["vector"]) == (loaded.ref.id, [], vector.digest)
        assert record["seed"] == 0 and record["finish"] in ("stop", "length") and "system" not in record
        assert set(record["scores"]) == {"ppl", "ppl_tail", "max_nll", "n_tokens", "rep", "distinct"}
    assert records[0]["pool"] == "x" and "pool" not in records[-1]
    assert records[6]["prompt"][0] == {"role": "system", "content": "Be brief."}


def test_samples_and_coefficients_differ(records):
    assert len(set(texts(records).values())) == len(records)


@pytest.mark.parametrize("change", [{"batch_size": 1}, {"batch_size": 5}, {"block": 4}, {"block": 7, "batch_size": 3}])
def test_neither_batch_nor_block_matters(loaded, vector, records, change):
    again = list(generate(loaded, PROMPTS, replace(CFG, **change), vector))
    assert texts(again) == texts(records)
    for a, b in zip(again, records, strict=True):
        assert {k: v for k, v in a.items() if k != "scores"} == {k: v for k, v in b.items() if k != "scores"}
        assert a["scores"] == pytest.approx(b["scores"], rel=1e-5)


@pytest.mark.parametrize("change", [{"block": 4}, {"batch_size": 3}], ids=["block", "batch"])
@pytest.mark.parametrize("start", [0, 1, 3, 4, 5, 14, 15, 17, 18])
@pytest.mark.parametrize("entering", [False, True])
def test_a_run_taken_up_again_writes_the_same_bytes(loaded, vector, start, change, entering, monkeypatch):
    monkeypatch.setattr(running, "entering_pays", lambda device: entering)
    cfg = replace(CFG, **change)
    whole = [dumps(r) for r in generate(loaded, PROMPTS, cfg, vector)]
    assert [dumps(r) for r in generate(loaded, PROMPTS, cfg, vector, start=start)] == whole[start:]


def test_a_row_does_not_depend_on_the_other_rows(loaded, vector, records):
    some = generate(loaded, PROMPTS[1:2], replace(CFG, coeffs=(0.5,), samples=1), vector)
    assert texts(some).items() <= texts(records).items()


def test_controls_are_the_unsteered_model(loaded, vector, records):
    plain = list(generate(loaded, PROMPTS, replace(CFG, coeffs=(0.0,))))
    assert all(r["vector"] is None and r["coeff"] == 0.0 for r in plain)
    assert texts(plain).items() <= texts(records).items()
    zero = list(generate(loaded, PROMPTS, CFG, vector - vector))
    assert texts(plain).items() <= texts(zero).items()


def test_a_zero_vector_changes_nothing_at_any_coefficient(loaded, vector):
    cfg = replace(CFG, coeffs=(0.0, 5.0), shared_noise=True, samples=1)
    zero = texts(generate(loaded, PROMPTS, cfg, vector - vector))
    assert all(zero[f"{p}/0/0"] == zero[f"{p}/5/0"] for p in "abc")


def test_the_seed_changes_every_text(loaded, vector, records):
    other = texts(generate(loaded, PROMPTS, replace(CFG, seed=1), vector))
    assert all(other[i] != text for i, text in texts(records).items())


def test_a_systems_text_stands_beside_the_prompt(loaded, records):
    cfg = replace(CFG, coeffs=(0.0,), system=POS)
    prompted = list(generate(loaded, PROMPTS, cfg))
    assert all(r["system"] == POS and POS not in str(r["prompt"]) for r in prompted)
    assert all(texts(records)[i] != text for i, text in texts(prompted).items())


def test_scores_follow_from_the_record_alone(loaded, records):
    again = score(loaded, [r["prompt"] for r in records], [r["completion"][0]["content"] for r in records], 4)
    for record, scores in zip(records, again, strict=True):
        assert record["scores"] == pytest.approx(scores, rel=1e-5)


@pytest.fixture(scope="module")
def steered():
    """The embedded model, whose texts are the tokens that were sampled, and a vector of its own."""
    toy, persona = load("toy"), pools.persona("authority")
    return toy, extract(toy, persona.pos, persona.neg, cfg=VectorConfig(contexts=8))


class TestStatesOfDecoding:
    """Scoring begins with what decoding has computed below the steered block, where that is what base computes."""

    @pytest.fixture
    def begun(self, monkeypatch):
        rows = []
        monkeypatch.setattr(Below, "use", lambda self, keys, use=Below.use: (rows.extend(keys), use(self, keys))[1])
        return rows

    @pytest.mark.parametrize(
        "change", [{}, {"batch_size": 4}, {"scope": "gen", "schedule": "linear"}, {"gate": "cosine"}]
    )
    @pytest.mark.parametrize("dosed", [True, False])
    def test_changes_no_score(self, steered, begun, monkeypatch, change, dosed):
        toy, v = steered
        how = replace(CFG, max_new_tokens=40, **(change if dosed else {"coeffs": (0.0,)}))
        found = list(generate(toy, PROMPTS, how, v if dosed else None))
        assert len(begun) == sum(record["scores"]["n_tokens"] > 0 for record in found) > 0
        begun.clear()
        monkeypatch.setattr(gen, "_ROOM", 0)
        for record, whole in zip(found, generate(toy, PROMPTS, how, v if dosed else None), strict=True):
            assert record["scores"] == pytest.approx(whole["scores"], rel=1e-5)
        assert not begun

    def test_is_left_alone_where_it_is_of_something_else(self, steered, begun):
        toy, v = steered
        list(generate(toy, PROMPTS, replace(CFG, system=POS), v))  # scored without the persona
        list(generate(toy, PROMPTS, replace(CFG, backtrack=True, coeffs=(0.5, 1.0)), v))
        assert not begun and gen._passed(replace(toy, chain=[None]), [[1]], CFG, v) is None


def test_scores_can_be_left_out(loaded):
    assert all(r["scores"] == {} for r in generate(loaded, PROMPTS, replace(CFG, coeffs=(0.0,), score=False)))


def test_records_come_as_they_are_made(loaded):
    stream = generate(loaded, PROMPTS * 1000, replace(CFG, coeffs=(0.0,), samples=1, block=2))
    assert next(stream)["id"] == "a/0/0"
    stream.close()


def test_wrong_coefficients_are_errors(loaded, vector):
    for wrong, message in (((1.0,), "without a steering vector"), ((1.0, 1.0), "repeat"), ((), "empty")):
        with pytest.raises(ShlError, match=message):
            next(generate(loaded, PROMPTS, replace(CFG, coeffs=wrong)))
    assert next(generate(loaded, PROMPTS, GenConfig(max_new_tokens=2)))["coeff"] == 0.0


def test_a_vector_for_another_model_is_refused(loaded, vector):
    other = Vector(vector.layers, {**vector.meta, "model_digest": "sha256:0"})
    with pytest.raises(Mismatch):
        next(generate(loaded, PROMPTS, CFG, other))
    assert next(generate(loaded, PROMPTS, replace(CFG, max_new_tokens=2), other, allow_mismatch=True))


def test_every_architecture_generates(each):
    made = extract(each, POS, None, PROMPTS, VectorConfig())
    out = list(generate(each, PROMPTS, GenConfig(coeffs=(0.0, 1.0), max_new_tokens=4), made))
    assert len(out) == 6 and all(r["scores"]["ppl"] is None or r["scores"]["ppl"] > 1 for r in out)


def test_the_story_model_tells_stories(stories):
    from shl.core.models import load

    model = load(str(stories), device="cpu")
    made = extract(model, POS, NEG, PROMPTS, VectorConfig())
    out = list(generate(model, PROMPTS, GenConfig(coeffs=(0.0, 1.0), max_new_tokens=60), made))
    assert all(r["n_tokens"] > 20 and r["scores"]["ppl"] < 20 for r in out)
