"""Suites of the evaluation by name: bundled ones, those of the package tinymfv, and any that a package plugs in.

A suite is one function: `(loaded, cfg, system, variant) -> rows`, rows as `shl.core.moral.row_of` makes them. A
package plugs one in as an entry point of the group `shl.suites`; `--suite name:variant` then calls it.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points

from shl.core import moral
from shl.core.defaults import EvalConfig
from shl.core.errors import ShlError
from shl.core.free import Row
from shl.core.models import Loaded

Suite = Callable[[Loaded, EvalConfig, str | None, str], list[Row]]
GROUP = "shl.suites"


def find(name: str) -> tuple[Suite, str]:
    """The suite of this name, and the variant that stands behind a colon."""
    stem, _, variant = name.partition(":")
    if stem == "mfv":
        return moral.read, variant
    if stem in ("tinymfv", "tinymfv-native"):
        from shl.core import package

        package.find()  # that it is missing is said before a model is loaded
        return (package.read if stem == "tinymfv" else package.read_native), variant
    plugged = {point.name: point for point in entry_points(group=GROUP)}
    if stem in plugged:
        return plugged[stem].load(), variant
    known = ["mfv", "tinymfv:classic", "tinymfv:scifi", "tinymfv:ai-actor", "tinymfv-native:classic", *sorted(plugged)]
    raise ShlError(f"no suite {name!r}", hint=f"suites: {', '.join(known)}")


def settled(cfg: EvalConfig) -> EvalConfig:
    """The configuration with what the suite itself asks for."""
    if not cfg.suite.startswith("tinymfv"):
        return cfg
    from shl.core import package

    return package.settled(cfg)
