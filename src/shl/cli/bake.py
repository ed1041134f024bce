"""`shl bake`: an adapter chain -> a merged checkpoint, or one stacked adapter."""

from __future__ import annotations

from typing import Annotated

from typer import Argument, Option

from shl.cli import options
from shl.cli.common import Where, begin, find_model, load_model, usage
from shl.core import files

NAME = "bake"
NEEDS_ARGUMENTS = True
EXAMPLES = """\b
Examples:
  shl bake out/r2/adapter -o model
  shl bake out/r0/adapter out/r1/adapter:0.5 -o stacked --as lora
"""
FORMS = ("model", "lora")  # the first is the default


def command(
    adapters: Annotated[
        list[str],
        Argument(metavar="DIR[:SCALE]...", show_default=False, help="Adapters, oldest first; each brings its parents."),
    ],
    out: options.OutDir,
    as_: Annotated[str | None, Option("--as", metavar="FORM", help=f"{' or '.join(FORMS)}. [{FORMS[0]}]")] = None,
    no_verify: Annotated[bool | None, Option("--no-verify", help="Do not compare the result's logits.")] = None,
    model: options.Model = None,
    revision: options.Revision = None,
    no_parents: options.NoParents = None,
    allow_mismatch: options.AllowMismatch = None,
    trust_remote_code: options.TrustRemoteCode = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    force: options.Force = None,
    quiet: options.Quiet = None,
    verbose: options.Verbose = None,
) -> None:
    """Bake an adapter chain into a plain checkpoint.

    transformers loads it. With --as lora the chain becomes one adapter that plain peft loads on the base model.
    """
    begin(quiet, verbose)
    if as_ is not None and as_ not in FORMS:
        raise usage(f"{as_!r} is not one of {', '.join(FORMS)}", "--as")
    files.refuse_existing(out, bool(force))
    where = Where(model, revision, adapters, no_parents, allow_mismatch, trust_remote_code, device, dtype)
    ref = find_model(where)
    with files.guarded_stdout():
        from shl.bake import bake

        loaded = load_model(where, ref)
        bake(loaded, out, as_=as_ or FORMS[0], force=bool(force), verify=not no_verify)
