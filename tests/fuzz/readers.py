"""Every reader of the product on one artifact: it accepts what is sound, or refuses in a sentence. Else a Defect."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fuzz.seeds import Blob, evaluation, sound
from shl import filter as flt
from shl import info, report, results
from shl.cli import train as cli_train
from shl.cli.common import adapter_header, vector_header
from shl.core import defaults, provenance, records
from shl.core.adapters import factors, resolve_chain
from shl.core.console import plain
from shl.core.errors import InputError, ShlError
from shl.core.evaluations import read_evaluation
from shl.core.heal_data import select
from shl.core.heal_part import Checkpoint
from shl.core.locate import find
from shl.core.part import PartFile
from shl.core.vectors import Vector
from shl.eval import compare
from shl.plot import dose, training
from shl.plot import path as trajectory

PATIENCE = 10.0  # seconds of computing; a reader that takes longer hangs, as does one that waits 30 times as long
SETTINGS = {"prompts": "sha256:1", "seed": 0}
CONFIGS = (defaults.VectorConfig, defaults.GenConfig, defaults.TrainConfig, defaults.EvalConfig, defaults.DoseConfig)
STEPS = ("vector", "gen", "train", "eval", "dose")


class Defect(AssertionError):
    """A reader crashed, hung, took damage for sound, or refused without saying what and where."""


def check(kind: str, blob: Blob, original: Blob, folder: Path) -> str:
    """Run the readers of one kind on an artifact in a scratch folder; "accepted" or "refused"."""
    target = _put(kind, blob, folder)
    try:
        with _patience():
            READERS[kind](target, blob, original)
        return "accepted"
    except ShlError as error:
        _judge(error, target)
        return "refused"
    except Defect:
        raise
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        raise Defect(f"{type(error).__name__}: {error}") from error
    finally:
        _remove(folder)


def _put(kind: str, blob: Blob, folder: Path) -> Path:
    names = {"plain": "f.txt", "vector": "f.safetensors", "ledger": "f.tsv", "evaluation": "base.json",
             "recommended": "model/shl.json", "gguf": "f.gguf", "adapter": "f", "run": "f",
             "part": "f.jsonl.part", "training": "f.part"}  # fmt: skip
    target = folder / names.get(kind, "f.jsonl")
    target.parent.mkdir(exist_ok=True)
    if kind == "recommended":
        (target.parent / "config.json").write_text("{}")
    for name, data in blob.items():
        path = target / name if names.get(kind) == "f" else target.with_name(target.name + name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return target


def _remove(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def _patience() -> Iterator[None]:
    def late(*_: object) -> None:
        raise Defect(f"took more than {PATIENCE} s")

    timers = ((signal.SIGPROF, signal.ITIMER_PROF, PATIENCE), (signal.SIGALRM, signal.ITIMER_REAL, 30 * PATIENCE))
    before = [signal.signal(number, late) for number, _, _ in timers]
    for _, timer, seconds in timers:
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for (number, timer, _), handler in zip(timers, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)


def _judge(error: ShlError, target: Path) -> None:
    """A refusal names the file, the line of a file of lines, and what to do; it is one short sentence."""
    said = f"{error.message!r} ({error.hint!r})"
    if "\n" in error.message or len(error.message) > 1200 or plain(error.hint) != error.hint:
        raise Defect(f"not one plain sentence: {said}")
    if not error.hint:
        raise Defect(f"does not say what to do: {said}")
    if isinstance(error, InputError):
        if target.name.split(".")[0] not in error.message and str(target.parent) not in error.message:
            raise Defect(f"does not name the file: {said}")
        by_line = target.suffix in (".jsonl", ".tsv", ".txt")
        if by_line and not re.search(r":\d+: |holds no (prompts|pairs)|is empty", error.message):
            raise Defect(f"does not name the line: {said}")


def _require(sound: bool, what: str) -> None:
    if not sound:
        raise Defect(f"accepted {what}")


# --- the readers ---


def _drawn(rows: list[dict[str, Any]]) -> None:
    """What `shl plot` makes of rows of a ledger, short of the picture."""
    trajectory._gather(rows)
    dose._panels(*dose._gather(rows))


def _told(path: Path) -> None:
    """`shl info` in both forms: text that a terminal shows and does not obey, and JSON."""
    facts = info.describe(path)
    for line in info.lines(facts):
        _require(plain(line) == line, f"{line!r}, which a terminal would obey")
    json.loads(records.dumps(facts))


def _records(path: Path, blob: Blob, original: Blob) -> None:
    rows = list(records.read_records(path))
    lines = [line for line in blob[""].removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()]
    _require(len(rows) == len(lines), f"{len(rows)} records in {len(lines)} lines")
    for row, line in zip(rows, lines, strict=True):
        text = line.decode().lstrip("\ufeff\x1e")
        pairs = json.loads(text, object_pairs_hook=list)
        _require(len(dict(pairs)) == len(pairs), "a key that stands twice")
        _require(json.loads(text) == row == json.loads(records.dumps(row)), "a record that does not come back")
        _sound_record(row)
    _told(path)
    _quietly(lambda: list(select(rows, defaults.TrainConfig(), str(path))))
    _quietly(lambda: cli_train._origin(rows, False))
    for cfg in (defaults.FilterConfig(), defaults.FilterConfig(max_ppl=50.0, max_tail_ppl=80.0, min_keep=0)):
        tally = flt.Tally()
        _quietly(lambda cfg=cfg, tally=tally: [records.dumps(row) for row in flt.annotate(rows, cfg, tally=tally)])
        tally.table()


def _sound_record(row: dict[str, Any]) -> None:
    """The table of docs/formats.md, written down a second time."""
    number = (int, float)
    kinds = {"id": str, "prompt": list, "completion": list, "coeff": number, "seed": int, "model": str,
             "adapters": list, "vector": str, "n_tokens": int, "finish": str, "scores": dict, "keep": bool,
             "reasons": list}  # fmt: skip
    for name, kind in kinds.items():
        value = row.get(name)
        _require(value is None or isinstance(value, kind), f"{name} {value!r}")
        _require(kind is bool or not isinstance(value, bool), f"{name} {value!r}")
        _require(not isinstance(value, float) or math.isfinite(value), f"{name} {value!r}")
    for message in (*row["prompt"], *row["completion"]):
        _require(message["role"] in records.ROLES and isinstance(message["content"], str), f"message {message!r}")
    for name in ("ppl", "ppl_tail", "rep", "n_tokens", "max_nll", "distinct"):
        value = (row.get("scores") or {}).get(name)
        _require(value is None or (isinstance(value, number) and not isinstance(value, bool)), f"score {value!r}")


def _quietly(work: Callable[[], object]) -> None:
    """A step may refuse what it reads, too; its messages name records rather than files."""
    try:
        work()
    except ShlError as error:
        _require(bool(error.message) and "\n" not in error.message, f"a message such as {error.message!r}")


def _prompts(path: Path, blob: Blob, original: Blob) -> None:
    found = records.read_prompts(path)
    text = blob[""].decode().split("\n")
    _require(len(found) == sum(bool(line.lstrip("\ufeff").strip()) for line in text), "lines without a prompt")
    _require(len({prompt.id for prompt in found}) == len(found), "one id twice")
    for prompt in found:
        said = [prompt.system or "", *(message["content"] for message in prompt.messages)]
        _require(all("\0" not in one for one in said) or path.suffix == ".jsonl", "NUL in plain text")
        "".join(said).encode()
        records.dumps(prompt.extra)
    if path.suffix == ".jsonl":
        _told(path)


def _pairs(path: Path, blob: Blob, original: Blob) -> None:
    for pair in records.read_pairs(path):
        _require(type(pair.pos) is type(pair.neg), "a chat against a string")
    _told(path)


def _vector(path: Path, blob: Blob, original: Blob) -> None:
    meta = vector_header(path)
    vector = Vector.load(path)
    _require(all(torch.isfinite(v).all() for v in vector.layers.values()), "numbers that are not finite")
    if "digest" in meta and blob[""] != original[""]:
        saved = path.with_name("original.safetensors")
        saved.write_bytes(original[""])
        _require(vector.digest == Vector.load(saved).digest, "a vector whose digest does not hold")
    vector.random_like(0)
    _told(path)


def _adapter(path: Path, blob: Blob, original: Blob) -> None:
    adapter_header(str(path))
    (adapter,) = resolve_chain([str(path)], parents=False)
    for both in factors(adapter).values():
        _require(bool(torch.isfinite(both.b @ both.a).all()), "a change that is not finite")
    recorded = adapter.meta.get("digest")
    _require(recorded in (None, adapter.digest), "an adapter whose digest does not hold")
    _told(path)


def _ledger(path: Path, blob: Blob, original: Blob) -> None:
    rows = results.read_rows(path)
    _require(all(row.keys() == rows[0].keys() for row in rows), "rows of different widths")
    if rows and "arm" in rows[0]:
        for line in results.markdown(rows).split("\n"):
            outside = re.sub(r"(?<!\\)(`+) ?.*? ?\1", "", line)  # in code nothing is markup
            _require(plain(line) == line and "<script" not in outside, f"{line!r} for a terminal or a page")
    _drawn(rows)
    _told(path)
    results.append_row(path, {"arm": "=x", "new": 1})
    again = results.read_rows(path)
    _require([{k: row[k] for k in rows[0]} for row in again[:-1]] == rows if rows else True, "a row and lost another")


def _evaluation(path: Path, blob: Blob, original: Blob) -> None:
    value = read_evaluation(path)
    for part in ("metrics", "delta", "retain"):
        for number in (value.get(part) or {}).values():
            _require(number is None or math.isfinite(number), f"{part} {number!r}")
    _quietly(lambda: records.dumps(compare(evaluation(), value)))
    _quietly(lambda: records.dumps(compare(evaluation(), evaluation(), value)))
    trajectory._gather(trajectory.rows_of(path.parent))
    _told(path)


def _recommended(path: Path, blob: Blob, original: Blob) -> None:
    ref = find(str(path.parent))
    for cls, step in zip(CONFIGS, STEPS, strict=True):
        _quietly(lambda cls=cls, step=step: defaults.configure(cls, step, ref.recommended))


def _gguf(path: Path, blob: Blob, original: Blob) -> None:
    from shl.export import from_gguf

    vector = from_gguf(path)
    _require(all(torch.isfinite(v).all() for v in vector.layers.values()), "numbers that are not finite")


def _part(path: Path, blob: Blob, original: Blob) -> None:
    whole = path.with_name(path.name.removesuffix(".part"))
    part = PartFile(whole, SETTINGS, resume=True)
    with part.writer() as lines:
        records.write_record(lines, {"id": "last"})
    written = whole.read_bytes().splitlines(keepends=True)
    _require(len(written) == part.lines + 1 and all(json.loads(line) is not ... for line in written), "a torn line")


def _training(path: Path, blob: Blob, original: Blob) -> None:
    states = []
    for number, data in enumerate((blob[""], original[""])):
        (path.parent / f"f{number}.part").write_bytes(data)
        held = Checkpoint(path.parent / f"f{number}", SETTINGS)
        states.append(held._read())
        held.release()
    (said, tensors), (wanted, others) = states
    same = tensors.keys() == others.keys() and all(torch.equal(tensors[name], one) for name, one in others.items())
    _require(said == wanted and same, "the state of another training")


def _run(path: Path, blob: Blob, original: Blob) -> None:
    """`shl report` makes its page of whatever there is, and says on it what is damaged; `shl plot` may refuse."""
    facts = report.gather(path)
    for note in facts["notes"]:
        _require(not note["what"].startswith("cannot be read: "), f"what a reader stumbles over: {note}")
        _require("\n" not in note["what"] and str(path.parent) not in note["what"], f"a note such as {note}")
    page = report.render(facts)
    sound_page = page.count("<script") == page.count("</script>") == 2 and page.endswith("</html>\n")
    _require(sound_page and "<script>alert" not in page, "a page that its data has broken")
    noted = {note["file"].split("/adapter")[0] for note in facts["notes"]}
    for name in ("nll/r0/v.safetensors", "nll/r0/adapter/adapter_model.safetensors"):
        told = name.split("/adapter")[0] in noted or _same(blob, original, path, name)
        _require(blob[name] == original[name] or told, f"{name}, which is damaged, without a note")
    _told(path)
    _quietly(lambda: trajectory._gather(trajectory.rows_of(path)))
    _quietly(lambda: dose._panels(*dose._gather([path])))
    _quietly(lambda: training._panels(training._read(path), ["nll"]))
    usual = _notes_of_a_sound_run()
    for note in facts["notes"]:
        if (note["file"], note["what"]) not in usual:  # the page is how a run's damage is refused
            raise InputError(note["what"], where=str(path / note["file"]), hint="the page says so")


@cache
def _notes_of_a_sound_run() -> set[tuple[str, str]]:
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        target = _put("run", sound(scratch / "seeds")["run"], scratch)
        return {(note["file"], note["what"]) for note in report.gather(target)["notes"]}


def _same(blob: Blob, original: Blob, path: Path, name: str) -> bool:
    """Whether other bytes mean the same: the digest of a header and its tensors holds."""
    (before := path.with_name("before.safetensors")).write_bytes(original[name])
    return provenance.digest_tensors(path / name) == provenance.digest_tensors(before)


def _rows(path: Path, blob: Blob, original: Blob) -> None:
    _told(path)


READERS: dict[str, Callable[[Path, Blob, Blob], None]] = {
    "records": _records, "kept": _records, "prompts": _prompts, "plain": _prompts, "pairs": _pairs, "vector": _vector,
    "adapter": _adapter, "ledger": _ledger, "evaluation": _evaluation, "recommended": _recommended, "gguf": _gguf,
    "part": _part, "training": _training, "rows": _rows, "run": _run,
}  # fmt: skip
