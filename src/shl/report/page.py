"""The page: one HTML file that asks the network for nothing and runs nothing but its own script.

Data goes in as JSON that cannot end its script element, the script writes text through textContent only, and a
Content-Security-Policy with the digests of the one style and the one script forbids everything else.
"""

from __future__ import annotations

import base64
import hashlib
import re
from typing import Any

from shl.core.pools import data
from shl.core.records import dumps

SCRIPTS = ("dom.js", "charts.js", "tables.js", "sayings.js", "diary.js", "rounds.js", "training.js", "page.js")
_SLOT = re.compile("@([A-Z]+)@")
# in a script element only these could end it or open a comment; `dumps` escapes what ends a line of script
_UNSAFE = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}


def render(facts: dict[str, Any]) -> str:
    """The whole page for the data that `gather` gives."""
    style = _asset("style.css")
    script = '"use strict";\n(() => {\n' + "\n".join(_asset(name) for name in SCRIPTS) + "\n})();\n"
    policy = (
        f"default-src 'none'; script-src {_digest(script)}; style-src {_digest(style)}; base-uri 'none'; "
        "form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )
    values = {"POLICY": policy, "STYLE": style, "DATA": embed(facts), "SCRIPT": script}
    parts = _SLOT.split(_asset("page.html"))  # split before anything is put in: data may hold the name of a slot
    return "".join(values[part] if at % 2 else part for at, part in enumerate(parts)) + "\n"


def embed(value: Any) -> str:
    """JSON that is inert inside a script element, whatever its strings hold."""
    text = dumps(value)
    for raw, escaped in _UNSAFE.items():  # none of them occurs in JSON outside strings
        text = text.replace(raw, escaped)
    return text


def _asset(name: str) -> str:
    return data("report", name).read_text(encoding="utf-8").strip()


def _digest(text: str) -> str:
    """A source of a Content-Security-Policy: the digest of an inline element's text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
