"""How messages become text and text becomes token ids: one owner of chat templates, BOS and the end of a turn."""

from __future__ import annotations

import json
import re
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from shl.core.errors import ShlError
from shl.core.provenance import digest_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, Any]]

# Some templates print today's date, given or asked for; a fixed one keeps a prompt the same from day to day.
_TODAY = datetime(2024, 7, 26)
_NOW = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
_OPEN, _CLOSE = "<think>", "</think>"
_PROBE = "zq probe qz"


def with_system(messages: Messages, system: str | None) -> Messages:
    """The messages under this system text, which takes the place of any they had; None leaves none."""
    rest = [m for m in messages if m["role"] != "system"]
    return rest if system is None else [{"role": "system", "content": system}, *rest]


def join_system(*texts: str | None) -> str | None:
    """Several system texts as one; None when there is none."""
    given = [text for text in texts if text]
    return "\n\n".join(given) if given else None


def under(messages: Messages, system: str | None) -> Messages:
    """The messages with a system text in front of any that they have of their own."""
    return with_system(messages, join_system(system, *(m["content"] for m in messages if m["role"] == "system")))


def fold_system(messages: Messages) -> Messages:
    """The system text put in front of the first user turn, for templates that know no system role."""
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
    rest = [dict(m) for m in messages if m["role"] != "system"]
    if not system:
        return rest
    for message in rest:
        if message["role"] == "user":
            message["content"] = f"{system}\n\n{message['content']}"
            return rest
    return [{"role": "user", "content": system}, *rest]


class Chat:
    """A tokenizer and its chat template, or the plain joining of texts when it has none."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    @cached_property
    def template_digest(self) -> str:
        """Digest of the chat template, so that a vector meets only prompts rendered as its own contexts were."""
        return digest_bytes(json.dumps(self.tokenizer.chat_template, sort_keys=True).encode())

    @cached_property
    def knows_system(self) -> bool:
        """Whether the template prints a system message; some raise at it and some leave it out."""
        try:
            text = self._apply([{"role": "system", "content": _PROBE}, {"role": "user", "content": "u"}], False)
        except Exception:  # whatever a template raises, it means that the role is refused
            return False
        return _PROBE in text

    def render(self, messages: Messages, *, think: bool = False) -> str:
        """The prompt as text, up to where the assistant's answer begins, or goes on when one is begun.

        Without `think` a think span that the template opens in any case is closed again.
        """
        if self.tokenizer.chat_template is None:
            begun = messages[-1]["role"] == "assistant"
            return "\n".join(m["content"] for m in messages) + ("" if begun else "\n")
        text = self._apply(messages if self.knows_system else fold_system(messages), think)
        opened = text.rstrip().endswith(_OPEN) and messages[-1]["role"] != "assistant"
        return f"{text.rstrip()}\n\n{_CLOSE}\n\n" if opened and not think else text

    def encode_prompt(self, messages: Messages, *, think: bool = False) -> list[int]:
        """Token ids of the rendered prompt, with the beginning-of-text token exactly once."""
        return self.encode_text(self.render(messages, think=think), raw=self.tokenizer.chat_template is None)

    def encode_text(self, text: str, *, raw: bool) -> list[int]:
        """Token ids of a text: raw text gets the tokenizer's own beginning, templated text brings it along."""
        try:
            text.encode()
        except UnicodeEncodeError:  # an argument that is no UTF-8; files have been checked
            raise ShlError("a prompt holds half a character", hint="type the text of options in UTF-8") from None
        ids = list(self.tokenizer(text, add_special_tokens=raw)["input_ids"])
        if raw and ids and ids[-1] == self.tokenizer.eos_token_id:
            ids.pop()
        if not ids:
            raise ShlError("a prompt has no tokens", hint="give every prompt some text")
        return ids

    def encode_completion(self, text: str, *, end: bool) -> list[int]:
        """Token ids of an answer, tokenised apart from its prompt, closed by the end of turn when asked."""
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if not end:
            return ids
        if self.end_id is None:
            raise ShlError("the tokenizer has no token that ends an answer", hint="set eos_token in its configuration")
        return [*ids, self.end_id]

    @cached_property
    def end_id(self) -> int | None:
        """The token that closes an assistant turn: what the template prints there if special, else end of text."""
        if self.tokenizer.chat_template is None:
            return self.tokenizer.eos_token_id
        turn = [{"role": "user", "content": "u"}, {"role": "assistant", "content": _PROBE}]
        text = self._apply(turn, False, closed=True)
        tail = text.rpartition(_PROBE)[2].lstrip()
        ids = self.tokenizer(tail, add_special_tokens=False)["input_ids"] if tail else []
        special = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        return ids[0] if ids and ids[0] in special else self.tokenizer.eos_token_id

    def decode(self, ids: list[int]) -> str:
        """The text of sampled ids; special tokens stay visible, since a model that emits them is broken."""
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    @cached_property
    def _dateless(self) -> str | None:
        """The template with a fixed date where it asks for today's; None where it does not."""
        template = self.tokenizer.chat_template
        if not isinstance(template, str) or "strftime_now" not in template:
            return None
        return _NOW.sub(lambda asked: json.dumps(_TODAY.strftime(asked[2])), template)

    def _apply(self, messages: Messages, think: bool, *, closed: bool = False) -> str:
        begun = messages[-1]["role"] == "assistant"
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=not begun,
                continue_final_message=begun and not closed,
                enable_thinking=think,
                thinking=think,  # what other families call it
                date_string=f"{_TODAY:%d %b %Y}",
                chat_template=self._dateless,
            )
        except Exception as error:  # a template may raise anything; it runs in a sandbox, and is a stranger's
            raise ShlError(
                f"the model's chat template does not take these messages: {error}",
                hint="look at the order of roles in the prompt, or at chat_template in the model's folder",
            ) from error
