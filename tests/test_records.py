"""Records: what is written is what is read, one line each, and every error names file, line and field."""

import io
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shl.core import records
from shl.core.errors import InputError

text = st.text(st.characters(codec="utf-8"), max_size=40)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)
completion_records = st.builds(
    lambda i, user, said, coeff, extra: {
        **extra,
        "id": i,
        "prompt": [{"role": "user", "content": user}],
        "completion": [{"role": "assistant", "content": said}],
        "coeff": coeff,
    },
    text,
    text,
    text,
    st.floats(-5, 5),
    st.dictionaries(st.sampled_from(["note", "x.y", "\u2028"]), json_values, max_size=2),
)


def record(**changes) -> dict:
    base = {
        "id": "p/1/0",
        "prompt": [{"role": "user", "content": "hi"}],
        "completion": [{"role": "assistant", "content": "hello"}],
    }
    return base | changes


@given(st.lists(completion_records, max_size=5))
def test_round_trip(rows):
    handle = io.StringIO()
    for row in rows:
        records.write_record(handle, row)
    lines = handle.getvalue()
    assert lines.count("\n") == len(rows)
    assert list(records.read_records(io.StringIO(lines, newline="\n"))) == rows


@given(json_values)
def test_dumps_is_one_line_of_utf8(value):
    line = records.dumps(value)
    assert "\n" not in line
    assert json.loads(line.encode().decode()) == value


@given(st.text())
def test_dumps_never_fails_on_a_string(value):
    assert json.loads(records.dumps(value).encode()) == value  # a lone surrogate is escaped


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_is_never_written(bad):
    with pytest.raises(ValueError):
        records.dumps({"ppl": bad})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", ":2: line contains invalid json"),
        ("[1]", ":2: line does not match requested type"),
        ('{"id": NaN}', ":2: .*NaN is not JSON"),
        (json.dumps(record(id=3)), ":2: id: is not a string"),
        (json.dumps(record(prompt="hi")), ":2: prompt: is missing or not a list"),
        (json.dumps(record(prompt=[{"role": "user"}])), r":2: prompt\[0\]: content: is missing"),
        (json.dumps(record(prompt=[{"role": "bot", "content": ""}])), r":2: prompt\[0\]\.role: is 'bot'"),
        (json.dumps(record(completion=[])), ":2: completion: is missing or not a list"),
        (json.dumps(record(completion=[{"role": "user", "content": ""}])), ":2: completion: is not a list of one"),
        (json.dumps(record(coeff="1")), ":2: coeff: is not a number"),
        (json.dumps(record(coeff=True)), ":2: coeff: is not a number"),
        (json.dumps(record(scores=[])), ":2: scores: is not an object"),
        (json.dumps(record(id="\ud800")), ":2: id: holds half a surrogate"),
    ],
)
def test_errors_name_file_line_and_field(tmp_path, line, message):
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(record()) + "\n" + line + "\n")
    with pytest.raises(InputError, match=f"r.jsonl{message}"):
        list(records.read_records(path))


def test_a_bad_byte_has_a_line_number(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_bytes(json.dumps(record()).encode() + b'\n\n{"id": "\xff"}\n')
    with pytest.raises(InputError, match=r"r\.jsonl:3: line is not valid utf-8"):
        list(records.read_records(path))


def test_reading_is_lazy():
    def endless():
        while True:
            yield json.dumps(record())

    assert next(records.read_records(endless()))["id"] == "p/1/0"


def test_missing_files_are_user_errors(tmp_path):
    for read in (records.read_prompts, records.read_pairs, lambda p: list(records.read_records(p))):
        with pytest.raises(InputError, match="no such file"):
            read(tmp_path / "nope.jsonl")
        with pytest.raises(InputError, match="is a directory"):
            read(tmp_path)


def prompts(tmp_path: Path, content: str, name: str = "p.jsonl") -> list[records.Prompt]:
    (tmp_path / name).write_text(content, encoding="utf-8")
    return records.read_prompts(tmp_path / name)


def test_prompts_in_every_form(tmp_path):
    got = prompts(
        tmp_path,
        '\ufeff{"user": "a", "id": "x", "axis": "authority"}\n\n'
        '{"prompt": [{"role": "user", "content": "b"}], "system": "s"}\n'
        '{"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "c"}]}\n',
    )
    assert got[0] == records.Prompt("x", [{"role": "user", "content": "a"}], None, {"axis": "authority"})
    assert [p.system for p in got] == [None, "s", "s"]
    assert got[2].messages == [{"role": "user", "content": "c"}]


def test_plain_text_is_one_prompt_a_line(tmp_path):
    got = prompts(tmp_path, "one\n\n{two}\n", "p.txt")
    assert [p.messages[0]["content"] for p in got] == ["one", "{two}"]


def test_an_id_follows_from_the_content_not_from_the_line(tmp_path):
    first = prompts(tmp_path, "a\nb\na\n", "p.txt")
    moved = prompts(tmp_path, "x\nb\na\na\n", "p.txt")
    assert len({p.id for p in first}) == 3
    assert {p.id for p in first} < {p.id for p in moved}


def test_a_given_id_is_unique(tmp_path):
    with pytest.raises(InputError, match=r"p\.jsonl:2: id: 'x' is taken already by .*p\.jsonl:1"):
        prompts(tmp_path, '{"user": "a", "id": "x"}\n{"user": "b", "id": "x"}\n')


@pytest.mark.parametrize("line", ["{}", '{"user": 1}', '{"user": "a", "prompt": []}', '{"user": "a", "system": 1}'])
def test_bad_prompts(tmp_path, line):
    with pytest.raises(InputError, match=r"p\.jsonl:1"):
        prompts(tmp_path, line)


def test_empty_inputs_are_errors(tmp_path):
    with pytest.raises(InputError, match="holds no prompts"):
        prompts(tmp_path, "\n")
    with pytest.raises(InputError, match="holds no pairs"):
        records.read_pairs(tmp_path / "p.jsonl")


def test_pairs(tmp_path):
    chat = [{"role": "user", "content": "a"}]
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"pos": "x", "neg": "y"}\n' + json.dumps({"pos": chat, "neg": chat}))
    assert records.read_pairs(path) == [("x", "y"), (chat, chat)]
    path.write_text(json.dumps({"pos": "x", "neg": chat}))
    with pytest.raises(InputError, match=r":1: neg: one side"):
        records.read_pairs(path)
