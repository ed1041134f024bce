"""A run folder: a Makefile that runs the loop and resumes, the prompts it asks, and a page that says what is what."""

from __future__ import annotations

from pathlib import Path

from shl.core import pools
from shl.core.errors import ShlError
from shl.core.files import atomic_dir

FILES = ("Makefile", "README.md")


def create(folder: Path | str, persona: str = "authority", model: str = "toy", rounds: int = 4) -> list[str]:
    """Write the folder; returns the names of its files. An existing one is never touched.

    `persona` is a bundled one; `model` is written down as it is given, so a relative path is taken from the folder.
    """
    if rounds < 1:
        raise ShlError(f"a run of {rounds} rounds", hint="use --rounds 1 or more")
    chosen = pools.persona(persona)
    prompts = pools.data("pools", f"{chosen.axis}.jsonl").read_text(encoding="utf-8")
    values = {"MODEL": model, "PERSONA": chosen.name, "AXIS": chosen.axis, "ROUNDS": str(rounds)}
    if any(set(value) & set("#$\n") for value in values.values()):
        raise ShlError(f"{model!r} cannot stand in a Makefile", hint="export SHL_MODEL instead of --model")
    if Path(folder).exists() and (not Path(folder).is_dir() or any(Path(folder).iterdir())):
        raise ShlError(f"{folder} exists already", hint="choose another name, or remove it yourself")
    with atomic_dir(Path(folder)) as new:
        for name in FILES:
            text = pools.data("run", name).read_text(encoding="utf-8")
            for key, value in values.items():
                text = text.replace(f"@{key}@", value)
            (new / name).write_text(text, encoding="utf-8")
        (new / "prompts.jsonl").write_text(prompts, encoding="utf-8")
    return [*FILES, "prompts.jsonl"]
