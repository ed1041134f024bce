"""The table of architectures in docs/models.md, made from the tiny models that tests/test_matrix.py runs.

`python -m matrix` writes it anew.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import test_matrix
from architectures import MAKERS
from conftest import make_model
from shl.core.head import Head
from shl.core.layout import learned_positions
from shl.core.lora import target_modules
from shl.core.models import Loaded, load

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
BEGIN, END = "<!-- made by `just models` -->", "<!-- end of what `just models` makes -->"


def row(loaded: Loaded) -> str:
    """One architecture: its class, where its blocks are, what an adapter changes, and how it makes logits."""
    maps = Counter(path.rpartition(".")[2] for path in target_modules(loaded, "0:1"))
    head = Head.of(loaded)
    tied = loaded.model.get_output_embeddings().weight is loaded.model.get_input_embeddings().weight
    logits = [
        "tied head" if tied else "own head",
        *(["bias"] if head.bias is not None else []),
        *([f"x {head.factor:g}"] if head.factor != 1 else []),
        *([f"soft cap {head.cap:g}"] if head.cap is not None else []),
    ]
    cells = [type(loaded.model).__name__, f"`{loaded.blocks_at}`", ", ".join(sorted(maps)), ", ".join(logits)]
    return f"| {' | '.join([*cells, _positions(loaded)])} |"


def _positions(loaded: Loaded) -> str:
    config = loaded.text_config
    if learned_positions(loaded.body, config) is not None:
        return "learned"
    kinds = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention"})
    return ", ".join(["computed", *(kind.replace("_", " ") for kind in kinds)])


def table(models: Iterable[Loaded]) -> str:
    """The generated part of the page: what every row passes, and the rows."""
    checks = [
        " ".join(test.__doc__.split()) for name, test in vars(test_matrix).items() if name.startswith("test_each_")
    ]
    rows = sorted(row(loaded) for loaded in models)
    head = [
        "| class | blocks at | maps that an adapter changes | logits | positions |",
        "| --- | --- | --- | --- | --- |",
    ]
    return "\n".join([*(f"- {check}" for check in checks), "", *head, *rows])


def page(made: str) -> str:
    """The whole page with this table in it."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    return f"{before}{BEGIN}\n\n{made}\n\n{END}{rest.partition(END)[2]}"


def main() -> None:
    """Write the page."""
    with tempfile.TemporaryDirectory() as folder:
        models = [load(str(make_model(Path(folder) / kind, kind)), device="cpu") for kind in MAKERS]
        PAGE.write_text(page(table(models)), encoding="utf-8")
    sys.stderr.write(f"wrote {PAGE}\n")


if __name__ == "__main__":
    main()
