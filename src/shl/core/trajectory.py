"""The dose along a trajectory: where a vector acts, how it is dialled down, when a row is rewound. No tensors here."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

from shl.core.defaults import GenConfig
from shl.core.errors import ShlError
from shl.core.text import repetition

SCOPES = ("all", "prompt", "gen")
SCHEDULES = ("constant", "linear", "exp")
GATES = ("cosine",)
WINDOW = 16  # tokens of the running surprise
TAIL = 64  # tokens whose text is searched for repetition
EVERY = 8  # tokens between two such searches
SPAN = 32  # tokens of a span at most, where the dose changes from token to token


@dataclass(frozen=True)
class Backtrack:
    """When a row is rewound, how far, and how much of its coefficient is left: the defaults are GenConfig's."""

    max_surprise: float = GenConfig.max_surprise
    max_rep: float = GenConfig.max_rep
    rewind: int = GenConfig.rewind
    shrink: float = GenConfig.shrink
    max_rewinds: int = GenConfig.max_rewinds

    def __post_init__(self) -> None:
        if not 0 < self.shrink < 1 or self.rewind < 1 or self.max_rewinds < 1 or self.max_surprise <= 0:
            raise ShlError(
                "backtracking needs a limit and a rewind above 0, one rewind at least, and a share between 0 and 1",
                hint="look at --max-surprise, --rewind, --max-rewinds and --shrink",
            )

    @property
    def extra(self) -> int:
        """Tokens that a row may sample in vain."""
        return self.max_rewinds * self.rewind


@dataclass(frozen=True)
class Course:
    """The share of its coefficient that a row gets at each position, before any gate.

    Position t is the t-th token of the answer; those of the prompt are negative. The hidden state at a position is
    that of its token, so the first token of an answer is drawn from the last position of the prompt.
    """

    scope: str = "all"
    schedule: str = "constant"
    horizon: int = GenConfig.horizon
    final: float = GenConfig.final
    gate: str | None = None
    backtrack: Backtrack | None = None

    def __post_init__(self) -> None:
        for name, value, known in (
            ("scope", self.scope, SCOPES),
            ("schedule", self.schedule, SCHEDULES),
            ("gate", self.gate, (None, *GATES)),
        ):
            if value not in known:
                raise ShlError(f"{name} {value!r} is not one of {', '.join(filter(None, known))}")
        if self.horizon < 1 or not 0 <= self.final <= 1 or (self.schedule == "exp" and self.final == 0):
            raise ShlError("a schedule needs a horizon of 1 or more and a final share from 0 to 1, for exp above 0")
        if self.scope == "prompt" and self.schedule != "constant":
            raise ShlError("a schedule acts on generated positions, and scope prompt leaves none of them")

    @property
    def plain(self) -> bool:
        """Is this the same dose everywhere, so that nothing has to be done or told?"""
        return (self.scope, self.schedule, self.gate, self.backtrack) == ("all", "constant", None, None)

    @property
    def varies(self) -> bool:
        """Does the dose change from one generated token to the next?"""
        return self.schedule != "constant" or self.gate is not None

    def share(self, t: int) -> float:
        """The share of the coefficient at position t."""
        if t < 0:
            return 0.0 if self.scope == "gen" else 1.0
        if self.scope == "prompt":
            return 0.0
        way = min(t / self.horizon, 1.0)
        if self.schedule == "linear":
            return 1 - (1 - self.final) * way
        return self.final**way if self.schedule == "exp" else 1.0


def course_of(cfg: GenConfig) -> Course:
    """The course that a configuration asks for."""
    limits = Backtrack(cfg.max_surprise, cfg.max_rep, cfg.rewind, cfg.shrink, cfg.max_rewinds)
    return Course(cfg.scope, cfg.schedule, cfg.horizon, cfg.final, cfg.gate, limits if cfg.backtrack else None)


class Step(NamedTuple):
    """What was true when a token was drawn.

    `dose` is the effective coefficient at the position that it was drawn from. `surprise` is -ln p(token) under the
    unsteered model, `excess` the surprise less the entropy of p, both in nats and 0 in rows that nobody watches.
    """

    coeff: float
    dose: float
    surprise: float = 0.0
    excess: float = 0.0


class Rewind(NamedTuple):
    """An answer of `at` tokens was cut to `to` and went on at `coeff`, because the reading `why` was `value`."""

    at: int
    to: int
    coeff: float
    why: str
    value: float


class Track:
    """One row on its way: its tokens, its coefficient, and what happened to them.

    Backtracking follows the idea of FASB (arXiv 2508.17621), with surprise and repetition in the place of a classifier.
    """

    def __init__(self, prompt: list[int], start: list[int], coeff: float, course: Course) -> None:
        self.input = [*prompt, *start]  # everything the model has read or is about to
        self.asked, self.first = len(prompt), len(self.input)
        self.coeff = coeff
        self.course = course
        self.steps: list[Step] = []
        self.rewinds: list[Rewind] = []
        self.finish: str | None = None
        self.rewound = False  # since the last forward pass

    @property
    def ids(self) -> list[int]:
        """The answer so far, with the tokens that it was made to begin with."""
        return self.input[self.asked :]

    @property
    def sampled(self) -> int:
        """Tokens sampled and kept."""
        return len(self.input) - self.first

    @property
    def drawn(self) -> int:
        """Tokens sampled, those that were forgotten again among them."""
        return self.sampled + sum(rewind.at - rewind.to for rewind in self.rewinds)

    @property
    def watched(self) -> bool:
        """Can this row still be rewound? One at coefficient 0 has nothing to shrink."""
        limits = self.course.backtrack
        return limits is not None and self.coeff != 0 and len(self.rewinds) < limits.max_rewinds

    def dose(self, position: int) -> float:
        """The coefficient at a position of the input, before any gate."""
        return self.coeff * self.course.share(position - self.asked)

    def add(self, token: int, step: Step | None = None) -> None:
        """Take a sampled token in."""
        self.input.append(token)
        if step is not None:
            self.steps.append(step)

    def trouble(self, say: Callable[[list[int]], str]) -> tuple[str, float] | None:
        """The reading that is over its limit, with its name; `say` turns ids into text.

        The running surprise is the sum of the excess over the last WINDOW tokens since the last rewind, divided by
        WINDOW: by how many nats a token the unsteered model is more surprised than it expects to be.
        """
        limits = self.course.backtrack
        assert limits is not None
        since = self.rewinds[-1].to if self.rewinds else 0
        recent = self.steps[max(since, self.sampled - WINDOW) :]
        if (value := sum(step.excess for step in recent) / WINDOW) > limits.max_surprise:
            return "surprise", value
        if self.sampled % EVERY == 0 and (value := repetition(say(self.ids[-TAIL:]))) > limits.max_rep:
            return "repetition", value
        return None

    def rewind(self, why: str, value: float) -> None:
        """Forget the last tokens and go on at a smaller coefficient."""
        limits = self.course.backtrack
        assert limits is not None
        at, to = self.sampled, max(0, self.sampled - limits.rewind)
        self.coeff = _short(self.coeff * limits.shrink)  # what the record says is what acts
        self.rewinds.append(Rewind(at, to, self.coeff, why, value))
        del self.input[self.first + to :], self.steps[to:]
        self.rewound = True

    def story(self) -> dict[str, Any]:
        """What a completion record says of the trajectory, see docs/formats.md."""
        course = self.course
        falls = {} if course.schedule == "constant" else {"horizon": course.horizon, "final": course.final}
        rewinds = [rewind._asdict() | {"value": _short(rewind.value)} for rewind in self.rewinds]
        return {
            "scope": course.scope,
            "schedule": course.schedule,
            **falls,
            "gate": course.gate,
            "spans": self.spans(),
            **({} if course.backtrack is None else {"rewinds": rewinds}),
        }

    def spans(self) -> list[dict[str, Any]]:
        """Runs of tokens with the row's coefficient and the mean dose that they were drawn at."""
        course = self.course

        def run(i: int) -> tuple[float, bool, int]:
            return self.steps[i].coeff, course.scope != "all" and i > 0, i // SPAN if course.varies else 0

        spans = []
        for (coeff, *_), chosen in groupby(range(len(self.steps)), run):
            doses = [self.steps[i].dose for i in chosen]
            spans.append({"tokens": len(doses), "coeff": coeff, "dose": _short(sum(doses) / len(doses))})
        return spans


Waiting = deque[tuple[Track, int]]  # rows that are not begun, each with its seed


def _short(value: float) -> float:
    """Six significant digits, as scores have them."""
    return float(f"{value:.6g}")
