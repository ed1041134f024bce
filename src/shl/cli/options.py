"""Options that mean the same in every command. None always means "not given"."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option

Model = Annotated[
    str | None,
    Option("--model", metavar="ID", help="Model: toy, a hub name or a folder. [artifact, env SHL_MODEL, else toy]"),
]
Revision = Annotated[str | None, Option("--revision", metavar="REV", help="Revision of a model on the hub.")]
Adapters = Annotated[
    list[str] | None,
    Option(
        "--adapter",
        metavar="DIR[:SCALE]",
        help="Adapter directory, oldest first; repeatable. It brings its recorded parents. 'none' is the empty chain.",
    ),
]
NoParents = Annotated[
    bool | None, Option("--no-parents", help="Take each adapter directory alone, without its parents.")
]
AllowMismatch = Annotated[
    bool | None, Option("--allow-mismatch", help="Go on although an artifact was made for another model or chain.")
]
TrustRemoteCode = Annotated[
    bool | None, Option("--trust-remote-code", help="Run code that comes with a model from the hub.")
]
Device = Annotated[
    str | None, Option("--device", help="cpu, cuda, cuda:1, mps, or auto: over all GPUs. [cuda when there is one]")
]
Dtype = Annotated[
    str | None, Option("--dtype", help="float32, bfloat16 or float16. [float32 on CPU, bfloat16 on a GPU]")
]
Seed = Annotated[int | None, Option("--seed", metavar="N", help="Seed of everything random. [0]")]
System = Annotated[
    str | None, Option("--system", metavar="TEXT", help="System text, before any that a prompt has of its own.")
]
Persona = Annotated[
    str | None, Option("--persona", metavar="NAME", help="Bundled persona whose positive side is the system text.")
]
OutFile = Annotated[Path, Option("--out", "-o", metavar="FILE", help="File to write.")]
OutDir = Annotated[Path, Option("--out", "-o", metavar="DIR", help="Directory to write.")]
OutRecords = Annotated[
    Path | None, Option("--out", "-o", metavar="FILE", help="File to write; complete when it exists. [stdout]")
]
Force = Annotated[bool | None, Option("--force", "-f", help="Replace the output when it exists.")]
Quiet = Annotated[bool | None, Option("--quiet", "-q", help="Only warnings and errors on stderr.")]
Verbose = Annotated[bool | None, Option("--verbose", "-v", help="Say more on stderr.")]
Vec = Annotated[
    Path | None,
    Option("--vec", metavar="FILE", help="Steering vector; its model and chain come with it."),
]
