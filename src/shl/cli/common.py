"""What commands share: which model to load, where each setting comes from, and small parsers."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from shl.core import console, pools, ranks, strict
from shl.core.defaults import advice, configure
from shl.core.errors import InputError, Mismatch
from shl.core.provenance import read_header
from shl.core.records import Prompt, read_prompts

if TYPE_CHECKING:
    from shl.core.locate import ModelRef
    from shl.core.models import Loaded
    from shl.core.vectors import Vector

Config = TypeVar("Config")
POOL = "authority"  # where prompts come from when neither a file nor the vector says
OFF = object()  # a limit that the user switched off, where None would mean "not given"


@dataclass(frozen=True)
class Where:
    """How and where to load a model: what the common options say."""

    model: str | None = None
    revision: str | None = None
    adapters: Sequence[str] | None = None
    no_parents: bool | None = None
    allow_mismatch: bool | None = None
    trust_remote_code: bool | None = None
    device: str | None = None
    dtype: str | None = None


def begin(quiet: bool | None, verbose: bool | None, *, shared: bool = False) -> None:
    """Set how much is said, before anything is. Of several processes the first speaks, and few commands share work."""
    if ranks.world() > 1 and not shared:
        raise usage("only gen, train and eval run in several processes")
    console.set_level(bool(quiet) or not ranks.first(), int(bool(verbose)))


def usage(message: str, flag: str | None = None) -> typer.BadParameter:
    """A wrong use of options: exit code 2."""
    return typer.BadParameter(message, param_hint=flag)


def chain_given(adapters: Sequence[str] | None) -> list[str] | None:
    """The chain that --adapter names; None when it was not given, empty for 'none'."""
    if not adapters:
        return None
    if "none" in adapters:
        if len(adapters) > 1:
            raise usage("'none' is the empty chain and stands alone", "--adapter")
        return []
    return list(adapters)


def vector_header(path: Path) -> dict[str, Any]:
    """A vector's header, its adapter paths made usable from here. Needs no torch."""
    meta = read_header(path)
    folder = path.absolute().parent
    return meta | {"adapter_paths": [os.path.normpath(folder / spec) for spec in meta.get("adapter_paths", [])]}


def adapter_header(spec: str) -> dict[str, Any]:
    """The model that an adapter was trained on, as far as its directory says. Needs no torch."""
    folder = Path(spec)
    if not folder.is_dir():  # DIR:SCALE
        folder = Path(spec.rpartition(":")[0] or spec)
    if not (folder / "adapter_config.json").is_file():
        raise InputError("is not an adapter directory", where=spec, hint="make one with: shl train KEEP.jsonl -o DIR")
    own = (folder / "shl.json").is_file()
    file = folder / ("shl.json" if own else "adapter_config.json")
    meta = strict.read_object(file)
    if not own:
        meta = {"model": meta.get("base_model_name_or_path")}
    found: dict[str, Any] = {name: meta[name] for name in ("model", "revision", "model_digest") if name in meta}
    for name, text in found.items():
        if not isinstance(text, str | None):
            raise InputError("is not a string", where=f"{file}: {name}")
    return found


def find_model(where: Where, artifact: Mapping[str, Any] | None = None) -> ModelRef:
    """The model by precedence: flag, the input artifact, SHL_MODEL, toy. Loads nothing."""
    from shl.core.locate import EMBEDDED, find

    if where.model == "":  # most likely a variable of the shell that is not set; the default would be another model
        raise usage("names no model", "--model")
    if artifact is None and (chain := chain_given(where.adapters)):
        artifact = adapter_header(chain[-1])
    made_for = artifact.get("model") if artifact else None
    name = where.model or made_for or os.environ.get("SHL_MODEL") or "toy"
    own_revision = artifact.get("revision") if artifact and name == made_for else None
    # a folder is recorded in full, so that what is made from it can be used from anywhere
    ref = find(
        os.path.abspath(name) if name not in EMBEDDED and os.path.isdir(name) else name, where.revision or own_revision
    )
    if artifact and where.model and not where.allow_mismatch:
        _refuse_other_model(ref, artifact)
    if made_for and not where.model:
        say = console.detail if ref.local else console.note  # a name on the hub means a download, which is told
        say(f"model {ref.id}, as the input says")
    return ref


def _refuse_other_model(ref: ModelRef, artifact: Mapping[str, Any]) -> None:
    """Fail before loading when the model named is not the one that the artifact was made for."""
    from shl.core.locate import local_digest

    made_for, digest = artifact.get("model"), artifact.get("model_digest")
    if made_for is None or made_for == ref.id:
        return
    own = str(digest).startswith("sha256:")  # of a folder; a model on the hub has a name and a commit instead
    if ref.local and own and local_digest(Path(ref.path)) == digest:  # the same files under another name
        return
    raise Mismatch(
        f"the input was made for model {made_for}, not {ref.id}",
        hint="leave --model out, since the input brings its model, or add --allow-mismatch",
    )


def load_model(
    where: Where, ref: ModelRef, artifact: Mapping[str, Any] | None = None, vector: Vector | None = None
) -> Loaded:
    """Load a model with its chain: the one given by --adapter, else the artifact's own."""
    from shl.core.models import load

    specs = chain_given(where.adapters)
    parents = not where.no_parents
    if specs is None:  # an artifact lists its whole chain, so nothing is left to bring along
        specs, parents = list((artifact or {}).get("adapter_paths") or []), False
    if artifact and "adapters" in artifact and not where.allow_mismatch:
        _refuse_other_chain(specs, parents, artifact["adapters"])
    loaded = load(
        ref.id,
        specs,
        revision=ref.revision,
        device=where.device,
        dtype=where.dtype,
        parents=parents,
        allow_mismatch=bool(where.allow_mismatch),
        trust_remote_code=bool(where.trust_remote_code),
        vector=vector,
    )
    console.detail(f"loaded {ref.id} with {len(loaded.chain)} adapters on {loaded.device} in {loaded.dtype}")
    return loaded


def _refuse_other_chain(specs: Sequence[str], parents: bool, expected: Sequence[str]) -> None:
    """Fail before loading when the chain is not the one that the artifact was made with."""
    from shl.core.adapters import resolve_chain
    from shl.core.models import chain_digests

    digests = chain_digests(resolve_chain(list(specs), parents=parents)) if specs else []
    if digests != list(expected):
        raise Mismatch(
            f"the input was made with a chain of {len(expected)} adapters, and this is another, of {len(digests)}",
            hint="name its chain with --adapter DIR, oldest first, or add --allow-mismatch",
        )


def system_of(system: str | None, persona: str | None) -> str | None:
    """The system text that --system gives, or the positive side of the bundled persona that --persona names."""
    if persona is None:
        return system
    if system is not None:
        raise usage("give either --system or --persona", "--persona")
    return pools.persona(persona).pos


def prompts_for(source: str | None, pool: str | None, artifact: Mapping[str, Any] | None) -> list[Prompt]:
    """The prompts of a file or stdin, else those of a bundled pool: the one named, or that of the vector's axis."""
    if source is not None:
        return read_prompts(source)
    axis = ((artifact or {}).get("personas") or {}).get("axis")
    name = pool or axis or POOL
    if artifact and not (pool or axis):
        console.note(f"the vector names no axis: prompts come from the pool {name} (choose with --pool)")
    return pools.pool(name)


def settle(cls: type[Config], flags: Mapping[str, Any], step: str = "", ref: ModelRef | None = None) -> Config:
    """A step's configuration: flags that were given, then the model's own recommendations, then defaults."""
    given = {name: None if value is OFF else value for name, value in flags.items() if value is not None}
    recommended = ref.recommended if ref else {}
    used = {name: value for name, value in advice(cls, step, recommended).items() if name not in given}
    if used and ref:
        told = ", ".join(f"{name} {shown(value)}" for name, value in used.items())
        console.note(f"{ref.id} recommends {told}")
    return configure(cls, step, recommended, **given)


def shown(value: Any) -> str:
    """A value as a user would type it."""
    if isinstance(value, tuple):
        return ",".join(map(shown, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def finite(command: Callable[..., None]) -> Callable[..., None]:
    """A command that takes neither NaN nor infinity for a number: no comparison with them would tell anything."""

    @functools.wraps(command)
    def checked(**given: Any) -> None:
        for name, value in given.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise usage(f"{value} is no number to compute with", "--" + name.strip("_").replace("_", "-"))
        command(**given)

    return checked


def numbers(text: str | None, flag: str) -> tuple[float, ...] | None:
    """A list of numbers such as 0,0.5,1."""
    if text is None:
        return None
    try:
        found = tuple(float(part) for part in text.split(","))
        if not all(map(math.isfinite, found)):
            raise ValueError
        return found
    except ValueError:
        raise usage(f"{text!r} is not a list of numbers such as 0,0.5,1", flag) from None


def limit(text: str | None, flag: str) -> Any:
    """A number, or OFF for 'none'."""
    if text is None:
        return None
    if text.lower() == "none":
        return OFF
    try:
        if math.isfinite(found := float(text)):
            return found
        raise ValueError
    except ValueError:
        raise usage(f"{text!r} is neither a number nor 'none'", flag) from None


def labels(pairs: Sequence[str] | None) -> dict[str, str]:
    """Labels such as arm=nll."""
    found = {}
    for pair in pairs or ():
        name, equals, value = pair.partition("=")
        if not equals or not name.strip():
            raise usage(f"{pair!r} is not NAME=VALUE, such as arm=nll", "--label")
        found[name.strip()] = value
    return found
