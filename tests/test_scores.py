"""Scores: surprise is what a plain forward pass says, in any batch and any chunks."""

import math

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from shl.core import scores
from shl.core.errors import ShlError
from shl.core.scores import nll_per_token, score

PROMPTS = [[1, *range(40, 40 + n)] for n in (3, 20, 7)]
ANSWERS = [list(range(100, 130)), [], [99]]
USER = [{"role": "user", "content": "Who said so?"}]


def reference(loaded, prompt, answer):
    with torch.inference_mode():
        logs = loaded.model(torch.tensor([prompt + answer])).logits[0].float().log_softmax(-1)
    return torch.stack([-logs[len(prompt) - 1 + t, token] for t, token in enumerate(answer)])


def test_surprise_is_what_a_plain_pass_says(each):
    found = nll_per_token(each, PROMPTS, ANSWERS)
    for prompt, answer, nll in zip(PROMPTS, ANSWERS, found, strict=True):
        assert len(nll) == len(answer)
        if answer:
            torch.testing.assert_close(nll, reference(each, prompt, answer), rtol=1e-5, atol=1e-4)


def test_neither_batch_nor_chunks_matter(each, monkeypatch):
    whole = nll_per_token(each, PROMPTS, ANSWERS)
    monkeypatch.setattr(scores, "_CHUNK", 3 * 512)
    for a, b in zip(whole, nll_per_token(each, PROMPTS, ANSWERS, batch_size=1), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_logits_that_are_capped_are_capped_here_too(tiny):
    from dataclasses import replace

    config = Gemma2Config(
        vocab_size=512, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=12, final_logit_softcapping=2.0, initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(config).eval()
    loaded = replace(tiny(), model=model, text_config=config, blocks=list(model.model.layers), head_checked=False)
    answer = list(range(100, 110))
    torch.testing.assert_close(nll_per_token(loaded, PROMPTS[:1], [answer])[0], reference(loaded, PROMPTS[0], answer))
    loaded.head_checked = False
    config.final_logit_softcapping = None
    model.config = Gemma2Config(**{**config.to_dict(), "final_logit_softcapping": 2.0})
    with pytest.raises(ShlError, match="not known here"):
        nll_per_token(loaded, PROMPTS[:1], [answer])


def test_a_score_says_what_it_should(tiny):
    loaded = tiny()
    text = "The guard said that the order came from above and that nobody asked why"
    nll = reference(loaded, loaded.encode_prompt(USER), loaded.encode_completion(text, end=False))
    found = score(loaded, [USER], [text])[0]
    assert found["ppl"] == pytest.approx(nll.mean().exp().item(), rel=1e-4)
    assert found["ppl_tail"] == pytest.approx(nll[-max(8, math.ceil(len(nll) / 4)) :].mean().exp().item(), rel=1e-4)
    assert found["max_nll"] == pytest.approx(nll.max().item(), rel=1e-4)
    assert found["n_tokens"] == len(nll) and found["rep"] == 0.0 and found["distinct"] == 1.0


def test_an_empty_answer_has_no_perplexity(tiny):
    found = score(tiny(), [USER], [""])[0]
    assert found["ppl"] is found["ppl_tail"] is found["max_nll"] is None and found["n_tokens"] == 0


def test_a_loop_shows(tiny):
    assert score(tiny(), [USER], ["again and again " * 20])[0]["rep"] > 0.9


def test_scores_are_those_of_the_base_model(tiny_model):
    from shl.core.models import load

    loaded = load(str(tiny_model()), device="cpu")
    before = score(loaded, [USER], ["Nobody asked why."])
    name = "model.layers.0.mlp.down_proj.weight"
    weight = loaded.model.get_parameter(name)
    loaded.originals[name] = weight.data
    weight.data = weight.data * 3
    assert score(loaded, [USER], ["Nobody asked why."]) == before
    assert torch.equal(weight.data, loaded.originals[name] * 3)
