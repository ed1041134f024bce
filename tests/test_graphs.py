"""Decoding over slots gives the tokens of decoding in batches; on CUDA the same step runs as a graph."""

from collections import deque
from contextlib import nullcontext

import pytest
import torch

from shl.core.decode import Sampling, _batch, decode
from shl.core.graphs import decode_slots, possible
from shl.core.hooks import Steering
from shl.core.trajectory import Backtrack, Course, Track

PROMPTS = [[1, *range(40, 40 + n)] for n in (3, 30, 7, 15, 0, 9, 22, 4, 1)]
SEEDS = list(range(11, 20))
COEFFS = [0.0, 0.5, 1.0, -1.0, 0.0, 2.0, 0.5, 0.0, 1.0]
SAMPLED = Sampling(max_new_tokens=24)


def tracks(course=None, starts=None):
    starts = starts or [[]] * len(PROMPTS)
    return [Track(p, s, c, course or Course()) for p, s, c in zip(PROMPTS, starts, COEFFS, strict=True)]


def alone(loaded, sampling, vector=None, course=None):
    """Each row for itself, in batches that pad and drop."""
    rows = tracks(course)
    for row in zip(rows, SEEDS, strict=True):
        with nullcontext() if vector is None else Steering(loaded, vector) as steering:
            list(_batch(loaded, deque([row]), 1, sampling, steering))
    return rows


def slotted(loaded, sampling, size, vector=None, course=None, rows=None):
    """The same rows, in slots that they take in turn."""
    rows = rows or tracks(course)
    waiting = deque(zip(rows, SEEDS, strict=True))
    with nullcontext() if vector is None else Steering(loaded, vector) as steering:
        ended = list(decode_slots(loaded, waiting, size, sampling, steering))
    assert sorted(map(id, ended)) == sorted(map(id, rows)) and not waiting
    return rows


def told(rows):
    return [(track.ids, track.finish, track.steps) for track in rows]


@pytest.fixture(params=["llama", "mistral", "qwen3", "gemma3", "toy"])
def loaded(request, tiny):
    from shl.core.models import load

    # by itself toy is bfloat16 on a GPU, where rows alone and rows in slots round differently
    found = load("toy", dtype="float32") if request.param == "toy" else tiny(request.param)
    assert possible(found, Course())
    return found


@torch.inference_mode()
@pytest.mark.parametrize("size", [1, 4, 64])
def test_rows_that_take_turns_equal_rows_alone(loaded, size):
    for sampling in (SAMPLED, Sampling(max_new_tokens=24, greedy=True, banned=frozenset({7, 50}))):
        assert told(slotted(loaded, sampling, size)) == told(alone(loaded, sampling))


@torch.inference_mode()
def test_doses_mix_and_fall_as_in_batches(loaded):
    vector = {1: torch.randn(loaded.hidden, generator=torch.Generator().manual_seed(1))}
    for course in (Course(), Course(scope="gen", schedule="linear", horizon=8, final=0.2), Course(scope="prompt")):
        mine, theirs = (
            told(f) for f in (slotted(loaded, SAMPLED, 4, vector, course), alone(loaded, SAMPLED, vector, course))
        )
        assert [row[:2] for row in mine] == [row[:2] for row in theirs]
        for (*_, steps), (*_, others) in zip(mine, theirs, strict=True):
            for mine_, theirs_ in zip(steps, others, strict=True):
                assert mine_ == theirs_ or tuple(mine_) == pytest.approx(theirs_)


@torch.inference_mode()
def test_forced_beginnings_and_stops(tiny):
    loaded = tiny()
    starts = [[50, 51] if k % 2 else [] for k in range(len(PROMPTS))]
    free = tracks(starts=starts)
    slotted(loaded, Sampling(max_new_tokens=24, endless=True), 4, rows=free)
    for track, start in zip(free, starts, strict=True):
        assert track.ids[: len(start)] == start and track.sampled == 24
    stop = loaded.stop_ids | {track.ids[9] for track in free}
    until = Sampling(max_new_tokens=24, until=stop)
    ended = tracks(starts=starts)
    slotted(loaded, until, 4, rows=ended)
    for before, after in zip(free, ended, strict=True):
        new = before.ids[len(before.ids) - 24 :]
        cut = next(i for i, token in enumerate(new) if token in stop)
        assert (after.finish, after.sampled) == ("stop", cut)


def test_what_changes_a_model_is_put_back(tiny):
    loaded = tiny()
    before = loaded.model.config._attn_implementation
    with torch.inference_mode():
        slotted(loaded, SAMPLED, 4)
    assert loaded.model.config._attn_implementation == before


REWINDING = [
    Course(backtrack=Backtrack(max_surprise=1e-4, rewind=5, shrink=0.7, max_rewinds=3)),
    Course("all", "linear", 8, 0.2, None, Backtrack(max_surprise=1e-4, rewind=3, shrink=0.5, max_rewinds=2)),
    Course("gen", backtrack=Backtrack(max_surprise=1e-3, rewind=40, shrink=0.5, max_rewinds=2)),
]


@torch.inference_mode()
@pytest.mark.parametrize("size", [1, 4, 64])
@pytest.mark.parametrize("course", REWINDING)
def test_rows_are_rewound_as_in_batches(loaded, size, course, monkeypatch):
    read, seen = Track.trouble, []

    def often(self, say):  # what is read is compared too, and the limit is met at moments that no rounding moves
        seen.append(read(self, say))
        return ("surprise", 1.0) if self.drawn % 9 == 4 + self.asked % 4 else None

    monkeypatch.setattr(Track, "trouble", often)
    vector = {1: torch.randn(loaded.hidden, generator=torch.Generator().manual_seed(1))}
    mine, theirs = slotted(loaded, SAMPLED, size, vector, course), alone(loaded, SAMPLED, vector, course)
    assert seen and sum(len(track.rewinds) for track in mine) > 3
    for one, other in zip(mine, theirs, strict=True):
        assert (one.ids, one.finish, one.rewinds) == (other.ids, other.finish, other.rewinds)
        assert one.spans() == other.spans()
        if one.watched:
            assert [step[2:] for step in one.steps] == [pytest.approx(step[2:], abs=1e-3) for step in other.steps]


@torch.inference_mode()
def test_what_a_rewind_is_decided_on_is_the_unsteered_reading(loaded):
    course = Course(backtrack=Backtrack(max_surprise=0.02, rewind=5, shrink=0.7, max_rewinds=3))
    vector = {1: 8 * torch.randn(loaded.hidden, generator=torch.Generator().manual_seed(1))}
    mine, theirs = slotted(loaded, SAMPLED, 4, vector, course), alone(loaded, SAMPLED, vector, course)
    assert sum(len(track.rewinds) for track in mine) > 3
    for one, other in zip(mine, theirs, strict=True):
        assert one.ids == other.ids
        assert [r[:4] for r in one.rewinds] == [r[:4] for r in other.rewinds]
        assert [r.value for r in one.rewinds] == pytest.approx([r.value for r in other.rewinds], abs=1e-3)


@torch.inference_mode()
def test_a_limit_that_nothing_reaches_changes_no_token(loaded):
    vector = {1: torch.randn(loaded.hidden, generator=torch.Generator().manual_seed(1))}
    calm = Course(backtrack=Backtrack(max_surprise=1e6, max_rep=2.0))
    watched, free = (slotted(loaded, SAMPLED, 4, vector, course) for course in (calm, Course()))
    assert [track.ids for track in watched] == [track.ids for track in free]


@pytest.mark.parametrize("course", [Course(gate="cosine")])
def test_a_dose_that_is_not_known_ahead_keeps_to_batches(tiny, course):
    assert not possible(tiny(), course) and possible(tiny(), REWINDING[1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs need CUDA")
@pytest.mark.parametrize("course", [Course(), REWINDING[0]])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma3"])
def test_a_graph_on_cuda_gives_the_tokens_of_the_cpu(tiny_model, family, course):
    from shl.core.models import load

    found = []
    for device in ("cpu", "cuda"):
        loaded = load(str(tiny_model(family)), device=device, dtype="float32")
        vector = {1: torch.randn(loaded.hidden, generator=torch.Generator().manual_seed(1))}
        for _ in range(2):
            with Steering(loaded, vector) as steering:
                said = decode(
                    loaded, PROMPTS, seeds=SEEDS, sampling=SAMPLED, steering=steering, coeffs=COEFFS, batch_size=4,
                    course=course,
                )  # fmt: skip
            found.append([one.ids for one in said])
    assert all(ids == found[0] for ids in found)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs need CUDA")
def test_memory_of_the_gpu_that_runs_out_halves_the_rows(tiny_model, capsys):
    from shl.core.models import load

    loaded = load(str(tiny_model("llama")), device="cuda", dtype="float32")
    many = {"prompts": PROMPTS * 100, "seeds": range(900), "sampling": Sampling(max_new_tokens=200)}
    free = decode(loaded, **many, batch_size=16)
    torch.cuda.empty_cache()
    config = loaded.text_config
    row = 8 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 240
    allowed = torch.cuda.memory_reserved() + 400 * row
    torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.get_device_properties(0).total_memory)
    try:
        tight = decode(loaded, **many, batch_size=900)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "out of memory while decoding 900 rows at once: going on with 450" in capsys.readouterr().err
    same = sum(a.ids == b.ids for a, b in zip(tight, free, strict=True))
    assert same >= 890  # rounding differs with the number of rows, and in 180,000 draws one may be that close


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs need CUDA")
def test_a_model_that_waits_for_the_device_decodes_without_graphs(tiny_model, capsys):
    from shl.core.models import load

    loaded = load(str(tiny_model("llama")), device="cuda", dtype="float32")
    wanted = [one.ids for one in decode(loaded, PROMPTS, seeds=SEEDS, sampling=SAMPLED, batch_size=4)]
    waits = []
    hook = loaded.blocks[0].register_forward_hook(lambda module, args, out: waits.append(out.sum().item()))
    try:
        found = [one.ids for one in decode(loaded, PROMPTS, seeds=SEEDS, sampling=SAMPLED, batch_size=4)]
    finally:
        hook.remove()
    assert found == wanted and "without CUDA graphs" in capsys.readouterr().err
