"""JSON Lines in and out: completion records, prompts and pairs, validated, with file, line and field in every error."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import jsonlines

from shl.core import strict
from shl.core.chat import join_system, with_system
from shl.core.errors import InputError

Source = Path | str | IO[str] | Iterable[str] | None
Message = dict[str, str]
Record = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")
LONGEST = 16 << 20  # bytes of a line; a longer one is a damaged file, and would not fit beside others in memory
MOST_SAID = 1 << 20  # characters of a completion
_SURROGATE = re.compile("[\ud800-\udfff]")
# what a terminal obeys or a reader takes for the end of a line; JSON can say it without holding it
_ESCAPED = re.compile("[\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_NUMBER = (int, float)
_KINDS: dict[type | tuple[type, ...], str] = {
    _NUMBER: "a number",
    str: "a string",
    int: "an integer",
    list: "a list",
    dict: "an object",
    bool: "true or false",
}
_OPTIONAL: dict[str, type | tuple[type, ...]] = {
    "coeff": _NUMBER,
    "seed": int,
    "model": str,
    "adapters": list,
    "vector": str,
    "n_tokens": int,
    "finish": str,
    "trajectory": dict,
    "scores": dict,
    "keep": bool,
    "reasons": list,
}
# the scores that shl measures; others are anybody's, and may be anything
_MEASURED = frozenset(("ppl", "ppl_tail", "max_nll", "n_tokens", "rep", "distinct"))


@dataclass(frozen=True)
class Prompt:
    """One prompt. A system message is always in `system`, never in `messages`."""

    id: str
    messages: list[Message]
    system: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def asked(self, system: str | None = None) -> list[Message]:
        """The chat as a model gets it: a run's system text in front of the prompt's own."""
        return with_system(self.messages, join_system(system, self.system))


class Pair(NamedTuple):
    """A contrast: two chats, whose last token is read, or two strings taken as they stand."""

    pos: str | list[Message]
    neg: str | list[Message]


def dumps(obj: Any, indent: int | None = None) -> str:
    """JSON on one line, or indented. NaN is refused; control characters and lone surrogates are escaped."""
    text = json.dumps(obj, ensure_ascii=False, allow_nan=False, indent=indent)
    return _ESCAPED.sub(lambda match: f"\\u{ord(match.group()):04x}", text)


def write_record(handle: IO[str], record: Record) -> None:
    """Write one record as one line."""
    handle.write(dumps(record) + "\n")


def as_chats(records: Iterable[Record]) -> Iterator[Record]:
    """Kept records as conversations: `messages` in the place of `prompt` and `completion`; other keys go along."""
    for record in records:
        if record.get("keep") is not False:
            rest = {name: value for name, value in record.items() if name not in ("prompt", "completion")}
            yield {"messages": [*record["prompt"], *record["completion"]], **rest}


def read_lines(source: Source) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every JSON object of a source with its place, "file:line"; None and "-" are stdin. Reads as it is asked."""
    with _open(source) as (name, lines):
        yield from _objects(name, lines)


def read_records(source: Source) -> Iterator[Record]:
    """Completion records, one at a time, each checked."""
    for where, record in read_lines(source):
        check_record(record, where)
        yield record


def check_record(record: Record, where: str = "record") -> None:
    """Refuse a record that is not a completion record."""
    _typed(record, "id", str, where)
    check_messages(record.get("prompt"), f"{where}: prompt")
    check_messages(record.get("completion"), f"{where}: completion")
    if len(record["completion"]) != 1 or record["completion"][0]["role"] != "assistant":
        raise InputError("is not a list of one assistant message", where=f"{where}: completion")
    if (said := len(record["completion"][0]["content"])) > MOST_SAID:
        raise InputError(f"has {said} characters, and no completion has more than {MOST_SAID}",
                         where=f"{where}: completion", hint="leave that record out")  # fmt: skip
    for name, kind in _OPTIONAL.items():
        if record.get(name) is not None:
            _typed(record, name, kind, where)
    if (record.get("n_tokens") or 0) < 0:
        raise InputError("is less than none", where=f"{where}: n_tokens")
    for name in ("adapters", "reasons"):
        if not all(isinstance(one, str) for one in record.get(name) or ()):
            raise InputError("is not a list of strings", where=f"{where}: {name}")
    for name in _MEASURED & (record.get("scores") or {}).keys():
        if record["scores"][name] is not None:
            _typed(record["scores"], name, _NUMBER, f"{where}: scores")
    if record.get("trajectory") is not None:
        _check_trajectory(record["trajectory"], record.get("n_tokens"), f"{where}: trajectory")


def _check_trajectory(told: dict[str, Any], n_tokens: int | None, where: str) -> None:
    """Refuse doses that are not those of the completion's tokens, and rewinds that go forward."""
    _objects_of(told, "spans", {"tokens": int, "coeff": _NUMBER, "dose": _NUMBER}, where)
    if n_tokens is not None and (total := sum(span["tokens"] for span in told["spans"])) != n_tokens:
        raise InputError(f"tells of {total} tokens where there are {n_tokens}", where=f"{where}: spans")
    if "rewinds" in told:
        _objects_of(told, "rewinds", {"at": int, "to": int, "coeff": _NUMBER, "why": str, "value": _NUMBER}, where)
        if any(not 0 <= one["to"] < one["at"] for one in told["rewinds"]):
            raise InputError("holds one that does not go back", where=f"{where}: rewinds")


def _objects_of(raw: dict[str, Any], name: str, kinds: dict[str, Any], where: str) -> None:
    """Refuse a field that is not a list of objects with fields of these kinds."""
    _typed(raw, name, list, where)
    for index, one in enumerate(raw[name]):
        if not isinstance(one, dict):
            raise InputError("is not an object", where=f"{where}: {name}[{index}]")
        for key, kind in kinds.items():
            _typed(one, key, kind, f"{where}: {name}[{index}]")


def check_messages(value: Any, where: str) -> None:
    """Refuse what is not a non-empty list of chat messages."""
    if not isinstance(value, list) or not value:
        raise InputError(
            "is missing or not a list of chat messages",
            where=where,
            hint='a message is {"role": "user", "content": "…"}',
        )
    for index, message in enumerate(value):
        place = f"{where}[{index}]"
        if not isinstance(message, dict):
            raise InputError("is not a chat message", where=place)
        for name in ("role", "content"):
            _typed(message, name, str, place)
        if message["role"] not in ROLES:
            raise InputError(f"is {message['role']!r}, not one of {', '.join(ROLES)}", where=f"{place}.role")


def read_prompts(source: Source) -> list[Prompt]:
    """Prompts from JSON Lines, or from plain text with one prompt a line. Ids are unique."""
    prompts: list[Prompt] = []
    places: dict[str, str] = {}
    repeats: dict[str, int] = {}
    for where, raw in _read_either(source):
        prompt = parse_prompt(raw, where)
        if prompt.id in places:
            if raw.get("id") is not None:
                raise InputError(f"{prompt.id!r} is taken already by {places[prompt.id]}", where=f"{where}: id")
            prompt = Prompt(_free_id(prompt.id, places, repeats), prompt.messages, prompt.system, prompt.extra)
        places[prompt.id] = where
        prompts.append(prompt)
    if not prompts:
        raise InputError("holds no prompts", where=_name(source))
    return prompts


def parse_prompt(raw: dict[str, Any], where: str = "prompt") -> Prompt:
    """One prompt from its JSON object: `prompt` or `user`, optional `system` and `id`, other keys carried through."""
    if ("prompt" in raw) == ("user" in raw):
        raise InputError('needs either "prompt", a list of chat messages, or "user", a string', where=where)
    if "user" in raw:
        _typed(raw, "user", str, where)
        messages: list[Message] = [{"role": "user", "content": raw["user"]}]
    else:
        check_messages(raw["prompt"], f"{where}: prompt")
        messages = raw["prompt"]
    for name in ("system", "id"):
        if raw.get(name) is not None:
            _typed(raw, name, str, where)
    system = raw.get("system")
    if messages[0]["role"] == "system":
        if system is not None:
            raise InputError("is given twice: as a key and as the first message", where=f"{where}: system")
        system, messages = messages[0]["content"], messages[1:]
        check_messages(messages, f"{where}: prompt")
    extra = {name: value for name, value in raw.items() if name not in ("prompt", "user", "system", "id")}
    given = raw.get("id")
    return Prompt(given if given is not None else _content_id(messages, system), messages, system, extra)


def read_pairs(source: Source) -> list[Pair]:
    """Contrast pairs: `pos` and `neg`, both chats or both strings."""
    pairs = []
    for where, raw in read_lines(source):
        for side in ("pos", "neg"):
            if isinstance(raw.get(side), str):
                _typed(raw, side, str, where)
            else:
                check_messages(raw.get(side), f"{where}: {side}")
        if isinstance(raw["pos"], str) != isinstance(raw["neg"], str):
            raise InputError("one side is a string and the other a chat", where=f"{where}: neg")
        pairs.append(Pair(raw["pos"], raw["neg"]))
    if not pairs:
        raise InputError("holds no pairs", where=_name(source))
    return pairs


def _content_id(messages: list[Message], system: str | None) -> str:
    """An id that follows from what the prompt says, so that moving a line changes no seed."""
    text = json.dumps([system, messages], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _free_id(base: str, taken: Iterable[str], repeats: dict[str, int]) -> str:
    """The first of base-2, base-3, … that is not taken: the same prompt twice is two prompts."""
    number = repeats.get(base, 1) + 1
    while f"{base}-{number}" in taken:
        number += 1
    repeats[base] = number
    return f"{base}-{number}"


def _typed(raw: dict[str, Any], name: str, kind: type | tuple[type, ...], where: str) -> None:
    """Refuse a field that is missing or of another type; a bool is no number, and text is valid Unicode."""
    value = raw.get(name)
    wrong_bool = isinstance(value, bool) and kind is not bool
    if name not in raw or not isinstance(value, kind) or wrong_bool:
        raise InputError("is missing" if name not in raw else f"is not {_KINDS[kind]}", where=f"{where}: {name}")
    if isinstance(value, str) and _SURROGATE.search(value):
        raise InputError("holds half a surrogate pair, which is no character", where=f"{where}: {name}")


def _objects(name: str, lines: Iterable[bytes | str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Decode numbered lines, skipping blank ones."""
    number = 0

    def counted() -> Iterator[bytes | str]:
        nonlocal number
        for line in lines:
            number += 1
            yield line

    reader = jsonlines.Reader(counted(), loads=strict.loads)
    while True:
        try:
            value = reader.read(type=dict, skip_empty=True)
        except EOFError:
            return
        except jsonlines.InvalidLineError as error:
            reason = re.sub(r" \(line \d+\)$", "", str(error))
            raise InputError(reason, where=f"{name}:{number}", hint="each line must be one JSON object") from error
        yield f"{name}:{number}", value


def _read_either(source: Source) -> Iterator[tuple[str, dict[str, Any]]]:
    """Objects of a JSON Lines source, or a `user` object for each line of plain text.

    The file's name decides when it ends in .txt or .jsonl, else its first line that is not blank.
    """
    with _open(source) as (name, lines):
        stream = iter(lines)
        blank = 0
        first: bytes | str | None = None
        for line in stream:
            if line.strip():
                first = line
                break
            blank += 1
        if first is None:
            return
        everything = _chain([b""] * blank, [first], stream)
        text = first if isinstance(first, str) else first.decode("utf-8", errors="replace")
        sure = name.endswith((".jsonl", ".ndjson"))  # a damaged first line does not make it plain text
        if name.endswith(".txt") or not (sure or text.lstrip("\ufeff\x1e").lstrip().startswith("{")):
            yield from _plain(name, everything)
        else:
            yield from _objects(name, everything)


def _chain(*parts: Iterable[bytes | str]) -> Iterator[bytes | str]:
    for part in parts:
        yield from part


_NEVER_TEXT = re.compile("[\0\ud800-\udfff]")
_NO_TEXT = "prompts are JSON Lines or plain text in UTF-8"


def _plain(name: str, lines: Iterable[bytes | str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Plain text, one prompt a line."""
    for number, line in enumerate(lines, 1):
        try:
            text = line if isinstance(line, str) else line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"is not UTF-8: {error}", where=f"{name}:{number}", hint=_NO_TEXT) from error
        if _NEVER_TEXT.search(text):
            raise InputError("holds NUL or half a surrogate pair", where=f"{name}:{number}", hint=_NO_TEXT)
        if said := text.lstrip("\ufeff").strip():
            yield f"{name}:{number}", {"user": said}


def _name(source: Source) -> str:
    if source is None or source == "-":
        return "stdin"
    return str(source) if isinstance(source, Path | str) else "input"


@contextmanager
def _open(source: Source) -> Iterator[tuple[str, Iterable[bytes | str]]]:
    """A name and the lines of a source. Files are read as bytes, so that a bad byte has a line number."""
    name = _name(source)
    if source is None or source == "-":
        yield name, _bounded(name, sys.stdin.buffer)
    elif isinstance(source, Path | str):
        if not Path(source).exists():
            raise InputError("no such file", where=name, hint="check the path; - reads what comes through a pipe")
        if Path(source).is_dir():
            raise InputError("is a directory, not a file", where=name, hint="name a file in it")
        with open(source, "rb") as handle:
            yield name, _bounded(name, handle)
    else:
        yield name, source


def _bounded(name: str, handle: IO[bytes]) -> Iterator[bytes]:
    """The lines of a file. One without an end is told before it fills the memory."""
    number = 0
    while line := handle.readline(LONGEST + 1):
        number += 1
        if len(line) > LONGEST:
            raise InputError(f"is longer than {LONGEST >> 20} MiB", where=f"{name}:{number}",
                             hint="each line must be one JSON object; is it another kind of file?")  # fmt: skip
        yield line
