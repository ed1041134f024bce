"""The command line as one page, docs/cli.md: `python -m shl.cli.reference > docs/cli.md`, or `just cli`.

It reads the parser's parameters and the commands' own signatures, never the printed help, so that the page does not
depend on a terminal, the environment or typer's taste in boxes.
"""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from typer.main import get_command

from shl.cli import app

SHARED = 4  # an option that so many commands have in the same words stands once, at the top

EXIT_CODES = (
    (0, "done, or the reader of a pipe has what it wanted"),
    (1, "something to mend: `shl: error: …` and, where there is one, `hint: …` with the next command to type"),
    (2, "wrong use of arguments or options"),
    (3, "finished below a gate; the commands that have one say so below"),
    (130, "stopped by Ctrl-C"),
)

GATES = {  # when a command ends with 3
    "gen": "with `--coeff auto`, no dose lets enough completions survive",
    "filter": "fewer records are kept than `--min-keep`",
    "eval": "coherence is below `--min-coherence`",
    "dose": "no dose lets enough completions survive",
}

ENVIRONMENT = (
    ("SHL_MODEL", "the model, where neither `--model` nor an input names one"),
    ("SHL_DEBUG", "when set, errors show their traceback"),
    ("NO_COLOR", "when set, nothing is coloured"),
    ("HF_HUB_OFFLINE", "1 keeps the Hugging Face libraries off the network"),
)


@dataclass(frozen=True)
class Entry:
    """One argument or option of a command, in words."""

    flags: tuple[str, ...]  # as declared; empty for an argument
    value: str  # what stands behind the flag, or for the argument; empty for a switch
    bounds: str  # of a number
    meaning: str
    default: str
    required: bool

    @property
    def shared(self) -> tuple[tuple[str, ...], str, str]:
        """What must be equal for two commands to have the same option."""
        return self.flags, self.meaning, self.default


@dataclass(frozen=True)
class Command:
    """One command, in words."""

    name: str
    text: str
    examples: tuple[str, ...]
    entries: tuple[Entry, ...]

    @property
    def usage(self) -> str:
        """`shl NAME` with everything that must or can follow it."""
        needed = [f"{min(e.flags, key=len)} {e.value}" for e in self.entries if e.flags and e.required]
        arguments = [e.value if e.required else f"[{e.value}]" for e in self.entries if not e.flags]
        return " ".join(["shl", self.name, *arguments, *needed, "[OPTIONS]"])


def commands() -> list[Command]:
    """Every command, in the order of `shl --help`."""
    parsers: dict[str, Any] = vars(get_command(app))["commands"]
    told = []
    for info in app.registered_commands:
        name, function = str(info.name), info.callback
        assert function is not None
        entries = tuple(_entries(parsers[name].params, function))
        told.append(Command(name, inspect.getdoc(function) or "", examples(info.epilog), entries))
    return told


def examples(epilog: str | None) -> tuple[str, ...]:
    """The lines under "Examples:" at the end of a command's help."""
    return tuple(line.strip() for line in (epilog or "").partition("Examples:\n")[2].splitlines() if line.strip())


def _entries(parameters: Sequence[Any], function: Callable[..., Any]) -> Iterable[Entry]:
    """What a command takes: flags as the parser knows them, choices as the signature has them."""
    annotated = inspect.signature(function, eval_str=True).parameters
    for parameter in parameters:
        meaning, default = _split(parameter.help or "")
        if parameter.param_type_name == "argument":
            flags, value = (), parameter.metavar or parameter.name.upper()
        else:
            flags, value = tuple(parameter.opts), _value(annotated[parameter.name].annotation, parameter.metavar)
        unsaid = "required" if parameter.required else "" if value else "off"
        yield Entry(flags, value, _bounds(parameter), meaning, default or unsaid, parameter.required)


def _split(text: str) -> tuple[str, str]:
    """A help text without the default in brackets at its end, and that default."""
    found = re.fullmatch(r"(.*?)(?: \[([^\[\]]*)\])?", text, re.DOTALL)
    assert found is not None
    return found[1], found[2] or ""


def _value(annotation: Any, metavar: str | None) -> str:
    """What stands behind a flag: one of some words, a metavar, or nothing."""
    kinds = [annotation]
    for kind in kinds:  # through Annotated, unions and lists down to plain types and words
        if get_origin(kind) is Literal:
            return "|".join(get_args(kind))
        if kind is bool:
            return ""
        kinds += get_args(kind)[:1] if hasattr(kind, "__metadata__") else ()
        kinds += get_args(kind) if get_origin(kind) in (Union, UnionType, list) else ()
    return metavar or "TEXT"


def _bounds(parameter: Any) -> str:
    """The range of a number."""
    low, high = getattr(parameter, "min", None), getattr(parameter, "max", None)
    if low is None:
        return "" if high is None else f"≤ {high}"
    return f"≥ {low}" if high is None else f"{low} to {high}"


def page() -> str:
    """The whole page as markdown."""
    told = commands()
    seen = Counter(entry.shared for one in told for entry in one.entries if entry.flags)
    often = {shared for shared, count in seen.items() if count >= SHARED and "--out" not in shared[0]}
    common = {entry.shared: entry for one in told for entry in one.entries if entry.shared in often}
    blocks = [
        "# Command line",
        "`just cli` writes this page from the commands; a test notices when it is out of date.",
        _table(("command", "what it does"), ((f"[`shl {c.name}`](#shl-{c.name})", _first(c.text)) for c in told)),
        _fold(
            "`shl COMMAND -h` says the same in short, `shl --version` prints the version. `shl --install-completion` "
            "sets up completion for the shell that it is typed in; `shl --show-completion` prints the script instead."
        ),
        "## Exit codes",
        _table(("code", "when"), EXIT_CODES),
        "## Environment",
        _table(("variable", "meaning"), ((f"`{name}`", text) for name, text in ENVIRONMENT)),
        "## Common options",
        _fold(
            "They mean the same in every command that has them. A setting that no flag gives comes from the input "
            "file, then from the environment, then from the model's own recommendations, then from the default."
        ),
        _options(list(common.values())),
        *(block for one in told for block in _section(one, common)),
    ]
    return "\n\n".join(blocks) + "\n"


def _fold(text: str) -> str:
    return textwrap.fill(text, 118, break_long_words=False, break_on_hyphens=False)


def _first(text: str) -> str:
    return text.partition("\n\n")[0].replace("\n", " ")


def _section(one: Command, common: dict[Any, Entry]) -> list[str]:
    """The blocks of one command."""
    own = [entry for entry in one.entries if entry.flags and entry.shared not in common]
    also = [f"`{entry.flags[0]}`" for entry in one.entries if entry.shared in common]
    arguments = [entry for entry in one.entries if not entry.flags]
    blocks = [f"## shl {one.name}", f"    {one.usage}", _cell(one.text)]
    if arguments:
        rows = ((_code(entry.value), _cell(entry.meaning), _cell(entry.default)) for entry in arguments)
        blocks.append(_table(("argument", "meaning", "default"), rows))
    if own:
        blocks.append(_options(own))
    blocks.append(_fold(f"[Common options](#common-options): {', '.join(also)}."))
    if one.name in GATES:
        blocks.append(f"Exit code 3: {GATES[one.name]}.")
    blocks.append("\n".join(["```sh", *one.examples, "```"]))
    return blocks


def _options(found: Sequence[Entry]) -> str:
    rows = (
        (", ".join(map(_code, e.flags)), f"{_code(e.value)} {e.bounds}".strip(), _cell(e.meaning), _cell(e.default))
        for e in found
    )
    return _table(("option", "value", "meaning", "default"), rows)


def _code(value: str) -> str:
    return f"`{_cell(value)}`" if value else ""


def _cell(text: str) -> str:
    """Text that a table shows as it is."""
    return re.sub(r"([|*<])", r"\\\1", text)


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [list(head), ["---"] * len(head), *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8", newline="\n")  # type: ignore[union-attr]
    sys.stdout.write(page())
