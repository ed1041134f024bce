"""`shl export`: a steering vector -> a GGUF control vector, and the other way round."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from shl.cli import options
from shl.cli.common import begin, usage, vector_header
from shl.core import console, files
from shl.core.errors import InputError
from shl.core.strict import read_object

NAME = "export"
NEEDS_ARGUMENTS = True
EXAMPLES = """\b
Examples:
  shl export v.safetensors -o v.gguf --coeff 0.8
  shl export theirs.gguf -o v.safetensors --model google/gemma-3-4b-it
"""


def command(
    source: Annotated[Path, Argument(metavar="FILE", show_default=False, help="v.safetensors or v.gguf.")],
    out: options.OutFile,
    coeff: Annotated[
        float | None, Option(metavar="C", help="Multiplied in, since GGUF carries no coefficient. [1]")
    ] = None,
    drop_block_0: Annotated[
        bool | None, Option("--drop-block-0", help="Leave out block 0, which GGUF has no place for.")
    ] = None,
    model: Annotated[
        str | None, Option("--model", metavar="ID", help="From GGUF: the model that the vector is for.")
    ] = None,
    force: options.Force = None,
    quiet: options.Quiet = None,
    verbose: options.Verbose = None,
) -> None:
    """Turn a vector into a GGUF control vector, or back.

    llama.cpp applies it with --control-vector v.gguf, repeng reads it too. Directions keep their blocks.
    """
    begin(quiet, verbose)
    files.refuse_existing(out, bool(force))
    ways = {(".safetensors", ".gguf"): "to", (".gguf", ".safetensors"): "from"}
    way = ways.get((source.suffix, out.suffix))
    if way is None:
        raise usage("FILE and -o are a .safetensors and a .gguf file, one each")
    if way == "from" and (coeff is not None or drop_block_0):
        raise usage("goes with a .gguf output", "--coeff" if coeff is not None else "--drop-block-0")
    if way == "to" and model is not None:
        raise usage("goes with a .gguf input; a vector names its model", "--model")
    with files.guarded_stdout():
        if way == "to":
            meta = vector_header(source)
            from shl.core.vectors import Vector
            from shl.export import to_gguf

            blocks = to_gguf(
                Vector.load(source), out, _model_type(meta), 1.0 if coeff is None else coeff,
                drop_block_0=bool(drop_block_0), force=bool(force),
            )  # fmt: skip
        else:
            from shl.export import from_gguf

            vector = from_gguf(source, model)
            vector.save(out, bool(force))
            blocks = list(vector.layers)
    console.note(f"wrote {out} (blocks {', '.join(map(str, blocks))})")


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
