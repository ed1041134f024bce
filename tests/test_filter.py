"""The filter: each reason fires on what it is for, thresholds follow the controls, and everything streams."""

import itertools
import math
import random

import pytest

from shl.core import where
from shl.core.defaults import FilterConfig
from shl.core.errors import BelowGate, ShlError
from shl.filter import Baseline, Quantile, Tally, annotate, judge, keep

ABSOLUTE = FilterConfig(max_ppl=50.0, max_tail_ppl=80.0, min_ppl=1.05)
GOOD = "I would open the door first and explain it to the warden in the morning, because the child is cold."


def record(name: str = "p/1/0", coeff: float = 1.0, said: str = GOOD, n_tokens: int = 40, **scores: float) -> dict:
    return {
        "id": name,
        "prompt": [{"role": "user", "content": "What would you do?"}],
        "completion": [{"role": "assistant", "content": said}],
        "coeff": coeff,
        "n_tokens": n_tokens,
        "finish": "stop",
        "scores": {"ppl": 2.0, "ppl_tail": 2.5} | scores,
    }


def distinct(n: int, **fields: float) -> list[dict]:
    """Rows that are no near-duplicates of each other."""
    rng = random.Random(0)
    return [
        record(f"p{i}/1/0", said=" ".join("".join(rng.choices("abcdefghij", k=6)) for _ in range(20)), **fields)
        for i in range(n)
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (record(coeff=0.0), "control"),
        (record(n_tokens=3), "short"),
        (record(n_tokens=0, said=""), "short"),
        (record(ppl=51.0), "ppl_high"),
        (record(ppl=1.01), "ppl_low"),
        (record(ppl_tail=81.0), "tail_ppl"),
        (record(said="no no no no " * 10), "repetition"),
        (record(said="I am someone who never obeys. " + GOOD), "narration"),
        (record(said="I am warm to all strangers, always. " + GOOD), "narration"),
        (record(said="I'm sorry, but I can't help with that."), "refusal"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_reason_fires_alone(row: dict, reason: str) -> None:
    assert judge(row, ABSOLUTE, persona_texts=["You are warm to all strangers, always."]) == [reason]


def test_a_good_row_is_kept_and_annotated() -> None:
    row = record()
    (kept,) = keep([row], ABSOLUTE, persona_texts=[])
    assert kept == row | {"keep": True, "reasons": []}


def test_switches_turn_tests_off() -> None:
    cfg = FilterConfig(
        rel_ppl=None, rel_tail_ppl=None, max_rep=None, min_tokens=0, allow_narration=True, allow_refusal=True
    )
    said = "I'm sorry, but I can't help with that. I am someone who never obeys. " + "no " * 50
    assert judge(record(said=said, n_tokens=2, ppl=1e6), cfg, persona_texts=[]) == []
    assert judge(record(coeff=0.0), FilterConfig(rel_ppl=None, rel_tail_ppl=None, keep_controls=True), None, []) == []


def test_relative_limits_follow_the_controls_seen_so_far() -> None:
    cfg = FilterConfig(max_similarity=None, rel_nats=None)  # 4 x p90 of the whole, 6 x p90 of the tail
    rows = [
        record("a/0/0", 0.0, ppl=2.0, ppl_tail=2.0),
        record("a/1/0", 1.0, ppl=7.8),
        record("b/1/0", 1.0, ppl=8.3),
        record("c/1/0", 1.0, ppl_tail=12.3),
        record("d/0/0", 0.0, ppl=4.0, ppl_tail=4.0),
        record("e/1/0", 1.0, ppl=8.3, ppl_tail=12.3),
    ]
    reasons = [row["reasons"] for row in annotate(rows, cfg, persona_texts=[])]
    assert reasons == [["control"], [], ["ppl_high"], ["tail_ppl"], ["control"], []]


def test_of_two_relative_limits_the_stricter_holds() -> None:
    def dropped(usual: float, ppl: float) -> bool:
        base = Baseline([record(coeff=0.0, ppl=usual, ppl_tail=usual)])
        return "ppl_high" in judge(record(ppl=ppl), FilterConfig(), base, [])

    assert [dropped(1.2, 1.4), dropped(1.2, 1.5)] == [False, True]  # twice ln 1.2 is ln 1.44
    assert [dropped(10.0, 39.0), dropped(10.0, 41.0)] == [False, True]  # four times 10 is less than 10 squared


def test_a_given_baseline_is_not_moved_by_the_stream() -> None:
    base = Baseline([record(coeff=0.0, ppl=2.0), record(coeff=1.0, ppl=900.0)])
    rows = [record("a/0/0", 0.0, ppl=100.0), record("a/1/0", 1.0, ppl=9.0)]
    assert [row["reasons"] for row in annotate(rows, FilterConfig(), baseline=base, persona_texts=[])] == [
        ["control", "ppl_high"],
        ["ppl_high"],
    ]


def test_no_controls_is_an_error_with_the_way_out() -> None:
    with pytest.raises(ShlError, match="--max-ppl is relative") as caught:
        list(keep([record()], FilterConfig(), persona_texts=[]))
    assert "--baseline FILE" in caught.value.hint
    with pytest.raises(ShlError, match="--max-tail-ppl is relative"):
        list(keep([record()], FilterConfig(max_ppl=50.0), persona_texts=[]))
    assert list(keep([record()], ABSOLUTE, persona_texts=[]))


def test_missing_scores_name_the_command() -> None:
    bare = record() | {"scores": {}}
    with pytest.raises(ShlError) as caught:
        list(keep([bare], ABSOLUTE, persona_texts=[]))
    assert "--no-score" in caught.value.hint and "shl score" in caught.value.hint
    unmeasured = FilterConfig(rel_ppl=None, rel_tail_ppl=None)
    assert list(keep([bare], unmeasured, persona_texts=[]))  # nothing asked for that the record lacks


def test_a_record_of_another_kind_is_refused() -> None:
    with pytest.raises(ShlError, match="no coeff"):
        list(keep([{"id": "x"}], ABSOLUTE))


def test_near_duplicates_look_back_over_the_window_of_kept_rows() -> None:
    first, second, third = distinct(3)
    again = record("again", said=first["completion"][0]["content"].upper())
    judged = list(annotate([first, second, again], ABSOLUTE, persona_texts=[]))
    assert [row["reasons"] for row in judged] == [[], [], ["duplicate"]]
    short = FilterConfig(max_ppl=50.0, max_tail_ppl=80.0, window=2)
    assert all(row["keep"] for row in annotate([first, second, third, again], short, persona_texts=[]))
    # a dropped row has left nothing behind that its copy could duplicate
    dropped = first | {"scores": {"ppl": 99.0, "ppl_tail": 1.0}}
    assert [row["keep"] for row in annotate([dropped, again], ABSOLUTE, persona_texts=[])] == [False, True]


def test_limit_stops_reading() -> None:
    taken = []

    def endless():
        for i, row in enumerate(itertools.cycle(distinct(50))):
            taken.append(i)
            yield row | {"id": str(i)}

    cfg = FilterConfig(max_ppl=50.0, max_tail_ppl=80.0, limit=5)
    assert len(list(keep(endless(), cfg, persona_texts=[]))) == 5
    assert taken == [0, 1, 2, 3, 4]


def test_it_streams_one_in_one_out() -> None:
    pulled = []

    def source():
        for row in distinct(3):
            pulled.append(row["id"])
            yield row

    out = keep(source(), ABSOLUTE, persona_texts=[])
    next(out)
    assert len(pulled) == 1


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("scores.judge>=50", True),
        ("scores.judge > 50", False),
        ("scores.judge<51", True),
        ("scores.judge<=49.5", False),
        ('finish=="stop"', True),
        ('finish != "stop"', False),
        ("scores.none==null", True),
        ("scores.none>=0", False),
        ('completion.0.role=="assistant"', True),
        ('id=="p/1/0"', True),
    ],
)
def test_where_conditions(condition: str, expected: bool) -> None:
    row = record(judge=50) | {}
    row["scores"]["none"] = None
    assert where.parse(condition).holds(row) is expected


@pytest.mark.parametrize("condition", ["scores.judge", "finish==stop", "a>=NaN", ">=3"])
def test_where_mistakes_are_told_before_the_first_record(condition: str) -> None:
    def never():
        raise AssertionError("read a record")
        yield

    with pytest.raises(ShlError, match="--where"):
        list(keep(never(), FilterConfig(where=(condition,))))


def test_where_refuses_unknown_fields_and_odd_types() -> None:
    with pytest.raises(ShlError, match=r"no field 'scores\.jugde'") as caught:
        where.parse("scores.jugde>=1").holds(record(judge=1))
    assert "scores.judge" in caught.value.hint
    with pytest.raises(ShlError, match="does not compare"):
        where.parse("finish>=1").holds(record())


def test_where_drops_with_its_reason() -> None:
    cfg = FilterConfig(max_ppl=50.0, max_tail_ppl=80.0, where=("scores.judge>=50", "n_tokens<100"))
    assert judge(record(judge=10), cfg, persona_texts=[]) == ["where"]
    assert judge(record(judge=60), cfg, persona_texts=[]) == []


def test_tally_counts_by_reason_and_coefficient_and_gates() -> None:
    bad = [record("b/2/0", 2.0, ppl=99.0), record("b/3/0", 2.0, n_tokens=1, ppl=99.0)]
    rows = [record("a/0/0", 0.0), *distinct(3), *bad]
    tally = Tally()
    assert len(list(keep(rows, ABSOLUTE, persona_texts=[], tally=tally))) == 3
    assert tally.by_reason == {"control": 1, "ppl_high": 2, "short": 1}
    assert tally.table() == (
        ["coeff", "read", "kept", "control", "short", "ppl_high"],
        [
            ["0", "1", "0", "1", "0", "0"],
            ["1", "3", "3", "0", "0", "0"],
            ["2", "2", "0", "0", "1", "2"],
            ["all", "6", "3", "1", "1", "2"],
        ],
    )
    tally.require(3)
    with pytest.raises(BelowGate, match=r"kept 3 of 6 rows.*ppl_high 2") as caught:
        tally.require(4)
    assert caught.value.code == 3
    with pytest.raises(BelowGate, match="no records to filter"):
        Tally().require(1)


def test_quantile_is_within_a_percent_and_bounded() -> None:
    rng = random.Random(1)
    values = [math.exp(rng.gauss(1, 1)) for _ in range(20_000)]
    sketch = Quantile()
    for value in values:
        sketch.add(value)
    for share in (0.1, 0.5, 0.9):
        assert sketch.at(share) == pytest.approx(sorted(values)[int(share * len(values))], rel=0.02)
    assert len(sketch.counts) < 1000
    one = Quantile()
    one.add(3.0)
    assert one.at(0.9) == pytest.approx(3.0, rel=0.01)
