"""The dose along a trajectory: what is added where, what a rewind leaves behind (nothing), and what records tell."""

import json
import sys
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from shl import cli
from shl.core.cache import check_replaceable, new_cache
from shl.core.decode import Sampling, decode
from shl.core.defaults import GenConfig, VectorConfig
from shl.core.errors import InputError, ShlError
from shl.core.hooks import Capture, Steering
from shl.core.records import Prompt, check_record, dumps
from shl.core.running import Running
from shl.core.sampling import surprises
from shl.core.scores import nll_per_token
from shl.core.trajectory import EVERY, SPAN, WINDOW, Backtrack, Course, Rewind, Step, Track, course_of
from shl.gen import generate
from shl.vector import extract
from test_formats import check, documented

PROMPTS = [[1, *range(40, 40 + n)] for n in (3, 30, 7, 15, 0)]
SEEDS = [11, 12, 13, 14, 15]
COEFFS = [1.5, 0.0, -1.0, 0.5, 2.0]
SHORT = Sampling(max_new_tokens=30)
EASY = Backtrack(max_surprise=1e-4, rewind=5, shrink=0.7, max_rewinds=3)
COURSES = [
    Course("all", "linear", horizon=10, final=0.2),
    Course("all", "exp", horizon=20, final=0.5),
    Course("prompt"),
    Course("gen"),
    Course("gen", "linear", horizon=8, final=0.0),
]


def direction(loaded, seed=1):
    return 3 * torch.randn(loaded.hidden, generator=torch.Generator().manual_seed(seed))


def middle(loaded):
    return {loaded.n_blocks // 2: direction(loaded)}


def run(loaded, course, prompts=PROMPTS, seeds=SEEDS, coeffs=COEFFS, sampling=SHORT, **kwargs):
    with Steering(loaded, middle(loaded), course.gate) as steering:
        return decode(
            loaded, prompts, seeds=seeds, sampling=sampling, steering=steering, coeffs=coeffs, course=course, **kwargs
        )


def told(completion):
    return completion.ids, completion.finish, [r[:4] for r in completion.track.rewinds], completion.track.spans()


# --- the course, without any model ---


def test_schedules_begin_at_one_and_stay_at_their_final_share():
    for schedule, half in (("linear", 0.6), ("exp", 0.2**0.5)):
        course = Course(schedule=schedule, horizon=100, final=0.2)
        assert [course.share(t) for t in (-5, -1, 0, 100, 1000)] == pytest.approx([1, 1, 1, 0.2, 0.2])
        assert course.share(50) == pytest.approx(half)
        shares = [course.share(t) for t in range(120)]
        assert shares == sorted(shares, reverse=True)


def test_scopes_divide_the_positions():
    both, prompt, gen = (Course(scope) for scope in ("all", "prompt", "gen"))
    assert [prompt.share(t) + gen.share(t) for t in range(-3, 9)] == [both.share(t) for t in range(-3, 9)] == [1] * 12
    assert (prompt.share(-1), prompt.share(0), gen.share(-1), gen.share(0)) == (1, 0, 0, 1)


def test_only_the_default_course_is_plain():
    assert Course().plain and course_of(GenConfig()).plain and course_of(GenConfig(horizon=5, shrink=0.9)).plain
    for change in ({"scope": "gen"}, {"schedule": "exp"}, {"gate": "cosine"}, {"backtrack": True}):
        assert not course_of(GenConfig(**change)).plain


@pytest.mark.parametrize(
    "wrong",
    [
        {"scope": "some"},
        {"schedule": "cubic"},
        {"gate": "sine"},
        {"schedule": "exp", "final": 0.0},
        {"horizon": 0},
        {"final": 1.5},
        {"scope": "prompt", "schedule": "linear"},
        {"backtrack": True, "shrink": 1.0},
        {"backtrack": True, "rewind": 0},
        {"backtrack": True, "max_surprise": 0.0},
    ],
)
def test_impossible_courses_are_errors(wrong):
    with pytest.raises(ShlError):
        course_of(GenConfig(**wrong))


def walk(excess, course, say=lambda ids: "", coeff=1.0):
    """A track that samples tokens of these surprises and is rewound when it should be."""
    track = Track([7, 7, 7], [], coeff, course)
    for token, value in enumerate(excess):
        track.add(token, Step(track.coeff, track.dose(len(track.input) - 1), value, value))
        if track.watched and (trouble := track.trouble(say)):
            track.rewind(*trouble)
    return track


def test_the_running_surprise_is_a_mean_over_the_window():
    course = Course(backtrack=Backtrack(max_surprise=0.5, rewind=3, shrink=0.5))
    assert not walk([0.5] * 100, course).rewinds  # at the limit, not over it
    assert not walk([0.0] * 9 + [0.5 * WINDOW] + [0.0] * 50, course).rewinds
    (only,) = walk([0.0] * 9 + [0.5 * WINDOW + 0.1] + [0.0] * 50, course).rewinds
    assert only == Rewind(10, 7, 0.5, "surprise", pytest.approx(0.5 + 0.1 / WINDOW))
    assert not walk([0.0] * 9 + [0.4 * WINDOW] + [0.0] * (WINDOW - 1) + [0.4 * WINDOW], course).rewinds


def test_what_came_before_a_rewind_counts_no_more():
    course = Course(backtrack=Backtrack(max_surprise=1, rewind=1, shrink=0.5))
    track = walk([0.9] * WINDOW + [3.0] + [0.9] * 40, course)
    assert [one.at for one in track.rewinds] == [WINDOW + 1]


def test_rewinds_are_bounded_and_shrink_the_coefficient():
    limits = Backtrack(max_surprise=0.1, rewind=4, shrink=0.5, max_rewinds=3)
    track = walk([9.0] * 30, Course(backtrack=limits))
    assert [(one.to, one.coeff) for one in track.rewinds] == [(0, 0.5), (0, 0.25), (0, 0.125)]
    assert not track.watched and track.sampled == 27
    assert not walk([9.0] * 30, Course(backtrack=limits), coeff=0.0).rewinds


def test_repetition_rewinds_too():
    course = Course(backtrack=Backtrack(max_rep=0.3, rewind=4))
    (first, *_) = walk([0.0] * EVERY, course, lambda ids: "means " * 30).rewinds
    assert first.why == "repetition" and first.at == EVERY and first.value > 0.9
    assert not walk([0.0] * 64, course, lambda ids: "The order is wrong, so she will not obey it.").rewinds


@given(st.lists(st.sampled_from([0.0, 0.0, 0.0, 5.0]), max_size=90), st.sampled_from(COURSES), st.integers(1, 20))
def test_spans_cover_the_tokens_whatever_happens(excess, course, rewind):
    limits = Backtrack(max_surprise=0.5, rewind=rewind, shrink=0.5, max_rewinds=3)
    track = walk(excess, replace(course, backtrack=limits))
    spans = track.spans()
    assert sum(span["tokens"] for span in spans) == track.sampled == len(track.steps)
    assert track.sampled + sum(one.at - one.to for one in track.rewinds) == len(excess)
    total = sum(span["tokens"] * span["dose"] for span in spans)
    assert total == pytest.approx(sum(step.dose for step in track.steps), rel=1e-4, abs=1e-4)
    assert [span["coeff"] for span in spans] == sorted((span["coeff"] for span in spans), reverse=True)


def test_spans_are_as_long_as_the_dose_is_the_same():
    assert walk([0.0] * 100, Course(backtrack=Backtrack())).spans() == [{"tokens": 100, "coeff": 1.0, "dose": 1.0}]
    assert [s["tokens"] for s in walk([0.0] * 100, Course(schedule="exp")).spans()] == [SPAN, SPAN, SPAN, 4]
    prompt = walk([0.0] * 100, Course("prompt")).spans()
    assert [(s["tokens"], s["dose"]) for s in prompt] == [(1, 1.0), (99, 0.0)]


# --- what is added ---


class Passes(Capture):
    """Capture that keeps the states of every pass, not those of the last one only."""

    def _make(self, layer):
        read, self.states = super()._make(layer), []

        def log(module, args, output):
            read(module, args, output)
            self.states.append(self.outputs[layer])

        return log


def added(loaded, course, coeff=1.5):
    """What steering adds at each position of a prompt and its answer, and the states that it is added to."""
    layer, prompt = loaded.n_blocks // 2, PROMPTS[3]
    with Steering(loaded, middle(loaded), course.gate) as steering, Passes(loaded, [layer], "all") as passes:
        (out,) = decode(loaded, [prompt], seeds=[3], sampling=SHORT, steering=steering, coeffs=[coeff], course=course)
    steered = torch.cat(passes.states, 1)[0]
    with torch.inference_mode(), Capture(loaded, [layer], "all") as plain:
        ids = torch.tensor([prompt + out.ids])[:, : len(steered)]
        before = plain.run(input_ids=ids)[layer][0]
    return steered - before, before, out


@pytest.mark.parametrize("course", COURSES, ids=lambda c: f"{c.scope}-{c.schedule}")
def test_each_position_gets_its_share_of_the_vector(each, course):
    """States below the steered block do not know of it, so the plain model's are what was added to."""
    shift, _, _ = added(each, course)
    n = len(PROMPTS[3])
    shares = torch.tensor([course.share(i - n) for i in range(len(shift))])
    assert len(shift) > n + 5
    torch.testing.assert_close(shift, 1.5 * shares[:, None] * direction(each), rtol=1e-4, atol=2e-4)


def test_the_gate_is_the_cosine_where_it_is_positive(each):
    shift, before, out = added(each, Course(gate="cosine"))
    gate = torch.cosine_similarity(before, direction(each)[None], dim=-1).clamp(min=0)
    torch.testing.assert_close(shift, 1.5 * gate[:, None] * direction(each), rtol=1e-3, atol=2e-4)
    doses = torch.tensor([step.dose for step in out.track.steps])
    torch.testing.assert_close(doses, 1.5 * gate[len(PROMPTS[3]) - 1 :][: len(doses)], rtol=1e-3, atol=1e-4)
    assert 0 < int((gate > 0).sum()) < len(gate)


def test_states_that_do_not_agree_are_left_alone(tiny):
    loaded, v = tiny(), torch.zeros(48)
    v[0] = 2.0
    across, along = torch.zeros(48), torch.zeros(48)
    across[1:], along[0], along[1] = 1.0, 3.0, 3.0
    states = torch.stack([across, -along, along, 0 * v])[None]
    old, loaded.blocks[1] = loaded.blocks[1], nn.Identity()
    try:
        with Steering(loaded, {1: v}, "cosine") as steering:
            steering.set([0.5])
            out = loaded.blocks[1](states)[0]
            assert steering.dose() == [0.0]
    finally:
        loaded.blocks[1] = old
    assert torch.equal(out[[0, 1, 3]], states[0, [0, 1, 3]])
    torch.testing.assert_close(out[2] - along, 0.5 * 0.5**0.5 * v)


def test_a_constant_course_is_todays_decoding_to_the_bit(each):
    with Steering(each, middle(each)) as steering:
        today = decode(each, PROMPTS, seeds=SEEDS, sampling=SHORT, steering=steering, coeffs=COEFFS)
    same = run(each, Course())
    assert same == today and all(one.track is None for one in same)
    # the same doses, set position by position
    slow = run(each, Course(schedule="linear", final=1.0))
    assert [one.ids for one in slow] == [one.ids for one in today]


@pytest.mark.parametrize("course", [*COURSES, Course(gate="cosine"), Course(backtrack=EASY)])
def test_coefficient_zero_is_no_vector(tiny, course):
    loaded = tiny("qwen2")
    plain = decode(loaded, PROMPTS, seeds=SEEDS, sampling=SHORT)
    mixed = run(loaded, course, coeffs=[0.0, 1.0, 0.0, 2.0, 0.0])
    for k in (0, 2, 4):
        assert mixed[k].ids == plain[k].ids
        assert all(span["dose"] == 0 for span in mixed[k].track.spans()) and not mixed[k].track.rewinds
    assert mixed[3].ids != plain[3].ids


def test_a_course_needs_a_vector(tiny):
    with pytest.raises(ShlError, match="without a steering vector"):
        decode(tiny(), PROMPTS, seeds=SEEDS, sampling=SHORT, course=Course("gen"))


def test_coefficients_of_other_positions_are_an_error(tiny):
    loaded = tiny()
    with pytest.raises(ShlError, match="3 positions for a pass of 2"), Steering(loaded, {1: direction(loaded)}) as s:
        s.set([[1.0, 1.0, 1.0]])
        loaded.model(input_ids=torch.tensor([[40, 41]]))


# --- rewinding ---


@pytest.fixture
def restless(monkeypatch):
    """Rows are in trouble at places of their own, so that every architecture is rewound."""

    def trouble(self, say):
        return ("surprise", 1.0) if len(self.rewinds) < 3 and self.sampled % 12 == 4 + self.asked % 5 else None

    monkeypatch.setattr(Track, "trouble", trouble)


def test_batching_does_not_matter(each, restless):
    course = Course("all", "linear", horizon=20, final=0.5, gate=None, backtrack=EASY)
    together = run(each, course)
    assert [len(one.track.rewinds) for one in together] == [3, 0, 3, 3, 3]
    alone = [run(each, course, [p], [s], [c])[0] for p, s, c in zip(PROMPTS, SEEDS, COEFFS, strict=True)]
    assert [told(one) for one in together] == [told(one) for one in alone]


def test_limits_that_nothing_crosses_change_no_text(each):
    calm = Course(backtrack=Backtrack(max_surprise=1e6, max_rep=2.0))
    assert [one.ids for one in run(each, calm)] == [one.ids for one in run(each, Course())]


def test_after_a_rewind_the_row_goes_on_as_if_it_began_there(each, restless):
    """Greedy decoding from the retained prefix at the new coefficient gives the same end."""
    greedy = Sampling(max_new_tokens=30, greedy=True)
    done = run(each, Course(backtrack=replace(EASY, max_rewinds=2)), sampling=greedy)
    rewound = [(p, one) for p, one in zip(PROMPTS, done, strict=True) if one.track.rewinds]
    assert len(rewound) == 4
    for prompt, one in rewound:
        last = one.track.rewinds[-1]
        fresh = replace(greedy, max_new_tokens=30 - last.to)
        (again,) = run(each, Course(), [prompt], [0], [last.coeff], fresh, forced=[one.ids[: last.to]])
        assert again.ids == one.ids and again.finish == one.finish


def states_of(cache, row):
    """Keys and values of one row, layer by layer."""
    return [tensor[row] for layer in cache.layers for tensor in (layer.keys, layer.values)]


@pytest.mark.parametrize("drawn", [3, 20])  # before and past the sliding window
@pytest.mark.parametrize("course", [Course(), Course("gen", "linear", horizon=9)], ids=["constant", "linear"])
def test_a_rewind_leaves_no_trace(each, drawn, course):
    """Logits and cache are those of a fresh pass over what was kept at the new dose, at once and from there on."""
    course = replace(course, backtrack=replace(EASY, max_surprise=1e9, max_rep=9.0, rewind=7))
    tracks = [Track(p, [], c, course) for p, c in zip(PROMPTS, COEFFS, strict=True)]

    def step(state):
        tokens, steps = state.sample()
        for track, token, read in zip(state.alive, tokens.tolist(), steps, strict=True):
            track.add(token, read)
        return tokens

    with torch.inference_mode(), Steering(each, middle(each)) as steering:
        state = Running(each, tracks, SEEDS, Sampling(max_new_tokens=40), steering)
        for _ in range(drawn):
            state.advance(step(state))
        tokens = step(state)
        for k in (0, 4):
            tracks[k].rewind("surprise", 1.0)
        for _ in range(3):
            state.advance(tokens)
            read = {k: list(tracks[k].input) for k in (0, 4)}
            tokens, after = step(state), state.logits
            for row, k in enumerate(state.rows):
                if k not in read:
                    continue
                fresh, ids = new_cache(each), torch.tensor([read[k]])
                doses = [tracks[k].dose(i) if row < 5 else 0.0 for i in range(ids.shape[1])]
                steering.set([doses])
                logits = each.model(input_ids=ids, past_key_values=fresh, use_cache=True).logits[0, -1]
                torch.testing.assert_close(after[row], logits, rtol=1e-4, atol=2e-4)
                for mine, theirs in zip(states_of(state.cache, row), states_of(fresh, 0), strict=True):
                    n = min(mine.shape[1], theirs.shape[1])
                    torch.testing.assert_close(mine[:, -n:], theirs[:, -n:], rtol=1e-4, atol=2e-4)
                    assert not mine[:, : mine.shape[1] - n].any()


def test_the_twin_reads_what_score_reads(each, restless):
    """Surprises of the text that is left, over all rewinds, are those of the unsteered model in a pass of its own."""
    done = run(each, Course(backtrack=replace(EASY, max_rewinds=4)))
    wanted = nll_per_token(each, PROMPTS, [one.ids for one in done])
    for one, nll in zip(done, wanted, strict=True):
        if one.track.watched:
            mine = torch.tensor([step.surprise for step in one.track.steps])
            torch.testing.assert_close(mine, nll, rtol=1e-3, atol=1e-3)
    assert sum(one.track.watched for one in done) == 4 and sum(len(one.track.rewinds) for one in done) > 9


def test_excess_is_surprise_less_entropy():
    logits = torch.tensor([[0.0, 0.0, float("-inf"), 0.0], [9.0, -9.0, 0.0, 1.0]])
    surprise, excess = surprises(logits, torch.tensor([1, 1]))
    other = torch.distributions.Categorical(logits=logits[1])
    assert surprise.tolist() == pytest.approx([torch.tensor(3.0).log().item(), -other.logits[1].item()])
    assert excess.tolist() == pytest.approx([0, -other.logits[1].item() - other.entropy().item()], abs=1e-5)


def test_caches_that_cannot_be_cut_are_refused(tiny):
    cache = new_cache(tiny())
    check_replaceable(cache)
    cache.layers.append(nn.Identity())
    with pytest.raises(ShlError, match="Identity cannot be rewound"):
        check_replaceable(cache)


# --- records ---

ASKED = [Prompt(name, [{"role": "user", "content": text}]) for name, text in (("a", "Who?"), ("b", "She thanked him."))]
CFG = GenConfig(coeffs=(0.0, 2.0), samples=2, max_new_tokens=30, block=3)
REWINDING = replace(CFG, backtrack=True, max_surprise=1e-4, rewind=5)
FEATURES = [
    replace(CFG, scope="prompt"),
    replace(CFG, schedule="linear", horizon=9),
    replace(CFG, gate="cosine"),
    REWINDING,
    replace(REWINDING, scope="gen", schedule="exp", gate="cosine"),
]


@pytest.fixture(scope="module")
def loaded(tiny):
    return tiny("qwen2")


@pytest.fixture(scope="module")
def vector(loaded):
    return extract(loaded, "You care about people.", "You follow orders.", ASKED, VectorConfig())


@pytest.fixture(scope="module")
def written(loaded, vector):
    return [list(generate(loaded, ASKED, cfg, vector)) for cfg in FEATURES]


def test_records_tell_their_trajectory(written):
    for cfg, records in zip(FEATURES, written, strict=True):
        for record in records:
            check_record(record)
            one = record["trajectory"]
            assert sum(span["tokens"] for span in one["spans"]) == record["n_tokens"]
            assert (one["scope"], one["schedule"], one["gate"]) == (cfg.scope, cfg.schedule, cfg.gate)
            assert ("rewinds" in one) == cfg.backtrack and ("horizon" in one) == (cfg.schedule != "constant")
    assert any(record["trajectory"]["rewinds"] for record in written[3])


def test_the_trajectory_is_documented(written):
    stories = [record["trajectory"] for records in written for record in records]
    check(documented("Trajectory"), stories)
    check(documented("Spans"), [span for one in stories for span in one["spans"]])
    check(documented("Rewinds"), [rewind for one in stories for rewind in one.get("rewinds", ())])


def test_plain_records_say_nothing_of_it(loaded, vector):
    extra = [replace(prompt, extra={"trajectory": "mine", "topic": "work"}) for prompt in ASKED]
    for record in generate(loaded, extra, CFG, vector):
        assert "trajectory" not in record and record["topic"] == "work"


@pytest.mark.parametrize("start", [1, 3, 4, 7])
@pytest.mark.parametrize("which", [3, 4])
def test_a_run_taken_up_again_writes_the_same_bytes(loaded, vector, written, which, start):
    again = generate(loaded, ASKED, FEATURES[which], vector, start=start)
    assert [dumps(r) for r in again] == [dumps(r) for r in written[which]][start:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spans": []}, "0 tokens where there are 2"),
        ({"spans": [{"tokens": 2, "coeff": 1}]}, "dose: is missing"),
        ({"spans": [2]}, "is not an object"),
        ({"rewinds": [{"at": 3, "to": 4, "coeff": 1, "why": "surprise", "value": 2}]}, "does not go back"),
        ({"rewinds": {}}, "is not a list"),
    ],
)
def test_trajectories_that_cannot_be_are_refused(change, message):
    record = {
        "id": "a/1/0",
        "prompt": [{"role": "user", "content": "Who?"}],
        "completion": [{"role": "assistant", "content": "Me."}],
        "n_tokens": 2,
        "trajectory": {"spans": [{"tokens": 2, "coeff": 1, "dose": 0.5}], "rewinds": []},
    }
    check_record(record)
    with pytest.raises(InputError, match=message):
        check_record(record | {"trajectory": record["trajectory"] | change})


@pytest.mark.parametrize("change", [asdict(cfg) for cfg in FEATURES[:1]])
def test_features_need_a_vector(loaded, change):
    with pytest.raises(ShlError, match="need a steering vector"):
        next(generate(loaded, ASKED, replace(GenConfig(**change), coeffs=(0.0,))))


# --- the command ---


@pytest.fixture
def shl(monkeypatch, capfd, tmp_path, loaded, vector):
    """`shl gen` in this process, on the tiny model and its vector."""
    monkeypatch.chdir(tmp_path)
    vector.save(Path("v.safetensors"))
    Path("p.txt").write_text("Who said so?\nAnswer!\n")

    def call(*argv):
        monkeypatch.setattr(sys, "argv", ["shl", "gen", "p.txt", "--max-new-tokens", "8", *map(str, argv)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as done:
            cli.main()
        out, err = capfd.readouterr()
        return done.value.code or 0, [json.loads(line) for line in out.splitlines()], err

    return call


@pytest.mark.parametrize(
    "wrong",
    [
        ["--coeff", "auto"],
        ["--vec", "v.safetensors", "--survival", "0.5"],
        ["--vec", "v.safetensors", "--coeff", "auto", "--survival", "0.5", "--target-kl", "1"],
        ["--vec", "v.safetensors", "--to-ceiling"],
        ["--vec", "v.safetensors", "--coeff", "auto", "--target-kl", "1", "--to-ceiling"],
        ["--vec", "v.safetensors", "--final", "0.5"],
        ["--vec", "v.safetensors", "--shrink", "0.5"],
        ["--vec", "v.safetensors", "--scope", "some"],
    ],
)
def test_flags_without_their_partner_are_wrong_usage(shl, wrong):
    assert shl(*wrong)[0] == 2


def test_flags_reach_the_records(shl):
    flags = ["--schedule", "exp", "--horizon", 4, "--final", 0.5, "--backtrack", "--max-surprise", 9]
    code, rows, err = shl("--vec", "v.safetensors", "--coeff", "0,1", *flags)
    assert code == 0, err
    assert {(row["trajectory"]["horizon"], row["trajectory"]["final"]) for row in rows} == {(4, 0.5)}
    assert all(row["trajectory"]["rewinds"] == [] for row in rows)


def test_auto_generates_at_the_dose_that_is_found(shl, vector, loaded, monkeypatch):
    from shl.core.defaults import DoseConfig
    from shl.core.records import read_prompts
    from shl.dose import by_kl

    wanted = by_kl(loaded, vector, read_prompts("p.txt"), 0.5, DoseConfig(seed=3)).coeff
    auto = ["--vec", "v.safetensors", "--coeff", "auto", "--target-kl", 0.5, "--seed", 3]
    code, rows, err = shl(*auto)
    assert code == 0, err
    assert [row["coeff"] for row in rows] == [0.0, float(f"{wanted:.4g}")] * 2
    assert f"coefficient {wanted:.4g}, at which KL" in err
    assert shl(*auto, "-o", "whole.jsonl")[0] == 0

    # an unfinished file keeps its coefficient: the search is not run again
    def stopped(*args, **kwargs):
        yield from islice(generate(*args, **kwargs), 2)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shl.gen.generate", stopped)
        assert shl(*auto, "-o", "c.jsonl")[0] == 130
    monkeypatch.setattr("shl.dose.by_kl", lambda *a, **k: pytest.fail("searched again"))
    assert "another coeffs" in shl(*auto[:5], 0.6, *auto[6:], "-o", "c.jsonl", "--resume")[2]
    code, _, err = shl(*auto, "-o", "c.jsonl", "--resume")
    assert code == 0, err
    assert Path("c.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()


def test_a_dose_that_is_not_found_says_how_to_go_on(shl):
    code, _, err = shl("--vec", "v.safetensors", "--coeff", "auto", "--target-kl", 1e6)
    assert code == 1 and "hint: search it with shl dose" in err and "--to-ceiling" not in err


def test_a_dose_at_the_ceiling_is_taken_when_that_is_asked_for(shl, vector):
    from shl.core.defaults import DoseConfig
    from shl.dose import ceiling

    auto = ["--vec", "v.safetensors", "--coeff", "auto", "--survival", 0]
    code, _, err = shl(*auto)
    assert code == 1 and "or take the highest with --to-ceiling" in err
    code, rows, err = shl(*auto, "--to-ceiling")
    assert code == 0, err
    assert {row["coeff"] for row in rows} == {0.0, float(f"{ceiling(vector, DoseConfig()):.4g}")}
