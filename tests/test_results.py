"""The ledger: no row is lost or torn under concurrent writers, no cell breaks a line or runs in a spreadsheet."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shl import results
from shl.core.errors import InputError

WRITER = """
import sys
from shl.results import append_row
who = int(sys.argv[2])
for i in range(12):
    append_row(sys.argv[1], {"who": who, "i": i, f"only_{who}_{i // 4}": "=x\\ty\\n"})
"""


@given(st.text(st.characters(codec="utf-8")))
def test_cells_round_trip_on_one_line(text):
    cell = results.cell(text)
    assert not set(cell) & set("\t\n\r")
    assert not cell.startswith(("=", "+", "-", "@"))
    assert results.uncell(cell) == text


def test_a_ledger_that_cannot_take_a_row_is_told_before_the_work(tmp_path):
    path = tmp_path / "r.tsv"
    results.refuse_unfit(path)
    results.append_row(path, {"arm": 1, "b": 2})
    with open(path, "a") as handle:
        handle.write("torn")  # appending mends it
    results.refuse_unfit(path)
    path.write_text("arm\tb\n1\n2\t3\n")
    (tmp_path / "keep.jsonl").write_text('{"id": "a"}\n')  # would be a ledger of one column, and be rewritten
    for unfit in (tmp_path, path, tmp_path / "keep.jsonl"):
        with pytest.raises(InputError) as error:
            results.refuse_unfit(unfit)
        assert error.value.hint


def test_numbers_stay_numbers():
    assert [results.cell(v) for v in (-1.5, 3, None, True, ["a"], "-1.5")] == [
        "-1.5",
        "3",
        "",
        "true",
        '["a"]',
        "'-1.5",
    ]


def test_rows_come_back_and_columns_grow(tmp_path):
    path = tmp_path / "deep" / "results.tsv"
    results.append_row(path, {"a": 1, "b": "x\ty"})
    results.append_row(path, {"b": "=cmd", "c": None})
    results.append_row(path, {"a": -2.5})
    assert results.read_rows(path) == [
        {"a": "1", "b": "x\ty", "c": ""},
        {"a": "", "b": "=cmd", "c": ""},
        {"a": "-2.5", "b": "", "c": ""},
    ]


WRITERS = 16


def test_sixteen_concurrent_writers_lose_nothing(tmp_path):
    path = tmp_path / "results.tsv"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(who)]) for who in range(WRITERS)]
    assert [writer.wait() for writer in writers] == [0] * WRITERS
    rows = results.read_rows(path)
    assert sorted((int(row["who"]), int(row["i"])) for row in rows) == [
        (w, i) for w in range(WRITERS) for i in range(12)
    ]
    for row in rows:
        assert row[f"only_{row['who']}_{int(row['i']) // 4}"] == "=x\ty\n"
    assert len(rows[0]) == 2 + WRITERS * 3


def test_an_old_ledger_with_fewer_columns_is_extended(tmp_path):
    """What an earlier version wrote stays as it stands, cell by cell, and new columns come after its own."""
    path = tmp_path / "results.tsv"
    path.write_text("arm\tnote\tauth_nats\nnll\t'=1+1\\tx\t-1.5\nbase\t\t\n", encoding="utf-8")
    before = results.read_rows(path)
    results.append_row(path, {"auth_nats": -2.0, "arm": "wd", "broken": 0.1, "train": {"lr": 0.1}})
    assert path.read_text(encoding="utf-8") == (
        'arm\tnote\tauth_nats\tbroken\ttrain\nnll\t\'=1+1\\tx\t-1.5\t\t\nbase\t\t\t\t\nwd\t\t-2.0\t0.1\t{"lr":0.1}\n'
    )
    rows = results.read_rows(path)
    assert [{name: row[name] for name in before[0]} for row in rows[:2]] == before
    assert before[0]["note"] == "=1+1\tx"


def test_a_torn_last_line_is_cut_and_a_whole_one_kept(tmp_path, capsys):
    path = tmp_path / "results.tsv"
    path.write_text("a\tb\n1\t2\n3")
    results.append_row(path, {"a": 4, "b": 5})
    assert path.read_text() == "a\tb\n1\t2\n4\t5\n"
    assert "torn" in capsys.readouterr().err
    path.write_text("a\tb\n1\t2")
    results.append_row(path, {"a": 4, "b": 5})
    assert path.read_text() == "a\tb\n1\t2\n4\t5\n"


def test_a_row_with_too_many_cells_is_an_error(tmp_path):
    path = tmp_path / "results.tsv"
    path.write_text("a\n1\t2\n")
    with pytest.raises(InputError, match=r"results\.tsv:2: has 2 cells"):
        results.read_rows(path)
    with pytest.raises(InputError, match="no such ledger"):
        results.read_rows(tmp_path / "nope.tsv")


def row(**changes) -> dict[str, str]:
    base = {"model": "toy", "model_digest": "sha256:aa", "suite": "mfv", "n": "132", "arm": "nll", "seed": "0"}
    return base | {"auth_nats": "-1.0", "argv": "shl eval"} | changes


def test_tables_never_mix_model_digests():
    rows = [row(), row(model_digest="sha256:bb", auth_nats="-9"), row(seed="1", auth_nats="-2.0")]
    text = results.markdown(rows)
    assert text.count("### ") == 2
    assert "| nll | -1.500 ± 0.707 | 2 | 0,1 |" in text
    assert "| nll | -9.000 | 1 | 0 |" in text


def test_tables_never_mix_sample_sizes():
    assert results.markdown([row(), row(n="24")]).count("### ") == 2


def test_tables_group_by_any_columns_and_say_how_rows_were_made():
    text = results.markdown([row(reg="wd", argv="shl eval --seed 1"), row(reg="", auth_nats="")], by=["reg", "arm"])
    assert "| wd | nll | -1.000 | 1 | 0 |" in text
    assert "| - | nll | - | 1 | 0 |" in text
    assert "- wd, nll: `shl eval --seed 1`" in text


def test_an_unknown_column_is_an_error():
    with pytest.raises(InputError, match="no column 'regg'"):
        results.markdown([row()], by=["regg"])


@pytest.mark.parametrize(
    ("cells", "shown"),
    [(["1", "2", "3"], "2.000 ± 1.000"), (["1", ""], "1.000 (1 missing)"), (["nan", "x"], "-"), ([], "-")],
)
def test_spread(cells, shown):
    assert results.spread(cells) == shown


def test_a_line_that_was_run_again_is_no_second_sample():
    """What a kill between an evaluation's row and its file leaves: the same row, later."""
    rows = [row(time="1", seed="0"), row(time="2", seed="0", commit="x"), row(time="3", seed="1", auth_nats="-2.0")]
    assert "| nll | -1.500 ± 0.707 | 2 | 0,1 |" in results.markdown(rows)
    assert results.distinct(rows) == [rows[0], rows[2]]
    assert len(results.distinct([row(argv="shl eval"), row(argv="shl eval --batch-size 2")])) == 2


def arms(metric: str, **values: list[float]) -> dict:
    """Groups of rows by arm, with base and prompted among them."""
    found = {("base",): [row(arm="base", **{metric: "0.5"})], ("prompted",): [row(arm="prompted", **{metric: "9.0"})]}
    return found | {(arm,): [row(arm=arm, **{metric: str(one)}) for one in many] for arm, many in values.items()}


@pytest.mark.parametrize(
    ("metric", "values", "expected"),
    [
        ("broken", {"nll": [0.5, 0.6], "kl": [0.1, 0.2]}, "kl"),  # down is better
        ("facts", {"nll": [0.5, 0.6], "kl": [0.1, 0.2]}, "nll"),  # up is better
        ("broken", {"nll": [0.1, 0.5], "kl": [0.1, 0.2]}, None),  # within the spread of one of them
        ("broken", {"nll": [0.5, 0.6], "kl": [0.1, 0.2], "wd": [0.0, 0.9]}, None),  # nobody beats a wide one
        ("broken", {"nll": [0.5], "kl": [0.1]}, None),  # one row has no spread
        ("broken", {"kl": [0.1, 0.2]}, None),  # nobody to compare with
        ("free_tokens", {"nll": [5, 6], "kl": [1, 2]}, None),  # no side is better
        ("auth_nats", {"nll": [1.0, 1.1], "kl": [3.0, 3.1]}, "kl"),  # towards the prompt
    ],
)
def test_the_best_arm_is_marked_when_it_is_ahead_by_more_than_the_spread(metric, values, expected):
    groups = arms(metric, **values)
    assert results.best(groups, metric) == ((expected,) if expected else None)
    rows = [one for many in groups.values() for one in many]
    text = results.markdown(rows, metrics=[metric])
    marked = [line.split(" | ")[0].strip("| ") for line in text.splitlines() if line.startswith("|") and "**" in line]
    assert marked == ([expected] if expected else [])
    assert (results.BOLD in text) == bool(expected) and (results.NO_BOLD in text) == (not expected and len(values) > 1)


@pytest.mark.parametrize("word", ["broken: broken 0.90 > 0.25", "collapsed: auth_nats is 1.5 x the prompt's shift"])
def test_a_broken_arm_is_not_the_best_in_a_trait(word):
    groups = arms("auth_nats", nll=[1.0, 1.1], kl=[3.0, 3.1], wd=[0.1, 0.2])
    assert results.best(groups, "auth_nats") == ("kl",)
    groups["kl",][1]["verdict"] = word
    assert results.best(groups, "auth_nats") == ("nll",)
    del groups["prompted",]
    assert results.best(groups, "auth_nats") is None  # nobody knows which way is meant


@given(st.lists(st.lists(st.floats(-9, 9), min_size=1, max_size=4), min_size=1, max_size=4), st.randoms())
def test_the_mark_owes_nothing_to_the_order_of_rows(columns, random):
    groups = arms("broken", **{f"a{i}": values for i, values in enumerate(columns)})
    names = list(groups)
    random.shuffle(names)
    assert results.best({name: groups[name] for name in names}, "broken") == results.best(groups, "broken")
