"""`shl dose`: a vector -> one coefficient, by divergence or by what survives the filter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from shl.cli import options
from shl.cli.common import Where, begin, find_model, load_model, prompts_for, settle, usage, vector_header
from shl.core import console, files, records
from shl.core.defaults import DoseConfig

NAME = "dose"
NEEDS_ARGUMENTS = True
EXAMPLES = """\b
Examples:
  shl dose --vec v.safetensors --survival 0.5
  shl gen --vec v.safetensors --coeff 0,$(shl dose --vec v.safetensors --target-kl 1)
"""


def command(
    vec: Annotated[Path, Option("--vec", metavar="FILE", help="Steering vector; its model and chain come with it.")],
    prompts: Annotated[
        str | None,
        Argument(show_default=False, help="JSON Lines or plain text; - is stdin. [the pool of the vector's axis]"),
    ] = None,
    target_kl: Annotated[
        float | None,
        Option(metavar="NATS", min=0, help="95th percentile over tokens of KL(steered || unsteered) to reach."),
    ] = None,
    survival: Annotated[
        float | None,
        Option(metavar="SHARE", min=0, max=1, help="Share of completions that must pass the filter's defaults."),
    ] = None,
    keep: Annotated[
        Path | None, Option(metavar="FILE", help="Write the probe's survivors, ready to train on. With --survival.")
    ] = None,
    probe: Annotated[
        int | None, Option("--limit", "-n", metavar="N", min=1, help=f"Probe prompts. [{DoseConfig.prompts}]")
    ] = None,
    max_new_tokens: Annotated[
        int | None, Option(metavar="N", min=1, help=f"Length of a probe at most. [{DoseConfig.max_new_tokens}]")
    ] = None,
    ceiling: Annotated[
        float | None,
        Option(metavar="X", min=0, help=f"Highest dose tried, in residual-stream lengths. [{DoseConfig.ceiling:g}]"),
    ] = None,
    model: options.Model = None,
    revision: options.Revision = None,
    adapter: options.Adapters = None,
    no_parents: options.NoParents = None,
    allow_mismatch: options.AllowMismatch = None,
    trust_remote_code: options.TrustRemoteCode = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    seed: options.Seed = None,
    batch_size: Annotated[
        int | None, Option(metavar="N", min=1, help=f"Rows read together. [{DoseConfig.batch_size}]")
    ] = None,
    force: options.Force = None,
    quiet: options.Quiet = None,
    verbose: options.Verbose = None,
) -> None:
    """Search the coefficient of a vector and print it.

    Stdout is that one number; every reading on the way is a table on stderr. A target that no dose reaches is an
    error, never a guess.
    """
    begin(quiet, verbose)
    if (target_kl is None) == (survival is None):
        raise usage("give one of --target-kl NATS and --survival SHARE")
    if keep is not None and survival is None:
        raise usage("goes with --survival", "--keep")
    if keep is not None:
        files.refuse_existing(keep, bool(force))
    artifact = vector_header(vec)
    where = Where(model, revision, adapter, no_parents, allow_mismatch, trust_remote_code, device, dtype)
    ref = find_model(where, artifact)
    flags = {"prompts": probe, "max_new_tokens": max_new_tokens, "ceiling": ceiling, "seed": seed,
             "batch_size": batch_size}  # fmt: skip
    cfg = settle(DoseConfig, flags, "dose", ref)
    asked = prompts_for(prompts, None, artifact)
    with files.data_stdout() as out:
        from shl.core.vectors import Vector
        from shl.dose import by_kl, by_survival

        vector = Vector.load(vec)
        loaded = load_model(where, ref, artifact, vector)
        if target_kl is not None:
            found = by_kl(loaded, vector, asked, target_kl, cfg)
        else:
            found = by_survival(loaded, vector, asked, float(survival or 0), cfg)
        if keep is not None:
            with files.atomic_file(keep, bool(force)) as lines:
                for record in found.survivors:
                    records.write_record(lines, record)
        console.table(
            "readings",
            ["coefficient", "KL p95" if survival is None else "survives"],
            [list(reading) for reading in found.readings],
            "KL p95: 95th percentile over tokens of KL(steered || unsteered), in nats"
            if survival is None
            else "survives: share of completions that pass the filter at its defaults",
        )
        out.write(f"{found.coeff:.4g}\n")
