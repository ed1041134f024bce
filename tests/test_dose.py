"""The dose: what is found meets its target and the next step up does not, by readings made independently."""

import json
import re
from dataclasses import replace

import pytest
import torch

from shl.cli import main
from shl.core import pools
from shl.core.defaults import DoseConfig, FilterConfig, GenConfig, VectorConfig
from shl.core.errors import BelowGate, ShlError
from shl.core.hooks import Steering
from shl.core.models import load
from shl.core.records import Prompt, check_record
from shl.dose import _Probe, by_kl, by_survival, ceiling
from shl.vector import extract

PROMPTS = [Prompt(f"p{i}", [{"role": "user", "content": text}]) for i, text in enumerate(("Who said so?", "Answer!"))]
CFG = DoseConfig(prompts=2, max_new_tokens=12)
LENIENT = FilterConfig(max_rep=None, max_similarity=None, min_tokens=1)


@pytest.fixture(scope="module")
def loaded(tiny):
    return tiny("qwen2")


@pytest.fixture(scope="module")
def vector(loaded):
    return extract(loaded, "You care about people.", "You follow orders.", PROMPTS, VectorConfig())


def test_no_dose_no_divergence(loaded, vector):
    assert _Probe(loaded, vector, PROMPTS, CFG).kl(0.0) == pytest.approx(0, abs=1e-6)


def test_the_divergence_is_that_of_whole_distributions(loaded, vector):
    """Against full log-softmaxes over single rows without any batching."""
    probe = _Probe(loaded, vector, PROMPTS, CFG)
    found = []
    for prompt, said, _ in probe.rows:
        ids, part = torch.tensor([prompt + said]), slice(len(prompt) - 1, -1)
        with torch.no_grad():
            plain = loaded.model(ids).logits[0, part].log_softmax(-1)
            with Steering(loaded, vector.layers) as steering:
                steering.set([2.0])
                steered = loaded.model(ids).logits[0, part].log_softmax(-1)
        found.append((steered.exp() * (steered - plain)).sum(-1))
    assert probe.kl(2.0) == pytest.approx(float(torch.cat(found).quantile(0.95)), rel=1e-4)


def test_the_dose_by_divergence_meets_its_target_and_hardly_more(loaded, vector):
    probe = _Probe(loaded, vector, PROMPTS, CFG)
    target = probe.kl(ceiling(vector, CFG)) / 3
    dose = by_kl(loaded, vector, PROMPTS, target, CFG)
    assert dose.value >= target > probe.kl(0.98 * dose.coeff)
    assert 0 < dose.coeff < ceiling(vector, CFG) and dose.survivors == []


def test_a_divergence_that_no_dose_reaches_is_an_error(loaded, vector):
    with pytest.raises(ShlError, match="less than the target"):
        by_kl(loaded, vector, PROMPTS, 1e3, CFG)


@pytest.fixture(scope="module")
def toy():
    """The embedded model and a vector of its own: on random weights no dose makes a text any worse."""
    loaded, persona = load("toy"), pools.persona("authority")
    return loaded, extract(loaded, persona.pos, persona.neg, cfg=VectorConfig(contexts=32), axis="authority")


def test_the_dose_by_survival_is_the_last_that_survives(toy):
    dose = by_survival(*toy, pools.pool("authority"), 0.6, DoseConfig(prompts=4, max_new_tokens=64))
    shares = dict(dose.readings)
    assert shares[dose.coeff] == dose.value >= 0.6
    above = [share for coeff, share in shares.items() if coeff > dose.coeff]
    assert above and max(above) < 0.6
    assert dose.survivors
    for record in dose.survivors:
        check_record(record)
        assert record["keep"] and record["coeff"] in shares


def test_the_probe_is_steered_as_it_is_told(toy):
    gen = GenConfig(schedule="linear", system="Be brief.", max_new_tokens=7)
    dose = by_survival(*toy, pools.pool("authority"), 0.7, DoseConfig(prompts=4, max_new_tokens=48), gen=gen)
    assert dose.survivors and max(row["n_tokens"] for row in dose.survivors) > 7
    for row in dose.survivors:
        assert row["trajectory"]["schedule"] == "linear" and row["system"] == "Be brief."


def test_a_systems_text_moves_the_divergence_whoever_gives_it(loaded, vector):
    theirs = [replace(prompt, system="Answer as a pirate.") for prompt in PROMPTS]
    ours = by_kl(loaded, vector, PROMPTS, 0.01, CFG, system="Answer as a pirate.")
    assert ours == by_kl(loaded, vector, theirs, 0.01, CFG) != by_kl(loaded, vector, PROMPTS, 0.01, CFG)


def test_survival_of_everything_or_nothing_is_an_error(loaded, vector):
    all_pass = replace(LENIENT, rel_ppl=None, rel_tail_ppl=None)
    with pytest.raises(ShlError, match="even at coefficient"):
        by_survival(loaded, vector, PROMPTS, 0.5, CFG, all_pass)
    with pytest.raises(BelowGate, match="smallest tried"):
        by_survival(loaded, vector, PROMPTS, 0.5, CFG, replace(all_pass, min_tokens=1000))


def test_the_command_prints_one_number_and_keeps_the_survivors(loaded, vector, tmp_path, capfd, monkeypatch):
    vector.save(tmp_path / "v.safetensors")
    (tmp_path / "p.txt").write_text("Who said so?\nAnswer!\n", encoding="utf-8")

    def run(*argv: str) -> int:
        monkeypatch.setattr("sys.argv", ["shl", "dose", *argv])
        with pytest.raises(SystemExit) as done:
            main()
        return done.value.code or 0

    common = ["--vec", str(tmp_path / "v.safetensors"), str(tmp_path / "p.txt"), "--max-new-tokens", "12"]
    assert run(*common, "--target-kl", "0.01") == 0
    out, err = capfd.readouterr()
    assert re.fullmatch(r"[0-9.e-]+\n", out) and float(out) > 0 and "KL p95" in err
    assert run(*common) == 2
    assert run(*common, "--target-kl", "1", "--survival", "0.5") == 2


def test_the_command_keeps_the_survivors(toy, tmp_path, capfd, monkeypatch):
    vector, keep = tmp_path / "v.safetensors", tmp_path / "keep.jsonl"
    toy[1].save(vector)
    line = f"shl dose --vec {vector} -n 4 --max-new-tokens 48 --survival 0.6 --keep {keep}"
    monkeypatch.setattr("sys.argv", line.split())
    with pytest.raises(SystemExit) as done:
        main()
    out, err = capfd.readouterr()
    assert not done.value.code, err
    assert float(out) > 0 and "survives" in err
    rows = [json.loads(row) for row in keep.read_text(encoding="utf-8").splitlines()]
    assert rows and all(row["keep"] for row in rows)
