"""Directions and the states that they are made of: laws of each method, and one pass equal to many."""

import pytest
import torch

from shl.core.defaults import METHODS, VectorConfig
from shl.core.directions import mean_difference, method, principal, probe
from shl.core.errors import ShlError
from shl.core.hooks import Capture
from shl.core.records import Prompt
from shl.core.states import Span, read_states
from shl.vector import extract

PERSONA = "You are a person who cares about others more than about rules, and you say so. "
TEXTS = ["Who said so?", "She thanked him twice, and then once more.", "Why?", "The guard said that the order came."]
CONTEXTS = [Prompt(f"c{i}", [{"role": "user", "content": text}]) for i, text in enumerate(TEXTS)]


def sides(shift=2.0, n=64, width=12, noise=0.5):
    """States that differ by `shift` along the first axis, with noise along all and much more along the second."""
    make = torch.Generator().manual_seed(0)
    common = torch.randn(n, width, generator=make, dtype=torch.float64)
    common[:, 1] *= 20
    other = torch.randn(n, width, generator=make, dtype=torch.float64) * noise
    below = common
    above = common + other
    above[:, 0] += shift
    return above, below


@pytest.mark.parametrize("name", METHODS)
def test_every_method_finds_a_planted_shift_with_its_sign_and_length(name):
    above, below = sides()
    found = method(name)(above, below)
    assert torch.cosine_similarity(found, torch.eye(12, dtype=torch.float64)[0], dim=0) > 0.8
    assert found.norm().item() == pytest.approx(2.0, rel=0.25)
    torch.testing.assert_close(method(name)(below, above), -found)


def test_pca_is_the_leading_eigenvector_of_the_second_moment():
    above, below = sides(shift=0.5)
    shift = above - below
    leading = torch.linalg.eigh(shift.T @ shift).eigenvectors[:, -1]
    found = principal(above, below)
    assert abs(float(torch.dot(found, leading))) == pytest.approx(float(found.norm()))
    assert torch.dot(found, mean_difference(above, below)) > 0


def test_the_probe_sits_where_the_gradient_of_its_loss_is_zero():
    above, below = sides(noise=2.0)
    states = torch.cat([above, below])
    spread = states.std(0)
    scaled = (states - states.mean(0)) / spread
    unit = probe(above, below)
    # of all multiples of the found direction, in standardised coordinates, one makes the penalised loss stationary
    direction = (unit / unit.norm()) * spread
    free = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    y = torch.cat([torch.ones(len(above)), torch.zeros(len(below))]).double()

    def loss(weight, bias):
        wrong = torch.nn.functional.binary_cross_entropy_with_logits(scaled @ weight + bias, y, reduction="sum")
        return wrong + weight.square().sum() / 2

    fit = torch.optim.LBFGS([free], max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def step():
        fit.zero_grad()
        total = loss(direction * free[0], free[1])
        total.backward()
        return total

    fit.step(step)
    weight = (direction * free[0]).detach().requires_grad_()
    loss(weight, free[1].detach()).backward()
    assert weight.grad.abs().max() < 1e-3


def test_an_unknown_method_is_named():
    with pytest.raises(ShlError, match="no method 'mean'"):
        method("mean")


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_states_of_rows_with_a_common_beginning_are_those_of_each_row_alone(each, batch_size):
    start = each.encode_prompt([{"role": "system", "content": PERSONA * 3}, {"role": "user", "content": "x"}])[:40]
    rows = [start + each.encode_completion(text, end=False) for text in TEXTS]
    spans = [Span(ids, read) for ids, read in zip(rows, (1, 3, 1, 2), strict=True)]
    blocks = list(range(each.n_blocks))
    found = read_states(each, spans, blocks, batch_size)
    for i, span in enumerate(spans):
        with torch.inference_mode():
            hidden = each.model(torch.tensor([span.ids]), output_hidden_states=True).hidden_states
        for layer in blocks[:-1]:  # the library puts the last norm into the last of its own
            alone = hidden[layer + 1][0, -span.read :].float().mean(0)
            torch.testing.assert_close(found[layer][i], alone, rtol=2e-4, atol=2e-4)


def test_a_common_beginning_is_read_once(tiny):
    loaded = tiny()
    start = loaded.encode_completion(PERSONA, end=False)
    rows = [Span(start + loaded.encode_completion(text, end=False)) for text in TEXTS]
    seen = []
    handle = loaded.blocks[0].register_forward_hook(lambda module, args, output: seen.append(args[0].shape[:2]))
    read_states(loaded, rows, [1], 8)
    handle.remove()
    shared = min(len(start), min(len(row.ids) for row in rows) - 1)
    assert seen[0] == (1, shared) and len(seen) == 2
    assert seen[1] == (4, max(len(row.ids) for row in rows) - shared)


def test_no_block_above_the_last_one_runs(tiny):
    loaded, ran = tiny(), []
    handles = [
        block.register_forward_hook(lambda module, args, output, i=i: ran.append(i))
        for i, block in enumerate(loaded.blocks)
    ]
    head = loaded.model.get_output_embeddings().register_forward_hook(lambda *_: ran.append("head"))
    extract(loaded, PERSONA, None, CONTEXTS, VectorConfig(layers="1"))
    for handle in [*handles, head]:
        handle.remove()
    assert set(ran) == {0, 1}


def test_response_is_the_mean_over_answers_given_under_each_persona(tiny):
    loaded = tiny()
    cfg = VectorConfig(layers="1", method="response", answer_tokens=6, batch_size=2)
    made = extract(loaded, PERSONA, None, CONTEXTS, cfg)
    assert (made.meta["method"], made.meta["position"], made.meta["answer_tokens"]) == ("response", "answer", 6)
    same = extract(loaded, PERSONA, None, CONTEXTS, VectorConfig(layers="1", position="answer", answer_tokens=6))
    torch.testing.assert_close(made.layers[1], same.layers[1], rtol=1e-4, atol=1e-4)
    last = extract(loaded, PERSONA, None, CONTEXTS, VectorConfig(layers="1")).layers[1]
    assert torch.cosine_similarity(made.layers[1], last, dim=0) < 0.999
    assert "answer_tokens" not in extract(loaded, PERSONA, None, CONTEXTS, VectorConfig(layers="1")).meta


def test_a_reading_without_a_cache_sees_nothing_of_an_earlier_one(tiny):
    loaded = tiny()
    ids = torch.tensor([loaded.encode_prompt(CONTEXTS[1].messages)])
    with torch.inference_mode(), Capture(loaded, [1], early_exit=True) as capture:
        first = capture.run(input_ids=ids)[1]
        assert torch.equal(first, capture.run(input_ids=ids)[1])


def test_auto_steers_the_block_whose_answers_speak_most_for_the_persona(tiny):
    from shl.bands import candidates, measure_blocks
    from shl.core.defaults import DoseConfig

    loaded = tiny("gemma3")
    prompts = [Prompt(f"p{i}", prompt.messages) for i, prompt in enumerate(CONTEXTS)]
    probe = DoseConfig(prompts=4, max_new_tokens=12, grid=3, refine=1, ceiling=4.0)
    found = measure_blocks(loaded, PERSONA, None, prompts, CONTEXTS, probe=probe, survival=0.25)
    assert {one.layer for one in found} <= set(candidates(6)) == {2, 3, 4}
    assert [one.effect for one in found] == sorted((one.effect for one in found), reverse=True)
    assert all(one.coeff > 0 and one.survival >= 0.25 for one in found)


def test_candidates_are_few_and_spread_over_the_middle():
    from shl.bands import candidates

    assert candidates(8) == [2, 3, 4, 5, 6] and candidates(2) == [1]
    many = candidates(62)
    assert len(many) == 8 and (many[0], many[-1]) == (13, 49) and len(set(many)) == 8
