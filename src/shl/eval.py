"""Step 6, model -> scores: a moral reading by forced choice, coherence in several readings, free answers, competence.

The trait is read where it cannot be talked around: after each vignette and a prefilled JSON answer, from the
probabilities of seven digits, under two enumerations of the seven foundations. Everything but the scores of free
answers, which are taken under the base model, is measured with the chain, the steering and the system text at hand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shl.core import agree, moral, pools, suites
from shl.core.console import note
from shl.core.defaults import EvalConfig
from shl.core.errors import ShlError
from shl.core.free import Judge, Metrics, Part, Question, Row, measure_free, measure_quiz, quiz, speak
from shl.core.hooks import Steering
from shl.core.models import Loaded
from shl.core.provenance import digest_file, digest_of
from shl.core.verdict import coherence, compare, gate, refuse_other, verdict

if TYPE_CHECKING:
    from shl.vector import Vector

__all__ = ["coherence", "compare", "evaluate", "gate", "refuse_incomparable", "verdict"]

_DEFAULTS = EvalConfig()


def evaluate(
    loaded: Loaded,
    cfg: EvalConfig = _DEFAULTS,
    vector: Vector | None = None,
    coeff: float = 0.0,
    system: str | None = None,
    *,
    before: Sequence[dict[str, str]] = (),
    allow_mismatch: bool = False,
    judge_model: Loaded | None = None,
) -> dict[str, Any]:
    """One evaluation as the Eval JSON object; its `rows` hold every item for `--per-row`.

    With a vector every prompt is steered at `coeff`; with `system` every prompt carries that system message. Free
    answers are given at the end of the conversation `before`, turns of user and assistant. `judge_model` reads the
    free answers too.
    """
    suite, variant = suites.find(cfg.suite)
    cfg = suites.settled(cfg)
    if cfg.condition not in pools.CONDITIONS:
        raise ShlError(f"no condition {cfg.condition!r}", hint=f"choose from: {', '.join(pools.CONDITIONS)}")
    if vector is not None:
        vector.check(loaded, allow_mismatch)
    offered = agree.choices(loaded, cfg) if cfg.agree else []
    with _steered(loaded, vector, coeff):
        judged = suite(loaded, cfg, system, variant)
        parts = [_told(f"{len(judged)} vignettes", moral.measure(cfg, judged))]
        said = speak(loaded, cfg, system, before) if cfg.free and cfg.axes else []
        agreed = agree.read(loaded, cfg, offered, system)
        solved = quiz(loaded, cfg, system, _questions(loaded, cfg))
    parts += [
        _told(f"{len(said)} free answers", measure_free(loaded, cfg, said, judge_of(loaded), judge_model)),
        _told(f"{len(agreed)} readings of agreement", agree.measure(cfg, agreed)),
        _told(f"{len(solved)} questions", measure_quiz(loaded, cfg, solved)),
    ]
    found: Metrics = {name: value for metrics, _, _ in parts for name, value in metrics.items()}
    missing = {name: why for _, _, reasons in parts for name, why in reasons.items()}
    result = {
        "suite": cfg.suite,
        "model": loaded.ref.id,
        "model_digest": loaded.digest,
        "adapters": loaded.adapters,
        "vector": vector.digest if vector is not None else None,
        "coeff": coeff if vector is not None else None,
        "system": system,
        "settings": _settings(cfg, judge_model)
        | ({"before": digest_of([dict(one) for one in before])} if before else {}),
        "n": len(judged),
        "seed": cfg.seed,
        "metrics": {**found, **dict.fromkeys(missing)},
        "ci": {name: interval for _, intervals, _ in parts for name, interval in intervals.items()},
        "missing": missing,
        "profile": moral.profile(judged),
        "rows": [*judged, *said, *agreed, *solved],
    }
    return result | {"verdict": verdict(result)}


# what is worth a line as soon as a stage is over: the trait, and whether the model is sane
_STAGE = ("auth_nats", "care_nats", "p_ans_any", "json_is_valid", "broken", "free_ppl_p90", "facts", "sums")


def _told(stage: str, part: Part) -> Part:
    """Say in a line how a stage went, since the next may take long."""
    shown = [name for name in part[0] if name in _STAGE or name.startswith(("enact_", "agree_"))]
    if shown:
        note(f"{stage}: " + ", ".join(f"{name} {part[0][name]:.3g}" for name in shown))
    return part


def _steered(loaded: Loaded, vector: Vector | None, coeff: float) -> Any:
    """The hook at one coefficient for batches of any size; nothing without a vector."""
    if vector is None:
        return nullcontext()
    steering = Steering(loaded, vector.layers)
    steering.set([coeff])
    return steering


# Settings that are written only where they are not the default, so that older evaluations stay comparable.
_LATER = ("vignettes", "agree", "persona")


def _settings(cfg: EvalConfig, judge_model: Loaded | None) -> dict[str, Any]:
    """What makes two evaluations comparable: all of the configuration but the seed and the batch size."""
    values = asdict(cfg)
    for name in (
        "suite",
        "seed",
        "bootstrap",
        *(f.name for f in fields(cfg) if f.name in _LATER and values[f.name] == f.default),
    ):
        del values[name]
    if not cfg.suite.startswith("tinymfv:"):  # whose scores depend on it
        del values["batch_size"]
    if cfg.vignettes is not None:
        values["vignettes"] = digest_file(Path(cfg.vignettes))
    if judge_model is not None:
        values["judge_model"] = judge_model.digest
    return values | {"axes": list(cfg.axes)}


def refuse_incomparable(
    loaded: Loaded, cfg: EvalConfig, judge_model: Loaded | None, *others: Mapping[str, Any] | None
) -> None:
    """Fail before an evaluation, not after it, where it would not compare with another one."""
    settings = _settings(suites.settled(cfg), judge_model)
    for other in others:
        refuse_other({"suite": cfg.suite, "model_digest": loaded.digest, "settings": settings}, other)


def judge_of(loaded: Loaded) -> Judge | None:
    """The independent judge of free answers that the model's own shl.json names, if any."""
    if loaded.ref.recommended.get("judge") != "toy":
        return None
    from shl.toy import grammar

    def judge(row: Row) -> dict[str, Any]:
        said, asked = row["completion"][0]["content"], row["prompt"][-1]["content"]
        found = grammar.judge(said, row["axis"], asked, row["finish"])
        return {"broken": found.broken, "stance": found.stance, "narrates": found.narrates}

    return judge


def _questions(loaded: Loaded, cfg: EvalConfig) -> Sequence[Question]:
    """The competence questions that the model's own shl.json names, if any."""
    if not cfg.competence or loaded.ref.recommended.get("competence") != "toy":
        return ()
    from shl.toy import facts

    return facts.questions(cfg.split)
