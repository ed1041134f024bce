"""The suites of the package tinymfv, or moralmaps as it is now called: by the package itself, or by its protocol here.

Its protocol (as of commit ca76c0e): a chat without system message that ends inside `<think>`, a think span of exactly
the budget that nothing may end, then the turn closed, a second user turn, and a prefilled answer. Two habits of its
cached implementation belong to the numbers and are kept here: the last token of the span is not seen, and with left
padding the positions jump between the span and what follows it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np

from shl.core import moral, vignettes
from shl.core.chat import fold_system
from shl.core.console import note
from shl.core.decode import Sampling, decode
from shl.core.defaults import EvalConfig
from shl.core.errors import ShlError
from shl.core.format import DIGITS, FOUNDATIONS
from shl.core.free import Row
from shl.core.models import Loaded
from shl.core.slot import Gap, Reading, Slot, read_slot
from shl.core.vignettes import CONDITIONS, Item

NAMES = ("tinymfv", "moralmaps")
COMMIT = "ca76c0e05e460d56d30e5292ba1f33cbbb3fa45f"
INSTALL = f"pip install 'tiny-mfv @ git+https://github.com/wassname/tinymfv@{COMMIT}'"
SETS = ("classic", "scifi", "ai-actor")
THINK = 64  # the package's own budget, which is used unless another is given
PREFILL = 'This is wrong because {"violation": "'
NUDGE = "Just answer"
_MARK = "zqMARKqz"


def find() -> ModuleType:
    """The package, under either name."""
    for name in NAMES:
        if importlib.util.find_spec(name) is not None:
            return importlib.import_module(name)
    raise ShlError("the package tinymfv is not installed", hint=INSTALL)


def settled(cfg: EvalConfig) -> EvalConfig:
    """The package cannot do without a think span: the configuration with its own budget where none was given."""
    return cfg if cfg.think else replace(cfg, think=THINK)


def read(loaded: Loaded, cfg: EvalConfig, system: str | None, variant: str) -> list[Row]:
    """The suite `tinymfv:SET`: the package's own evaluate, on a stratified choice, with its traps out of the way.

    Rows that it cannot score, because the model wrote the prefill by itself, are read by its protocol here.
    """
    package = find()
    chosen, found = _chosen(package, cfg, variant)
    tokenizer = _Tokenizer(loaded, system)
    with _hushed(package):
        report = package.evaluate(
            loaded.model,
            tokenizer,
            name=variant or SETS[0],
            vignettes=chosen,
            conditions=(CONDITIONS[cfg.condition],),
            max_think_tokens=cfg.think,
            batch_size=cfg.batch_size,
            return_per_row=True,
            verbose=0,  # otherwise a free generation of its own, up to 2048 tokens
        )
    rows = [_row(item, one) for item, one in zip(found, report["per_row"], strict=True)]
    lost = [
        i for i, row in enumerate(rows) if not np.isfinite([*row["score"], row["p_ans_any"], row["nll_json"]]).all()
    ]
    if lost:
        note(f"the package could not score {len(lost)} of {len(rows)} vignettes; they were read by its protocol here")
        again = moral.rows_of([found[i] for i in lost], read_slots(loaded, cfg, [found[i] for i in lost], system))
        for i, row in zip(lost, again, strict=True):
            rows[i] = row | {"reread": True}
    return rows


@contextmanager
def _hushed(package: ModuleType) -> Iterator[None]:
    """Without the package's log and progress bar."""
    logger, module = importlib.import_module("loguru").logger, importlib.import_module(f"{package.__name__}.eval")
    bar = module.tqdm
    logger.disable(package.__name__)
    module.tqdm = partial(bar, disable=True)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.tqdm = bar  # type: ignore[attr-defined]
        logger.enable(package.__name__)


def read_native(loaded: Loaded, cfg: EvalConfig, system: str | None, variant: str) -> list[Row]:
    """The suite `tinymfv-native:SET`: the package's vignettes, wording and protocol, read by the instrument here."""
    _, found = _chosen(find(), cfg, variant)
    return moral.rows_of(found, read_slots(loaded, cfg, found, system))


def _chosen(package: ModuleType, cfg: EvalConfig, variant: str) -> tuple[list[dict[str, Any]], list[Item]]:
    """The vignettes as the package takes them and as items; of a file when one is given."""
    if cfg.vignettes is not None:
        found = moral.choose(vignettes.read(cfg.vignettes, cfg.condition), cfg.limit)
        return [_packed(item, CONDITIONS[cfg.condition]) for item in found], found
    name = variant or SETS[0]
    if name not in SETS:
        raise ShlError(f"the package has no set {name!r}", hint=f"sets: {', '.join(SETS)}")
    raw = package.load_vignettes(name)
    found = [vignettes.item_of(row, cfg.condition, f"tinymfv:{name}:{i}") for i, row in enumerate(raw, 1)]
    by_id = {row["id"]: row for row in raw}
    found = moral.choose(found, cfg.limit)
    return [by_id[item.id] for item in found], found


def _packed(item: Item, key: str) -> dict[str, Any]:
    human = {
        f"human_{vignettes.COLUMNS[name]}": share for name, share in zip(FOUNDATIONS, item.human or (), strict=False)
    }
    return {"id": item.id, "foundation_coarse": vignettes.COLUMNS[item.foundation], key: item.text, **human}


def _row(item: Item, one: dict[str, Any]) -> Row:
    """A row of the package's report in our form."""
    row = {
        "kind": "vignette",
        "id": item.id,
        "foundation": item.foundation,
        "score": [float(value) for value in one["score"]],
        "p": [float(value) for value in one["p"]],
        "top1": one["top1"],
        "p_ans_any": float(one["pmass_allowed"]),
        "nll_json": float(one["nll_prefill"]),
    }
    return row | ({"human": list(item.human)} if item.human else {})


class _Tokenizer:
    """The tokenizer as the package may use it: it pads on the left with a token of its own, begins no text twice,
    and puts a system text in front of the first turn. What the package sets on it stays here."""

    def __init__(self, loaded: Loaded, system: str | None) -> None:
        self._real, self._chat, self._system = loaded.tokenizer, loaded.chat, system
        self.padding_side = "left"
        self.pad_token, self.pad_token_id = _pad(loaded)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def apply_chat_template(self, messages: list[dict[str, str]], **kwargs: Any) -> str:
        if self._system is not None and kwargs.get("add_generation_prompt"):
            messages = [{"role": "system", "content": self._system}, *messages]
            messages = messages if self._chat.knows_system else fold_system(messages)
        return self._real.apply_chat_template(messages, **kwargs)

    def __call__(self, text: str | list[str], padding: bool = False, **kwargs: Any) -> Any:
        texts = [text] if isinstance(text, str) else text
        begun = self._real.bos_token is not None and texts[0].startswith(self._real.bos_token)
        kwargs = {"add_special_tokens": not begun, **kwargs}
        if not padding:
            return self._real(text, **kwargs)
        import torch
        from transformers import BatchEncoding

        from shl.core.batches import left_pad

        ids, mask = left_pad(
            self._real(texts, add_special_tokens=kwargs["add_special_tokens"])["input_ids"], torch.device("cpu")
        )
        return BatchEncoding({"input_ids": ids.masked_fill(mask == 0, self.pad_token_id), "attention_mask": mask})


def _pad(loaded: Loaded) -> tuple[str, int]:
    """A token for padding that ends no turn: the package takes whatever equals it for padding."""
    tokenizer = loaded.tokenizer
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in loaded.stop_ids:
        return tokenizer.pad_token, tokenizer.pad_token_id
    used = {*loaded.stop_ids, *loaded.encode_prompt([{"role": "user", "content": "x"}])}
    index = next(i for i in reversed(range(len(tokenizer))) if i not in used)
    return tokenizer.convert_ids_to_tokens(index), index


@dataclass(frozen=True)
class Protocol:
    """The package's habits that its users may want to leave out or, to compare, to keep.

    `pad_to` is its batch size, whose padding moves positions; None leaves none. `begin_twice` keeps the second
    beginning-of-text token that it puts before templates that print one.
    """

    pad_to: int | None = None
    begin_twice: bool = False


def read_slots(
    loaded: Loaded, cfg: EvalConfig, found: Sequence[Item], system: str | None, protocol: Protocol | None = None
) -> Reading:
    """Both frames of every vignette by the package's protocol, two rows an item, all of them batched together."""
    protocol = protocol or Protocol()
    wording = importlib.import_module(f"{find().__name__}.guided")._make_forced_hint
    hints = [wording(list(names)) for names in (FOUNDATIONS, FOUNDATIONS[::-1])]
    tokenizer = _Tokenizer(loaded, system)
    prompts = [_opened(loaded, tokenizer, f"{item.text}\n\n{hint}", protocol) for item in found for hint in hints]
    thought = _think(loaded, prompts, cfg)
    suffix = loaded.encode_completion(_between(loaded), end=False)
    seams = [len(prompt) + len(ids) - 1 for prompt, ids in zip(prompts, thought, strict=True)]
    contexts = [prompt + ids[:-1] + suffix for prompt, ids in zip(prompts, thought, strict=True)]
    digits = [loaded.encode_completion(digit, end=False)[0] for digit in DIGITS]
    slot = Slot(loaded.encode_completion(PREFILL, end=False), digits)
    if len(set(digits)) < len(digits):
        raise ShlError(f"the tokenizer of {loaded.ref.id} gives the digits no distinct tokens")
    return read_slot(loaded, contexts, slot, cfg.batch_size, _gaps(prompts, seams, protocol.pad_to))


def _opened(loaded: Loaded, tokenizer: _Tokenizer, user: str, protocol: Protocol) -> list[int]:
    """The prompt up to the inside of a think span."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": user}], add_generation_prompt=True, tokenize=False
    )
    text += "" if text.rstrip().endswith("<think>") else "<think>\n"
    encode = loaded.tokenizer if protocol.begin_twice else tokenizer
    return list(encode(text)["input_ids"])


def _think(loaded: Loaded, prompts: list[list[int]], cfg: EvalConfig) -> list[list[int]]:
    """A span of exactly the budget after each prompt; what would end it is never drawn."""
    tokenizer, config = loaded.tokenizer, loaded.model.generation_config
    end = tokenizer.convert_tokens_to_ids("</think>")
    eos = config.eos_token_id if config is not None else None
    named = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])}
    banned = {i for i in named | ({end} - {tokenizer.unk_token_id}) if i is not None}
    sampling = Sampling(max_new_tokens=cfg.think, greedy=True, banned=frozenset(banned), endless=True)
    size = max(cfg.batch_size, 64)
    return [one.ids for one in decode(loaded, prompts, seeds=[0] * len(prompts), sampling=sampling, batch_size=size)]


def _between(loaded: Loaded) -> str:
    """What stands between the span and the prefill: the closed turn, and the user's second."""
    template = loaded.tokenizer.apply_chat_template
    turn = [{"role": "user", "content": "_"}, {"role": "assistant", "content": _MARK}]
    close = template(turn, tokenize=False).split(_MARK, 1)[1]
    turn[0] = {"role": "user", "content": NUDGE}
    return "</think>" + close + template(turn, tokenize=False, continue_final_message=True).split(_MARK, 1)[0]


def _gaps(prompts: list[list[int]], seams: list[int], size: int | None) -> list[Gap] | None:
    """How far each prompt lies behind the longest of its batch, in the package's batches: file order, frames apart."""
    if size is None:
        return None
    lengths = np.array([len(prompt) for prompt in prompts]).reshape(-1, 2)
    gaps = np.concatenate(
        [lengths[at : at + size].max(0) - lengths[at : at + size] for at in range(0, len(lengths), size)]
    )
    return [(seam, int(gap)) for seam, gap in zip(seams, gaps.reshape(-1), strict=True)]


def version() -> str:
    """Name and version of the installed package, for provenance."""
    name = find().__name__
    return f"{name} {importlib.metadata.version({'tinymfv': 'tiny-mfv', 'moralmaps': 'moral-maps'}[name])}"
