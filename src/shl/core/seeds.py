"""Seeds derived from names, so that a row's randomness depends on nothing but its own identity."""

import hashlib
import json


def seed_of(seed: int, *parts: str) -> int:
    """A seed in [0, 2**63) for the thing named by parts. JSON keeps ("a", "b") apart from ("ab",)."""
    name = json.dumps([seed, *parts], ensure_ascii=True)
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1
