"""Where every artifact of a run came from, as `shl info` tells it, and whether the pieces belong together."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from shl.core.errors import InputError
from shl.core.provenance import digest_file
from shl.core.runs import REFERENCES, Round
from shl.info import describe, lines
from shl.report.notes import Notes
from shl.report.words import text

Facts = dict[str, Any]

FILES = ("v.safetensors", "completions.jsonl", "keep.jsonl", "rejects.jsonl", "adapter", "steered.json", "eval.json",
         "samples.jsonl")  # fmt: skip
TOP = ("prompts.jsonl", *(f"{name}{end}" for name in REFERENCES for end in (".json", ".samples.jsonl")), "results.tsv")


def read_artifacts(root: Path, rounds: list[Round], notes: Notes) -> list[Facts]:
    """One entry for each artifact that is there: kind, digest, what it was made from, when and by which line."""
    paths = [root / name for name in TOP] + [one.folder / name for one in rounds for name in FILES]
    entry = functools.partial(_entry, notes)
    found = {path: facts for path in paths if path.exists() and (facts := notes.attempt(path, entry)) is not None}
    for one in rounds:
        _check(one, found, notes)
    return list(found.values())


def _entry(notes: Notes, path: Path) -> Facts:
    facts = describe(path)
    if path.name == "adapter" and facts["kind"] != "adapter":
        raise InputError("is no adapter: it has no adapter_config.json", where=str(path), hint="run shl train again")
    made = facts["shl"] if isinstance(facts.get("shl"), dict) else facts
    return {
        "file": notes.name(path),
        "kind": facts["kind"],
        "about": _about(facts, made),
        "digest": _digest(path, facts, made),
        "from": _sources(facts, made),
        "version": text(made.get("version")),
        "commit": text(made.get("commit")),
        "created": text(made.get("created")),
        "argv": [str(word) for word in made["argv"]] if isinstance(made.get("argv"), list) else [],
        "lines": lines({name: value for name, value in facts.items() if name not in ("path", "kind")}),
    }


def _about(facts: Facts, made: Facts) -> str:
    """The one thing to know about an artifact of its kind."""
    kind = facts["kind"]
    if kind == "vector":
        return f"{facts.get('method')} vector, blocks {', '.join(map(str, _list(facts.get('layers'))))}"
    if kind == "adapter":
        parents = len(_list(made.get("parents")))
        return f"adapter, rank {facts.get('rank')}, {made.get('n_records', '?')} records, on {parents} parents"
    if kind == "evaluation":
        return str(facts.get("verdict") or kind)
    if kind == "ledger":
        return f"ledger, {facts['rows']} rows"
    return f"{kind}, {facts['lines']} lines" if isinstance(facts.get("lines"), int) else kind


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _digest(path: Path, facts: Facts, made: Facts) -> str:
    """The artifact's own digest where it has one, else that of its bytes."""
    own = made.get("digest") or facts.get("digest")
    return str(own) if own else "" if path.is_dir() else digest_file(path)


def _sources(facts: Facts, made: Facts) -> dict[str, list[str]]:
    """Digests of what an artifact was made from, by kind."""
    contexts = made.get("contexts")
    found = {
        "model": _listed(made.get("model_digest")),
        "chain": _listed(made.get("adapters")),
        "vector": _listed(made.get("vectors")) or _listed(facts.get("vector")),
        "data": _listed(made.get("data")),
        "contexts": _listed(contexts.get("digest") if isinstance(contexts, dict) else None),
    }
    return {kind: digests for kind, digests in found.items() if digests}


def _listed(value: Any) -> list[str]:
    """Digests in a value of a header, or in the counts that `describe` makes of records."""
    if isinstance(value, str):
        return [value] if ":" in value else []
    if isinstance(value, dict):
        value = [name for name in value if not name.startswith("[")]
    return [one for one in value if isinstance(one, str) and ":" in one] if isinstance(value, list) else []


def _check(one: Round, found: dict[Path, Facts], notes: Notes) -> None:
    """Say when pieces of a round were not made from each other: a step was run again, and those after it were not."""
    vector = found.get(one.folder / "v.safetensors", {}).get("digest")
    for name in ("completions.jsonl", "adapter") if vector else ():
        path = one.folder / name
        used = found.get(path, {}).get("from", {}).get("vector", [])
        if used and vector not in used:
            notes.add(path, "was made with another vector than the one beside it", "run what follows shl vector again")
    adapter = found.get(one.folder / "adapter", {}).get("digest")
    scored = one.folder / "eval.json"
    chain = found.get(scored, {}).get("from", {}).get("chain", [])
    if adapter and chain and not any(link.startswith(adapter) for link in chain):  # a link may end in its scale
        notes.add(scored, "is of another adapter than the one beside it", "run shl eval again")
