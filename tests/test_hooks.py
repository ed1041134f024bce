"""The hooks: what is added is c times v, nothing more, and what is read is what the block gave."""

import pytest
import torch
from torch import nn

from shl.core.batches import left_pad, positions_of
from shl.core.errors import ShlError
from shl.core.hooks import Capture, Steering

PROMPTS = [[1, 40, 41, 42], [1, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63, 64], [1, 70, 71]]


def inputs(loaded, prompts=PROMPTS):
    ids, mask = left_pad(prompts, loaded.device)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions_of(mask)}


def logits(loaded, prompts=PROMPTS):
    with torch.inference_mode():
        return loaded.model(**inputs(loaded, prompts), use_cache=False).logits[:, -1]


def direction(loaded, seed=0):
    return torch.randn(loaded.hidden, generator=torch.Generator().manual_seed(seed))


def test_what_is_added_is_the_coefficient_times_the_vector(each):
    v, layer = direction(each), each.n_blocks // 2
    with torch.inference_mode(), Capture(each, [layer], "all") as plain:
        before = plain.run(**inputs(each))[layer]
    with torch.inference_mode(), Steering(each, {layer: v}) as steering, Capture(each, [layer], "all") as read:
        steering.set([0.0, 0.5, -2.0])
        after = read.run(**inputs(each))[layer]
    expected = before + torch.tensor([0.0, 0.5, -2.0])[:, None, None] * v
    assert torch.equal(after, expected)


def test_coefficient_zero_changes_no_bit(each):
    plain = logits(each)
    with Steering(each, {1: direction(each)}) as steering:
        steering.set([0.0, 1.0, 0.0])
        steered = logits(each)
    assert torch.equal(plain[[0, 2]], steered[[0, 2]])
    assert not torch.allclose(plain[1], steered[1])


def test_one_coefficient_serves_every_row(tiny):
    loaded = tiny()
    with Steering(loaded, {1: direction(loaded)}) as steering:
        steering.set([0.5])
        one = logits(loaded)
        steering.set([0.5, 0.5, 0.5])
        assert torch.equal(one, logits(loaded))


def test_keep_drops_the_coefficients_of_rows_that_left(tiny):
    loaded = tiny()
    with Steering(loaded, {1: direction(loaded), 2: direction(loaded, 1)}) as steering:
        steering.set([0.0, 1.0, 2.0])
        whole = logits(loaded, [PROMPTS[0]] * 3)
        steering.keep(torch.tensor([0, 2]))
        assert torch.equal(logits(loaded, [PROMPTS[0]] * 2), whole[[0, 2]])


def test_hooks_leave_nothing_behind_even_after_an_error(tiny):
    loaded = tiny()
    plain, before = logits(loaded), [len(block._forward_hooks) for block in loaded.blocks]
    with pytest.raises(ZeroDivisionError), Steering(loaded, {0: direction(loaded)}):
        _ = 1 / 0
    assert torch.equal(plain, logits(loaded))
    assert [len(block._forward_hooks) for block in loaded.blocks] == before


def test_a_hook_that_never_fires_is_an_error(tiny):
    loaded = tiny()
    with pytest.raises(ShlError, match="never fired"), Steering(loaded, {0: direction(loaded)}):
        pass


def test_misfits_are_errors(tiny):
    loaded = tiny()
    with pytest.raises(ShlError, match="wide"):
        Steering(loaded, {0: torch.zeros(3)})
    with pytest.raises(ShlError, match="no such blocks"):
        Steering(loaded, {99: direction(loaded)})
    with pytest.raises(ShlError, match="no blocks"):
        Steering(loaded, {})
    with (
        pytest.raises(ShlError, match="2 coefficients for a batch of 3"),
        Steering(loaded, {0: direction(loaded)}) as s,
    ):
        s.set([1.0, 1.0])
        logits(loaded)


class TupleBlock(nn.Module):
    """A block of the older kind, which returns a tuple."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return (self.inner(*args, **kwargs), "cache")


def test_blocks_that_return_tuples_are_steered_in_every_row(tiny):
    loaded = tiny()
    block = TupleBlock(loaded.blocks[1])
    old, loaded.blocks[1] = loaded.blocks[1], block
    try:
        hidden = torch.randn(3, 4, loaded.hidden)
        rotary = loaded.model.model.rotary_emb(hidden, torch.arange(4)[None])
        plain = block(hidden, position_embeddings=rotary)[0]
        with Steering(loaded, {1: direction(loaded)}) as steering, Capture(loaded, [1], "all") as read:
            steering.set([1.0, 2.0, 3.0])
            out = block(hidden, position_embeddings=rotary)
        shift = torch.tensor([1.0, 2.0, 3.0])[:, None, None] * direction(loaded)
        assert out[1] == "cache" and torch.equal(out[0], plain + shift)
        assert torch.equal(read.outputs[1], out[0])
    finally:
        loaded.blocks[1] = old


def test_capture_reads_what_the_library_calls_hidden_states(each):
    layers = [0, each.n_blocks - 2]
    with torch.inference_mode(), Capture(each, layers, "all") as read:
        mine = read.run(**inputs(each))
        theirs = each.model(**inputs(each), output_hidden_states=True, use_cache=False).hidden_states
    for layer in layers:
        assert torch.equal(mine[layer], theirs[layer + 1])


def test_early_exit_reads_the_same_and_runs_no_later_block(each):
    late, ran = each.blocks[-1], []
    handle = late.register_forward_hook(lambda *args: ran.append(1))
    try:
        with torch.inference_mode(), Capture(each, [0, 1], "last", early_exit=True) as read:
            early = read.run(**inputs(each))
        assert not ran
        with torch.inference_mode(), Capture(each, [0, 1], "all") as read:
            full = read.run(**inputs(each))
        assert ran
    finally:
        handle.remove()
    for layer in (0, 1):
        assert torch.equal(early[layer], full[layer][:, -1])
