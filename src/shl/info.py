"""What any artifact is, where it came from, and its numbers. Needs no torch: headers are read directly."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from shl import results
from shl.core.console import plain
from shl.core.errors import InputError
from shl.core.evaluations import is_per_row
from shl.core.files import refuse_links_out
from shl.core.provenance import (
    KEY,
    check_adapter,
    digest_adapter,
    digest_file,
    digest_tensors,
    read_header,
    read_safetensors,
)
from shl.core.records import check_record, read_lines
from shl.core.strict import read_object

Facts = dict[str, Any]


def describe(path: Path | str) -> Facts:
    """The facts about an artifact; `kind` says what it is."""
    path = Path(path)
    if not path.exists():
        raise InputError("no such file or folder", where=str(path), hint="check the path")
    facts = _folder(path) if path.is_dir() else _file(path)
    return {"path": str(path), **facts}


def _file(path: Path) -> Facts:
    """A single file, told by its name and its content."""
    readers: dict[str, Callable[[Path], Facts]] = {
        ".safetensors": _tensors,
        ".tsv": _ledger,
        ".json": _json,
        ".jsonl": _jsonl,
        ".part": _jsonl,
    }
    if path.suffix not in readers:
        raise InputError(
            "is not a kind of file that shl knows", where=str(path), hint=f"known: {', '.join(sorted(readers))}"
        )
    return readers[path.suffix](path)


def _folder(path: Path) -> Facts:
    """An adapter, a model, or a folder that holds artifacts."""
    if (path / "adapter_config.json").is_file():
        return _adapter(path)
    if (path / "config.json").is_file():
        return _model(path)
    found = sorted(
        str(item.relative_to(path))
        for name in ("*.safetensors", "*.jsonl", "*.json", "*.tsv", "*.html", "*.png")
        for item in path.rglob(name)
        if not any(part.startswith(".") for part in item.relative_to(path).parts)
    )
    if not found:
        raise InputError("holds nothing that shl knows", where=str(path))
    return {"kind": "run folder", "files": found}


def _tensors(path: Path) -> Facts:
    """A vector, or some other safetensors file."""
    tensors, metadata = read_safetensors(path)
    shapes = {name: f"{info.dtype} {'x'.join(map(str, info.shape))}" for name, info in tensors.items()}
    if KEY not in metadata:
        return {"kind": "safetensors", "tensors": shapes, "metadata": sorted(metadata)}
    meta = read_header(path)
    return {"kind": "vector", **meta, "tensors": shapes, "digest": digest_tensors(path, meta)}


def _adapter(path: Path) -> Facts:
    """A PEFT adapter directory."""
    config = read_object(refuse_links_out(path, "adapter_config.json"))
    tensors, _ = read_safetensors(refuse_links_out(path, "adapter_model.safetensors"))
    facts: Facts = {
        "kind": "adapter",
        "rank": config.get("r"),
        "alpha": config.get("lora_alpha"),
        "base_model": config.get("base_model_name_or_path"),
        "targets": config.get("target_modules"),
        "tensors": len(tensors),
        "numbers": sum(math.prod(info.shape) for info in tensors.values()),
    }
    if (path / "shl.json").is_file():
        facts["shl"] = read_object(refuse_links_out(path, "shl.json"))
        check_adapter(path, digest_adapter(path / "adapter_model.safetensors", config), facts["shl"])
    if (path / "log.jsonl").is_file():
        steps = [row for _, row in read_lines(refuse_links_out(path, "log.jsonl"))]
        facts["log"] = {"lines": len(steps), "last": steps[-1] if steps else None}
    return facts


def _model(path: Path) -> Facts:
    """A model folder: the embedded model, a baked one, or any checkpoint."""
    config = read_object(path / "config.json")
    files = sorted(path.glob("*.safetensors"))
    headers = [read_safetensors(file)[0] for file in files]
    facts: Facts = {
        "kind": "model",
        "architecture": config.get("architectures"),
        "type": config.get("model_type"),
        "numbers": sum(math.prod(info.shape) for header in headers for info in header.values()),
        "dtypes": dict(Counter(info.dtype for header in headers for info in header.values())),
        "weights": {file.name: digest_file(file) for file in files},
    }
    if (path / "shl.json").is_file():
        facts["shl"] = read_object(path / "shl.json")
    return facts


def _ledger(path: Path) -> Facts:
    """results.tsv."""
    rows = results.read_rows(path)
    return {
        "kind": "ledger",
        "rows": len(rows),
        "arms": dict(Counter(row.get("arm", "") or "-" for row in rows)),
        "models": dict(Counter(f"{row.get('model', '')} {row.get('model_digest', '')}".strip() for row in rows)),
        "columns": list(rows[0]) if rows else [],
    }


def _json(path: Path) -> Facts:
    """An evaluation, or another JSON object."""
    value = read_object(path)
    kind = "evaluation" if {"suite", "metrics"} <= value.keys() else "json"
    return {"kind": kind, **value}


def _jsonl(path: Path) -> Facts:
    """Completion records, items of an evaluation, prompts, pairs, or some other lines."""
    rows = list(read_lines(path))
    if not rows:
        return {"kind": "empty", "lines": 0}
    if is_per_row([row for _, row in rows]):
        return _items(rows)
    first = rows[0][1]
    if "completion" in first:
        for where, record in rows:
            check_record(record, where)
        return _records([record for _, record in rows], unfinished=path.suffix == ".part")
    kinds = {"pos": "pairs", "prompt": "prompts", "user": "prompts"}
    kind = next((kind for key, kind in kinds.items() if key in first), "jsonl")
    return {"kind": kind, "lines": len(rows), "keys": dict(Counter(key for _, row in rows for key in row))}


def _items(rows: list[tuple[str, dict[str, Any]]]) -> Facts:
    """The items of an evaluation: how many of each kind, and what was found of them, whatever their order."""
    kinds = Counter(row["kind"] for _, row in rows)
    facts: Facts = {"kind": "evaluation items", "lines": len(rows), "items": dict(sorted(kinds.items()))}
    if spoken := [(where, row) for where, row in rows if row["kind"] == "free"]:
        for where, row in spoken:
            check_record(row, where)
        answers = [row for _, row in spoken]
        judged = [row["judge"] for row in answers if isinstance(row.get("judge"), dict)]
        facts["answers"] = {
            "axis": _distinct(answers, "axis"),
            "finish": _distinct(answers, "finish"),
            "n_tokens": _quantiles(row.get("n_tokens") for row in answers),
            "scores": _scores(answers),
            **({name: _distinct(judged, name) for name in ("broken", "stance", "narrates")} if judged else {}),
        }
    if right := [row["right"] for _, row in rows if isinstance(row.get("right"), bool)]:
        facts["right"] = f"{sum(right)} of {len(right)}"
    return facts


def _records(records: list[dict[str, Any]], unfinished: bool) -> Facts:
    """Completion records: how many by coefficient, and their scores."""
    facts: Facts = {
        "kind": "unfinished completions" if unfinished else "completions",
        "lines": len(records),
        **{name: _distinct(records, name) for name in ("model", "vector", "adapters", "coeff", "seed", "finish")},
        "n_tokens": _quantiles(record.get("n_tokens") for record in records),
        "scores": _scores(records),
    }
    if any("keep" in record for record in records):
        facts["keep"] = _distinct(records, "keep")
        facts["reasons"] = dict(Counter(reason for record in records for reason in record.get("reasons") or []))
    return facts


def _scores(records: list[dict[str, Any]]) -> Facts:
    """Quantiles of each score."""
    names = sorted({name for record in records for name in record.get("scores") or {}})
    return {name: _quantiles((record.get("scores") or {}).get(name) for record in records) for name in names}


def _distinct(records: list[dict[str, Any]], name: str, most: int = 12) -> Facts | str:
    """How often each value occurs, unless there are too many to list."""
    counts = Counter(json.dumps(record.get(name)) for record in records)
    if len(counts) > most:
        return f"{len(counts)} different values"
    return {str(json.loads(value)) if value != "null" else "none": count for value, count in counts.items()}


def _quantiles(values: Iterable[Any]) -> Facts | None:
    """Minimum, median, 90th percentile and maximum of the numbers among some values."""
    numbers = sorted(float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool))
    if not numbers:
        return None
    p90 = numbers[min(len(numbers) - 1, math.ceil(0.9 * len(numbers)) - 1)]
    return {"min": numbers[0], "p50": statistics.median(numbers), "p90": p90, "max": numbers[-1]}


def lines(facts: Facts, indent: str = "") -> list[str]:
    """Facts as indented text, one a line, for people. What files say is shown and never obeyed by a terminal."""
    shown: list[str] = []
    for key, value in facts.items():
        name = plain(key)
        if isinstance(value, dict):
            shown += [f"{indent}{name}:", *lines(value, indent + "  ")]
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
            shown.append(f"{indent}{name}:")
            for item in value:
                shown += [f"{indent}  -", *lines(item if isinstance(item, dict) else {"": item}, indent + "    ")]
        elif isinstance(value, list):
            shown.append(f"{indent}{name}: {plain(', '.join(map(str, value))) or '-'}")
        else:
            text = f"{value:.6g}" if isinstance(value, float) else "-" if value is None else plain(str(value))
            shown.append(f"{indent}{name}: {text}")
    return shown
