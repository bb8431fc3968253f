"""The prefixes that the engine serves: found in a folder, loaded when a request needs one."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Hashable
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from chatglm_ptuning.prefix.bank import PrefixBank
from chatglm_ptuning.prefix.formats import detect_format
from chatglm_ptuning.serving.engine.request import UnknownPrefix

if TYPE_CHECKING:
    from chatglm_ptuning.model.modeling_chatglm import ChatGLMForConditionalGeneration

logger = logging.getLogger(__name__)

_SUFFIXES = (".safetensors", ".bin", ".pt", ".json")
"""Of the files of a prefix; other files beside it may change."""


class PrefixFolder:
    """A folder whose subfolders are prefixes, named by them. It may change at any time.

    Args:
        path: the folder. A subfolder is a prefix if `load_prefix` would find one in it: a prefix checkpoint of any
            format, or a training run. Others are ignored, and so are hidden ones.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path)

    def names(self) -> list[str]:
        """The names of the prefixes, sorted."""
        return [name for name, child in sorted(self._children().items()) if _place(child) is not None]

    def find(self, name: str) -> tuple[Path, Hashable]:
        """The path of a prefix, and a value that changes with its files.

        The name is looked up among the subfolders. It is never part of a path itself.

        Raises:
            UnknownPrefix: if there is no prefix of this name.
        """
        child = self._child(name)
        place = None if child is None else _place(child)
        if place is None:
            raise UnknownPrefix(f"There is no prefix named {name!r}.")
        return place, (str(place), _state(place))

    def _child(self, name: str) -> Path | None:
        # Every request looks for one; the others are not examined.
        try:
            with os.scandir(self.path) as entries:
                found = (one for one in entries if one.name == name and name[0] != "." and one.is_dir())
                return next((Path(one.path) for one in found), None)
        except FileNotFoundError:
            return None

    def _children(self) -> dict[str, Path]:
        try:
            with os.scandir(self.path) as entries:
                return {one.name: Path(one.path) for one in entries if one.name[0] != "." and one.is_dir()}
        except FileNotFoundError:
            return {}


def _place(path: Path) -> Path | None:
    try:
        return detect_format(path)[1]
    except OSError:  # not there, or removed meanwhile
        return None


def _state(place: Path) -> tuple[tuple[str, int, int, int], ...]:
    files = [place] if place.is_file() else [file for file in place.iterdir() if file.suffix in _SUFFIXES]
    found = []
    for file in files:
        try:
            status = file.stat()
        except OSError:
            continue
        found.append((file.name, status.st_ino, status.st_mtime_ns, status.st_size))
    return tuple(sorted(found))


@dataclass(frozen=True, eq=False)
class RowPrefix:
    """The prefix of one request.

    Attributes:
        key: equal for the same prefix with the same values; None for the plain base.
        length: number of virtual tokens.
        key_values: `[num_layers * 2, groups, length, kv_channels]`, until it has been copied into a slot.
    """

    key: Hashable = None
    length: int = 0
    key_values: torch.Tensor | None = None

    def copied(self) -> RowPrefix:
        """The prefix without its keys and values, which then can be freed."""
        return replace(self, key_values=None)


class ServedPrefixes:
    """Loads prefixes when they are first needed, and again when their files have changed. Safe for many threads.

    Args:
        model: the base.
        folder: where they are; None for the plain base alone.
        memory: bound on the bytes of loaded prefixes, see PrefixBank.
    """

    def __init__(self, model: ChatGLMForConditionalGeneration, folder: PrefixFolder | None, memory: int) -> None:
        self._model, self._folder = model, folder
        self._device, self._dtype = model.device, model.transformer.embedding.word_embeddings.weight.dtype
        self._bank = PrefixBank(self._dtype, memory)
        self._keys: dict[str, Hashable] = {}
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """The names of all prefixes, loaded or not."""
        return [] if self._folder is None else self._folder.names()

    def get(self, name: str | None) -> RowPrefix:
        """The prefix of this name with the present content of its files; None is the plain base.

        Raises:
            UnknownPrefix: if there is none, or it cannot be loaded; a log message says why.
        """
        if name is None:
            return RowPrefix()
        if self._folder is None:
            raise UnknownPrefix(f"There is no prefix named {name!r}.")
        place, key = self._folder.find(name)
        with self._lock:
            if name not in self._bank or self._keys[name] != key:
                self._load(name, place)
                self._keys[name] = key
            key_values = self._bank.key_values(name, self._device, self._dtype)
        return RowPrefix((name, key), key_values.shape[2], key_values)

    def remove(self, name: str) -> None:
        """Frees the memory of a prefix, if it is loaded."""
        with self._lock:
            self._bank.remove(name)

    def usage(self) -> tuple[int, int, int]:
        """The number of loaded prefixes, their bytes, and how many were removed for others."""
        with self._lock:
            return len(self._bank.names), self._bank.memory_used, self._bank.evictions

    def _load(self, name: str, place: Path) -> None:
        try:
            prefix = self._model.fold_prefix(place)
            if not prefix.trained:
                raise ValueError(f"The prefix in {place} was saved untrained: its values are random.")
        except (OSError, ValueError) as error:
            logger.warning(f"The prefix {name!r} cannot be loaded: {error}")
            raise UnknownPrefix(f"The prefix {name!r} cannot be loaded; the log says why.") from error
        self._bank.add(name, prefix)
