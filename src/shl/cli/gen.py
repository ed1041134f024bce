"""`shl gen`: a vector and prompts -> steered completions, scored under the base model."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Argument, Option

from shl.cli import options
from shl.cli.auto import SURVIVAL, aim_of, begun_with, search
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
    system_of,
    usage,
    vector_header,
)
from shl.cli.live import Survival
from shl.core import console, files, pools, ranks, records
from shl.core.defaults import DoseConfig, GenConfig
from shl.core.part import PartFile
from shl.core.provenance import digest_of, digest_tensors
from shl.core.trajectory import course_of

NAME = "gen"
NEEDS_ARGUMENTS = False
EXAMPLES = """\b
Examples:
  shl gen --vec v.safetensors | shl filter > keep.jsonl
  shl gen prompts.jsonl --vec v.safetensors --coeff auto --backtrack -o completions.jsonl --resume
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
        Option(
            metavar="LIST",
            help="Multiples of the vector, swept for each prompt; 'auto' searches one as shl dose does and adds 0. "
            f"[{shown(GenConfig.coeffs)}]",
        ),
    ] = None,
    survival: Annotated[
        float | None,
        Option(metavar="SHARE", min=0, max=1, help=f"With auto: share that must pass the filter. [{SURVIVAL:g}]"),
    ] = None,
    target_kl: Annotated[
        float | None, Option(metavar="NATS", min=0, help="With auto: KL to the unsteered model to reach instead.")
    ] = None,
    to_ceiling: Annotated[
        bool | None, Option("--to-ceiling", help="With auto: the highest dose tried, where enough survive even that.")
    ] = None,
    scope: Annotated[
        Literal["all", "prompt", "gen"] | None, Option(help=f"Positions that are steered. [{GenConfig.scope}]")
    ] = None,
    schedule: Annotated[
        Literal["constant", "linear", "exp"] | None,
        Option(help=f"How the dose falls along generated tokens. [{GenConfig.schedule}]"),
    ] = None,
    horizon: Annotated[
        int | None, Option(metavar="N", min=1, help=f"Tokens until the dose stops falling. [{GenConfig.horizon}]")
    ] = None,
    final: Annotated[
        float | None, Option(metavar="SHARE", min=0, max=1, help=f"Share of the dose then. [{GenConfig.final:g}]")
    ] = None,
    gate: Annotated[
        Literal["cosine"] | None, Option(help="Multiply the dose by max(0, cos(hidden state, vector)).")
    ] = None,
    backtrack: Annotated[
        bool | None, Option("--backtrack", help="Rewind rows that break down and go on with a smaller coefficient.")
    ] = None,
    max_surprise: Annotated[
        float | None,
        Option(
            metavar="NATS",
            min=0,
            help="Surprise of the unsteered model beyond its own entropy, a token over the last 16, that rewinds. "
            f"[{GenConfig.max_surprise:g}]",
        ),
    ] = None,
    max_rep: Annotated[
        float | None,
        Option(metavar="SHARE", min=0, help=f"Repetition in the last 64 tokens that rewinds. [{GenConfig.max_rep:g}]"),
    ] = None,
    rewind: Annotated[int | None, Option(metavar="N", min=1, help=f"Tokens to go back. [{GenConfig.rewind}]")] = None,
    shrink: Annotated[
        float | None,
        Option(metavar="SHARE", min=0, max=1, help=f"Factor of the coefficient at each. [{GenConfig.shrink:g}]"),
    ] = None,
    max_rewinds: Annotated[
        int | None, Option(metavar="N", min=1, help=f"Rewinds of a row at most. [{GenConfig.max_rewinds}]")
    ] = None,
    samples: Annotated[
        int | None, Option(metavar="N", min=1, help=f"Samples for each coefficient. [{GenConfig.samples}]")
    ] = None,
    pool: Annotated[
        str | None, Option(metavar="NAME", help=f"Bundled prompts. [the axis of --vec or --persona, else {POOL}]")
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
    system: options.System = None,
    persona: options.Persona = None,
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
    at coefficient 0 are controls, which shl filter measures the others by. Without --vec all rows are such: plain
    text, or that of a persona as a mere prompt, which filter and train take with --keep-controls and
    --include-controls.
    """
    begin(quiet, verbose, shared=True)
    ranks.refuse_stdin(prompts)
    if resume and (out is None or str(out) == "-"):
        raise usage("needs -o FILE, since a pipe keeps nothing", "--resume")
    if prompts is not None and pool is not None:
        raise usage("give either PROMPTS or --pool", "--pool")
    system = system_of(system, persona)
    auto = coeff == "auto"
    aim = aim_of(auto, vec, survival, target_kl, to_ceiling)
    # auto, and no vector at all, take no advice on coefficients: a stand-in says so
    coeffs = GenConfig.coeffs if auto or (vec is None and coeff is None) else numbers(coeff, "--coeff")
    artifact = vector_header(vec) if vec is not None else None
    where = Where(model, revision, adapter, no_parents, allow_mismatch, trust_remote_code, device, dtype)
    ref = find_model(where, artifact)
    flags = {"coeffs": coeffs, "samples": samples, "limit": count, "max_new_tokens": max_new_tokens,
             "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "greedy": greedy,
             "system": system, "score": False if no_score else None, "shared_noise": shared_noise, "seed": seed,
             "batch_size": batch_size, "scope": scope, "schedule": schedule, "horizon": horizon, "final": final,
             "gate": gate, "backtrack": backtrack, "max_surprise": max_surprise, "max_rep": max_rep,
             "rewind": rewind, "shrink": shrink, "max_rewinds": max_rewinds}  # fmt: skip
    if prompts is None and count is None:
        flags["limit"] = POOL_PROMPTS
    cfg = settle(GenConfig, flags, "gen", ref)
    _refuse_idle(cfg, flags)
    if persona is not None and artifact is None:
        pool = pool or pools.persona(persona).axis
    asked = prompts_for(prompts, pool, artifact)
    settings = _settings(cfg, asked, ref.id, ref.revision, chain_given(adapter), vec, artifact)
    if aim is not None:  # the target stands for the coefficient, which nobody knows yet
        settings["coeffs"] = ["auto", aim]
    target = _target(out, settings, bool(resume), bool(force)) if ranks.first() else None
    begun, complete = ranks.share((target.lines, target.complete) if target else (0, False))
    if complete:
        console.note(f"{out} is complete already")
        return

    def sampled() -> Iterator[dict[str, Any]]:
        from shl.core.vectors import Vector
        from shl.gen import generate

        vector = Vector.load(vec) if vec is not None else None
        loaded = load_model(where, ref, artifact, vector)
        chosen = cfg
        if aim is not None and vector is not None:
            probe = settle(DoseConfig, {"seed": cfg.seed}, "dose", ref)
            found = begun_with(target) or search(loaded, vector, asked, aim, probe, cfg)
            chosen = replace(cfg, coeffs=(0.0, ranks.share(found)))
        watch = Survival() if console.live() else None
        return generate(loaded, asked, chosen, vector, start=begun, allow_mismatch=bool(allow_mismatch), watch=watch)

    _write(sampled, target)


def _refuse_idle(cfg: GenConfig, flags: dict[str, Any]) -> None:
    """A flag that does nothing without another is a mistake, and so is a course that contradicts itself."""
    course_of(cfg)
    for needed, names in (
        ("schedule", ("horizon", "final")),
        ("backtrack", ("max_surprise", "max_rep", "rewind", "shrink", "max_rewinds")),
    ):
        idle = [name for name in names if flags[name] is not None]
        if idle and getattr(cfg, needed) in ("constant", False):
            raise usage(f"goes with --{needed}", "--" + idle[0].replace("_", "-"))


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


def _target(out: Path | None, settings: dict[str, Any], resume: bool, force: bool) -> PartFile | None:
    """The resumable file, or None for stdout."""
    if out is None or str(out) == "-":
        return None
    return PartFile(out, settings, resume=resume, force=force)


def _write(sampled: Any, target: PartFile | None) -> None:
    """Write records as they come, to stdout or to the unfinished file."""
    if not ranks.first():  # the first process writes what all of them make
        with files.guarded_stdout():
            for _ in sampled():
                pass
        return
    handle = files.data_stdout() if target is None else target.writer()
    begun, count, tokens = time.monotonic(), 0, 0
    try:
        with handle as lines, closing(sampled()) as made:
            for record in made:
                records.write_record(lines, record)
                count, tokens = count + 1, tokens + record["n_tokens"]
    except KeyboardInterrupt:
        if target is not None:
            console.note(f"stopped; {target.part} keeps what is finished, and --resume continues it")
        raise
    seconds = max(time.monotonic() - begun, 1e-9)
    console.note(f"{count} completions, {tokens} tokens, {tokens / seconds:.0f} tokens/s")
