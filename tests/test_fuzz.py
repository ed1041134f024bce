"""A sample of the fuzzing (`just fuzz` runs the full count), the laws behind it, and what it has found."""

import json
import math
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz import __main__ as fuzz
from fuzz import readers
from fuzz.mutate import damage
from fuzz.readers import READERS, Defect, check
from fuzz.seeds import evaluation, lines, record, sound
from shl import info, results
from shl.core import records, strict
from shl.core.defaults import EvalConfig, FilterConfig, TrainConfig, configure
from shl.core.errors import InputError, ShlError
from shl.core.evaluations import read_evaluation
from shl.core.metrics import finite
from shl.core.peft_dir import CONFIG, META, read_adapter
from shl.core.provenance import read_safetensors
from shl.core.vectors import Vector
from shl.export import from_gguf
from shl.filter import Tally, annotate

SCRATCH = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize("kind", READERS)
def test_damage_is_refused_in_a_sentence_or_does_not_matter(kind):
    went, defects = fuzz.run(50, seed=7, kinds=(kind,))
    assert not defects and went.total() == 50
    assert went[f"{kind} refused"] > 5 or kind == "plain"


def test_a_case_follows_from_its_name(tmp_path):
    original = sound(tmp_path)["records"]
    first, again = (list(fuzz.cases("records", original, 3, 5)) for _ in range(2))
    assert first == again and len({str(blob) for _, blob in first}) == 5


class TestTheHarness:
    """A reader that misbehaves is told: the fuzzing can fail."""

    @pytest.fixture
    def run(self, monkeypatch, tmp_path):
        def with_reader(reader):
            monkeypatch.setitem(READERS, "records", reader)
            (tmp_path / "case").mkdir(exist_ok=True)
            return check("records", {"": b"x"}, {"": b"x"}, tmp_path / "case")

        return with_reader

    @pytest.mark.parametrize(
        ("error", "told"),
        [
            (KeyError("id"), "KeyError"),
            (RecursionError(), "RecursionError"),
            (MemoryError(), "MemoryError"),
            (InputError("is wrong", where="elsewhere:1"), "name the file"),
            (InputError("is wrong", where="f.jsonl"), "name the line"),
            (InputError("is wrong", where="f.jsonl:1", hint=""), "what to do"),
            (ShlError("two\nlines", hint="mend it"), "one plain sentence"),
        ],
    )
    def test_crashes_and_poor_sentences(self, run, error, told):
        def reader(*_):
            raise error

        with pytest.raises(Defect, match=told):
            run(reader)

    def test_hanging(self, run, monkeypatch):
        monkeypatch.setattr(readers, "PATIENCE", 0.05)
        with pytest.raises(Defect, match="took more than"):
            run(lambda *_: time.sleep(5))

    def test_blind_acceptance(self, run):
        assert run(lambda *_: None) == "accepted"
        with pytest.raises(Defect, match="accepted"):
            run(lambda *_: readers._sound_record(record(n_tokens="many")))


def sound_record(row: dict) -> bool:
    try:
        readers._sound_record(row)
    except Defect:
        return False
    return row["n_tokens"] is None or row["n_tokens"] >= 0


@settings(suppress_health_check=SCRATCH, max_examples=150, deadline=None)
@given(st.sampled_from(("coeff", "seed", "n_tokens", "finish", "scores", "reasons", "keep", "note")), json_values)
def test_a_field_is_accepted_when_the_documented_type_is_in_it(tmp_path, name, value):
    path = tmp_path / "r.jsonl"
    row = record(0) | {name: value}
    path.write_bytes(json.dumps(row).encode())  # NaN and infinity are written here, as other programs do
    try:
        (back,) = records.read_records(path)
    except InputError as error:
        assert "r.jsonl:1" in error.message and error.hint
    else:
        assert sound_record(back) and back == row


@settings(suppress_health_check=SCRATCH, max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=30), min_size=1, max_size=4))
def test_any_text_is_a_prompt_or_is_refused(tmp_path, texts):
    for name, data in (
        ("p.jsonl", "".join(json.dumps({"user": text}) + "\n" for text in texts).encode()),
        ("p.txt", "\n".join(texts).encode("utf-8", "surrogatepass")),
    ):
        (tmp_path / name).write_bytes(data)
        try:
            prompts = records.read_prompts(tmp_path / name)
        except InputError as error:
            assert name in error.message and error.hint
        else:
            said = [prompt.messages[0]["content"] for prompt in prompts]
            plain = [line.lstrip("\ufeff").strip() for line in "\n".join(texts).split("\n")]
            assert said == (texts if name == "p.jsonl" else [line for line in plain if line])


@settings(suppress_health_check=SCRATCH, max_examples=60, deadline=None)
@given(st.dictionaries(st.text(max_size=8), st.text(max_size=12) | st.floats(allow_nan=False), min_size=1, max_size=4))
def test_any_row_of_a_ledger_comes_back_and_runs_nowhere(tmp_path, row):
    path = tmp_path / "l.tsv"
    path.unlink(missing_ok=True)
    results.append_row(path, row)
    (back,) = results.read_rows(path)
    assert len(back) == len({name.encode("utf-8", "replace") for name in row})
    for line in path.read_text(encoding="utf-8").split("\n"):
        for cell in line.split("\t"):
            number = finite(cell) is not None
            assert number or not cell.lstrip().startswith(("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20"))


class TestFound:
    """Defects that fuzzing found or that reading for it showed; each was a traceback, a hang, or damage taken in."""

    @pytest.fixture
    def put(self, tmp_path):
        def write(data: bytes | str, name: str = "f.jsonl"):
            (tmp_path / name).write_bytes(data if isinstance(data, bytes) else data.encode())
            return tmp_path / name

        return write

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ('{"id": "a", "id": "b"}', "the key 'id' stands twice"),
            ('{"coeff": 1e999}', "1e999 is too large"),
            ('{"coeff": ' + "9" * 400 + "}", "too large"),
            ('{"x": ' + "[" * 5000 + "]" * 5000 + "}", "nested more than 100 deep"),
            (json.dumps(record(scores={"ppl": "2"})), "scores: ppl: is not a number"),
            (json.dumps(record(scores={"ppl_tail": True})), "scores: ppl_tail: is not a number"),
            (json.dumps(record(n_tokens=-1)), "n_tokens: is less than none"),
            (json.dumps(record(adapters=[1])), "adapters: is not a list of strings"),
            (json.dumps(record(reasons=[["x"]])), "reasons: is not a list of strings"),
        ],
    )
    def test_records(self, put, line, message):
        with pytest.raises(InputError, match=rf"f\.jsonl:2: .*{message}") as error:
            list(records.read_records(put(lines(record()) + line.encode() + b"\n")))
        assert error.value.hint

    def test_a_line_without_an_end_is_refused_before_it_fills_the_memory(self, put):
        path = put(lines(record()))
        with path.open("r+b") as handle:
            handle.truncate(100 << 20)  # one line of 100 MB, which takes no room on the disk
        for read in (lambda: list(records.read_records(path)), lambda: info.describe(path)):
            with pytest.raises(InputError, match=r"f\.jsonl:2: is longer than 16 MiB"):
                read()
        said = record(completion=[{"role": "assistant", "content": "x" * (records.MOST_SAID + 1)}])
        with pytest.raises(InputError, match="no completion has more than"):
            list(records.read_records([json.dumps(said)]))

    def test_a_damaged_first_line_does_not_make_jsonl_plain_text(self, put):
        with pytest.raises(InputError, match=r":1: line contains invalid json"):
            records.read_prompts(put('"user": "torn at its head"}\n{"user": "b"}\n'))

    def test_prompts_of_binary_text_and_of_nothing_but_a_mark(self, put):
        with pytest.raises(InputError, match=r"f\.txt:1: holds NUL"):
            records.read_prompts(put("Wer?\n".encode("utf-16-le"), "f.txt"))
        assert len(records.read_prompts(put("\ufeff\nWho?\n", "f.txt"))) == 1

    def test_the_same_prompt_many_times_is_quick(self, put):
        prompts = records.read_prompts(put("again\n" * 20_000, "f.txt"))  # was quadratic: minutes
        assert len({prompt.id for prompt in prompts}) == 20_000

    def test_a_null_id_is_no_id(self, put):
        row = '{"user": "a", "id": null}\n'
        assert len({prompt.id for prompt in records.read_prompts(put(row * 2))}) == 2

    def test_what_a_terminal_obeys_is_escaped_in_json(self):
        text = "\x9b2J\x7f\u2028\u202e\ud800"
        line = records.dumps({"said": text})
        assert line.isascii() and line.isprintable() and json.loads(line)["said"] == text

    def test_as_many_coefficients_as_rows_do_not_fill_the_memory(self):
        rows = (record(i, coeff=1 + i / 7) for i in range(3000))
        tally = Tally()
        cfg = FilterConfig(max_ppl=50.0, max_tail_ppl=80.0, max_similarity=None)
        assert sum(1 for _ in annotate(rows, cfg, persona_texts=[], tally=tally)) == 3000
        _, table = tally.table()
        assert len(table) < 300 and table[-1][:2] == ["all", "3000"]
        assert sum(int(row[1]) for row in table[:-1]) == 3000 and any(row[0] == "others" for row in table)

    @pytest.mark.parametrize(
        ("offsets", "shape", "dtype"),
        [([32, 0], [8], "F32"), ([-8, 24], [8], "F32"), ([0, 2**62], [2**60], "F32"), ([0, 32], [9], "F32"),
         ([0.0, 32], [8], "F32"), ([0, 32], [-8], "F32"), ([0, 16], [8], "BF16"), ([8, 40], [8], "F32"),
         ([0], [8], "F32"), ([0, 32], 8, "F32"), ([0, 32], [8], 4)],
    )  # fmt: skip
    def test_headers_that_lie(self, put, offsets, shape, dtype):
        head = json.dumps({"layer1.v": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()
        path = put(len(head).to_bytes(8, "little") + head + bytes(32), "f.safetensors")
        with pytest.raises(InputError, match=r"f\.safetensors: "):  # [32, 0] once hashed for ever
            read_safetensors(path)

    @pytest.mark.parametrize("metadata", [["shl"], "shl", {"shl": 5}, {"shl": "[]"}, {"shl": '{"layers": 3}'}])
    def test_metadata_that_is_none(self, put, metadata):
        entry = {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}
        head = json.dumps({"__metadata__": metadata, "layer1.v": entry}).encode()
        with pytest.raises(InputError):
            Vector.load(put(len(head).to_bytes(8, "little") + head + bytes(32), "f.safetensors"))

    def test_one_bit_of_a_vector(self, put, tmp_path):
        data = sound(tmp_path)["vector"][""]
        for at in (len(data) - 1, data.index(b"You care")):
            damaged = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
            with pytest.raises(InputError, match="was changed after it was written: its digest differs"):
                Vector.load(put(damaged, "f.safetensors"))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"lora_alpha": 1e30}, "lora_alpha is not a number up to"),
            ({"r": 3}, r"has rank 2; adapter_config\.json says 3"),
            ({"r": 0}, "r is not a number of at least 1"),
            ({"alpha_pattern": {"(a+)+$": 1}}, "more than names"),
            ({"alpha_pattern": {"[": 1}}, "which is no pattern"),
            ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern of 'q_proj' is not a number"),
            ({"rank_pattern": [1]}, "rank_pattern is not an object"),
            ({"fan_in_fan_out": "yes"}, "fan_in_fan_out is not"),
        ],
    )
    def test_adapter_configurations(self, tmp_path, change, message):
        folder = tmp_path / "adapter"
        sound(tmp_path)
        (folder / META).unlink()
        (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | change))
        with pytest.raises(InputError, match=message):
            read_adapter(folder)

    @pytest.mark.parametrize("own", ["{", "[]", '{"parents": 1}', '{"parents": [], "config": 3}', '{"model": 3}'])
    def test_what_an_adapter_says_about_itself(self, tmp_path, own):
        sound(tmp_path)
        (tmp_path / "adapter" / META).write_text(own)
        with pytest.raises(InputError, match=r"adapter/shl\.json"):
            read_adapter(tmp_path / "adapter")

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (b"a\tb\n1\xff\t2\n", ":2: is not UTF-8"),
            (b"a\tb\n1\n", ":2: has 1 cells for 2 columns"),
            (b"a\ta\n1\t2\n", ":1: names the column 'a' twice"),
            (b"a\tb\n\0\0\0\t2\n", ":2: holds NUL"),
            (b"", ": is empty"),
        ],
    )
    def test_ledgers(self, put, data, message):
        with pytest.raises(InputError, match=rf"f\.tsv{message}") as error:
            results.read_rows(put(data, "f.tsv"))
        assert error.value.hint

    @pytest.mark.parametrize(
        "change",
        [{"metrics": []}, {"metrics": {"auth_nats": "-1"}}, {"n": "7"}, {"settings": 3}, {"metrics": {"x": True}}],
    )
    def test_evaluations(self, put, change):
        path = put(json.dumps(evaluation() | change), "base.json")
        with pytest.raises(InputError, match=r"base\.json: "):
            read_evaluation(path)

    @pytest.mark.parametrize("bad", [b"\xff\xfe", None])
    def test_gguf(self, put, tmp_path, bad):
        data = sound(tmp_path)["gguf"][""]
        if bad:
            data = data.replace(b"llama", bad + b"ama")
        else:  # the model's name as an array of 2**50 bytes: the library counted them all
            at = data.index(b"llama") - 12
            data = data[:at] + (9).to_bytes(4, "little") + (7).to_bytes(4, "little") + (2**50).to_bytes(8, "little")
        with pytest.raises(InputError, match="is not a GGUF file, or a damaged one"):
            from_gguf(put(data, "f.gguf"))

    def test_recommendations_of_the_wrong_type(self):
        for advice in ({"train": {"lr": "high"}}, {"train": 3}, {"train": {"rank": 1.5}}, {"train": {"epochs": True}}):
            with pytest.raises(ShlError, match=r"shl\.json"):
                configure(TrainConfig, "train", advice)
        assert configure(EvalConfig, "eval", {"judge": "toy", "competence": "toy"}).competence  # the folder's own words
        assert configure(TrainConfig, "train", {"train": {"lr": 1, "alpha": None, "targets": ["q"]}}).targets == ("q",)

    def test_json_is_strict(self):
        assert strict.loads("[" * 100 + "]" * 100) is not None
        for text in ("[" * 101 + "]" * 101, "NaN", "[1, -Infinity]", '{"a": {"b": 1, "b": 1}}'):
            with pytest.raises(ValueError):
                strict.loads(text)
        assert not strict.is_number(True) and not strict.is_number(math.inf) and strict.is_number(0)

    def test_a_long_quotation_is_cut(self, put):
        role = json.dumps(record(prompt=[{"role": "x" * 100_000, "content": ""}]))
        with pytest.raises(InputError) as error:
            list(records.read_records(put(role)))
        assert len(error.value.message) < 1000


def test_damage_of_every_kind_is_done(tmp_path):
    from random import Random

    for kind, blob in sound(tmp_path).items():
        assert any(damage(kind, blob, Random(i)) != blob for i in range(5))
