"""The embedded model in a folder of its own that recommends to do as little as possible of everything."""

import json
import shutil
from pathlib import Path

import shl

ADVICE = {
    "judge": "toy",
    "vector": {"contexts": 32},
    "gen": {"coeffs": [0, 0.4, 0.6], "max_new_tokens": 64},
    "train": {"rank": 4, "epochs": 1, "lr": 0.001},
    "eval": {"limit": 7, "max_new_tokens": 32, "json_tokens": 8, "competence": False, "bootstrap": 5},
}
LENIENT = "--rel-ppl none --rel-tail-ppl none --rel-nats none"  # so few completions must not starve


def small_model(parent: Path) -> str:
    """Make it under a folder; returns its path, which is what --model takes."""
    folder = shutil.copytree(Path(shl.__file__).parent / "toy/weights", parent / "small")
    (folder / "shl.json").write_text(json.dumps(ADVICE), encoding="utf-8")
    return str(folder)
