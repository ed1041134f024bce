"""`shl gen`: a vector and prompts -> steered completions, scored under the base model."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from shl.cli import options
from shl.cli.common import (
    POOL,
    Where,
    begin,
    chain_given,
    find_model,
    load_model,
    numbers,
    prompts_for,
    settle,
    shown,
    usage,
    vector_header,
)
from shl.core import console, files, records
from shl.core.defaults import GenConfig
from shl.core.provenance import digest_of, digest_tensors

NAME = "gen"
NEEDS_ARGUMENTS = False
EXAMPLES = """\b
Examples:
  shl gen --vec v.safetensors | shl filter > keep.jsonl
  shl gen prompts.jsonl --vec v.safetensors --coeff 0,0.5,1,2 -o completions.jsonl --resume
"""

POOL_PROMPTS = 64  # how many of a bundled pool when -n is not given


def command(
    prompts: Annotated[
        str | None,
        Argument(show_default=False, help="JSON Lines or plain text; - is stdin. [a bundled pool, see --pool]"),
    ] = None,
    vec: options.Vec = None,
    out: options.OutRecords = None,
    resume: Annotated[bool | None, Option("--resume", help="Continue what -o left unfinished.")] = None,
    coeff: Annotated[
        str | None,
        Option(metavar="LIST", help=f"Multiples of the vector, swept for each prompt. [{shown(GenConfig.coeffs)}]"),
    ] = None,
    samples: Annotated[
        int | None, Option(metavar="N", min=1, help=f"Samples for each coefficient. [{GenConfig.samples}]")
    ] = None,
    pool: Annotated[
        str | None, Option(metavar="NAME", help=f"Bundled prompts. [the vector's axis, else {POOL}]")
    ] = None,
    count: Annotated[
        int | None, Option("--limit", "-n", metavar="N", min=1, help=f"Prompts at most. [{POOL_PROMPTS} of a pool]")
    ] = None,
    max_new_tokens: Annotated[
        int | None, Option(metavar="N", min=1, help=f"Length of a completion at most. [{GenConfig.max_new_tokens}]")
    ] = None,
    temperature: Annotated[
        float | None, Option(metavar="T", min=0, help=f"Sampling temperature. [{GenConfig.temperature:g}]")
    ] = None,
    top_k: Annotated[
        int | None, Option(metavar="K", min=0, help=f"Sample among the K likeliest; 0 is all. [{GenConfig.top_k}]")
    ] = None,
    top_p: Annotated[
        float | None, Option(metavar="P", min=0, max=1, help=f"Sample within this mass. [{GenConfig.top_p}]")
    ] = None,
    min_p: Annotated[
        float | None,
        Option(metavar="P", min=0, max=1, help=f"Drop tokens below P x the likeliest. [{GenConfig.min_p:g}]"),
    ] = None,
    greedy: Annotated[bool | None, Option("--greedy", help="Take the likeliest token instead of sampling.")] = None,
    system: Annotated[str | None, Option(metavar="TEXT", help="System text put before every prompt's own.")] = None,
    no_score: Annotated[bool | None, Option("--no-score", help="Do not measure under the base model.")] = None,
    shared_noise: Annotated[
        bool | None, Option("--shared-noise", help="The same noise at every coefficient, for paired reading.")
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
        int | None, Option(metavar="N", min=1, help=f"Rows decoded together. [{GenConfig.batch_size}]")
    ] = None,
    force: options.Force = None,
    quiet: options.Quiet = None,
    verbose: options.Verbose = None,
) -> None:
    """Sample completions, steered by a vector.

    For each prompt and coefficient, scored under the base model. Model, chain and pool come with the vector. Rows
    at coefficient 0 are controls, which shl filter measures the others by.
    """
    begin(quiet, verbose)
    if resume and (out is None or str(out) == "-"):
        raise usage("needs -o FILE, since a pipe keeps nothing", "--resume")
    if prompts is not None and pool is not None:
        raise usage("give either PROMPTS or --pool", "--pool")
    coeffs = numbers(coeff, "--coeff")
    artifact = vector_header(vec) if vec is not None else None
    where = Where(model, revision, adapter, no_parents, allow_mismatch, trust_remote_code, device, dtype)
    ref = find_model(where, artifact)
    flags = {"coeffs": coeffs, "samples": samples, "limit": count, "max_new_tokens": max_new_tokens,
             "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "greedy": greedy,
             "system": system, "score": False if no_score else None, "shared_noise": shared_noise, "seed": seed,
             "batch_size": batch_size}  # fmt: skip
    if prompts is None and count is None:
        flags["limit"] = POOL_PROMPTS
    cfg = settle(GenConfig, flags, "gen", ref)
    asked = prompts_for(prompts, pool, artifact)
    settings = _settings(cfg, asked, ref.id, ref.revision, chain_given(adapter), vec, artifact)
    target = _target(out, settings, bool(resume), bool(force))
    if target is not None and target.complete:
        console.note(f"{out} is complete already")
        return

    def sampled(start: int) -> Iterator[dict[str, Any]]:
        from shl.core.vectors import Vector
        from shl.gen import generate

        loaded = load_model(where, ref, artifact)
        vector = Vector.load(vec) if vec is not None else None
        return generate(loaded, asked, cfg, vector, start=start, allow_mismatch=bool(allow_mismatch))

    _write(sampled, target)


def _settings(
    cfg: GenConfig,
    prompts: list[records.Prompt],
    model: str,
    revision: str | None,
    chain: list[str] | None,
    vec: Path | None,
    artifact: dict[str, Any] | None,
) -> dict[str, Any]:
    """What an unfinished file must have been begun with, so that it can be continued. Batch size does not matter."""
    values = asdict(cfg)
    del values["batch_size"]
    own = artifact["adapters"] if artifact and "adapters" in artifact else []
    return values | {
        "model": model,
        "revision": revision,
        "adapters": own if chain is None else chain,
        "vector": digest_tensors(vec, artifact) if vec is not None else None,
        "prompts": digest_of([asdict(prompt) for prompt in prompts]),
    }


def _target(out: Path | None, settings: dict[str, Any], resume: bool, force: bool) -> files.PartFile | None:
    """The resumable file, or None for stdout."""
    if out is None or str(out) == "-":
        return None
    return files.PartFile(out, settings, resume=resume, force=force)


def _write(sampled: Any, target: files.PartFile | None) -> None:
    """Write records as they come, to stdout or to the unfinished file."""
    handle = files.data_stdout() if target is None else target.writer()
    begun, count, tokens = time.monotonic(), 0, 0
    try:
        with handle as lines:
            for record in sampled(target.lines if target else 0):
                records.write_record(lines, record)
                count, tokens = count + 1, tokens + record["n_tokens"]
    except KeyboardInterrupt:
        if target is not None:
            console.note(f"stopped; {target.part} keeps what is finished, and --resume continues it")
        raise
    seconds = max(time.monotonic() - begun, 1e-9)
    console.note(f"{count} completions, {tokens} tokens, {tokens / seconds:.0f} tokens/s")
