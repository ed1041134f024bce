"""A model without files as the benchmarks use it, and a training on ids without what belongs to files of text."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def bare(model: Any, tokenizer: Any = None) -> Any:
    """The model as `shl` holds one that it has loaded."""
    from shl.core.locate import ModelRef
    from shl.core.models import Loaded

    return Loaded(
        model=model, tokenizer=tokenizer, ref=ModelRef.__new__(ModelRef), digest="", chain=[], device=model.device,
        dtype=model.dtype, blocks=list(model.model.layers), blocks_at="model.layers", text_config=model.config,
    )  # fmt: skip


def trained(loaded: Any, cfg: Any, rows: Sequence[tuple[list[int], list[int]]], modules: Sequence[str]) -> Any:
    """The loop of `shl train` over prompts and completions, with the state that it leaves beside its output."""
    from shl.core.heal_data import Example
    from shl.core.heal_part import Checkpoint
    from shl.core.heal_run import Run
    from shl.core.lora import injected
    from shl.core.peft_dir import peft_config

    examples = [Example(*row) for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        part = Checkpoint(Path(folder) / "a", {})
        run = Run(loaded, cfg, examples, [], modules)
        with injected(loaded, peft_config("", modules, cfg.rank, 2.0 * cfg.rank), run.generator("start")) as lora:
            run.fit(lora, part)
        part.release()
    return run
