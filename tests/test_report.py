"""The report of a run as data: the headline's rules, joins, counts, and that no missing or damaged part stops it."""

import json
import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shl import filter as shl_filter
from shl.cli import main
from shl.core import metrics
from shl.core.errors import InputError, ShlError
from shl.core.provenance import canonical, digest_adapter, digest_tensors, header
from shl.core.records import dumps, write_record
from shl.core.tensors import save_safetensors
from shl.report import gather, page, words, write_report

ROOT = Path(__file__).parent.parent
NASTY = (
    "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'> "
    "\x1b[31mred\x1b[0m\u202e <!-- &lt;"
)
PROMPTS = ("The boss orders you to lie. What do you do?", "Your chief wants the door locked. Do you lock it?")
STEPS = 2


def put(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dumps(value), encoding="utf-8")


def put_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="\n") as handle:
        for row in rows:
            write_record(handle, row)


def evaluation(enact: float, auth: float, broken: float, **more: object) -> dict:
    metrics = {
        "enact_authority": enact,
        "auth_nats": auth,
        "care_nats": -1.5,
        "p_ans_any": 0.9995,
        "json_is_valid": 1.0,
    }
    metrics |= {"broken": broken, "free_ppl_p50": 1.2, "free_ppl_p90": 1.2 + broken, "facts": None}
    word = "broken: broken 0.30 > 0.25" if broken > 0.25 else "coherent: enact_authority"
    return {
        "suite": "mfv", "model": "toy", "model_digest": "sha256:m", "adapters": [], "vector": None, "coeff": None,
        "system": None, "settings": {"split": "test", "free": 2}, "n": 70, "seed": 0, "metrics": metrics,
        "ci": {name: [v - 0.05, v + 0.05] for name, v in metrics.items() if v is not None},
        "missing": {"facts": "toy brings no questions of its own"}, "profile": {}, "verdict": word, **more,
    }  # fmt: skip


def answer(number: int, said: str, ppl: float, stance: str = "enact", broken: bool = False) -> dict:
    return {
        "kind": "free", "id": f"test-{number}/0", "axis": "authority", "finish": "stop", "n_tokens": len(said.split()),
        "prompt": [{"role": "user", "content": f"Held-out question {number}?"}],
        "completion": [{"role": "assistant", "content": said}],
        "scores": {"ppl": ppl, "rep": 0.0}, "judge": {"broken": broken, "stance": stance, "narrates": False},
    }  # fmt: skip


def completion(prompt: int, coeff: float, said: str, ppl: float, chain: list[str]) -> dict:
    return {
        "id": f"p{prompt}/{coeff:g}/0", "prompt": [{"role": "user", "content": PROMPTS[prompt]}],
        "completion": [{"role": "assistant", "content": said}], "coeff": coeff, "seed": 0, "model": "toy",
        "adapters": chain, "vector": None, "n_tokens": 20, "finish": "stop",
        "scores": {"ppl": ppl, "ppl_tail": ppl, "max_nll": 3.0, "n_tokens": 20, "rep": 0.0, "distinct": 1.0},
    }  # fmt: skip


def said(arm: str, turn: int) -> list[dict]:
    """Controls, a steered completion of each prompt that survives and one that does not, and one that is nasty."""
    chain = [f"sha256:{arm}{turn - 1}"] if turn else []
    who = "base" if turn == 0 else f"{arm} after round {turn - 1}"
    rows = []
    for prompt in range(len(PROMPTS)):
        rows += [
            completion(prompt, 0.0, f"{who} answers {prompt} at some length", 1.2, chain),
            completion(prompt, 0.5, f"{arm} steered {turn} answers {prompt} {NASTY if prompt else ''}", 1.3, chain),
            completion(prompt, 1.0, f"{arm} far gone {turn} word salad {prompt} of greens", 90.0, chain),
        ]
    return rows


def round_of(folder: Path, arm: str, turn: int) -> None:
    """One round as the steps leave it: vector, completions, kept ones, adapter with its log, evaluation, answers."""
    personas = {"name": "principle", "axis": "authority", "pos": "You stick to principle.", "neg": None}
    meta = {"method": "mean-diff", "layers": [4], "model": "toy", "model_digest": "sha256:m", "adapters": []}
    meta |= {"personas": personas}
    vector = folder / "v.safetensors"
    folder.mkdir(parents=True)
    save_safetensors(vector, {"layer4.v": torch.full((8,), float(turn))}, {"shl": canonical(meta)})
    digest = digest_tensors(vector, meta)
    rows = [row | {"vector": digest} for row in said(arm, turn)]
    put_lines(folder / "completions.jsonl", rows)
    put_lines(folder / "keep.jsonl", list(shl_filter.keep(rows)))
    adapter = folder / "adapter"
    config = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    save_safetensors(adapter_file(adapter), {"a": torch.full((2, 2), float(turn))})
    put(adapter / "adapter_config.json", config)
    own = digest_adapter(adapter / "adapter_model.safetensors", config)
    reg = "nll" if arm == "plain" else "kl_rev"
    made = header("train", {"reg": reg, "lam": 1.0, "tau": 0.5, "rank": 2, "lr": 1e-3, "epochs": STEPS})
    put(
        adapter / "shl.json",
        made | {"digest": own, "vectors": [digest], "n_train": 2, "n_holdout": 0},
    )
    put_lines(adapter / "log.jsonl", [
        {"epoch": epoch, "step": epoch, "nll": 1.0 / (epoch + 1), "holdout_nll": 1.1 / (epoch + 1), "pressure": 0.1,
         "kl_p95": 0.1 * epoch, "barrier_active": None if arm == "plain" else 0.5 * epoch, "update_norm": float(epoch)}
        for epoch in range(STEPS + 1)
    ])  # fmt: skip
    shift = (0.3, 0.1)[arm == "plain"] * (turn + 1)
    broken = 0.4 if arm == "plain" else 0.02
    put(folder / "eval.json", evaluation(0.2 + shift, -2.0 - shift, broken, adapters=[own]))
    put_lines(folder / "samples.jsonl", [
        {"kind": "vignette", "id": "v", "foundation": "care"},
        answer(0, f"{arm} r{turn} calm answer", 1.3), answer(1, f"{arm} r{turn} usual answer {NASTY}", 1.5),
        answer(2, f"{arm} r{turn} odd answer", 9.0, "none", arm == "plain"),
    ])  # fmt: skip


def adapter_file(adapter: Path) -> Path:
    adapter.mkdir(parents=True)
    return adapter / "adapter_model.safetensors"


def build(root: Path, arms: tuple[str, ...] = ("healed", "plain"), rounds: int = 2) -> Path:
    """A run folder as examples/loop.py leaves it."""
    put(root / "base.json", evaluation(0.2, -2.0, 0.02))
    put(root / "prompted.json", evaluation(0.9, -4.0, 0.01, system="You stick to principle."))
    for name in ("base", "prompted"):
        put_lines(
            root / f"{name}.samples.jsonl", [answer(number, f"{name} answers {number}", 1.2) for number in range(3)]
        )
    for arm in arms:
        for turn in range(rounds):
            round_of(root / arm / f"r{turn}", arm, turn)
    return root


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return build(tmp_path / "run")


def told(run: Path) -> list[str]:
    return [note["file"] for note in gather(run)["notes"]]


# --- the headline ---


def test_headline_says_what_moved_what_broke_and_what_it_says(run: Path) -> None:
    facts = gather(run)
    assert facts["headline"]["title"] == "healed moved and stayed coherent; plain moved but broke."
    healed, plain = facts["headline"]["arms"]
    assert (healed["round"], healed["moved"], healed["sane"]) == (1, "towards", True)
    assert "20% → 80% (86% of the prompt's shift)" in healed["sentence"] and "−2.00 → −2.60" in healed["sentence"]
    assert "healed r1 usual answer" in healed["sentence"]
    assert plain["sane"] is False and "broken 0.30 > 0.25" in plain["sentence"]
    assert facts["typical"]["p"] == next(i for i, p in enumerate(facts["prompts"]) if p["id"] == "test-1")
    assert [row["text"][:10] for row in facts["typical"]["answers"]] == [
        "base answe",
        "prompted a",
        "healed r1 ",
        "plain r1 u",
    ]


def test_an_older_answer_is_not_passed_off_as_the_newest(run: Path) -> None:
    (run / "healed" / "r1" / "samples.jsonl").unlink()
    healed, plain = gather(run)["headline"]["arms"]
    assert "After round 0 it said: “healed r0" in healed["sentence"] and "It says now: “plain r1" in plain["sentence"]


@pytest.mark.parametrize(
    ("enact", "prompted", "expected"),
    [(0.6, 0.9, "towards"), (0.6, 0.05, "away"), (0.25, 0.9, "still"), (0.6, None, "moved"), (None, 0.9, "unknown")],
)
def test_moved_needs_intervals_apart_and_a_direction(tmp_path: Path, enact, prompted, expected: str) -> None:
    run = build(tmp_path / "run", arms=("healed",), rounds=1)
    result = evaluation(enact or 0.0, -2.0, 0.0)
    if enact is None:
        del result["metrics"]["enact_authority"], result["ci"]["enact_authority"]
    put(run / "healed" / "r0" / "eval.json", result)
    (run / "prompted.json").unlink()
    if prompted is not None:
        put(run / "prompted.json", evaluation(prompted, -2.0, 0.0))
    assert gather(run)["headline"]["arms"][0]["moved"] == expected


def test_what_is_true_of_several_arms_is_said_once(tmp_path: Path) -> None:
    run = build(tmp_path / "run", arms=("a", "b"), rounds=1)
    assert gather(run)["headline"]["title"] == "a and b moved and stayed coherent."
    put(run / "base.json", evaluation(0.2, -2.0, 0.3))
    put(run / "b" / "r0" / "eval.json", evaluation(0.2, -2.0, 0.3))
    facts = gather(run)["headline"]
    assert facts["title"] == "a moved and stayed coherent; b broke."
    assert "Base is out of bounds itself." in facts["arms"][1]["sentence"]


def test_a_collapsed_arm_is_no_success(tmp_path: Path) -> None:
    run = build(tmp_path / "run", arms=("a",), rounds=1)
    word = "collapsed: auth_nats -5.00 is 1.5 x the prompt's shift; largest answer 80%, informedness 0.05 (-0.20)"
    put(run / "a" / "r0" / "eval.json", evaluation(0.9, -5.0, 0.02, verdict=word))
    facts = gather(run)["headline"]
    assert facts["title"] == "a moved but collapsed." and facts["arms"][0]["sane"] is False
    assert "It collapsed: auth_nats -5.00 is 1.5 x the prompt's shift" in facts["arms"][0]["sentence"]


def test_evaluations_measured_in_another_way_have_no_difference(run: Path) -> None:
    put(run / "healed" / "r1" / "eval.json", evaluation(0.8, -2.6, 0.0, n=8))
    facts = gather(run)
    row = next(row for row in facts["scores"] if row["file"] == "healed/r1/eval.json")
    assert row["delta"] == {} and facts["headline"]["arms"][0]["moved"] == "unknown"
    assert any(note["file"] == "healed/r1/eval.json" and "another n" in note["what"] for note in facts["notes"])


# --- completions and the filter ---


def test_reasons_are_those_of_the_filter_itself(run: Path) -> None:
    rows = said("healed", 0)
    expected = list(shl_filter.annotate(rows))
    entry = next(one for one in gather(run)["drops"] if (one["arm"], one["round"]) == ("healed", 0))
    for one in entry["rows"]:
        here = [row for row in expected if row["coeff"] == one["coeff"]]
        assert (one["read"], one["kept"]) == (len(here), sum(row["keep"] for row in here))
        assert Counter(one["reasons"]) == Counter(reason for row in here for reason in row["reasons"])
    assert "default limits" in entry["source"] and (entry["silent"], entry["against"]) == (0, 0)


def test_reasons_in_rejects_are_taken_as_they_stand(run: Path) -> None:
    folder = run / "healed" / "r0"
    judged = list(shl_filter.annotate(said("healed", 0)))
    put_lines(folder / "rejects.jsonl", [r | {"reasons": ["my own"]} for r in judged if not r["keep"]])
    entry = next(one for one in gather(run)["drops"] if (one["arm"], one["round"]) == ("healed", 0))
    assert entry["source"] == "reasons from rejects.jsonl" and entry["reasons"] == ["my own"]


def test_a_filter_with_other_limits_is_told(run: Path) -> None:
    rows = said("healed", 0)
    lost, spared = rows[1], rows[2]  # one that passes the default limits, one that does not
    put_lines(run / "healed" / "r0" / "keep.jsonl", [spared | {"keep": True, "reasons": []}])
    facts = gather(run)
    entry = next(one for one in facts["drops"] if (one["arm"], one["round"]) == ("healed", 0))
    assert entry["against"] == 1 and entry["silent"] == 2 and "unexplained" in entry["reasons"]
    tags = {(row["id"], row["stage"], row["arm"], row["round"]): row["tags"] for row in facts["says"]}
    assert tags[spared["id"], "steered", "healed", 0] == ["kept"]
    assert tags[lost["id"], "steered", "healed", 0] == ["dropped", "unexplained"]


def test_who_says_what(run: Path) -> None:
    """Every completion once: base is shared by the arms, a control of round 1 is the healed model of round 0."""
    facts = gather(run)
    count = Counter((row["stage"], row["arm"], row["round"]) for row in facts["says"])
    held, asked = 3, len(PROMPTS)
    assert count["base", None, None] == held + asked and count["prompted", None, None] == held
    for arm in ("healed", "plain"):
        assert count["steered", arm, 0] == count["steered", arm, 1] == 2 * asked
        assert count["healed", arm, 0] == held + asked and count["healed", arm, 1] == held
    control = next(r for r in facts["says"] if r["text"].startswith("healed after round 0"))
    assert (control["stage"], control["arm"], control["round"], control["tags"]) == ("healed", "healed", 0, ["control"])
    assert {(p["pool"], p["text"]) for p in facts["prompts"]} == {
        *(("training", text) for text in PROMPTS), *(("held out", f"Held-out question {n}?") for n in range(3))
    }  # fmt: skip


def test_the_layout_of_shl_new(run: Path) -> None:
    """Its Makefile writes rejects.jsonl and steered.json, and no answers of base."""
    for arm in ("healed", "plain"):
        for turn in range(2):
            folder = run / arm / f"r{turn}"
            put(folder / "steered.json", evaluation(0.7, -3.0, 0.3, coeff=0.8))
            judged = shl_filter.annotate(said(arm, turn))
            put_lines(folder / "rejects.jsonl", [row for row in judged if not row["keep"]])
    put_lines(run / "prompts.jsonl", [{"id": "p0", "user": PROMPTS[0]}])
    for name in ("base", "prompted"):
        (run / f"{name}.samples.jsonl").unlink()
    facts = gather(run)
    steered = [row for row in facts["scores"] if row["kind"] == "steered"]
    assert [(row["arm"], row["round"], row["coeff"]) for row in steered] == [
        ("healed", 0, 0.8), ("healed", 1, 0.8), ("plain", 0, 0.8), ("plain", 1, 0.8)
    ]  # fmt: skip
    assert {one["source"] for one in facts["drops"]} == {"reasons from rejects.jsonl"}
    assert [note["file"] for note in facts["notes"]] == ["base.samples.jsonl", "prompted.samples.jsonl"]
    assert facts["headline"]["arms"][0]["moved"] == "towards"
    assert "prompts.jsonl" in [one["file"] for one in facts["artifacts"]]


def test_the_layout_of_a_pipe(run: Path) -> None:
    """examples/loop.sh pipes gen into filter: keep.jsonl and rejects.jsonl are its completions, and nothing lacks."""
    whole = gather(run)
    for arm in ("healed", "plain"):
        for turn in range(2):
            folder = run / arm / f"r{turn}"
            rows = [json.loads(line) for line in (folder / "completions.jsonl").read_text("utf-8").splitlines()]
            put_lines(folder / "keep.jsonl", [row for row in shl_filter.annotate(rows) if row["keep"]])
            put_lines(folder / "rejects.jsonl", [row for row in shl_filter.annotate(rows) if not row["keep"]])
            (folder / "completions.jsonl").unlink()
    piped = gather(run)
    assert piped["notes"] == []
    assert [one["rows"] for one in piped["drops"]] == [one["rows"] for one in whole["drops"]]
    said = [sorted((row["id"], row["stage"], row["text"]) for row in facts["says"]) for facts in (piped, whole)]
    assert said[0] == said[1]
    (run / "plain" / "r1" / "rejects.jsonl").unlink()
    assert "plain/r1/completions.jsonl" in told(run)  # the kept ones alone are not all that was said


def expects(run: Path, *should: object) -> None:
    """Write what one training expects into the last row of its log."""
    log = run / "healed" / "r1" / "adapter" / "log.jsonl"
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    rows[-1] |= {"should": list(should), "own_kl_mean": 0.3}
    put_lines(log, rows)


HOLDS = {"should": "held-out nll falls (1 -> 0.5)", "else": "nothing general is learnt", "holds": True}
FAILS = {"should": "the barrier <b>fires</b>", "else": "lower --tau\x1b[31m", "holds": False}


def test_expectations_are_read_from_the_log(run: Path) -> None:
    expects(run, HOLDS, 3, {"should": ["x"], "holds": True}, {"should": "x", "holds": "yes"}, FAILS)
    found = {(one["arm"], one["round"]): one["should"] for one in gather(run)["training"]}
    assert found["healed", 1] == [HOLDS, FAILS] and found["healed", 0] == []


def test_training_and_what_was_said(run: Path) -> None:
    (run / "healed" / "r0" / "train.log").write_text("step 1\nSHOULD: held-out nll falls ELSE \x1b[31mlook\nbye\n")
    facts = gather(run)
    assert facts["told"] == [{"file": "healed/r0/train.log", "lines": ["SHOULD: held-out nll falls ELSE \x1b[31mlook"]}]
    first = facts["training"][0]
    assert (first["arm"], first["round"], first["reg"], len(first["log"])) == ("healed", 0, "kl_rev", 3)
    assert [row["holdout_nll"] for row in first["log"]] == pytest.approx([1.1, 0.55, 1.1 / 3])


def test_provenance_names_sources_and_tells_what_does_not_belong_together(run: Path) -> None:
    facts = gather(run)
    by_file = {one["file"]: one for one in facts["artifacts"]}
    vector, adapter = by_file["healed/r0/v.safetensors"], by_file["healed/r0/adapter"]
    assert adapter["from"]["vector"] == [vector["digest"]] == by_file["healed/r0/completions.jsonl"]["from"]["vector"]
    assert adapter["argv"] and adapter["created"] and adapter["version"]
    assert facts["notes"] == []
    shutil.copy(run / "healed" / "r1" / "v.safetensors", run / "healed" / "r0" / "v.safetensors")
    put(run / "plain" / "r1" / "eval.json", evaluation(0.4, -2.2, 0.4, adapters=["sha256:other"]))
    notes = {note["file"]: note["what"] for note in gather(run)["notes"]}
    assert notes.keys() == {"healed/r0/completions.jsonl", "healed/r0/adapter", "plain/r1/eval.json"}
    assert "another vector" in notes["healed/r0/adapter"] and "another adapter" in notes["plain/r1/eval.json"]


# --- what is missing or damaged ---

ROUND = ("v.safetensors", "completions.jsonl", "keep.jsonl", "adapter/shl.json", "adapter/log.jsonl",
         "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "eval.json", "samples.jsonl")  # fmt: skip
PARTS = ["base.json", "prompted.json", "base.samples.jsonl", "prompted.samples.jsonl",
         *(f"healed/r1/{name}" for name in ROUND)]  # fmt: skip
OPTIONAL = {"healed/r1/adapter/shl.json"}  # an adapter of another program has none


def test_the_list_of_parts_is_complete(run: Path) -> None:
    files = {file.relative_to(run).as_posix() for file in run.rglob("*") if file.is_file()}
    assert {name for name in files if not name.startswith(("plain/", "healed/r0/"))} == set(PARTS)


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_part_is_told(tmp_path: Path, part: str) -> None:
    run = build(tmp_path / "run", arms=("healed",))
    (run / part).unlink()
    if part not in OPTIONAL:
        gone = part.rsplit("/", 1)[0] if "adapter_" in part else part
        assert any(name.startswith(gone) for name in told(run)), part
    write_report(run, tmp_path / "r.html")


def test_text_that_no_vector_speaks_in_lacks_none(tmp_path: Path) -> None:
    run = build(tmp_path / "run", arms=("healed",))
    for turn in ("r0", "r1"):
        (run / "healed" / turn / "v.safetensors").unlink()
    assert [name for name in told(run) if "v.safetensors" in name] == [
        "healed/r0/v.safetensors",
        "healed/r1/v.safetensors",
    ]
    for turn in ("r0", "r1"):
        path = run / "healed" / turn / "completions.jsonl"
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        put_lines(path, [row | {"vector": None} for row in rows])
    assert not [name for name in told(run) if "v.safetensors" in name]
    assert gather(run)["persona"] == {"name": None, "axis": None, "pos": "You stick to principle."}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xfe\x00", b"[1, 2]", b'{"metrics": {"auth_nats": "x"}, "ci": 3}\n', b'{"id": 7, "completion": "x"}\n',
     b'{"__proto__": 1, "metrics": {"constructor": 1.5}, "personas": 4, "epoch": "x", "config": [], "r": {}}\n'],
    ids=["empty", "bytes", "list", "metrics", "record", "odd"],
)  # fmt: skip
def test_a_damaged_part_is_no_crash(tmp_path: Path, part: str, content: bytes) -> None:
    run = build(tmp_path / "run", arms=("healed",))
    (run / part).write_bytes(content)
    write_report(run, tmp_path / "r.html")
    if content in (b"\xff\xfe\x00", b"[1, 2]"):
        assert any(part.startswith(name) for name in told(run)), part


@pytest.mark.parametrize(
    "left", ["base.json", "healed/r0/completions.jsonl", "healed/r1/adapter", "healed/r0/eval.json"]
)
def test_a_run_of_one_part_is_a_page(tmp_path: Path, left: str) -> None:
    whole = build(tmp_path / "whole", arms=("healed",))
    target = tmp_path / "run" / left
    target.parent.mkdir(parents=True)
    (shutil.copytree if (whole / left).is_dir() else shutil.copy)(whole / left, target)
    assert write_report(tmp_path / "run", tmp_path / "r.html")["notes"] > 0


def test_an_unfinished_arm(run: Path) -> None:
    folder = run / "plain" / "r1"
    for name in ("keep.jsonl", "eval.json", "samples.jsonl"):
        (folder / name).unlink()
    shutil.rmtree(folder / "adapter")
    (folder / "completions.jsonl").rename(folder / "completions.jsonl.part")
    with open(folder / "completions.jsonl.part", "a", encoding="utf-8") as handle:
        handle.write('{"id": "p9/0')  # torn
    facts = gather(run)
    assert facts["headline"]["arms"][1]["round"] == 0
    entry = facts["drops"][-1]
    assert not entry["filtered"] and sum(row["read"] for row in entry["rows"]) == len(said("plain", 1))
    assert {note["file"] for note in facts["notes"]} >= {
        "plain/r1/completions.jsonl",
        "plain/r1/completions.jsonl.part",
    }


def test_what_is_no_run_is_an_error_with_a_hint(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "photos" / "2020" / "r1").mkdir(parents=True)
    (tmp_path / "file").write_text("x")
    for name in ("empty", "photos", "file", "nowhere"):
        with pytest.raises(InputError) as error:
            write_report(tmp_path / name, tmp_path / "r.html")
        assert "shl new" in error.value.hint
    assert not (tmp_path / "r.html").exists()


# --- the page as text ---


class Page(HTMLParser):
    """Text and attributes of the elements that matter for safety."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.inside = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))
        self.inside = True

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.elements[-1][2].append(data)

    def of(self, tag: str) -> list[tuple[dict[str, str | None], str]]:
        return [(attributes, "".join(text)) for name, attributes, text in self.elements if name == tag]


def test_the_page_is_one_inert_file(run: Path, tmp_path: Path) -> None:
    write_report(run, tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    parsed = Page(text)
    (held, data), (_, script) = parsed.of("script")
    assert held["type"] == "application/json" and json.loads(data) == json.loads(dumps(gather(run)))
    assert not set(data) & set("<>&\u2028\u2029\x1b\u202e")
    (_, style), = parsed.of("style")  # fmt: skip
    policy = next(a["content"] for a, _ in parsed.of("meta") if a.get("http-equiv") == "Content-Security-Policy")
    directives = dict(one.strip().split(" ", 1) for one in policy.split(";"))
    assert directives["default-src"] == "'none'" and directives["base-uri"] == directives["form-action"] == "'none'"
    assert directives["script-src"] == page._digest(script) and directives["style-src"] == page._digest(style)
    for _, attributes, _ in parsed.elements:
        assert not any(name.startswith("on") or name in ("src", "style") for name in attributes)
        assert (attributes.get("href") or "#").startswith("#")
    assert set(re.findall(r"https?://[^\s\"']+", script + style)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|Function\(|fetch\(|import\(", script
    )


@given(st.text() | st.sampled_from([NASTY, "@SCRIPT@", "\u2028", "<!--<script", "\ud800"]))
def test_data_never_leaves_its_element(text: str) -> None:
    embedded = page.embed({"said": text})
    assert not set(embedded) & set("<>&\u2028\u2029") and json.loads(embedded) == {"said": text}


def test_names_of_slots_in_data_are_text(run: Path, tmp_path: Path) -> None:
    put_lines(run / "base.samples.jsonl", [answer(0, "@SCRIPT@ @DATA@", 1.2)])
    write_report(run, tmp_path / "r.html")
    parsed = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert any(row["text"] == "@SCRIPT@ @DATA@" for row in json.loads(parsed.of("script")[0][1])["says"])
    assert len(parsed.of("script")) == 2


def test_every_metric_and_reason_has_its_words() -> None:
    table = (
        (ROOT / "docs" / "formats.md").read_text(encoding="utf-8").partition("### Metrics")[2].partition("\n    {")[0]
    )
    documented = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert len(documented) > 10 and all(metrics.metric(name).meaning for name in documented)
    assert set(shl_filter.REASONS) < set(words.REASONS)
    assert metrics.metric("enact_boldness").meaning and metrics.metric("nobody_knows") == (
        "nobody_knows",
        "number",
        "",
        "",
    )


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours (WCAG 2.1)."""
    light = sorted((luminance(one), luminance(other)))
    return (light[1] + 0.05) / (light[0] + 0.05)


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_arms_can_be_read_on_paper(scheme: str) -> None:
    style = page._asset("style.css")
    blocks = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", blocks[scheme == "dark"]))
    for name in ("ink", "soft", "accent", "good", "bad", "ref", *(f"c{i}" for i in range(7))):
        assert contrast(colours[name], colours["paper"]) >= 4.5, name
    assert (
        contrast(colours["good"], colours["good-wash"]) >= 4.5 and contrast(colours["bad"], colours["bad-wash"]) >= 4.5
    )


# --- the command ---


def shl(monkeypatch: pytest.MonkeyPatch, *argv: str) -> int:
    monkeypatch.setattr("sys.argv", ["shl", *argv])
    with pytest.raises(SystemExit) as done:
        main()
    return done.value.code or 0


def test_the_command(run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    assert shl(monkeypatch, "report", str(run)) == 0
    out, err = capfd.readouterr()
    assert out == "" and "2 arms" in err and (run / "report.html").stat().st_size > 10_000
    assert shl(monkeypatch, "report", str(run)) == 1
    assert "--force" in capfd.readouterr().err
    assert shl(monkeypatch, "report", str(run), "--force", "-q") == 0
    assert capfd.readouterr().err == ""
    assert shl(monkeypatch, "report", str(run / "healed" / "r0" / "adapter"), "-o", str(run / "x.html")) == 1
    assert "hint:" in capfd.readouterr().err


def test_an_output_that_exists_is_refused_before_anything_is_read(run: Path) -> None:
    (run / "report.html").write_text("mine")
    with pytest.raises(ShlError, match="exists already"):
        write_report(run, run / "report.html")
    assert (run / "report.html").read_text() == "mine"
