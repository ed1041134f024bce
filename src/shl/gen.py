"""Step 2, vector -> steered completions: sampled for each prompt, coefficient and sample, and scored under base."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import chain, islice, repeat
from typing import Any, NamedTuple

from shl.core import ranks
from shl.core.below import Passed
from shl.core.chat import Messages, with_system
from shl.core.console import Rate, progress
from shl.core.decode import Completion, Sampling, decode
from shl.core.defaults import GenConfig
from shl.core.errors import ShlError
from shl.core.hooks import Steering
from shl.core.models import Loaded
from shl.core.records import Prompt
from shl.core.scores import score
from shl.core.seeds import seed_of
from shl.core.trajectory import course_of
from shl.core.vectors import Vector

_ROOM = 1 << 30  # bytes for the states of a block of records


class Row(NamedTuple):
    """One completion to be sampled."""

    prompt: Prompt
    coeff: float
    sample: int

    @property
    def id(self) -> str:
        """The record's id: what seeds, resume and joins go by."""
        return f"{self.prompt.id}/{self.coeff:.12g}/{self.sample}"

    def seed(self, cfg: GenConfig) -> int:
        """The row's own seed; shared noise leaves the coefficient out, so that answers are paired over arms."""
        if cfg.shared_noise:
            return seed_of(cfg.seed, self.prompt.id, str(self.sample))
        return seed_of(cfg.seed, self.id)

    @property
    def messages(self) -> Messages:
        """The prompt as the record holds it: with a system text of its own, without any that the run added."""
        return with_system(self.prompt.messages, self.prompt.system)


def rows(prompts: Sequence[Prompt], cfg: GenConfig, coeffs: Sequence[float]) -> Iterator[Row]:
    """Everything to sample, in the one order: prompt by prompt, then coefficient, then sample."""
    for prompt in islice(prompts, cfg.limit):
        for coeff in coeffs:
            for sample in range(cfg.samples):
                yield Row(prompt, coeff, sample)


def count(n_prompts: int, cfg: GenConfig, steered: bool) -> int:
    """How many records a run will write."""
    return min(n_prompts, cfg.limit if cfg.limit is not None else n_prompts) * len(_coeffs(cfg, steered)) * cfg.samples


def generate(
    loaded: Loaded,
    prompts: Sequence[Prompt],
    cfg: GenConfig | None = None,
    vector: Vector | None = None,
    *,
    start: int = 0,
    allow_mismatch: bool = False,
    watch: Callable[[dict[str, Any]], Mapping[str, object]] | None = None,
) -> Iterator[dict[str, Any]]:
    """Completion records in order, leaving out the first `start`.

    `watch` sees each record and says what stands behind the progress bar.

    Records are decoded in fixed blocks, so that a run taken up at any record repeats its block and gives the same
    texts. Several processes share the blocks, and the first gets all records. Scores are those of the base model,
    without chain and steering, for the prompt without the persona. Where the dose is not the same everywhere, each
    record tells its trajectory.
    """
    cfg = cfg or GenConfig()
    coeffs = _coeffs(cfg, vector is not None)
    if vector is None and not course_of(cfg).plain:
        raise ShlError("scope, schedule, gate and backtracking need a steering vector", hint="add --vec v.safetensors")
    if vector is not None:
        vector.check(loaded, allow_mismatch)
    facts = {
        "seed": cfg.seed,
        "model": loaded.ref.id,
        "adapters": loaded.adapters,
        "vector": None if vector is None else vector.digest,
    }
    skipped, sizes = _blocks(start, cfg)
    todo = islice(rows(prompts, cfg, coeffs), skipped, None)
    total = count(len(prompts), cfg, vector is not None)
    rate = Rate()

    def made(block: list[Row]) -> list[dict[str, Any]]:
        encoded = {id(row.prompt): loaded.encode_prompt(row.prompt.asked(cfg.system)) for row in block}
        asked = [encoded[id(row.prompt)] for row in block]
        passed = _passed(loaded, asked, cfg, vector)
        done = _decode(
            loaded, block, asked, cfg, vector, passed, lambda _, said: bar.advance(**rate.count(said.n_tokens))
        )
        texts = [completion.text for completion in done]
        below = None if passed is None else passed.below
        scores = score(loaded, [row.messages for row in block], texts, cfg.batch_size, below) if cfg.score else None
        return [_record(row, done[i], cfg, facts, scores[i] if scores else {}) for i, row in enumerate(block)]

    with progress("generating", max(0, total - skipped)) as bar:
        at = skipped
        for records in ranks.spread(iter(lambda: list(islice(todo, next(sizes))), []), made):
            for record in records:
                if watch is not None:
                    bar.advance(0, **watch(record))
                if at >= start:
                    yield record
                at += 1


def _blocks(start: int, cfg: GenConfig) -> tuple[int, Iterator[int]]:
    """Where the block begins that holds record `start`, and the sizes of the blocks from there on."""
    first, size = cfg.block or cfg.batch_size, cfg.block or 4 * cfg.batch_size
    if start < first:
        return 0, chain([first], repeat(size))
    return first + (start - first) // size * size, repeat(size)


def _coeffs(cfg: GenConfig, steered: bool) -> tuple[float, ...]:
    """The coefficients of a run; without a vector there is only 0."""
    coeffs = tuple(c + 0.0 for c in cfg.coeffs)  # -0.0 is 0.0
    if len(set(coeffs)) < len(coeffs) or not coeffs:
        raise ShlError(f"the coefficients {coeffs} are empty or repeat one", hint="use --samples for several samples")
    if steered or coeffs == (0.0,):
        return coeffs
    if cfg.coeffs == GenConfig.coeffs:
        return (0.0,)
    raise ShlError("coefficients were given without a steering vector", hint="add --vec v.safetensors")


def _passed(loaded: Loaded, asked: list[list[int]], cfg: GenConfig, vector: Vector | None) -> Passed | None:
    """A place for the states below the steered blocks, which are base's states too: scoring need not compute them.

    There is none for a model with a chain or under a persona, whose states are of something else than what is scored,
    nor for more than there should be room for, nor where processes score rows that others have decoded.
    """
    size = sum(len(ids) + cfg.max_new_tokens for ids in asked) * loaded.hidden * loaded.dtype.itemsize
    if not cfg.score or loaded.chain or cfg.system or size > _ROOM or ranks.sharing() > 1:
        return None
    return Passed(loaded, loaded.n_blocks - 1 if vector is None else min(vector.layers))


def _decode(
    loaded: Loaded,
    block: list[Row],
    asked: list[list[int]],
    cfg: GenConfig,
    vector: Vector | None,
    passed: Passed | None,
    tick: Callable[[int, Completion], None],
) -> list[Completion]:
    """Sample one block of rows, whatever their coefficients."""
    sampling = Sampling(cfg.max_new_tokens, cfg.temperature, cfg.top_k, cfg.top_p, cfg.min_p, cfg.greedy)
    steered = nullcontext() if vector is None else Steering(loaded, vector.layers, cfg.gate)
    with passed or nullcontext(), steered as steering:
        return decode(
            loaded,
            asked,
            seeds=[row.seed(cfg) for row in block],
            sampling=sampling,
            steering=steering,
            coeffs=None if vector is None else [row.coeff for row in block],
            course=course_of(cfg),
            batch_size=cfg.batch_size,
            on_finish=tick,
            passed=passed,
        )


def _record(
    row: Row, completion: Completion, cfg: GenConfig, facts: dict[str, Any], scores: dict[str, Any]
) -> dict[str, Any]:
    record = {
        "id": row.id,
        "prompt": row.messages,
        "completion": [{"role": "assistant", "content": completion.text}],
        **({} if cfg.system is None else {"system": cfg.system}),
        "coeff": row.coeff,
        **facts,
        "n_tokens": completion.n_tokens,
        "finish": completion.finish,
        **({} if completion.track is None else {"trajectory": completion.track.story()}),
        "scores": scores,
    }
    return record | {name: value for name, value in row.prompt.extra.items() if name not in (*record, "trajectory")}
