"""Peak memory of `shl filter` on a long stream: it holds a window and two histograms, however much goes through.

Pipes generated records (controls among them, so that relative limits are in force) through the command and reads its
peak resident memory from the operating system. Fails when that reaches the limit.

    python tests/bench/memory.py --gigabytes 5
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator

LIMIT = 200e6  # bytes


def records(total: float, line: int, seed: int = 0) -> Iterator[bytes]:
    """Completion records of about so many bytes each, most of it prompt, until the total is reached."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 9))) for _ in range(3000)]
    written = number = 0
    while written < total:
        said = " ".join(rng.choices(words, k=rng.randint(40, 160)))
        head = {"id": f"p{number // 4}/{number % 4 / 4}/0", "coeff": number % 4 / 4, "n_tokens": 60, "finish": "stop",
                "scores": {"ppl": rng.uniform(1.5, 20), "ppl_tail": rng.uniform(1.5, 30)},
                "completion": [{"role": "assistant", "content": said}]}  # fmt: skip
        text = json.dumps(head)
        filler = " ".join(rng.choices(words, k=50))
        context = (filler * (line // len(filler) + 1))[: max(line - len(text) - 60, 1)]
        row = text[:-1].encode() + b', "prompt": [{"role": "user", "content": "' + context.encode() + b'"}]}\n'
        written, number = written + len(row), number + 1
        yield row


def main() -> int:
    """Run and report in one line of markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=0.2)
    parser.add_argument("--line", type=int, default=64_000, help="bytes of a record")
    given, options = parser.parse_known_args()
    command = [sys.executable, "-m", "shl", "filter", *options]
    begun, sent, count = time.monotonic(), 0, 0
    filtering = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    assert filtering.stdin
    for row in records(given.gigabytes * 1e9, given.line):
        filtering.stdin.write(row)
        sent, count = sent + len(row), count + 1
    filtering.stdin.close()
    _, status, used = os.wait4(filtering.pid, 0)
    peak = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    seconds = time.monotonic() - begun
    print("| GB in | records | bytes of a record | exit | peak MB | seconds |\n| --- | --- | --- | --- | --- | --- |")
    code = os.waitstatus_to_exitcode(status)
    print(f"| {sent / 1e9:.2f} | {count} | {sent // count} | {code} | {peak / 1e6:.0f} | {seconds:.0f} |")
    return int(code != 0 or peak >= LIMIT)


if __name__ == "__main__":
    sys.exit(main())
