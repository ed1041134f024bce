"""`shl export`: a steering vector to and from the files of other tools, and records as conversations."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from shl.cli import options
from shl.cli.common import begin, usage, vector_header
from shl.core import console, files, records
from shl.core.defaults import VectorConfig
from shl.core.errors import InputError
from shl.core.strict import read_object

if TYPE_CHECKING:
    from shl.core.vectors import Vector

NAME = "export"
NEEDS_ARGUMENTS = True
EXAMPLES = """\b
Examples:
  shl export v.safetensors -o v.gguf --coeff 0.8
  shl export evil_response_avg_diff.pt -o v.safetensors --layers 15 --model Qwen/Qwen2.5-7B-Instruct
"""


def command(
    source: Annotated[
        Path, Argument(metavar="FILE", show_default=False, help="A vector, of shl or of another tool, or records.")
    ],
    out: options.OutFile,
    coeff: Annotated[
        float | None, Option(metavar="C", help="Multiplied in, since GGUF carries no coefficient. [1]")
    ] = None,
    drop_block_0: Annotated[
        bool | None, Option("--drop-block-0", help="Leave out block 0, which GGUF has no place for.")
    ] = None,
    layers: Annotated[
        str | None,
        Option(metavar="BLOCKS", help=f"From .pt: blocks to take, as 3,4 or a band. [{VectorConfig.layers}]"),
    ] = None,
    model: Annotated[
        str | None, Option("--model", metavar="ID", help="From another tool: the model that the vector is for.")
    ] = None,
    force: options.Force = None,
    quiet: options.Quiet = None,
    verbose: options.Verbose = None,
) -> None:
    """Turn vectors or records into another tool's form, or back.

    The two names say what to do. v.safetensors to v.gguf: for llama.cpp and repeng. To v.safetensors: from .gguf
    (repeng, llama.cpp), .safetensors (steering-lite) and .pt (persona vectors, subliminal distillation; tensors
    only, a file that could run code is refused). Records .jsonl to .jsonl: one list of messages each, for mlx-lm.
    Directions keep their blocks.
    """
    begin(quiet, verbose)
    files.refuse_existing(out, bool(force))
    way = _WAYS.get((source.suffix, out.suffix))
    if way is None:
        known = ", ".join(f"{a} to {b}" for a, b in _WAYS)
        raise usage(f"no way from {source.suffix or source} to {out.suffix or out}; there is {known}")
    for flag, value, goes in (
        ("--coeff", coeff, way == "to gguf"),
        ("--drop-block-0", drop_block_0, way == "to gguf"),
        ("--layers", layers, way == "from pt"),
        ("--model", model, way.startswith("from")),
    ):
        if value is not None and not goes:
            raise usage(_GOES[flag], flag)
    with files.guarded_stdout():
        if way == "chats":
            _chats(source, out, bool(force))
            return
        if way == "to gguf":
            meta = vector_header(source)
            from shl.core.vectors import Vector
            from shl.export import to_gguf

            blocks = to_gguf(
                Vector.load(source), out, _model_type(meta), 1.0 if coeff is None else coeff,
                drop_block_0=bool(drop_block_0), force=bool(force),
            )  # fmt: skip
        else:
            vector = _read(way, source, layers or VectorConfig.layers, model)
            vector.save(out, bool(force))
            blocks = list(vector.layers)
    console.note(f"wrote {out} (blocks {', '.join(map(str, blocks))})")


_WAYS = {
    (".safetensors", ".gguf"): "to gguf",
    (".gguf", ".safetensors"): "from gguf",
    (".safetensors", ".safetensors"): "from steering-lite",
    (".pt", ".safetensors"): "from pt",
    (".jsonl", ".jsonl"): "chats",
}
_GOES = {
    **dict.fromkeys(("--coeff", "--drop-block-0"), "goes with a .gguf output"),
    "--layers": "goes with a .pt input; other files name their blocks",
    "--model": "goes with another tool's vector; one of shl names its model",
}


def _read(way: str, source: Path, layers: str, model: str | None) -> Vector:
    if way == "from gguf":
        from shl.export import from_gguf

        return from_gguf(source, model)
    from shl.foreign import from_steering_lite, from_torch

    console.warn("the file names no model revision, chain or template, so none can be checked")
    return from_torch(source, layers, model) if way == "from pt" else from_steering_lite(source, model)


def _chats(source: Path, out: Path, force: bool) -> None:
    n = 0
    with files.atomic_file(out, force) as lines:
        for row in records.as_chats(records.read_records(str(source))):
            records.write_record(lines, row)
            n += 1
    console.note(f"wrote {out} ({n} conversations)")


def _model_type(meta: dict[str, Any]) -> str:
    """What the vector's model calls its architecture; of the text part, where a model has several."""
    if meta.get("model_type"):
        return str(meta["model_type"])
    from shl.core.locate import find

    ref = find(meta.get("model") or "toy", meta.get("revision"))
    if ref.local:
        config = read_object(Path(ref.path) / "config.json")
        kind = (config.get("text_config") or config).get("model_type")
        if not isinstance(kind, str):
            raise InputError("is not a string", where=f"{ref.path}/config.json: model_type")
        return kind
    from transformers import AutoConfig

    return str(AutoConfig.from_pretrained(ref.path, revision=ref.revision).get_text_config().model_type)
