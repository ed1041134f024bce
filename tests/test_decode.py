"""Decoding: a row's text depends on its prompt, its seed and its coefficient, and on nothing else."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.masking_utils import create_masks_for_generate

from shl.core import cache as cache_module
from shl.core import running
from shl.core.batches import left_pad, positions_of
from shl.core.cache import DecodeMasks, GrowingLayer, new_cache
from shl.core.decode import Sampling, decode, draw
from shl.core.errors import ShlError
from shl.core.hooks import Steering
from shl.core.models import load
from shl.core.running import Running
from shl.core.trajectory import Backtrack, Course

PROMPTS = [[1, *range(40, 40 + n)] for n in (3, 30, 7, 15, 1)]
SEEDS = [11, 12, 13, 14, 15]
SHORT = Sampling(max_new_tokens=24)


def ids(completions):
    return [c.ids for c in completions]


def alone(loaded, sampling=SHORT, **kwargs):
    return [decode(loaded, [p], seeds=[s], sampling=sampling, **kwargs)[0] for p, s in zip(PROMPTS, SEEDS, strict=True)]


def test_a_row_in_a_batch_equals_the_row_alone(each):
    together = decode(each, PROMPTS, seeds=SEEDS, sampling=SHORT)
    assert ids(together) == ids(alone(each))
    assert ids(together) == ids(decode(each, PROMPTS, seeds=SEEDS, sampling=SHORT, batch_size=2))
    swapped = decode(each, PROMPTS[::-1], seeds=SEEDS[::-1], sampling=SHORT)
    assert ids(swapped) == ids(together)[::-1]


def test_greedy_decoding_is_the_librarys(each):
    mine = decode(each, PROMPTS, seeds=SEEDS, sampling=Sampling(max_new_tokens=16, greedy=True))
    for prompt, completion in zip(PROMPTS, mine, strict=True):
        theirs = each.model.generate(
            torch.tensor([prompt]), max_new_tokens=16, do_sample=False, eos_token_id=sorted(each.stop_ids)
        )[0, len(prompt) :].tolist()
        assert completion.ids == [token for token in theirs if token not in each.stop_ids]


def test_a_longer_limit_only_continues(tiny):
    short = decode(tiny(), PROMPTS, seeds=SEEDS, sampling=Sampling(max_new_tokens=5))
    long = decode(tiny(), PROMPTS, seeds=SEEDS, sampling=Sampling(max_new_tokens=50))
    assert [c.ids[:5] for c in long] == ids(short)


def test_stop_tokens_end_a_row_and_are_left_out(tiny):
    loaded = tiny()
    free = decode(loaded, PROMPTS * 8, seeds=range(40), sampling=SHORT)
    stop = frozenset(token for c in free for token in c.ids[3:6])  # tokens that do come up
    kept, loaded.__dict__["stop_ids"] = loaded.stop_ids, stop
    try:
        stopped = decode(loaded, PROMPTS * 8, seeds=range(40), sampling=SHORT)
    finally:
        loaded.__dict__["stop_ids"] = kept
    for before, after in zip(free, stopped, strict=True):
        cut = next((i for i, token in enumerate(before.ids) if token in stop), None)
        assert after.ids == before.ids[:cut] and after.n_tokens == len(after.ids)
        assert after.finish == ("length" if cut is None else "stop")
    assert any(c.finish == "stop" for c in stopped)


def test_coefficients_mix_in_one_batch(each):
    v = {1: torch.randn(each.hidden, generator=torch.Generator().manual_seed(1))}
    coeffs = [0.0, 0.5, 1.0, -1.0, 0.0]
    with Steering(each, v) as steering:
        mixed = decode(each, PROMPTS, seeds=SEEDS, sampling=SHORT, steering=steering, coeffs=coeffs)
        single = [
            decode(each, [p], seeds=[s], sampling=SHORT, steering=steering, coeffs=[c])[0]
            for p, s, c in zip(PROMPTS, SEEDS, coeffs, strict=True)
        ]
    assert ids(mixed) == ids(single)
    plain = decode(each, PROMPTS, seeds=SEEDS, sampling=SHORT)
    assert [mixed[i].ids == plain[i].ids for i in range(5)] == [True, False, False, False, True]


def test_coefficients_need_a_vector(tiny):
    with pytest.raises(ShlError, match="without a steering vector"):
        decode(tiny(), PROMPTS, seeds=SEEDS, sampling=SHORT, coeffs=[1.0] * 5)


def test_forced_tokens_begin_the_answer(tiny):
    loaded, start = tiny(), [90, 91, 92]
    greedy = Sampling(max_new_tokens=6, greedy=True)
    forced = decode(loaded, PROMPTS, seeds=SEEDS, sampling=greedy, forced=[start] * 5)
    plain = decode(loaded, [p + start for p in PROMPTS], seeds=SEEDS, sampling=greedy)
    assert ids(forced) == [start + c.ids for c in plain]
    assert all(c.text == loaded.chat.decode(c.ids) and c.n_tokens == len(c.ids) for c in forced)


# --- rows that enter a running batch ---

MIXED = [[1, *range(40, 40 + n)] for n in (3, 30, 7, 15, 1, 22, 9, 2, 18, 12, 5, 26)]
DOSES = [0.0, 0.5, 1.0, -1.0] * 3


@pytest.fixture(params=["llama", "gemma3", "toy"])
def model(request, tiny):
    return load("toy", device="cpu", dtype="float32") if request.param == "toy" else tiny(request.param)


@pytest.fixture
def entered(monkeypatch):
    """As on a device where it pays. For each time that rows entered: how many, and the columns that no row needs."""
    monkeypatch.setattr(running, "entering_pays", lambda device: True)
    seen, enter = [], Running.enter

    def spy(self, places, tracks, seeds):
        enter(self, places, tracks, seeds)
        longest = max(len(track.input) for track in self.alive if track.finish is None)
        seen.append((len(tracks), self.masks.seen - longest))
        assert {layer.get_seq_length() for layer in self.cache.layers} == {self.masks.seen}

    monkeypatch.setattr(Running, "enter", spy)
    return seen


def mixed(loaded, sampling, course=None, doses=DOSES, rows=range(12), **kwargs):
    v = {loaded.n_blocks // 2: torch.randn(loaded.hidden, generator=torch.Generator().manual_seed(1))}
    with Steering(loaded, v, course.gate if course else None) as steering:
        return decode(
            loaded, [MIXED[i] for i in rows], seeds=list(rows), sampling=sampling, steering=steering,
            coeffs=[doses[i] for i in rows], course=course, **kwargs,
        )  # fmt: skip


def often(loaded, share=12):
    """Tokens that end a row at any time."""
    return frozenset(range(0, loaded.text_config.vocab_size, share))


@pytest.mark.parametrize("greedy", [False, True], ids=["sampled", "greedy"])
def test_a_row_that_enters_equals_the_row_alone(model, entered, greedy):
    """Whoever else is in the batch, and whenever it enters; past the sliding window and before it."""
    sampling = Sampling(max_new_tokens=40, greedy=greedy, until=often(model))
    one_by_one = [mixed(model, sampling, rows=[i])[0] for i in range(12)]
    assert len({one.n_tokens for one in one_by_one}) > (2 if greedy else 5) and not entered
    for size, most in ((2, 10), (4, 8), (64, 0)):
        entered.clear()
        assert mixed(model, sampling, batch_size=size) == one_by_one
        assert (0 if greedy else 1) <= sum(n for n, _ in entered) <= most or (size == 64 and not entered)
        assert all(idle == 0 for _, idle in entered)


@pytest.mark.parametrize(
    "course",
    [Course("gen", "linear", horizon=9), Course("prompt"), Course(gate="cosine")],
    ids=["gen", "prompt", "gate"],
)
def test_rows_that_enter_tell_their_own_doses(tiny, entered, course):
    loaded = tiny("gemma3")
    sampling = Sampling(max_new_tokens=40, until=often(loaded))
    together = mixed(loaded, sampling, course, batch_size=3)
    alone = [mixed(loaded, sampling, course, rows=[i])[0] for i in range(12)]
    assert together == alone and sum(n for n, _ in entered) > 3
    for mine, theirs in zip(together, alone, strict=True):
        mine, theirs = ([step.dose for step in one.track.steps] for one in (mine, theirs))
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-5)


def test_nobody_enters_where_rows_cannot_be_replaced_or_are_rewound(tiny, entered):
    loaded = tiny("qwen3_next")  # with running states
    sampling = Sampling(max_new_tokens=12, until=often(loaded))
    assert mixed(loaded, sampling, batch_size=3) == [mixed(loaded, sampling, rows=[i])[0] for i in range(12)]
    mixed(tiny(), sampling, Course(backtrack=Backtrack()), batch_size=3)
    assert not entered


def test_every_finish_is_told_once(tiny):
    told = {}
    done = decode(tiny(), PROMPTS, seeds=SEEDS, sampling=SHORT, batch_size=2, on_finish=told.__setitem__)
    assert [told[i] for i in range(5)] == done


def same_mask(mine, theirs):
    """None stands for a mask that lets everything through."""
    if mine is None or theirs is None:
        return all(mask is None or bool(mask.all()) for mask in (mine, theirs))
    return torch.equal(mine.expand_as(theirs), theirs)


def test_masks_are_the_librarys(each):
    tokens, mask = left_pad(PROMPTS, each.device)
    masks, cache = DecodeMasks(each, mask, 40), new_cache(each)
    assert masks.plan is not None
    with torch.inference_mode():
        each.model(input_ids=tokens, attention_mask=mask, position_ids=positions_of(mask), past_key_values=cache)
        for step in range(1, 30):
            mine = masks.step()
            padding = torch.cat([mask, mask.new_ones(len(mask), step)], 1)
            theirs = create_masks_for_generate(each.text_config, torch.zeros(len(mask), 1, each.hidden), padding, cache)
            pairs = [(mine[k], theirs[k]) for k in theirs] if isinstance(theirs, dict) else [(mine, theirs)]
            assert all(same_mask(a, b) for a, b in pairs)
            each.model(
                input_ids=tokens[:, :1],
                attention_mask=mine,
                past_key_values=cache,
                position_ids=padding.sum(1)[:, None],
            )


def test_unknown_model_types_get_the_librarys_masks(tiny, monkeypatch):
    loaded = tiny("qwen2")
    known = decode(loaded, PROMPTS, seeds=SEEDS, sampling=SHORT)
    monkeypatch.setattr(cache_module, "_SLICED", frozenset())
    assert decode(loaded, PROMPTS, seeds=SEEDS, sampling=SHORT) == known


def test_rows_leave_the_cache_of_every_kind_of_layer(each):
    """Continuing two of five rows gives what they give alone, past the sliding window and before it."""
    for fed in (2, 30):
        full, part = new_cache(each), DynamicCache(config=each.model.config)
        prompts = [list(range(40 + k, 40 + k + fed)) for k in range(5)]
        keep = torch.tensor([1, 4])
        with torch.inference_mode():
            each.model(input_ids=torch.tensor(prompts), past_key_values=full, use_cache=True)
            full.batch_select_indices(keep)
            each.model(input_ids=torch.tensor(prompts)[keep], past_key_values=part, use_cache=True)
            for token in ([[60], [61]], [[62], [63]]):
                mine = each.model(input_ids=torch.tensor(token), past_key_values=full, use_cache=True).logits
                theirs = each.model(input_ids=torch.tensor(token), past_key_values=part, use_cache=True).logits
                torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_a_growing_layer_holds_what_a_plain_one_holds():
    from transformers.cache_utils import DynamicLayer

    mine, theirs = GrowingLayer(), DynamicLayer()
    for n in (5, 1, 1, 100, 1):
        keys, values = torch.randn(4, 2, n, 3), torch.randn(4, 2, n, 3)
        for a, b in zip(mine.update(keys, values), theirs.update(keys, values), strict=True):
            assert torch.equal(a, b)
        rows = torch.tensor([3, 0, 1, 2])
        mine.batch_select_indices(rows), theirs.batch_select_indices(rows)
        assert torch.equal(mine.keys, theirs.keys) and mine.get_seq_length() == theirs.get_seq_length()


SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 3, 10, 99]),
    top_p=st.sampled_from([0.1, 0.5, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.2]),
)


def filtered(logits, sampling):
    """The distribution that the library's own filters leave, for reference."""
    steps = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        steps.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(TopPLogitsWarper(sampling.top_p))
    return torch.softmax(steps(None, logits), -1), steps


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), sampling=SAMPLINGS)
def test_draw_follows_the_filtered_distribution(seed, sampling):
    """Laid out over an even grid of uniforms, tokens come up in proportion to their probability."""
    logits = 2 * torch.randn(1, 12, generator=torch.Generator().manual_seed(seed))
    expected, _ = filtered(logits, sampling)
    if sampling.min_p:  # relative to the likeliest token that is left
        expected = torch.where(expected >= sampling.min_p * expected.max() * (1 - 1e-6), expected, 0.0)
        expected = expected / expected.sum()
    grid = (torch.arange(4000) + 0.5)[:, None] / 4000
    tokens = draw(logits.expand(4000, -1), grid, sampling)
    share = torch.bincount(tokens, minlength=12) / 4000
    assert (share - expected[0]).abs().max() < 1e-3


def test_the_largest_uniform_still_draws_a_kept_token():
    logits = torch.tensor([[5.0, 4.0, 3.0, -50.0]])
    nearly_one = torch.tensor([[1.0 - 2**-24]])
    for sampling in (Sampling(top_k=3), Sampling(top_p=0.5), Sampling(top_k=0, top_p=1.0)):
        assert draw(logits, nearly_one, sampling).item() in (0, 1, 2)
    assert draw(logits, nearly_one, Sampling(temperature=0)).item() == 0


def test_min_p_is_the_librarys_when_it_stands_alone():
    logits = torch.randn(1, 30, generator=torch.Generator().manual_seed(3))
    theirs = torch.softmax(MinPLogitsWarper(0.1)(None, logits), -1)
    grid = (torch.arange(2000) + 0.5)[:, None] / 2000
    tokens = draw(logits.expand(2000, -1), grid, Sampling(top_k=0, top_p=1.0, min_p=0.1))
    assert (torch.bincount(tokens, minlength=30) / 2000 - theirs[0]).abs().max() < 2e-3
