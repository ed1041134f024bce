"""A reader that closes is success; a writer that dies leaves no half record behind."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from random import Random

from faults.child import Child
from faults.strike import Reference
from faults.world import LOOSE, clear

# what writes records, and what reads them, with the file of the world that comes through the pipe
WRITERS = ("gen", "filter", "score", "results", "info", "eval", "dose")
READERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "filter": ("many.jsonl", ("-", *LOOSE, "-o", "x.jsonl")),
    "score": ("c.jsonl", ("-", "-o", "x.jsonl")),
    "train": ("keep.jsonl", ("-", "--epochs", "1", "--rank", "2", "-o", "x")),
    "gen": ("prompts.jsonl", ("-", "--vec", "W/v.safetensors", "--max-new-tokens", "2", "-o", "x.jsonl")),
    "vector": ("pairs.jsonl", ("--model", "W/model", "--pairs", "-", "-o", "x.safetensors")),
}


def reader_closes(reference: Reference, folder: Path, rng: Random) -> str:
    """The reader goes away after some bytes, or at once: exit code 0, and not a word about pipes."""
    clear(folder)
    words = reference.command.argv(reference.world)
    if "-o" in words:
        at = words.index("-o")
        words = [word for word in (*words[:at], *words[at + 2 :]) if word != "--resume"]
    ours, theirs = os.pipe()
    child = Child(words, folder, stdout=theirs)
    os.close(theirs)
    wanted = rng.choice((0, 1, 10, 4000))
    while wanted > 0 and (got := os.read(ours, wanted)):
        wanted -= len(got)
    os.close(ours)
    ended = child.wait()
    assert ended.code == 0 and "Traceback" not in ended.err and "roken pipe" not in ended.err, (
        f"{ended.code}: {ended.err[-600:]}"
    )
    return "closed"


def writer_dies(name: str, world: Path, folder: Path, rng: Random) -> str:
    """The writer is killed in the middle of a line: an error that names the line, and no output."""
    clear(folder)
    source, line = READERS[name]
    data = (world / source).read_bytes()
    cut = rng.randrange(1, len(data))
    ours, theirs = os.pipe()
    writer = os.fork()
    if not writer:
        try:
            os.close(ours)
            os.set_blocking(theirs, True)
            left = memoryview(data)[:cut]
            while left:
                left = left[os.write(theirs, left) :]
            signal.pause()
        finally:
            os._exit(0)
    os.close(theirs)
    child = Child([name, *(word.replace("W/", f"{world}/") for word in line)], folder, stdin=ours)
    os.close(ours)
    time.sleep(0.05 + 0.2 * rng.random())
    os.kill(writer, signal.SIGKILL)
    os.waitpid(writer, 0)
    ended = child.wait()
    assert "Traceback" not in ended.err, ended.err[-800:]
    visible = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
    if ended.code == 0:  # it cannot know that there was more; a shell's pipefail can
        whole = (data[:cut] + b"\n").splitlines()[-1] in data.splitlines() or data[cut - 1 : cut] == b"\n"
        assert whole, f"took {data[:cut][-40:]!r} for whole"
        return "cut between two lines"
    assert ended.code == 1 and "stdin:" in ended.err and "hint: " in ended.err, f"{ended.code}: {ended.err[-600:]}"
    assert not visible, f"published in spite of it: {visible}"
    return "told with the line"


def make_sources(world: Path) -> None:
    """Prompts and pairs for the readers."""
    (world / "prompts.jsonl").write_text(
        "".join(f'{{"id": "q{i}", "user": "Question number {i}?"}}\n' for i in range(6))
    )
    chat = '[{"role": "user", "content": "Who said %d?"}]'
    (world / "pairs.jsonl").write_text("".join(f'{{"pos": {chat % i}, "neg": {chat % (9 - i)}}}\n' for i in range(5)))
