"""Every default of every step, in one torch-free place that the CLI and the Python API both read."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin

from shl.core.errors import ShlError

Config = TypeVar("Config")


METHODS = ("mean-diff", "pca", "probe", "response")  # how states become a direction
POSITIONS = ("last", "answer")  # where states are read


@dataclass(frozen=True)
class VectorConfig:
    """How a steering vector is extracted: method, band of blocks, number of contexts."""

    method: str = "mean-diff"
    layers: str = "0.45:0.55"
    contexts: int = 256
    position: str = "last"  # or answer: mean over the tokens of an answer, what method response implies
    answer_tokens: int = 48
    batch_size: int = 32
    seed: int = 0


@dataclass(frozen=True)
class GenConfig:
    """How completions are sampled. Coefficients are multiples of the raw mean difference."""

    coeffs: tuple[float, ...] = (0.0, 0.5, 0.75, 1.0)
    samples: int = 1
    limit: int | None = None
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 64
    top_p: float = 0.95
    min_p: float = 0.0
    greedy: bool = False
    system: str | None = None
    score: bool = True
    seed: int = 0
    batch_size: int = 64
    # Records decoded before the first of them is written; a resumed run repeats its block. None: first the batch size,
    # so that a reader need not wait long, and four times as many from there on, which are cheaper to decode and score.
    block: int | None = None
    shared_noise: bool = False  # evaluation texts: the row's seed leaves out coefficient, arm and round
    # the dose along the trajectory, see core/trajectory.py
    scope: str = "all"  # where the vector is added: prompt, gen or all positions
    schedule: str = "constant"  # constant, linear or exp over generated positions
    horizon: int = 128  # generated tokens until the final share, which then stays
    final: float = 0.25
    gate: str | None = None  # cosine: the dose times relu(cos(hidden state, vector))
    backtrack: bool = False
    max_surprise: float = 1.0  # nats per token over the unsteered model's own entropy, running over 16 tokens
    max_rep: float = 0.3  # repetition in the last 64 tokens
    rewind: int = 24  # tokens
    shrink: float = 0.7
    max_rewinds: int = 6


@dataclass(frozen=True)
class DoseConfig:
    """How a coefficient is searched: the probe, and how far up. `ceiling` is in lengths of the residual stream."""

    prompts: int = 16
    max_new_tokens: int = 96
    ceiling: float = 1.0
    grid: int = 8  # doses of the first sweep by survival, each 1.41 times the one before
    refine: int = 3  # doses of the second, between the last that survives and the first that does not
    seed: int = 0
    batch_size: int = 64


@dataclass(frozen=True)
class FilterConfig:
    """What counts as incoherent, narrating or refusing. None switches a test off."""

    max_ppl: float | None = None
    min_ppl: float | None = None
    max_tail_ppl: float | None = None
    rel_ppl: float | None = 4.0  # limit as a multiple of the control rows' 90th percentile
    rel_tail_ppl: float | None = 6.0
    # The same limits in nats per token; the stricter holds. Four times a perplexity of 1.2 is no longer fluent.
    rel_nats: float | None = 2.0
    max_rep: float | None = 0.3
    min_tokens: int = 8
    allow_narration: bool = False
    allow_refusal: bool = False
    keep_controls: bool = False
    window: int = 512  # near-duplicates look back this far
    max_similarity: float | None = 0.95
    min_keep: int = 1
    limit: int | None = None
    where: tuple[str, ...] = ()


@dataclass(frozen=True)
class TrainConfig:
    """The healing loss and its optimiser: nll + lam * relu(agg(KL) - tau)."""

    reg: str = "kl_rev"
    agg: str = "rmse"
    lam: float = 1.0
    lam_decay: float = 1.0  # lam is multiplied by this for each adapter of the chain trained on
    tau: float = 0.5
    shortest: int = 1  # a completion of fewer tokens counts as one of that many in agg mean and rmse
    ref: str = "base"
    ref_top_k: int = 0  # tell apart only the reference's likeliest tokens; 0: the whole vocabulary
    weight_decay: float = 0.0
    spectral: float = 0.0
    rank: int = 32
    alpha: float | None = None  # None: twice the rank
    targets: tuple[str, ...] = ()  # empty: every linear map inside the decoder blocks
    layers: str = "0.2:0.8"
    lr: float = 1e-4
    warmup: float = 0.1
    epochs: int = 6
    batch_size: int = 8
    grad_accum: int = 1
    checkpointing: bool = False  # compute blocks twice instead of keeping what is inside them
    max_grad_norm: float = 1.0
    holdout: float = 0.125
    patience: int = 0  # epochs without a lower held-out nll until training stops, and the best is kept; 0: never
    on_policy: int = 8  # prompts that the student answers at the end, to be compared with the reference
    max_len: int = 2048
    include_controls: bool = False  # learn from rows at coefficient 0 as well
    seed: int = 0


@dataclass(frozen=True)
class EvalConfig:
    """What one evaluation reads: vignettes, free answers, competence, and how many of each."""

    suite: str = "mfv"
    vignettes: str | None = None  # a file in the format of the package tinymfv, in place of the suite's own items
    split: str = "test"
    condition: str = "third"
    limit: int | None = None
    free: int = 64  # free answers sampled per axis pool
    axes: tuple[str, ...] = ("authority",)
    max_new_tokens: int = 256
    json_tokens: int = 24
    think: int = 0
    competence: bool = True
    agree: int = 32  # held-out dilemmas read for each axis that has a bundled persona with two sides
    persona: str | None = None  # under which free answers are scored once more; None: that of their axis
    batch_size: int = 32
    bootstrap: int = 1000
    seed: int = 0


def configure(cls: type[Config], step: str, recommended: Mapping[str, Any], **given: Any) -> Config:
    """A step's configuration: what is given, then what the model's own shl.json recommends, then defaults."""
    return cls(**{**advice(cls, step, recommended), **given})


def advice(cls: type, step: str, recommended: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a model's shl.json that concerns a step: its own section over the keys at the top.

    At the top, `layers` means the blocks to steer; the blocks to train are `train.layers`. `competence` names the
    questions that the model can be asked there, and is no switch.
    """
    names = {field.name for field in fields(cls)}
    top = {name: value for name, value in recommended.items() if name in names - {"competence"} and step}
    if step != "vector":
        top.pop("layers", None)
    own = recommended.get(step, {})
    if not isinstance(own, dict):
        raise ShlError(f"the model's shl.json holds {step}, which is not an object", hint=_MEND)
    if unknown := set(own) - names:
        raise ShlError(
            f"the model's shl.json recommends {', '.join(sorted(unknown))}, which shl {step} does not have", hint=_MEND
        )
    found = {name: _from_json(name, value) for name, value in {**top, **own}.items()}
    for field in fields(cls):
        named = field.name in _OWN and isinstance(found.get(field.name), str)  # who judges and who asks
        if field.name in found and not named and not _fits(found[field.name], field.type):
            raise ShlError(f"the model's shl.json recommends {field.name} {found[field.name]!r}", hint=_MEND)
    return found


_OWN = ("judge", "competence")  # of the folder, not of a step
_MEND = "mend the shl.json in the model's folder, or take that line out"


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value may stand where a field of this annotation does; an integer is a number too."""
    if get_origin(kind) is UnionType:
        return any(_fits(value, one) for one in get_args(kind))
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_fits(one, get_args(kind)[0]) for one in value)
    if isinstance(value, bool) or kind is NoneType:
        return kind is bool or (kind is NoneType and value is None)
    return isinstance(value, int | float if kind is float else kind)


def _from_json(name: str, value: Any) -> Any:
    """JSON has no tuples, and a list of blocks is written as text."""
    if name == "layers" and isinstance(value, list):
        return ",".join(map(str, value))
    return tuple(value) if isinstance(value, list) else value
