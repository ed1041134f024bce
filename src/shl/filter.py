"""Step 3, completions -> kept completions: which ones are worth training on, and why the others are not.

Everything streams in constant memory and needs no torch: `gen` has measured, this decides. Relative limits are
multiples of the 90th percentile over the control rows (coefficient 0) seen so far; in `gen`'s order a prompt's
controls come first. A relative limit with no control row before it is an error, never a guess.
"""

import math
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from shl.core import pools, text, where
from shl.core.defaults import FilterConfig
from shl.core.errors import BelowGate, ShlError

_DEFAULTS = FilterConfig()

REASONS = (
    "control",
    "short",
    "ppl_high",
    "ppl_low",
    "tail_ppl",
    "repetition",
    "narration",
    "refusal",
    "where",
    "duplicate",
)

MOST_COEFFS = 256  # told apart in a tally

Record = dict[str, Any]


class Quantile:
    """A running quantile of positive numbers in bounded memory: a histogram of 1%-wide logarithmic buckets."""

    WIDTH = math.log(1.01)

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()
        self.n = 0

    def add(self, value: float) -> None:
        self.counts[round(math.log(max(value, 1e-9)) / self.WIDTH)] += 1
        self.n += 1

    def at(self, share: float) -> float:
        """The value below which this share of the numbers lies, to 1%."""
        rank, below = math.ceil(share * self.n), 0
        for bucket in sorted(self.counts):
            below += self.counts[bucket]
            if below >= max(rank, 1):
                return math.exp(bucket * self.WIDTH)
        raise ValueError("no numbers yet")


class Baseline:
    """What control rows score: the yardstick of the relative limits."""

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self.ppl = Quantile()
        self.ppl_tail = Quantile()
        for record in records:
            self.add(record)

    def add(self, record: Record) -> None:
        """Count a row in when it is a control with text to score; other rows change nothing."""
        if record["coeff"] == 0 and record["n_tokens"] > 0:
            for sketch, name in ((self.ppl, "ppl"), (self.ppl_tail, "ppl_tail")):
                if math.isfinite(value := _score(record, name)):
                    sketch.add(value)


@dataclass
class Tally:
    """How many rows were read, kept and dropped: by reason and by coefficient. A row may have several reasons."""

    read: Counter[float] = field(default_factory=Counter)
    kept: Counter[float] = field(default_factory=Counter)
    dropped: dict[float, Counter[str]] = field(default_factory=dict)

    def add(self, record: Record) -> None:
        coeff = float(record["coeff"])
        if coeff not in self.read and len(self.read) >= MOST_COEFFS:
            coeff = math.inf  # no record has it: a sweep without steps is counted together, in bounded memory
        self.read[coeff] += 1
        self.kept[coeff] += record["keep"]
        self.dropped.setdefault(coeff, Counter()).update(record["reasons"])

    @property
    def by_reason(self) -> Counter[str]:
        """Drops by reason over all coefficients."""
        return sum(self.dropped.values(), Counter())

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Columns and rows for the console: a row for each coefficient and one for all, a column for each reason."""
        reasons = [reason for reason in REASONS if self.by_reason[reason]]
        rows = [
            [
                _named(coeff),
                read,
                self.kept[coeff],
                *(self.dropped[coeff][reason] for reason in reasons),
            ]
            for coeff, read in sorted(self.read.items())
        ]
        rows.append(["all", self.read.total(), self.kept.total(), *(self.by_reason[reason] for reason in reasons)])
        return ["coeff", "read", "kept", *reasons], [[str(cell) for cell in row] for row in rows]

    def require(self, min_keep: int) -> None:
        """Raise (exit code 3) when fewer rows than asked for were kept."""
        if min_keep and not self.read.total():
            raise BelowGate(
                "there are no records to filter", hint="look at what the command before said, or name a file of records"
            )
        if (kept := self.kept.total()) < min_keep:
            common = ", ".join(f"{reason} {count}" for reason, count in self.by_reason.most_common(3))
            raise BelowGate(
                f"kept {kept} of {self.read.total()} rows, fewer than --min-keep {min_keep} ({common or 'none'})",
                hint="lower the coefficients (shl gen --coeff), generate more, or loosen the limit that drops most",
            )


def _named(coeff: float) -> str:
    return f"{coeff:g}" if coeff < math.inf else "others"


def judge(
    record: Record,
    cfg: FilterConfig = _DEFAULTS,
    baseline: Baseline | None = None,
    persona_texts: Sequence[str] | None = None,
) -> list[str]:
    """The reasons to drop one record, judged on its own; an empty list keeps it.

    `persona_texts` are the personas whose words count as narration; None stands for the bundled ones.
    """
    said = record["completion"][-1]["content"]
    personas = pools.persona_texts() if persona_texts is None else persona_texts
    tests = {
        "control": record["coeff"] == 0 and not cfg.keep_controls,
        "short": record["n_tokens"] < cfg.min_tokens,
        **_surprise(record, cfg, baseline),
        "repetition": cfg.max_rep is not None and text.repetition(said) > cfg.max_rep,
        "narration": not cfg.allow_narration and text.narration(said, personas),
        "refusal": not cfg.allow_refusal and text.refusal(said),
        "where": not all(where.parse(condition).holds(record) for condition in cfg.where),
    }
    return [reason for reason in REASONS if tests.get(reason)]


def _surprise(record: Record, cfg: FilterConfig, baseline: Baseline | None) -> dict[str, bool]:
    """The three tests on perplexity under the base model. An empty completion has none to test."""
    if record["n_tokens"] == 0:
        return {}
    controls = baseline or Baseline()
    high = _limit("max_ppl", cfg.max_ppl, cfg.rel_ppl, cfg.rel_nats, controls.ppl)
    tail = _limit("max_tail_ppl", cfg.max_tail_ppl, cfg.rel_tail_ppl, cfg.rel_nats, controls.ppl_tail)
    return {
        "ppl_high": high is not None and _score(record, "ppl") > high,
        "ppl_low": cfg.min_ppl is not None and _score(record, "ppl") < cfg.min_ppl,
        "tail_ppl": tail is not None and _score(record, "ppl_tail") > tail,
    }


def _limit(
    name: str, absolute: float | None, relative: float | None, nats: float | None, controls: Quantile
) -> float | None:
    """The limit in force: the absolute one when given, else the stricter multiple of the controls, else none."""
    if absolute is not None or relative is None:
        return absolute
    if controls.n == 0:
        flag = "--" + name.replace("_", "-")
        raise ShlError(
            f"{flag} is relative to control rows (coefficient 0), and none has been read yet",
            hint=f"generate them (shl gen --coeff 0,...), or give --baseline FILE, or {flag} NUMBER",
        )
    usual = controls.at(0.9)
    return min(relative * usual, math.inf if nats is None else usual**nats)


def _score(record: Record, name: str) -> float:
    """A score of the record. Null is what `gen` writes for a number too large for JSON."""
    scores = record.get("scores") or {}
    if name not in scores:
        raise ShlError(
            f"record {record['id']!r} has no scores.{name}",
            hint="run shl gen without --no-score, or add scores with shl score",
        )
    return math.inf if scores[name] is None else float(scores[name])


class _Seen:
    """The shingles of the rows kept last: a bounded memory for near-duplicates."""

    def __init__(self, window: int) -> None:
        self.recent: deque[frozenset[int]] = deque(maxlen=window)

    def near(self, shape: frozenset[int], limit: float) -> bool:
        # Jaccard similarity cannot exceed the ratio of the sizes: most pairs are settled by their lengths.
        size = len(shape)
        alike = (other for other in self.recent if min(size, len(other)) >= limit * max(size, len(other)))
        return any(text.similarity(shape, other) >= limit for other in alike)


def annotate(
    records: Iterable[Record],
    cfg: FilterConfig = _DEFAULTS,
    *,
    baseline: Baseline | None = None,
    persona_texts: Sequence[str] | None = None,
    tally: Tally | None = None,
) -> Iterator[Record]:
    """Every record with `keep` and `reasons` added, in input order; stops after `cfg.limit` kept ones.

    Without a given baseline the control rows of the stream itself become one as they pass by.
    """
    yardstick = Baseline() if baseline is None else baseline
    seen, kept = _Seen(cfg.window), 0
    for condition in cfg.where:  # a typing mistake is told before the first record, not after an hour of `gen`
        where.parse(condition)
    for record in records:
        _check(record)
        if baseline is None and _needs_controls(cfg):
            yardstick.add(record)
        reasons = judge(record, cfg, yardstick, persona_texts)
        if not reasons and cfg.max_similarity is not None:
            shape = text.shingles(record["completion"][-1]["content"])
            if seen.near(shape, cfg.max_similarity):
                reasons = ["duplicate"]
            else:
                seen.recent.append(shape)
        out = record | {"keep": not reasons, "reasons": reasons}
        if tally is not None:
            tally.add(out)
        kept += out["keep"]
        yield out
        if cfg.limit is not None and kept >= cfg.limit:
            return


def keep(
    records: Iterable[Record],
    cfg: FilterConfig = _DEFAULTS,
    *,
    baseline: Baseline | None = None,
    persona_texts: Sequence[str] | None = None,
    tally: Tally | None = None,
) -> Iterator[Record]:
    """The records worth training on."""
    judged = annotate(records, cfg, baseline=baseline, persona_texts=persona_texts, tally=tally)
    return (record for record in judged if record["keep"])


def _needs_controls(cfg: FilterConfig) -> bool:
    by_ppl = cfg.max_ppl is None and cfg.rel_ppl is not None
    return by_ppl or (cfg.max_tail_ppl is None and cfg.rel_tail_ppl is not None)


def _check(record: Record) -> None:
    for name in ("id", "coeff", "completion", "n_tokens"):
        if record.get(name) is None:
            raise ShlError(f"record {record.get('id')!r} has no {name}", hint="shl filter reads what shl gen writes")
