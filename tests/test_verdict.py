"""What an evaluation comes to: damage before traits, collapse told from strength, ratios with guarded denominators."""

import pytest

from shl.core import verdict as vd
from shl.core.errors import BelowGate, Mismatch


def fake(**metrics: float | None) -> dict:
    full = {
        "auth_nats": -1.7, "care_nats": -1.4, "p_ans_any": 0.99, "json_is_valid": 1.0, "largest_share": 0.3,
        "informedness": 0.5, "free_tail_p90": 1.8, "broken": None, "facts": 0.8,
    }  # fmt: skip
    return {"suite": "mfv", "model_digest": "d", "settings": {}, "n": 70, "metrics": full | metrics}


def test_compare_gives_deltas_and_guarded_retain() -> None:
    steered = fake(auth_nats=-3.7, care_nats=-1.41)
    out = vd.compare(fake(auth_nats=-3.2, care_nats=-1.0), fake(), steered)
    assert out["delta"]["auth_nats"] == pytest.approx(-1.5)
    assert out["delta"]["broken"] is None
    assert out["retain"]["auth_nats"] == pytest.approx(0.75)
    assert out["retain"]["care_nats"] is None  # the steered row moved care by next to nothing
    assert "p_ans_any" not in out["retain"]
    assert "auth_nats -3.20 (-1.50)" in out["verdict"]
    assert "retain" not in vd.compare(fake(), fake())
    with pytest.raises(Mismatch, match="differ in n"):
        vd.compare(fake(), fake() | {"n": 140})


@pytest.mark.parametrize(
    ("metrics", "fault"),
    [
        ({"p_ans_any": 0.4}, "p_ans_any 0.40 < 0.9"),
        ({"json_is_valid": 0.0}, "json_is_valid"),
        ({"broken": 0.5}, "broken 0.50 > 0.25"),
        ({"free_rep": 0.8}, "free_rep"),
        ({"free_refused": 0.9}, "free_refused"),
        ({"free_ppl_p90": 5000.0}, "free_ppl_p90"),
        ({"free_tail_p90": 25.0}, "free_tail_p90 25.0 = 13.9 x base"),
    ],
)
def test_the_floor_comes_before_the_trait(metrics: dict, fault: str) -> None:
    prompted = fake(auth_nats=-3.0)
    said = vd.verdict(fake(auth_nats=-9.0, informedness=0.1, **metrics), fake(), prompted)
    assert said.startswith("broken: ") and fault in said and "auth_nats" not in said
    assert vd.verdict(fake(auth_nats=-9.0), fake()).startswith("coherent: auth_nats -9.00 (-7.30)")


def test_beyond_the_prompt_at_falling_informedness_is_collapsed() -> None:
    prompted = fake(auth_nats=-2.7)
    said = vd.verdict(fake(auth_nats=-3.2, informedness=0.2), fake(), prompted)
    assert said.startswith("collapsed: auth_nats -3.20 is 1.5 x the prompt's shift") and "informedness 0.20" in said
    assert vd.verdict(fake(auth_nats=-3.2), fake(), prompted).startswith("coherent")  # strong, and still informed
    assert vd.verdict(fake(auth_nats=-2.8, informedness=0.2), fake(), prompted).startswith("coherent")  # within 1.25 x
    assert vd.verdict(fake(auth_nats=-0.7, informedness=0.2), fake(), prompted).startswith("coherent")  # the other way
    assert vd.compare(fake(auth_nats=-3.2, informedness=0.2), fake(), None, prompted)["verdict"].startswith("collapsed")


def test_ratios_are_of_the_target_and_never_of_a_broken_model() -> None:
    healed = fake(auth_nats=-2.7, care_nats=-1.2, p_ans_any=0.94, facts=0.6)
    found = vd.compare(healed, fake())["ratios"]
    assert found["surgicality"] == pytest.approx(1.0 / 0.2)
    assert found["coherence_cost"] == pytest.approx(0.05 / 1.0)
    assert found["competence_loss"] == pytest.approx(0.2)
    assert vd.compare(healed, fake(), target="care_nats")["ratios"]["surgicality"] == pytest.approx(0.2)
    broken = vd.compare(fake(auth_nats=-9.0, p_ans_any=0.1), fake())["ratios"]
    assert broken["surgicality"] is None and broken["coherence_cost"] is None
    still = vd.compare(fake(auth_nats=-1.71), fake())["ratios"]  # nothing to divide by
    assert still["surgicality"] is None and still["coherence_cost"] is None
    alone = vd.compare(fake(auth_nats=-2.7, care_nats=-1.4), fake())["ratios"]
    assert alone["surgicality"] == pytest.approx(1.0 / vd.LEAST_SHIFT)  # others did not move at all
    assert "lost facts 0.60 (-0.20)" in vd.verdict(healed, fake())


def test_the_gate_is_the_lowest_coherence() -> None:
    assert vd.coherence(fake()["metrics"]) == 0.99
    assert vd.coherence(fake(broken=0.25)["metrics"]) == 0.75
    assert vd.coherence(fake(json_is_valid=None)["metrics"]) == 0.99
    vd.gate(fake() | {"verdict": ""}, 0.9)
    with pytest.raises(BelowGate, match=r"0\.750") as caught:
        vd.gate(fake(broken=0.25) | {"verdict": "x"}, 0.9)
    assert caught.value.code == 3
