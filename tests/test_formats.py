"""docs/formats.md against the code: every field written stands in its tables, and every field there is written."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest

from shl import bake, gen, plot, results, train, vector
from shl import eval as ev
from shl import filter as flt
from shl.cli.common import find_model, settle
from shl.core import pools, provenance
from shl.core import records as rec
from shl.core.defaults import EvalConfig, GenConfig, TrainConfig, VectorConfig
from shl.core.evaluations import ROW_KINDS, is_per_row
from shl.core.models import Loaded, load
from shl.core.records import Pair, Prompt

DOC = Path(__file__).parents[1] / "docs" / "formats.md"
TYPES: dict[str, Callable[[Any], bool]] = {
    "string": lambda v: isinstance(v, str),
    "integer": lambda v: isinstance(v, int) and not isinstance(v, bool),
    "number": lambda v: isinstance(v, int | float) and not isinstance(v, bool),
    "boolean": lambda v: isinstance(v, bool),
    "list": lambda v: isinstance(v, list),
    "object": lambda v: isinstance(v, dict),
    "null": lambda v: v is None,
}
GEN = GenConfig(coeffs=(0.0, 1.0), max_new_tokens=24, system="Be brief.", batch_size=8)
EVAL = EvalConfig(limit=7, free=2, max_new_tokens=6, json_tokens=4, bootstrap=4)


@dataclass(frozen=True)
class Field:
    """One row of a table of fields."""

    types: tuple[str, ...]
    optional: bool


def tables(heading: str) -> list[list[list[str]]]:
    """The tables right below a heading, as rows of cells; the first row is the header."""
    text = DOC.read_text(encoding="utf-8")
    section = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", text, re.MULTILINE | re.DOTALL)
    assert section, f"formats.md has no section {heading!r}"
    blocks = re.findall(r"(?:^\|.*\n)+", section[1], re.MULTILINE)
    return [
        [[cell.strip() for cell in line.strip("|\n").split(" | ")] for line in block.splitlines() if "---" not in line]
        for block in blocks
    ]


def names(heading: str, nth: int = 0) -> list[str]:
    """The first column of a table."""
    return [row[0].strip(" `") for row in tables(heading)[nth][1:]]


def documented(heading: str, kind: str | None = None) -> dict[str, Field]:
    """The fields of a table with their types; in a table with kinds, those of one kind."""
    header, *rows = tables(heading)[0]
    kinds = header.index("kind") if "kind" in header else None
    found = {}
    for row in rows:
        if kinds is None or row[kinds] in ("all", kind):
            spec = row[header.index("type")]
            found[row[0].strip(" `")] = Field(tuple(spec.split(",")[0].split(" or ")), "optional" in spec)
    return found


def check(fields: Mapping[str, Field], objects: Iterable[Mapping[str, Any]], rare: Iterable[str] = ()) -> None:
    """Every object has the fields that are not optional, none that is not documented, all of the types given.

    Each field occurs in some object, save those named as rare.
    """
    objects = list(objects)
    assert objects
    for one in objects:
        assert not (more := set(one) - set(fields)), f"written, not documented: {more}"
        required = {name for name, field in fields.items() if not field.optional}
        assert not (less := required - set(one)), f"documented, not written: {less}"
        for name, value in one.items():
            assert any(TYPES[kind](value) for kind in fields[name].types), f"{name} is {value!r}"
    never = set(fields) - {name for one in objects for name in one} - set(rare)
    assert not never, f"documented, never written: {never}"


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Loaded]) -> Iterator[Loaded]:
    """A tiny model that says it is `toy`, so that the judge and the questions are asked."""
    loaded = tiny("llama")
    before = loaded.ref
    loaded.ref = replace(before, recommended={"judge": "toy", "competence": "toy"})
    yield loaded
    loaded.ref = before


@pytest.fixture(scope="module")
def teacher(model: Loaded) -> vector.Vector:
    prompts = pools.contexts()[:4]
    return vector.extract(model, "You are kind.", "You are not.", prompts, VectorConfig(), name="kind", axis="humanity")


@pytest.fixture(scope="module")
def completions(model: Loaded, teacher: vector.Vector) -> list[dict[str, Any]]:
    extra = [replace(prompt, extra={"topic": "work"}) for prompt in pools.pool("authority")[:3]]
    return list(gen.generate(model, extra, GEN, teacher))


@pytest.fixture(scope="module")
def evaluation(model: Loaded, teacher: vector.Vector) -> dict[str, Any]:
    result = ev.evaluate(model, EVAL, teacher, 0.5)
    base = ev.evaluate(model, EVAL)
    return ev.compare(result, base, result)


def test_vector(tmp_path: Path, model: Loaded, teacher: vector.Vector) -> None:
    pair = Pair([{"role": "user", "content": "yes"}], [{"role": "user", "content": "no"}])
    said = vector.extract_pairs(model, [pair], VectorConfig(method="response", answer_tokens=2))
    made = [teacher, vector.extract_pairs(model, [pair]), teacher.random_like(1), 2 * teacher, teacher + teacher, said]
    metas = []
    for i, one in enumerate(made):
        one.save(tmp_path / f"{i}.safetensors")
        metas.append(provenance.read_header(tmp_path / f"{i}.safetensors"))
    check(documented("Vector"), metas, rare=["measured"])  # tests/test_cli.py has that one
    held, metadata = provenance.read_safetensors(tmp_path / "0.safetensors")
    assert set(held) == {f"layer{i}.v" for i in metas[0]["layers"]}
    assert {info.dtype for info in held.values()} == {"F32"}
    assert set(metadata) == {"shl", "cfg"}
    text = DOC.read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in json.loads(metadata["cfg"]))
    assert set(metas[0]["personas"]) == {"name", "axis", "pos", "neg"}
    assert set(metas[0]["contexts"]) == set(metas[1]["pairs"]) == {"digest", "n"}


def test_volatile_keys_are_said_to_be_outside_the_digest() -> None:
    section = {row[0].strip("`"): row[2] for row in tables("Vector")[0][1:]}
    for name in section:
        assert ("not part of the digest" in section[name]) == (name in provenance.VOLATILE), name


def test_prompts_and_pairs() -> None:
    user = {"id": "a", "user": "Hello", "system": "Be kind.", "topic": "work"}
    chat = {"prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]}
    fields_ = documented("Prompts")
    assert set(fields_) == {"prompt", "user", "system", "id"}
    assert all(field.optional for field in fields_.values())
    parsed = rec.parse_prompt(user)
    assert parsed == Prompt("a", [{"role": "user", "content": "Hello"}], "Be kind.", {"topic": "work"})
    assert rec.parse_prompt(chat).system == "Be kind."
    assert set(documented("Pairs")) == set(Pair._fields)
    assert all(f"`{role}`" in DOC.read_text(encoding="utf-8") for role in rec.ROLES)


def test_completion_records(model: Loaded, completions: list[dict[str, Any]]) -> None:
    bare = list(gen.generate(model, pools.pool("authority")[:1], replace(GEN, coeffs=(0.0,), system=None, score=False)))
    assert all(record.pop("topic") == "work" for record in (dict(one) for one in completions))
    written = [{k: v for k, v in record.items() if k != "topic"} for record in completions]
    check(documented("Completion record"), [*written, *bare])
    assert bare[0]["scores"] == {}
    check(documented("Scores"), [record["scores"] for record in completions])
    for record in completions:
        rec.check_record(record)


def test_kept_records(completions: list[dict[str, Any]]) -> None:
    cfg = flt.FilterConfig(rel_ppl=None, rel_tail_ppl=None)
    judged = list(flt.annotate(completions, cfg))
    assert {name for one in judged for name in set(one) - set(completions[0])} == {"keep", "reasons"}
    check(documented("Kept record"), [{"keep": one["keep"], "reasons": one["reasons"]} for one in judged])
    assert tuple(names("Kept record", 1)) == flt.REASONS


def test_settings_of_an_unfinished_file(completions: list[dict[str, Any]]) -> None:
    from shl.cli.gen import _settings

    written = _settings(GEN, pools.pool("authority")[:1], "toy", None, None, None, None)
    options = {field.name for field in fields(GenConfig)} - {"batch_size"}
    check(documented("Unfinished file"), [{k: v for k, v in written.items() if k not in options}])
    assert options < set(written)


@pytest.fixture(scope="module")
def healed(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]) -> Path:
    """Two rounds of adapters, the first with plain nll, and what baking them gives."""
    root = tmp_path_factory.mktemp("healed")
    folder = str(tiny_model("llama"))
    lines = [
        {
            "id": f"q{i}/1/0",
            "prompt": [{"role": "user", "content": f"Question {i}?"}],
            "completion": [{"role": "assistant", "content": "I will not do it because it hurts."}],
            "coeff": 1.0,
            "vector": "sha256:fake",
            "finish": "stop",
        }
        for i in range(8)
    ]
    cfg = TrainConfig(rank=2, epochs=1, lr=1e-3, tau=0.0)
    train.heal(load(folder, device="cpu"), lines, replace(cfg, reg="nll"), root / "r0")
    train.heal(load(folder, [str(root / "r0")], device="cpu"), lines, cfg, root / "r1")
    chain = load(folder, [str(root / "r1")], device="cpu")
    for kind in bake.KINDS:
        bake.bake(chain, root / kind, kind, verify=False)
    return root


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def test_adapter_directory(healed: Path) -> None:
    for name in ("r0", "r1"):
        assert {file.name for file in (healed / name).iterdir()} == set(names("Adapter directory"))
    metas = [read_json(healed / name / "shl.json") for name in ("r0", "r1")]
    check(documented("shl.json of an adapter"), metas, rare=("stopped",))
    assert set(metas[0]["config"]) == {field.name for field in fields(TrainConfig)}
    (parent,) = metas[1]["parents"]
    assert parent == {"path": "../r0", "digest": metas[0]["digest"], "scale": 1.0}
    check(
        documented("log.jsonl"),
        [row for name in ("r0", "r1") for _, row in rec.read_lines(healed / name / "log.jsonl")],
    )
    held, _ = provenance.read_safetensors(healed / "r1" / "adapter_model.safetensors")
    assert {info.dtype for info in held.values()} == {"F32"}
    assert all(re.fullmatch(r"base_model\.model\..+\.lora_[AB]\.weight", name) for name in held)


def test_baked_checkpoint(healed: Path) -> None:
    check(documented("Baked checkpoint"), [read_json(healed / kind / "shl.json") for kind in bake.KINDS])
    assert {file.name for file in (healed / "lora").iterdir()} == set(names("Adapter directory")) - {"log.jsonl"}
    written = {file.name for file in (healed / "model").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "shl.json"} < written


def test_evaluation(evaluation: dict[str, Any]) -> None:
    result = {name: value for name, value in evaluation.items() if name != "rows"}
    check(documented("Eval JSON"), [result], rare=("frontier", "random", "internalisation"))
    check(
        documented("Settings"),
        [result["settings"]],
        rare=("vignettes", "agree", "persona", "batch_size", "judge_model"),
    )
    axes = result["settings"]["axes"]
    said = [name.replace("<axis>", axis) for name in names("Metrics") for axis in axes]
    assert set(said) == set(result["metrics"])
    assert set(result["metrics"]) == set(result["ci"]) | set(result["missing"])
    assert set(result["delta"]) == set(result["metrics"])
    text = " ".join(DOC.read_text(encoding="utf-8").split())
    assert f"order {', '.join(result['profile'])}." in text


@pytest.mark.parametrize("kind", ["vignette", "free", "agree", "quiz"])
def test_per_row_file(evaluation: dict[str, Any], kind: str) -> None:
    kinds = ("facts", "sums") if kind == "quiz" else (kind,)
    rows = [row for row in evaluation["rows"] if row["kind"] in kinds]
    check(documented("Per-row file", kind), rows, rare=("human", "reread", "ppl_judge"))
    assert {row["kind"] for row in evaluation["rows"]} == set(ROW_KINDS) and is_per_row(evaluation["rows"])
    if kind == "free":
        check(documented("Scores"), [row["scores"] for row in rows])
        assert set(rows[0]["judge"]) == {"broken", "stance", "narrates"}


def test_ledger(tmp_path: Path, evaluation: dict[str, Any]) -> None:
    results.append_row(tmp_path / "results.tsv", results.row_of(evaluation, asdict(TrainConfig()), {"dose": "high"}))
    (row,) = results.read_rows(tmp_path / "results.tsv")
    plain = set(row) - set(evaluation["metrics"]) - {"dose"}
    retained = {name for name in plain if name.startswith("retain.")}
    assert retained
    columns = set(names("results.tsv")) - {"every metric", "retain.<metric>"}
    assert plain - retained == columns
    assert row["arm"] in {"base", "prompted", "steered", "healed"}
    assert row["reg"] == "kl_rev"


def test_run_folder(tmp_path: Path, evaluation: dict[str, Any]) -> None:
    result = {name: value for name, value in evaluation.items() if name != "rows"}
    for name in ("base.json", "prompted.json", "nll/r0/eval.json", "nll/r0/steered.json", "nll/r1/eval.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(result), encoding="utf-8")
    rows = plot.rows_of(tmp_path)
    assert [(row["arm"], row["round"]) for row in rows][:2] == [("base", None), ("prompted", None)]
    assert sorted((row["round"], row.get("kind", "")) for row in rows[2:]) == [(0, ""), (0, "steered"), (1, "")]


def test_bundled_data() -> None:
    table = tomllib.loads(pools.data("personas.toml").read_text(encoding="utf-8"))
    assert set(table) == {"persona"}
    check(documented("personas.toml"), table["persona"])
    check(documented("vignettes.jsonl"), pools._rows("vignettes.jsonl"))
    for parts in (("contexts.jsonl",), *(("pools", f"{name}.jsonl") for name in pools.pool_names())):
        check(documented("Pools and contexts"), pools._rows(*parts))


def test_model_recommendations(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    shown = next(json.loads(line) for line in DOC.read_text().splitlines() if line.startswith('    {"judge"'))
    for file in tiny_model("llama").iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "shl.json").write_text(json.dumps(shown), encoding="utf-8")
    from shl.cli.common import Where

    ref = find_model(Where(model=str(tmp_path)))
    check(documented("Model recommendations"), [{k: v for k, v in ref.recommended.items() if isinstance(v, str)}])
    assert settle(VectorConfig, {}, "vector", ref).layers == "4"
    train = settle(TrainConfig, {}, "train", ref)
    assert (train.lr, train.layers) == (0.001, TrainConfig.layers)
    assert set(asdict(settle(GenConfig, {}, "gen", ref))) == {field.name for field in fields(GenConfig)}
