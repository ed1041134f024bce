"""`shl train`: kept completions -> a healed adapter."""

from __future__ import annotations

from typing import Annotated, Any

from typer import Argument, Option

from shl.cli import options
from shl.cli.common import Where, begin, find_model, load_model, settle
from shl.core import files, ranks, records
from shl.core.defaults import TrainConfig
from shl.core.errors import Mismatch

NAME = "train"
NEEDS_ARGUMENTS = True
EXAMPLES = """\b
Examples:
  shl train keep.jsonl -o out/r0/adapter
  shl train keep.jsonl --adapter out/r0/adapter --reg kl_rev --lam 0.3 --weight-decay 10 -o out/r1/adapter
"""


def command(
    source: Annotated[str, Argument(metavar="RECORDS", show_default=False, help="Kept records; - is stdin.")],
    out: options.OutDir,
    reg: Annotated[str | None, Option(help=f"nll, kl_fwd or kl_rev. [{TrainConfig.reg}]")] = None,
    agg: Annotated[
        str | None, Option(help=f"Barrier over positions: mean, rmse, p95 or max. [{TrainConfig.agg}]")
    ] = None,
    lam: Annotated[
        float | None, Option(metavar="X", min=0, help=f"Weight of the barrier. [{TrainConfig.lam:g}]")
    ] = None,
    lam_decay: Annotated[
        float | None,
        Option(metavar="X", min=0, help=f"Times this for each adapter of the chain. [{TrainConfig.lam_decay:g}]"),
    ] = None,
    tau: Annotated[
        float | None, Option(metavar="NATS", min=0, help=f"Divergence that is free. [{TrainConfig.tau:g}]")
    ] = None,
    shortest: Annotated[
        int | None,
        Option(metavar="N", min=1, help=f"The barrier takes shorter ones as N tokens long. [{TrainConfig.shortest}]"),
    ] = None,
    ref_: Annotated[
        str | None, Option("--ref", help=f"Reference of the barrier: base or prev. [{TrainConfig.ref}]")
    ] = None,
    ref_top_k: Annotated[
        int | None,
        Option(metavar="K", min=0, help="Tell apart only the reference's K likeliest tokens; 0: all. [0]"),
    ] = None,
    weight_decay: Annotated[
        float | None, Option(metavar="X", min=0, help=f"Weight decay. [{TrainConfig.weight_decay:g}]")
    ] = None,
    spectral: Annotated[
        float | None, Option(metavar="X", min=0, help=f"Weight of the spectral penalty. [{TrainConfig.spectral:g}]")
    ] = None,
    rank: Annotated[int | None, Option(metavar="R", min=1, help=f"Rank of the adapter. [{TrainConfig.rank}]")] = None,
    alpha: Annotated[float | None, Option(metavar="X", help="Scale of the adapter. [twice the rank]")] = None,
    target: Annotated[
        list[str] | None, Option(metavar="NAME", help="Linear maps to adapt; repeatable. [all inside the blocks]")
    ] = None,
    layers: Annotated[
        str | None, Option(metavar="BLOCKS", help=f"Blocks to adapt, as 3,4 or a band. [{TrainConfig.layers}]")
    ] = None,
    lr: Annotated[float | None, Option(metavar="X", min=0, help=f"Learning rate. [{TrainConfig.lr:g}]")] = None,
    warmup: Annotated[
        float | None, Option(metavar="SHARE", min=0, max=1, help=f"Steps to warm up. [{TrainConfig.warmup:g}]")
    ] = None,
    epochs: Annotated[
        int | None, Option(metavar="N", min=1, help=f"Passes over the records. [{TrainConfig.epochs}]")
    ] = None,
    grad_accum: Annotated[
        int | None, Option(metavar="N", min=1, help=f"Batches for each step. [{TrainConfig.grad_accum}]")
    ] = None,
    checkpointing: Annotated[
        bool | None, Option("--checkpointing", help="Compute blocks twice, in less memory.")
    ] = None,
    max_grad_norm: Annotated[
        float | None, Option(metavar="X", min=0, help=f"Clip gradients. [{TrainConfig.max_grad_norm:g}]")
    ] = None,
    holdout: Annotated[
        float | None, Option(metavar="SHARE", min=0, max=1, help=f"Records held out. [{TrainConfig.holdout:g}]")
    ] = None,
    patience: Annotated[
        int | None,
        Option(
            metavar="N", min=0, help="Epochs without a lower held-out nll until it stops; the best is kept; 0: off. [0]"
        ),
    ] = None,
    on_policy: Annotated[
        int | None,
        Option(metavar="N", min=0, help=f"Prompts for KL on the student's own text. [{TrainConfig.on_policy}]"),
    ] = None,
    max_len: Annotated[
        int | None, Option(metavar="N", min=1, help=f"Tokens of a record at most. [{TrainConfig.max_len}]")
    ] = None,
    include_controls: Annotated[
        bool | None, Option("--include-controls", help="Learn from rows at coefficient 0 as well.")
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
        int | None, Option(metavar="N", min=1, help=f"Records computed together. [{TrainConfig.batch_size}]")
    ] = None,
    force: options.Force = None,
    quiet: options.Quiet = None,
    verbose: options.Verbose = None,
) -> None:
    """Train an adapter on kept completions, healed by a barrier.

    loss = nll + lam * relu(agg(KL) - tau), on top of the chain that --adapter names. The directory records that
    chain as its parents. A training that was killed goes on after its last finished epoch when the line is repeated.
    """
    begin(quiet, verbose, shared=True)
    ranks.refuse_stdin(source)
    files.refuse_existing(out, bool(force))
    rows = list(records.read_records(source))
    artifact = _origin(rows, bool(allow_mismatch))
    where = Where(model, revision, adapter, no_parents, allow_mismatch, trust_remote_code, device, dtype)
    ref = find_model(where, artifact)
    flags = {"reg": reg, "agg": agg, "lam": lam, "lam_decay": lam_decay, "tau": tau, "shortest": shortest,
             "ref": ref_, "ref_top_k": ref_top_k, "checkpointing": checkpointing, "patience": patience,
             "on_policy": on_policy, "weight_decay": weight_decay,
             "spectral": spectral, "rank": rank, "alpha": alpha, "targets": tuple(target) if target else None,
             "layers": layers, "lr": lr, "warmup": warmup, "epochs": epochs, "grad_accum": grad_accum,
             "max_grad_norm": max_grad_norm, "include_controls": include_controls,
             "holdout": holdout, "max_len": max_len, "seed": seed,
             "batch_size": batch_size}  # fmt: skip
    cfg = settle(TrainConfig, flags, "train", ref)
    with files.guarded_stdout(), ranks.together(), ranks.own(out) as place:
        from shl.core.heal_data import select
        from shl.train import heal

        chosen = select(rows, cfg, source)  # before anything heavy, so that an empty input fails at once
        loaded = load_model(where, ref, artifact)
        # of several processes each would have to find the same unfinished state, so they begin anew
        heal(loaded, chosen, cfg, place, bool(force) or ranks.world() > 1, source=source)


_PLURAL = {"model": "models", "adapters": "adapters", "vector": "vectors"}


def _origin(rows: list[dict[str, Any]], allow_mismatch: bool) -> dict[str, Any]:
    """The model and chain that the records were sampled from: one for all of them, and one vector."""
    found: dict[str, Any] = {}
    for name in ("model", "adapters", "vector"):
        named = [row for row in rows if row.get(name) is not None]
        other = next((row for row in named if row[name] != named[0][name]), None)
        if other and not allow_mismatch:
            raise Mismatch(
                f"the records come from different {_PLURAL[name]}: {other['id']} has another one than {named[0]['id']}",
                hint="train on one at a time, or insist with --allow-mismatch",
            )
        if named and name != "vector":
            found[name] = named[0][name]
    return found
