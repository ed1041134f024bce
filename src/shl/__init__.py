"""shl distils a persona steering vector into LoRA weights and heals the incoherence, one round at a time.

    import shl
    m = shl.load("toy")
    v = shl.extract(m, pos="…", neg="…")
    kept = list(shl.keep(shl.generate(m, shl.pool("authority"), vector=v), shl.FilterConfig()))
    shl.heal(m, kept, out="r0")

Names are imported when they are first used, so `import shl` does not import torch.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# name -> where it lives. `merge` is shl.bake.bake: `shl.bake` itself can only be the module.
_HOME = {
    "load": "shl.core.models",
    "Loaded": "shl.core.models",
    "ModelRef": "shl.core.locate",
    "Vector": "shl.core.vectors",
    "extract": "shl.vector",
    "extract_pairs": "shl.vector",
    "measure_blocks": "shl.bands",
    "generate": "shl.gen",
    "by_kl": "shl.dose",
    "by_survival": "shl.dose",
    "annotate": "shl.filter",
    "keep": "shl.filter",
    "judge": "shl.filter",
    "Tally": "shl.filter",
    "heal": "shl.train",
    "merge": "shl.bake:bake",
    "evaluate": "shl.eval",
    "compare": "shl.eval",
    "trajectory": "shl.plot",
    "dose_response": "shl.plot",
    "training_curves": "shl.plot",
    "write_report": "shl.report",
    "describe": "shl.info",
    "append_row": "shl.results",
    "row_of": "shl.results",
    "read_rows": "shl.results",
    "read_records": "shl.core.records",
    "read_prompts": "shl.core.records",
    "write_record": "shl.core.records",
    "persona": "shl.core.pools",
    "personas": "shl.core.pools",
    "pool": "shl.core.pools",
    "contexts": "shl.core.pools",
    "vignettes": "shl.core.pools",
    "VectorConfig": "shl.core.defaults",
    "GenConfig": "shl.core.defaults",
    "DoseConfig": "shl.core.defaults",
    "FilterConfig": "shl.core.defaults",
    "TrainConfig": "shl.core.defaults",
    "EvalConfig": "shl.core.defaults",
    "configure": "shl.core.defaults",
    "ShlError": "shl.core.errors",
}

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    """Import a public name from its home on first use (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'shl' has no attribute {name!r}")
    module, _, attribute = _HOME[name].partition(":")
    value = getattr(import_module(module), attribute or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
