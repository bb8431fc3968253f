"""The exported prefixes of a folder and its subfolders, `NAME.vllm.safetensors`, and requests for them.

A request for a prefix of P virtual tokens is `[placeholder] * P + prompt`, with a `cache_salt` that holds the hash of
the prefix's content. The salt goes into the hash of the first block: vLLM's own prefix cache shares the blocks of a
prefix among its requests, and with no others. A replaced prefix has another hash. The placeholders are never computed.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

SUFFIX = ".vllm.safetensors"
VERSION = "1"
SALT = "ptuning:"
"""In front of the hash in a `cache_salt`."""


@dataclass(frozen=True)
class Prefix:
    """An exported prefix.

    Attributes:
        length: number of virtual tokens.
        content_hash: of its keys and values.
    """

    path: Path
    length: int
    content_hash: str

    @property
    def salt(self) -> str:
        """The `cache_salt` of requests for it."""
        return SALT + self.content_hash

    def read(self) -> torch.Tensor:
        """Keys and values, float32 `[layers, 2, length, groups, channels]`; the keys are for places 0 to length - 1.

        Raises:
            OSError, ValueError: if the file is gone, damaged, or was replaced by another prefix.
        """
        try:
            with safe_open(self.path, "pt") as file:
                key_values = file.get_tensor("key_values")
        except SafetensorError as error:
            raise ValueError(f"{self.path} is damaged: {error}.") from error
        content = f"{tuple(key_values.shape)}".encode() + key_values.contiguous().numpy().tobytes()
        if hashlib.sha256(content).hexdigest() != self.content_hash:
            raise ValueError(f"{self.path} was replaced or is damaged: its content has another hash.")
        return key_values


class PrefixFolder:
    """The prefixes of a folder, which may change at any time."""

    def __init__(self, path: str | PathLike[str]) -> None:
        self._path = Path(path)
        self._read: dict[tuple[str, int, int, int], Prefix | None] = {}
        self._by_hash: dict[str, Prefix] = {}

    def by_name(self) -> dict[str, Prefix]:
        """The prefixes that are in the folder or its subfolders now, by the names of their files."""
        found = {}
        for path in sorted(path for place in ("", "[!.]*/") for path in self._path.glob(f"{place}[!.]*{SUFFIX}")):
            try:
                status = path.stat()
            except OSError:  # removed meanwhile
                continue
            key = (str(path), status.st_ino, status.st_mtime_ns, status.st_size)
            if key not in self._read:
                self._read[key] = _header(path)
            if (prefix := self._read[key]) is not None:
                found[path.name.removesuffix(SUFFIX)] = prefix
        return found

    def of_salt(self, salt: str | None) -> Prefix | None:
        """The prefix that a `cache_salt` asks for, also one that has left the folder since it was first asked for.

        Raises:
            KeyError: if it asks for one that is not there.
        """
        if salt is None or not salt.startswith(SALT):
            return None
        wanted = salt.removeprefix(SALT)
        if wanted not in self._by_hash:
            self._by_hash |= {prefix.content_hash: prefix for prefix in self.by_name().values()}
        return self._by_hash[wanted]


def _header(path: Path) -> Prefix | None:
    try:
        with safe_open(path, "pt") as file:
            fields = file.metadata() or {}
            length = file.get_slice("key_values").get_shape()[2]
    except (OSError, SafetensorError, IndexError):
        return None
    if fields.get("ptuning_vllm") != VERSION or "content_sha256" not in fields:
        return None
    return Prefix(path, length, fields["content_sha256"])


def prefix_prompt(prefix: Prefix | None, token_ids: list[int], placeholder: int = 0) -> dict[str, Any]:
    """A prompt for `LLM.generate`; None is the plain base.

    Args:
        placeholder: `placeholder_id` in the connector's settings.
    """
    if prefix is None:
        return {"prompt_token_ids": token_ids}
    return {"prompt_token_ids": [placeholder] * prefix.length + token_ids, "cache_salt": prefix.salt}
