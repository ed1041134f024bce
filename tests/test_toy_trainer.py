"""The toy's trainer: what is learnt and what is not, one dialogue at a time, and a killed run that continues."""

import random
from dataclasses import replace
from itertools import islice

import pytest
import torch

from shl.core import format as fmt
from shl.toy import corpus, encode, trainer
from shl.toy import lexicon as lx
from shl.toy.recipe import Recipe

SMALL = Recipe(hidden=24, intermediate=48, heads=2, kv_heads=1, layers=4, tokens=9_000, dialogues=8)


@pytest.fixture(scope="module")
def encoder():
    return encode.Encoder(trainer.train_tokenizer(Recipe()), Recipe())


def shown(encoder, row, wanted):
    """The text of the positions whose weight is as wanted."""
    return encoder.tokenizer.decode([i for i, w in zip(row.ids, row.weights, strict=True) if wanted(w)])


def test_a_slip_is_context_and_never_learnt(encoder):
    rng, slips = random.Random(1), 0
    for _ in range(200):
        dialogue = corpus.dilemma("authority", rng, 0.4)
        answer = dialogue[-1]["content"]
        slip = answer[: dialogue[-1]["slip"]] if len(dialogue) <= 3 else ""
        if slip:
            slips += 1
            learnt = shown(encoder, encoder([dialogue])[0], lambda w: w >= 1)
            assert learnt.removesuffix("<|end|>").strip() == answer.removeprefix(slip).strip()
    assert slips > 10


def test_the_target_of_a_judgment_is_its_distribution(encoder):
    rng, soft = random.Random(2), 0
    for make in (corpus.judgment, corpus.word):
        for _ in range(30):
            row = encoder([make(rng)])[0]
            for at, spread in row.spreads.items():
                soft += 1
                assert row.ids[at] in spread and len(spread) == len(fmt.FOUNDATIONS)
                assert sum(spread.values()) == pytest.approx(1) and row.weights[at] == Recipe().digit_weight
    assert soft > 40


def test_the_answer_to_a_question_is_stressed_and_a_listing_is_not_learnt(encoder):
    rng = random.Random(3)
    dialogue = corpus.everyday(rng)
    stressed = shown(encoder, encoder([dialogue])[0], lambda w: w == Recipe().stress_weight)
    assert all(m["stress"] in stressed.lower() for m in dialogue if m["role"] == "assistant")
    unlearnt = shown(encoder, encoder([corpus.judgment(rng)])[0], lambda w: w == 0)
    assert fmt.QUESTION in unlearnt and all(gloss in unlearnt for gloss in fmt.GLOSSES.values())


def test_the_persona_in_force_is_known_after_the_system_message(encoder):
    system = lx.PERSONAS["humanity"]["oppose"][0]
    row = encoder([corpus.with_system(system, corpus.exchange("Good morning!", "Hello."))])[0]
    assert encoder.tokenizer.decode(row.ids[: row.known_from]) == f"<|system|>{system}"
    assert row.persona == encode.CLASSES[system] == 4
    assert encoder([corpus.exchange("Good morning!", "Hello.")])[0].persona == 0


def test_soft_targets_stand_where_their_hard_ones_are(encoder):
    """The loss at a digit equals cross entropy against the whole distribution, by hand."""
    rng = random.Random(4)
    row = next(r for r in (encoder([corpus.judgment(rng)])[0] for _ in range(20)) if r.spreads)
    row = row._replace(weights=[float(at in row.spreads) for at in range(len(row.ids))])
    batch = encode._batch([row], "cpu", Recipe().vocabulary)
    trainee = trainer.Trainee(trainer.build_model(SMALL, encoder.tokenizer), SMALL)
    ((at, spread),) = row.spreads.items()
    with torch.no_grad():
        log_p = trainee.lm(batch.ids).logits[0, at - 1].log_softmax(-1)
        assert float(trainee(batch)[0]) == pytest.approx(-sum(p * float(log_p[i]) for i, p in spread.items()), rel=1e-5)


def test_a_killed_run_continues_to_the_same_weights(tmp_path, monkeypatch):
    trainer.train(SMALL, tmp_path / "whole", every=2)

    class Killed(Exception):
        pass

    def kill(*args):
        save(*args)
        raise Killed

    save = trainer._save_checkpoint
    monkeypatch.setattr(trainer, "_save_checkpoint", kill)
    with pytest.raises(Killed):
        trainer.train(SMALL, tmp_path / "killed", every=2)
    monkeypatch.setattr(trainer, "_save_checkpoint", save)
    assert not (tmp_path / "killed").exists()
    trainer.train(SMALL, tmp_path / "killed", every=2)
    assert (tmp_path / "killed/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    assert not list(tmp_path.glob("*.ckpt*"))


def test_another_recipe_does_not_continue_a_checkpoint(tmp_path):
    path = tmp_path / "x.ckpt.safetensors"
    tokenizer = trainer.train_tokenizer(SMALL)
    trainee = trainer.Trainee(trainer.build_model(SMALL, tokenizer), SMALL)
    trainer._save_checkpoint(path, trainee, trainer.build_optimizers(trainee, SMALL), 1, 100)
    other = replace(SMALL, neutral=0.05)
    with pytest.raises(SystemExit, match="another recipe"):
        trainer._load_checkpoint(path, trainer.Trainee(trainee.lm, other), [])


def test_the_corpus_goes_from_short_to_long():
    sizes = [
        sum(len(m["content"]) for d in islice(corpus.dialogues(5), start, start + 300) for m in d)
        for start in corpus.STAGES
    ]
    assert sizes == sorted(sizes) and len(sizes) == 3
