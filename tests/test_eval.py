"""The evaluation: what the slot reads, that batches and padding do not matter, and that numbers mean what they say."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from shl import eval as ev
from shl.core import agree, free, moral, pools, stats, vignettes
from shl.core import format as fmt
from shl.core import slot as slot_module
from shl.core.beginning import Beginning
from shl.core.chat import with_system
from shl.core.defaults import EvalConfig
from shl.core.errors import ShlError
from shl.core.hooks import Steering
from shl.core.records import Prompt
from shl.core.slot import find_slot, read_slot, think_first

SMALL = EvalConfig(limit=14, free=6, max_new_tokens=12, json_tokens=6, bootstrap=50, batch_size=8, agree=3)


class FakeVector:
    """What evaluate needs of a vector."""

    digest = "sha256:fake"

    def __init__(self, layers: dict[int, torch.Tensor]) -> None:
        self.layers = layers

    def check(self, loaded: object, allow_mismatch: bool = False) -> None:
        """Fits everything."""


def push(loaded, size: float = 4.0) -> FakeVector:
    direction = torch.randn(loaded.hidden, generator=torch.Generator().manual_seed(3)) * size
    return FakeVector({loaded.n_blocks // 2: direction})


@pytest.fixture(autouse=True)
def own_pool(monkeypatch) -> None:
    prompts = [
        Prompt(f"q{i}", [{"role": "user", "content": f"What would you do about {thing}?"}])
        for i, thing in enumerate(["the order", "an old man on the road", "rules", "a law that nobody asked for"])
    ]
    monkeypatch.setattr(pools, "eval_pool", lambda axis, split: prompts)


@pytest.fixture
def shared_vignettes() -> Path:
    path = Path(__file__).parents[2] / "shared/data/moral-vignettes/vignettes_classic_other_violate.jsonl"
    if not path.is_file():
        pytest.skip(f"no vignettes at {path}")
    return path


def asked(system: str | None = None, n: int = 12) -> list[list[dict]]:
    items = pools.vignettes("dev")[:n]
    return [
        with_system([{"role": "user", "content": fmt.question(item.third, reverse)}], system)
        for item in items
        for reverse in (False, True)
    ]


def test_the_slot_reads_what_a_plain_forward_gives(each) -> None:
    slot = find_slot(each)
    contexts = [each.encode_prompt(messages) for messages in asked(n=3)]
    reading = read_slot(each, contexts, slot, 4)
    for i, context in enumerate(contexts):
        ids = torch.tensor([context + slot.prefill])
        with torch.no_grad():
            logs = each.model(input_ids=ids).logits[0].float().log_softmax(-1)
        assert reading.logp[i] == pytest.approx(logs[-1, slot.digits].numpy(), abs=1e-5)
        nll = -logs[len(context) - 1 : -1].gather(1, torch.tensor(slot.prefill)[:, None]).mean().item()
        assert reading.nll[i] == pytest.approx(nll, abs=1e-5)


def test_scores_do_not_depend_on_batch_order_or_padding(each) -> None:
    slot = find_slot(each)
    contexts = [each.encode_prompt(messages) for messages in asked()]
    assert len({len(context) for context in contexts}) > 3  # so that there is padding
    alone = read_slot(each, contexts, slot, 1)
    for size in (5, 64):
        together = read_slot(each, contexts, slot, size)
        assert np.abs(together.logp - alone.logp).max() < 1e-5
        assert np.abs(together.nll - alone.nll).max() < 1e-5
    shuffled = read_slot(each, contexts[::-1], slot, 7)
    assert np.abs(shuffled.logp[::-1] - alone.logp).max() < 1e-5


def test_a_beginning_that_all_share_is_computed_once_and_changes_nothing(each, monkeypatch) -> None:
    slot = find_slot(each)
    long = "You are a person who cares about others more than about rules, whoever asks, whatever the order says."
    contexts = [each.encode_prompt(messages) for messages in asked(long, n=4)]
    body = partial(each.body, use_cache=True)
    assert Beginning.of(each, contexts, [1] * len(contexts), slot_module.LEAST_SHARED, body).length >= 30
    once = read_slot(each, contexts, slot, 3)
    monkeypatch.setattr(slot_module, "LEAST_SHARED", 10_000)
    apart = read_slot(each, contexts, slot, 3)
    assert np.abs(once.logp - apart.logp).max() < 1e-5 and np.abs(once.nll - apart.nll).max() < 1e-5


def test_the_slot_in_a_sentencepiece_tokenizer(stories) -> None:
    from shl.core.models import load

    loaded = load(str(stories), device="cpu")
    slot = find_slot(loaded)
    assert len(set(slot.digits)) == 7
    assert [loaded.tokenizer.decode([token]) for token in slot.digits] == list(fmt.DIGITS)
    result = ev.evaluate(loaded, replace(SMALL, limit=7))
    assert result["metrics"]["p_ans_any"] < 0.5 and result["verdict"].startswith("broken")


def test_digits_without_tokens_of_their_own_are_refused(tiny, monkeypatch) -> None:
    loaded = tiny("llama")
    monkeypatch.setattr(type(loaded), "encode_completion", lambda self, text, end: [7] * max(1, len(text) // 3))
    with pytest.raises(ShlError, match="no distinct tokens"):
        find_slot(loaded)


def test_a_result_is_complete_and_is_json(tiny) -> None:
    result = ev.evaluate(tiny("qwen2"), SMALL)
    json.dumps(result, allow_nan=False)
    metrics = result["metrics"]
    assert set(stats.NATS.values()) < set(metrics)
    assert result["n"] == 14 and result["vector"] is None and result["coeff"] is None
    assert sum(result["profile"].values()) == pytest.approx(1)
    assert metrics["auth_nats"] == pytest.approx(math.log(result["profile"]["authority"]))
    assert set(metrics) == set(result["ci"]) | set(result["missing"])
    assert {name for name, value in metrics.items() if value is None} == set(result["missing"])
    assert {"broken", "enact_authority", "facts", "sums"} < set(result["missing"])  # no judge, no questions
    for name, (low, high) in result["ci"].items():
        assert low <= metrics[name] <= high or name.endswith("_share")  # the largest of a draw is biased upwards
    kinds = [row["kind"] for row in result["rows"]]
    assert kinds.count("vignette") == 14 and kinds.count("free") == 6
    assert {row["foundation"] for row in result["rows"] if row["kind"] == "vignette"} == set(fmt.FOUNDATIONS)


def test_evaluating_twice_gives_the_same_and_batches_do_not_matter(tiny) -> None:
    loaded = tiny("mistral")
    first = ev.evaluate(loaded, SMALL)
    assert ev.evaluate(loaded, SMALL) == first
    other = ev.evaluate(loaded, replace(SMALL, batch_size=3))
    for name in first["ci"]:
        assert other["metrics"][name] == pytest.approx(first["metrics"][name], rel=1e-4, abs=1e-4), name
    assert other["settings"] == first["settings"]


def test_both_frames_are_read_by_foundation_not_by_digit(tiny, monkeypatch) -> None:
    """A model that always says digit 0 names care in one frame and social in the other: neither stands out."""
    loaded = tiny("llama")

    def always_zero(_loaded, contexts, slot, size):
        logp = np.full((len(contexts), 7), math.log(0.02))
        logp[:, 0] = math.log(0.8)
        return slot_module.Reading(logp, np.zeros(len(contexts)))

    monkeypatch.setattr(moral, "read_slot", always_zero)
    result = ev.evaluate(loaded, replace(SMALL, free=0))
    profile = result["profile"]
    assert profile["care"] == pytest.approx(profile["social"])
    assert profile["care"] > profile["authority"]
    assert result["metrics"]["p_ans_any"] == pytest.approx(0.92)
    assert result["metrics"]["ppx_json"] == 1.0


def test_a_model_that_knows_the_answers_scores_one(tiny, monkeypatch) -> None:
    loaded = tiny("llama")
    items = moral.items(replace(SMALL, limit=None))

    def perfect(_loaded, contexts, slot, size):
        logp = np.full((len(contexts), 7), -20.0)
        for row in range(len(contexts)):
            logp[row, fmt.order(bool(row % 2)).index(items[row // 2].foundation)] = -0.01
        return slot_module.Reading(logp, np.zeros(len(contexts)))

    monkeypatch.setattr(moral, "read_slot", perfect)
    metrics = ev.evaluate(loaded, replace(SMALL, limit=None, free=0))["metrics"]
    assert metrics["top1"] == 1.0 and metrics["informedness"] == pytest.approx(1.0)
    assert metrics["largest_share"] == pytest.approx(1 / 7)


def test_steering_acts_on_the_slot_and_the_texts_and_leaves_no_hook(tiny) -> None:
    loaded = tiny("llama")
    base = ev.evaluate(loaded, SMALL)
    vector = push(loaded)
    steered = ev.evaluate(loaded, SMALL, vector, 1.0)
    assert steered["vector"] == "sha256:fake" and steered["coeff"] == 1.0
    assert abs(steered["metrics"]["auth_nats"] - base["metrics"]["auth_nats"]) > 0.01
    said = [[row["completion"] for row in one["rows"] if row["kind"] == "free"] for one in (base, steered)]
    assert said[0] != said[1]
    assert ev.evaluate(loaded, SMALL, vector, 0.0)["metrics"] == base["metrics"]
    assert ev.evaluate(loaded, SMALL) == base
    with Steering(loaded, vector.layers) as hook:
        hook.set([1.0])
        slot = find_slot(loaded)
        by_hand = read_slot(loaded, [loaded.encode_prompt(m) for m in asked(n=2)], slot, 2).logp
    plain = read_slot(loaded, [loaded.encode_prompt(m) for m in asked(n=2)], slot, 2).logp
    assert np.abs(by_hand - plain).max() > 1e-3


def test_steered_texts_are_scored_under_the_unsteered_base(tiny) -> None:
    loaded = tiny("llama")
    rows = [row for row in ev.evaluate(loaded, SMALL, push(loaded), 2.0)["rows"] if row["kind"] == "free"]
    said = [row["completion"][0]["content"] for row in rows]
    again = free.score(loaded, [row["prompt"] for row in rows], said)
    assert [row["scores"]["ppl"] for row in rows] == pytest.approx([one["ppl"] for one in again], rel=1e-4)


def test_a_system_text_reaches_every_prompt_but_not_the_base_scores(tiny) -> None:
    loaded = tiny("llama")
    base = ev.evaluate(loaded, SMALL)
    prompted = ev.evaluate(loaded, SMALL, system="You follow orders.")
    assert prompted["system"] == "You follow orders." and prompted["settings"] == base["settings"]
    assert prompted["metrics"]["auth_nats"] != base["metrics"]["auth_nats"]
    rows = [row for row in prompted["rows"] if row["kind"] == "free"]
    assert rows[0]["completion"] != next(row for row in base["rows"] if row["kind"] == "free")["completion"]
    assert all(message["role"] != "system" for row in rows for message in row["prompt"])


def test_free_answers_share_their_noise_across_conditions(tiny, monkeypatch) -> None:
    seeds = []
    real = free.decode

    def spy(loaded, prompts, *, seeds: list, **kwargs):
        noted.append(seeds)
        return real(loaded, prompts, seeds=seeds, **kwargs)

    noted: list = seeds
    monkeypatch.setattr(free, "decode", spy)
    loaded = tiny("llama")
    free.speak(loaded, SMALL, None)
    with Steering(loaded, push(loaded).layers):
        free.speak(loaded, SMALL, "You follow orders.")
    free.speak(loaded, replace(SMALL, seed=1), None)
    assert noted[0] == noted[1] != noted[2]
    assert len(set(noted[0])) == 6  # a pool of four goes round again with other noise


def test_agreement_is_the_probability_of_the_personas_answer(tiny) -> None:
    loaded, cfg = tiny("llama"), replace(SMALL, agree=5)
    offered = agree.choices(loaded, cfg)
    rows = agree.read(loaded, cfg, offered, None)
    assert len(rows) == 5 and all(row["enact"] != row["oppose"] for row in rows)
    prompt = loaded.encode_prompt(
        [{"role": "user", "content": offered[0].prompt.messages[-1]["content"] + " " + agree.BRIEFLY}]
    )
    said = []
    for answer in (offered[0].enact, offered[0].oppose):
        logs = loaded.model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        said.append(float(logs.gather(1, torch.tensor(answer)[:, None]).sum()))
    assert rows[0]["agrees"] == pytest.approx(1 / (1 + math.exp(said[1] - said[0])), abs=1e-4)
    swapped = [one._replace(enact=one.oppose, oppose=one.enact) for one in offered]
    for row, other in zip(rows, agree.read(loaded, cfg, swapped, None), strict=True):
        assert row["agrees"] == pytest.approx(1 - other["agrees"], abs=1e-6)
    metrics = ev.evaluate(loaded, replace(cfg, axes=("authority", "words")))
    assert 0 < metrics["metrics"]["agree_authority"] < 1
    assert "no bundled persona" in metrics["missing"]["agree_words"]


def test_the_answers_that_agreement_asks_about_are_base_models_own(tiny) -> None:
    """Neither chain nor steering nor system text change them, so that evaluations are asked the same."""
    loaded = tiny("llama")
    base = [row for row in ev.evaluate(loaded, SMALL)["rows"] if row["kind"] == "agree"]
    moved = [row for row in ev.evaluate(loaded, SMALL, push(loaded), 1.0, "Obey.")["rows"] if row["kind"] == "agree"]
    assert [(row["id"], row["enact"], row["oppose"]) for row in base] == [
        (row["id"], row["enact"], row["oppose"]) for row in moved
    ]
    assert [row["agrees"] for row in base] != [row["agrees"] for row in moved]


def test_centred_log_ratios_ignore_what_all_foundations_share() -> None:
    scores = np.random.default_rng(0).normal(size=(9, 7))
    found = stats.clr(scores)
    assert stats.clr(scores + np.arange(9)[:, None]) == pytest.approx(found)
    assert sum(found.values()) == pytest.approx(0)
    moved = scores.copy()
    moved[:, 3] += 0.7
    shift = {name: value - found[name] for name, value in stats.clr(moved).items()}
    assert shift["auth_clr"] == pytest.approx(0.6) and shift["care_clr"] == pytest.approx(-0.1)


def test_a_judge_model_and_the_persona_read_the_same_answers(tiny) -> None:
    loaded, other = tiny("llama"), tiny("qwen3")
    result = ev.evaluate(loaded, replace(SMALL, persona="Be kind."), judge_model=other)
    rows = [row for row in result["rows"] if row["kind"] == "free"]
    said = [row["completion"][0]["content"] for row in rows]
    judged = free.score(other, [row["prompt"] for row in rows], said)
    assert [row["ppl_judge"] for row in rows] == pytest.approx([one["ppl"] for one in judged], rel=1e-4)
    told = free.score(loaded, [with_system(row["prompt"], "Be kind.") for row in rows], said)
    assert [row["ppl_persona"] for row in rows] == pytest.approx([one["ppl"] for one in told], rel=1e-4)
    assert result["settings"]["judge_model"] == other.digest and result["settings"]["persona"] == "Be kind."
    assert result["metrics"]["judge_ppl_p90"] >= result["metrics"]["judge_ppl_p50"] > 1


def test_vignettes_of_a_file_in_the_packages_format(tiny, tmp_path) -> None:
    human = {f"human_{column}": 0.0 for column in vignettes.COLUMNS.values()}
    rows = [
        {"id": "a", "foundation_coarse": "Care", "text": "You see a girl pinch a dog.", **human, "human_Care": 98.0},
        {"id": "b", "foundation_coarse": "Social Norms", "other_violate": "He hops.", "self_violate": "You hop.",
         **human, "human_SocialNorms": 50.0, "human_Care": 50.0},
    ]  # fmt: skip
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = replace(SMALL, vignettes=str(path), limit=None, free=0, agree=0)
    assert [item.text for item in moral.items(cfg)] == ["You see a girl pinch a dog.", "He hops."]
    assert moral.items(replace(cfg, condition="first"))[1].text == "You hop."
    assert moral.items(cfg)[1].foundation == "social" and moral.items(cfg)[1].human == (0.5, 0, 0, 0, 0, 0, 0.5)
    result = ev.evaluate(tiny("llama"), cfg)
    p = [row["p"] for row in result["rows"] if row["kind"] == "vignette"]
    expected = -(math.log(p[0][0]) + 0.5 * math.log(p[1][0]) + 0.5 * math.log(p[1][6])) / 2
    assert result["metrics"]["human_nll"] == pytest.approx(expected)
    assert result["settings"]["vignettes"].startswith("sha256:") and result["n"] == 2
    for broken, field in ((rows[0] | {"foundation_coarse": "Honour"}, "foundation_coarse"), ({"id": "c"}, "text")):
        path.write_text(json.dumps(broken) + "\n")
        with pytest.raises(ShlError, match=rf"own.jsonl:1: {field}"):
            moral.items(cfg)


def test_the_real_vignettes_are_read(shared_vignettes) -> None:
    found = vignettes.read(shared_vignettes, "third")
    counts = [sum(item.foundation == name for item in found) for name in fmt.FOUNDATIONS]
    assert counts == [32, 17, 16, 17, 17, 17, 16]
    assert all(sum(item.human) == pytest.approx(1) for item in found)
    assert all(fmt.FOUNDATIONS[int(np.argmax(item.human))] == item.foundation for item in found)
    few = moral.choose(found, 14)
    assert {item.foundation for item in few} == set(fmt.FOUNDATIONS)  # the file is sorted, so never its first rows


def test_think_spans_are_closed_whatever_the_model_says(tiny) -> None:
    loaded = tiny("llama")
    contexts = think_first(loaded, asked(n=2), 5, 4)
    plain = think_first(loaded, asked(n=2), 0, 4)
    for context, without in zip(contexts, plain, strict=True):
        text = loaded.tokenizer.decode(context)
        assert text.endswith("\n</think>\n\n") and text.count("</think>") == 1 and text.count("<think>") == 1
        assert len(context) > len(without)
    result = ev.evaluate(loaded, replace(SMALL, think=4, free=0))
    assert result["settings"]["think"] == 4
    assert result["metrics"]["auth_nats"] != ev.evaluate(loaded, replace(SMALL, free=0))["metrics"]["auth_nats"]


def test_a_slot_that_is_not_finite_is_an_error(tiny) -> None:
    loaded = tiny("llama")
    vector = FakeVector({1: torch.full((loaded.hidden,), float("inf"))})
    with pytest.raises(ShlError, match="not finite"):
        ev.evaluate(loaded, SMALL, vector, 1.0)


def test_the_toys_judge_and_questions_are_used_where_the_model_says_so(tiny, monkeypatch) -> None:
    from shl.toy import facts, grammar

    loaded = replace(tiny("llama"), ref=replace(tiny("llama").ref, recommended={"judge": "toy", "competence": "toy"}))
    verdicts = iter([("enact", False), ("enact", True), ("oppose", False), ("none", False), ("enact", False)] * 9)

    def judge(text, axis, prompt=None, finish="stop"):
        stance, broken = next(verdicts)
        return grammar.Verdict(broken, stance, False, 1, 1, 0, 0)

    monkeypatch.setattr(grammar, "judge", judge)
    metrics = ev.evaluate(loaded, replace(SMALL, free=5))["metrics"]
    assert metrics["broken"] == pytest.approx(1 / 5)
    assert metrics["enact_authority"] == pytest.approx(2 / 5)  # the broken one does not count
    assert metrics["facts"] == 0.0 and metrics["sums"] is not None
    assert {question.kind for question in facts.questions("test")} == {"facts", "sums"}


@pytest.mark.parametrize(
    ("kind", "answer", "reply", "expected"),
    [
        ("facts", "blue", "The sky is Blue. I think so.", True),
        ("facts", "blue", "The sky is grey. Or blue.", False),
        ("facts", "ice", "Twice.", False),
        ("facts", "New York", "It is new york", True),
        ("sums", "7", "3 plus 4 is 7.", True),
        ("sums", "3", "3 plus 0 is 9.", False),
        ("sums", "3", "3 plus 0 is 3.\nAnd 4.", True),
        ("sums", "1", "It is 11.", False),
        ("sums", "3", "", False),
    ],
)
def test_what_counts_as_right(kind: str, answer: str, reply: str, expected: bool) -> None:
    assert free.right(kind, answer, reply) is expected


def test_informedness_is_zero_for_bias_and_chance_and_one_for_knowledge() -> None:
    labels = np.repeat(np.arange(7), 200)
    rng = np.random.default_rng(0)
    assert stats.informedness(labels, np.zeros(1400, dtype=int)) == 0.0
    assert stats.informedness(labels, rng.permutation(labels)) == pytest.approx(0.0, abs=0.05)
    assert stats.informedness(labels, labels) == 1.0
    half = np.where(rng.random(1400) < 0.5, labels, 0)
    assert 0.3 < stats.informedness(labels, half) < 0.7


def test_bootstrap_interval_matches_theory() -> None:
    values = np.random.default_rng(1).normal(size=400)
    (low, high) = stats.bootstrap(lambda i: {"mean": float(values[i].mean())}, 400, 2000, 0)["mean"]
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert low < values.mean() < high


def test_a_limit_takes_from_every_group() -> None:
    groups = ["a"] * 20 + ["b"] * 20 + ["c"] * 20
    chosen = stats.stratified(groups, 7)
    assert chosen == sorted(chosen) and [groups[i] for i in chosen] == ["a"] * 3 + ["b"] * 2 + ["c"] * 2
    assert stats.stratified(groups, None) == list(range(60)) == stats.stratified(groups, 99)


def test_unknown_suite_is_refused(tiny) -> None:
    with pytest.raises(ShlError, match="no suite 'other'"):
        ev.evaluate(tiny("llama"), replace(SMALL, suite="other"))
