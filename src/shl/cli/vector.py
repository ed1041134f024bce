"""`shl vector`: a persona pair -> a steering vector."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from shl.cli import options
from shl.cli.common import Where, begin, find_model, load_model, prompts_for, settle, usage
from shl.core import console, files, pools, records
from shl.core.defaults import METHODS, POSITIONS, VectorConfig

if TYPE_CHECKING:
    from shl.bands import Reading

NAME = "vector"
NEEDS_ARGUMENTS = True
EXAMPLES = """\b
Examples:
  shl vector --persona principle -o v.safetensors
  shl vector --model google/gemma-3-4b-it --pos "You stick to principle." --neg "You defer." -o v.safetensors
"""


def command(
    out: options.OutFile,
    pos: Annotated[str | None, Option(metavar="TEXT", help="System text of the persona to move towards.")] = None,
    neg: Annotated[
        str | None, Option(metavar="TEXT", help="System text to move away from. [no system message]")
    ] = None,
    persona: Annotated[str | None, Option(metavar="NAME", help="A bundled persona pair instead of texts.")] = None,
    pairs: Annotated[
        Path | None, Option(metavar="FILE", help="Explicit contrasts, JSON Lines of pos and neg; - is stdin.")
    ] = None,
    prompts: Annotated[
        Path | None, Option(metavar="FILE", help="Contexts to read under both personas. [bundled]")
    ] = None,
    contexts: Annotated[
        int | None, Option(metavar="N", min=1, help=f"How many contexts at most. [{VectorConfig.contexts}]")
    ] = None,
    layers: Annotated[
        str | None,
        Option(
            metavar="BLOCKS", help=f"Blocks as 3,4, a band of the depth, or auto: measured. [{VectorConfig.layers}]"
        ),
    ] = None,
    method: Annotated[
        str | None, Option(help=f"How states become a direction: {', '.join(METHODS)}. [{VectorConfig.method}]")
    ] = None,
    position: Annotated[
        str | None, Option(help=f"What is read: the last token, or the whole answer. [{VectorConfig.position}]")
    ] = None,
    answer_tokens: Annotated[
        int | None, Option(metavar="N", min=1, help=f"Length of an answer that is read. [{VectorConfig.answer_tokens}]")
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
        int | None, Option(metavar="N", min=1, help=f"Contexts read together. [{VectorConfig.batch_size}]")
    ] = None,
    force: options.Force = None,
    quiet: options.Quiet = None,
    verbose: options.Verbose = None,
) -> None:
    """Make a steering vector from a persona pair.

    The vector is the mean difference of hidden states between the two personas, or another direction as long as that
    is along it; coefficient 1 adds the shift that the persona itself causes. It carries its model, its chain and its
    personas along. With --layers auto each block is steered as far as answers stay sound, and the one at which they
    then speak most for the persona is taken.
    """
    begin(quiet, verbose)
    if sum(source is not None for source in (pos, persona, pairs)) != 1:
        raise usage("give one of --pos TEXT, --persona NAME and --pairs FILE")
    if neg is not None and pos is None:
        raise usage("goes with --pos", "--neg")
    if pairs is not None and prompts is not None:
        raise usage("goes with --pos or --persona", "--prompts")
    files.refuse_existing(out, bool(force))
    where = Where(model, revision, adapter, no_parents, allow_mismatch, trust_remote_code, device, dtype)
    ref = find_model(where)
    flags = {"method": method, "layers": layers, "contexts": contexts, "position": position,
             "answer_tokens": answer_tokens, "seed": seed, "batch_size": batch_size}  # fmt: skip
    cfg = settle(VectorConfig, flags, "vector", ref)
    for name, value, known in (("method", cfg.method, METHODS), ("position", cfg.position, POSITIONS)):
        if value not in known:
            raise usage(f"{value!r} is not one of {', '.join(known)}", f"--{name}")
    auto = cfg.layers == "auto"
    if auto and pairs is not None:
        raise usage("auto needs personas, by --pos or --persona", "--layers")
    chosen = pools.persona(persona) if persona is not None else None
    contrasts = records.read_pairs(pairs if str(pairs) != "-" else None) if pairs is not None else None
    shown = records.read_prompts(prompts) if prompts is not None else None
    with files.guarded_stdout():
        from shl.bands import measure_blocks
        from shl.vector import extract, extract_pairs

        loaded = load_model(where, ref)
        if contrasts is not None:
            made = extract_pairs(loaded, contrasts, cfg)
        else:
            pair = chosen or pools.Persona("", "", str(pos), neg)
            if auto:
                asked = prompts_for(None, None, {"personas": {"axis": pair.axis}})
                blocks = measure_blocks(loaded, pair.pos, pair.neg, asked, shown, cfg)
                cfg = replace(cfg, layers=str(blocks[0].layer))
                _show(blocks)
            made = extract(loaded, pair.pos, pair.neg, shown, cfg, name=pair.name or None, axis=pair.axis or None)
            if auto:
                made.meta["measured"] = [asdict(one) for one in blocks]
        made.save(out, bool(force))
    residual, agreement = made.meta["residual_norms"], made.meta["agreement"]
    rows = [[layer, norm, residual[str(layer)], agreement[str(layer)]] for layer, norm in made.norms.items()]
    console.table(
        "steering vector",
        ["block", "norm", "residual", "agreement"],
        rows,
        "norm: length of the direction; residual: mean length of the hidden state; "
        "agreement: mean cosine between each context's difference and their mean (near 0: no common direction)",
    )
    console.note(f"wrote {out} (blocks {', '.join(map(str, made.layers))}; {made.digest[:19]}…)")


def _show(blocks: list[Reading]) -> None:
    """What --layers auto measured."""
    console.table(
        "blocks, the one taken first",
        ["block", "coefficient", "survives", "effect", "+-"],
        [[one.layer, one.coeff, one.survival, one.effect, one.error] for one in blocks],
        "coefficient: the highest at which 80% of the answers pass the filter, steered at this block alone; effect: "
        "ln p(answer | pos) - ln p(answer | neg) of those, under the unsteered model, in nats; +-: standard error",
    )
