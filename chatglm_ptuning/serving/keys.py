"""Secrets that the users of a server must know: API keys, and the passwords of the page."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Sequence
from pathlib import Path


class KeySet:
    """Keys of which a user must know one; `given in keys` takes a time that does not depend on them."""

    def __init__(self, keys: Sequence[str] = ()) -> None:
        self._digests = [_digest(key) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def __contains__(self, given: str) -> bool:
        digest = _digest(given)
        return sum(hmac.compare_digest(digest, one) for one in self._digests) > 0


def _digest(key: str) -> bytes:
    # Digests have one length, so that a comparison does not tell that of a key.
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def read_keys(path: str | None, variable: str, given: Sequence[str] = ()) -> list[str]:
    """The given keys, those of a file (one a line) and those of an environment variable (separated by spaces).

    Raises:
        OSError: if the file cannot be read.
        ValueError: if the file has no key, or a key is not ASCII text.
    """
    in_file = [] if path is None else Path(path).read_text(encoding="utf-8").split()
    if path is not None and not in_file:
        raise ValueError(f"{path} has no key; write one a line.")
    keys = [*given, *in_file, *os.environ.get(variable, "").split()]
    if any(not key.strip() or not key.isascii() or not key.isprintable() for key in keys):
        raise ValueError("A key must be ASCII text that is not empty.")
    return keys
