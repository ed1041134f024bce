"""`shl eval`: a model, perhaps steered or prompted -> one JSON object of scores."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Option

from shl.cli import options
from shl.cli.common import Where, begin, find_model, labels, load_model, settle, shown, usage, vector_header
from shl.core import console, files, pools, records
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
    system: Annotated[str | None, Option(metavar="TEXT", help="System text of every prompt.")] = None,
    persona: Annotated[
        str | None, Option(metavar="NAME", help="Bundled persona whose positive side is the system text.")
    ] = None,
    baseline: Annotated[
        Path | None, Option(metavar="FILE", help="Evaluation of the base: adds delta and a verdict that knows it.")
    ] = None,
    steered: Annotated[
        Path | None, Option(metavar="FILE", help="Evaluation of the steered model: adds retain; needs --baseline.")
    ] = None,
    append: Annotated[Path | None, Option(metavar="LEDGER", help="Add a row to this ledger.")] = None,
    label: Annotated[
        list[str] | None, Option(metavar="NAME=VALUE", help="A column of that row, such as arm=nll; repeatable.")
    ] = None,
    per_row: Annotated[Path | None, Option(metavar="FILE", help="Write every item that was scored.")] = None,
    min_coherence: Annotated[
        float | None, Option(metavar="SHARE", min=0, max=1, help="Exit 3 when coherence is lower. [no gate]")
    ] = None,
    suite: Annotated[str | None, Option(help=f"Which vignettes. [{EvalConfig.suite}]")] = None,
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
    """Score a model: a moral profile by forced choice, coherence, free answers, competence.

    The model may carry adapters, be steered (--vec with --coeff) or be prompted (--system, --persona).
    """
    begin(quiet, verbose)
    if (vec is None) != (coeff is None):
        raise usage("--vec and --coeff go together")
    if persona is not None:
        if system is not None:
            raise usage("give either --system or --persona", "--persona")
        system = pools.persona(persona).pos
    if steered is not None and baseline is None:
        raise usage("needs --baseline", "--steered")
    named = labels(label)
    for target in (out, per_row):
        if target is not None and str(target) != "-":
            files.refuse_existing(target, bool(force))
    base, teacher = (read_evaluation(path) if path is not None else None for path in (baseline, steered))
    where = Where(model, revision, adapter, no_parents, allow_mismatch, trust_remote_code, device, dtype)
    artifact = vector_header(vec) if vec is not None else None
    ref = find_model(where, artifact)
    flags = {"suite": suite, "split": split, "condition": condition, "limit": count, "free": free,
             "axes": tuple(axis) if axis else None, "max_new_tokens": max_new_tokens, "json_tokens": json_tokens,
             "think": think, "competence": False if no_competence else None, "bootstrap": bootstrap,
             "batch_size": batch_size, "seed": seed}  # fmt: skip
    cfg = settle(EvalConfig, flags, "eval", ref)
    with files.open_out(out, bool(force)) as handle:
        from shl import results
        from shl.core.vectors import Vector
        from shl.eval import compare, evaluate, gate

        vector = Vector.load(vec) if vec is not None else None
        loaded = load_model(where, ref, artifact, vector)
        result = evaluate(loaded, cfg, vector, coeff or 0.0, system, allow_mismatch=bool(allow_mismatch))
        rows = result.pop("rows")
        if base is not None:
            result = compare(result, base, teacher)
        handle.write(records.dumps(result, indent=2 if out else None) + "\n")
        if per_row is not None:
            with files.atomic_file(per_row, bool(force)) as lines:
                for row in rows:
                    records.write_record(lines, row)
        if append is not None:  # before -o has its name: what a rerun finds complete has its row
            trained = loaded.chain[-1].meta.get("config") if loaded.chain else None
            results.append_row(append, results.row_of(result, trained, named))
    _show(result)
    if min_coherence is not None:
        gate(result, min_coherence)


def _show(result: dict[str, Any]) -> None:
    """Metrics with their intervals, and the verdict."""
    delta, retain = result.get("delta") or {}, result.get("retain") or {}
    rows = [
        [name, value, *(result["ci"].get(name) or (None, None)), delta.get(name), retain.get(name)]
        for name, value in result["metrics"].items()
    ]
    caption = "95% bootstrap interval; delta: minus base; retain: share of the steered model's shift"
    console.table(f"{result['suite']}, {result['n']} vignettes", ["metric", "value", "low", "high", "delta", "retain"],
                  rows, caption)  # fmt: skip
    console.note(str(result["verdict"]))
