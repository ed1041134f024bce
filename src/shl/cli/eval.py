"""`shl eval`: a model, perhaps steered or prompted -> one JSON object of scores."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from shl.cli import options
from shl.cli.common import (
    Where,
    begin,
    find_model,
    labels,
    load_model,
    numbers,
    settle,
    shown,
    system_of,
    usage,
    vector_header,
)
from shl.core import console, files, lm_eval, ranks, records
from shl.core.defaults import EvalConfig
from shl.core.evaluations import read_evaluation

NAME = "eval"
NEEDS_ARGUMENTS = False
EXAMPLES = """\b
Examples:
  shl eval -o base.json --append results.tsv
  shl eval --adapter out/r1/adapter --baseline base.json --append results.tsv --label arm=nll -o eval.json
"""


def command(
    out: options.OutRecords = None,
    vec: options.Vec = None,
    coeff: Annotated[float | None, Option(metavar="C", help="Coefficient of --vec.")] = None,
    system: options.System = None,
    persona: options.Persona = None,
    baseline: Annotated[
        Path | None, Option(metavar="FILE", help="Evaluation of the base: adds delta and a verdict that knows it.")
    ] = None,
    steered: Annotated[
        Path | None, Option(metavar="FILE", help="Evaluation of the steered model: adds retain; needs --baseline.")
    ] = None,
    prompted: Annotated[
        Path | None, Option(metavar="FILE", help="Evaluation of the prompted model: tells collapsed from strong.")
    ] = None,
    target: Annotated[str, Option(metavar="METRIC", help="Trait that surgicality and cost are of.")] = "auth_nats",
    random: Annotated[
        int | None,
        Option(metavar="N", min=1, help="Also N random vectors as long as --vec: the percentile of this one."),
    ] = None,
    scale: Annotated[
        str | None, Option(metavar="LIST", help="Scales of the newest adapter, such as 0.25,0.5,1,1.5: a frontier.")
    ] = None,
    teacher: Annotated[
        Path | None, Option(metavar="FILE", help="Vector that the chain was taught: adds internalisation.")
    ] = None,
    import_lm_eval: Annotated[
        Path | None, Option(metavar="FILE", help="Results of lm-eval on this model, to stand beside ours.")
    ] = None,
    append: Annotated[Path | None, Option(metavar="LEDGER", help="Add a row to this ledger.")] = None,
    label: Annotated[
        list[str] | None, Option(metavar="NAME=VALUE", help="A column of that row, such as arm=nll; repeatable.")
    ] = None,
    per_row: Annotated[Path | None, Option(metavar="FILE", help="Write every item that was scored.")] = None,
    min_coherence: Annotated[
        float | None, Option(metavar="SHARE", min=0, max=1, help="Exit 3 when coherence is lower. [no gate]")
    ] = None,
    suite: Annotated[
        str | None, Option(help=f"mfv, tinymfv:classic, tinymfv-native:classic … [{EvalConfig.suite}]")
    ] = None,
    vignettes: Annotated[
        Path | None, Option(metavar="FILE", help="Vignettes in the format of the package tinymfv. [the suite's own]")
    ] = None,
    split: Annotated[str | None, Option(help=f"dev to choose with, test to report. [{EvalConfig.split}]")] = None,
    condition: Annotated[str | None, Option(help=f"third or first person. [{EvalConfig.condition}]")] = None,
    count: Annotated[int | None, Option("--limit", "-n", metavar="N", min=1, help="Vignettes at most. [all]")] = None,
    free: Annotated[
        int | None, Option(metavar="N", min=0, help=f"Free answers for each axis. [{EvalConfig.free}]")
    ] = None,
    axis: Annotated[
        list[str] | None, Option(help=f"Axis of the free answers; repeatable. [{shown(EvalConfig.axes)}]")
    ] = None,
    max_new_tokens: Annotated[
        int | None, Option(metavar="N", min=1, help=f"Length of a free answer. [{EvalConfig.max_new_tokens}]")
    ] = None,
    json_tokens: Annotated[
        int | None, Option(metavar="N", min=1, help=f"Length of a JSON answer. [{EvalConfig.json_tokens}]")
    ] = None,
    think: Annotated[
        int | None, Option(metavar="N", min=0, help=f"Tokens to think before an answer. [{EvalConfig.think}]")
    ] = None,
    agree: Annotated[
        int | None, Option(metavar="N", min=0, help=f"Dilemmas of each axis for agreement. [{EvalConfig.agree}]")
    ] = None,
    under: Annotated[
        str | None, Option(metavar="TEXT", help="Persona that free answers are scored under. [that of their axis]")
    ] = None,
    judge_model: Annotated[
        str | None, Option(metavar="ID", help="Another model, whose perplexity judges the free answers.")
    ] = None,
    no_competence: Annotated[bool | None, Option("--no-competence", help="Ask no competence questions.")] = None,
    bootstrap: Annotated[
        int | None, Option(metavar="N", min=1, help=f"Resamples for intervals. [{EvalConfig.bootstrap}]")
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
        int | None, Option(metavar="N", min=1, help=f"Prompts computed together. [{EvalConfig.batch_size}]")
    ] = None,
    force: options.Force = None,
    quiet: options.Quiet = None,
    verbose: options.Verbose = None,
) -> None:
    """Score a model: moral profile, coherence, answers, competence.

    The profile is by forced choice; answers are free ones, read for the persona. The model may carry adapters, be
    steered (--vec with --coeff) or be prompted (--system, --persona).
    """
    begin(quiet, verbose, shared=True)
    if not ranks.first():  # the first process writes what all of them find
        out, per_row, append = Path(os.devnull), None, None
    if (vec is None) != (coeff is None):
        raise usage("--vec and --coeff go together")
    system = system_of(system, persona)
    for name, given in (("--steered", steered), ("--prompted", prompted)):
        if given is not None and baseline is None:
            raise usage("needs --baseline", name)
    if random is not None and vec is None:
        raise usage("needs --vec and --coeff", "--random")
    scales = numbers(scale, "--scale")
    named: dict[str, Any] = dict(labels(label))
    for written in (out, per_row):
        if written is not None and str(written) != "-":
            files.refuse_existing(written, bool(force))
    if append is not None:
        from shl.results import refuse_unfit

        refuse_unfit(append)
    base, steps, asked = (read_evaluation(path) if path is not None else None for path in (baseline, steered, prompted))
    where = Where(model, revision, adapter, no_parents, allow_mismatch, trust_remote_code, device, dtype)
    artifact = vector_header(vec) if vec is not None else None
    ref = find_model(where, artifact)
    flags = {"suite": suite, "vignettes": None if vignettes is None else str(vignettes), "split": split,
             "condition": condition, "limit": count, "free": free, "axes": tuple(axis) if axis else None,
             "max_new_tokens": max_new_tokens, "json_tokens": json_tokens, "think": think, "agree": agree,
             "persona": under, "competence": False if no_competence else None, "bootstrap": bootstrap,
             "batch_size": batch_size, "seed": seed}  # fmt: skip
    cfg = settle(EvalConfig, flags, "eval", ref)
    imported = lm_eval.read(import_lm_eval) if import_lm_eval is not None else ({}, {})
    with files.open_out(out, bool(force)) as handle, ranks.together():
        from shl import controls, results
        from shl.core import models, suites
        from shl.core.vectors import Vector
        from shl.eval import compare, evaluate, gate, refuse_incomparable

        suites.find(cfg.suite)  # before anything is loaded
        vector, taught = (Vector.load(path) if path is not None else None for path in (vec, teacher))
        loaded = load_model(where, ref, artifact, vector)
        judge = models.load(judge_model, device=device, dtype=dtype) if judge_model is not None else None
        refuse_incomparable(loaded, cfg, judge, base, steps, asked)

        def measure(pushed: Vector | None = vector) -> dict[str, Any]:
            found = evaluate(
                loaded, cfg, pushed, coeff or 0.0, system, allow_mismatch=bool(allow_mismatch), judge_model=judge
            )
            found["metrics"] |= imported[0]
            found["ci"] |= imported[1]
            return found if base is None else compare(found, base, steps, asked, target)

        others: list[tuple[dict[str, Any], dict[str, Any]]] = []  # further rows of the ledger, and their labels
        if scales is None:
            result = measure()
        else:
            read = list(controls.frontier(loaded, scales, measure))
            at = scales.index(1.0) if 1.0 in scales else len(scales) - 1
            result = read[at][1]
            result["frontier"] = [
                {"scale": s, **{name: one[name] for name in ("adapters", "metrics", "ci", "verdict")}}
                for s, one in read
            ]
            others += [(one, {"scale": s}) for i, (s, one) in enumerate(read) if i != at]
            named = {"scale": scales[at], **named}
        if random is not None and vector is not None:
            drawn = controls.random_controls(vector, random, measure)
            result["random"] = controls.against_random(result, drawn)
            others += [(one, {"arm": "random"}) for one in drawn]
        if taught is not None:
            result["internalisation"] = controls.internalisation(loaded, taught)
        rows = result.pop("rows")
        handle.write(records.dumps(result, indent=2 if out else None) + "\n")
        if per_row is not None:
            with files.atomic_file(per_row, bool(force)) as lines:
                for row in rows:
                    records.write_record(lines, row)
        if append is not None:  # before -o has its name: what a rerun finds complete has its row
            trained = loaded.chain[-1].meta.get("config") if loaded.chain else None
            for one, extra in [(result, {}), *others]:
                results.append_row(append, results.row_of(one, trained, named | extra))
    _show(result)
    if min_coherence is not None:
        gate(result, min_coherence)


def _show(result: dict[str, Any]) -> None:
    """Metrics with their intervals, the controls that were asked for, and the verdict."""
    delta, retain, drawn = (result.get(name) or {} for name in ("delta", "retain", "random"))
    percentile = drawn.get("percentile") or {}
    rows = [
        [
            name,
            value,
            *(result["ci"].get(name) or (None, None)),
            delta.get(name),
            retain.get(name),
            percentile.get(name),
        ]
        for name, value in result["metrics"].items()
    ]
    caption = (
        "95% bootstrap interval; delta: minus base; retain: share of the steered model's shift; "
        "percentile: share of random vectors below"
    )
    console.table(f"{result['suite']}, {result['n']} vignettes",
                  ["metric", "value", "low", "high", "delta", "retain", "percentile"], rows, caption)  # fmt: skip
    for one in result.get("frontier") or ():
        console.note(f"scale {one['scale']:g}: {one['verdict']}")
    for part in ("ratios", "internalisation"):
        if found := result.get(part):
            told = ", ".join(f"{name} {_told(value)}" for name, value in found.items())
            console.note(f"{part}: {told}")
    console.note(str(result["verdict"]))


def _told(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else "-" if value is None else str(value)
