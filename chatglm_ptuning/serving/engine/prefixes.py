"""The prefixes that the engine serves: found in a folder, loaded when a request needs one."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from chatglm_ptuning.prefix.bank import PrefixBank
from chatglm_ptuning.prefix.batch import PrefixBatch
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
        return sorted(child.name for child in self._children() if _place(child) is not None)

    def find(self, name: str) -> tuple[Path, Hashable]:
        """The path of a prefix, and a value that changes with its files.

        The name is looked up among the subfolders. It is never part of a path itself.

        Raises:
            UnknownPrefix: if there is no prefix of this name.
        """
        child = next(self._children(name), None)
        place = None if child is None else _place(child)
        if place is None:
            raise UnknownPrefix(f"There is no prefix named {name!r}.")
        return place, (str(place), _state(place))

    def _children(self, name: str | None = None) -> Iterator[Path]:
        """The subfolders, or the one of this name. Every request looks for one; the others are not examined."""
        try:
            with os.scandir(self.path) as entries:
                found = [one for one in entries if one.name[0] != "." and name in (None, one.name)]
        except OSError:  # not there
            return
        for one in found:
            with contextlib.suppress(OSError):  # a link to itself
                if one.is_dir():
                    yield Path(one.path)


def _place(path: Path) -> Path | None:
    try:
        return detect_format(path)[1]
    except OSError:  # not there, or removed meanwhile
        return None


def _state(place: Path) -> tuple[tuple[str, int, int, int], ...]:
    found = []
    try:
        files = [place] if place.is_file() else [file for file in place.iterdir() if file.suffix in _SUFFIXES]
    except OSError:  # removed meanwhile
        return ()
    for file in files:
        with contextlib.suppress(OSError):
            status = file.stat()
            found.append((file.name, status.st_ino, status.st_mtime_ns, status.st_size))
    return tuple(sorted(found))


@dataclass(frozen=True, eq=False)
class RowPrefix:
    """The prefix of one request.

    Attributes:
        key: name and version of the values, equal for the same values only; None for the plain base.
        length: number of virtual tokens.
        key_values: `[num_layers * 2, groups, length, kv_channels]`, until it has been copied into a slot.
    """

    key: Hashable = None
    length: int = 0
    key_values: torch.Tensor | None = None

    @classmethod
    def of(cls, batch: PrefixBatch) -> RowPrefix:
        """The prefix of a batch that has one row, or fits any number of rows.

        Raises:
            ValueError: if it has more.
        """
        batch.check_rows(1)
        length = batch.lengths[0]
        if not length:
            return cls()
        entries = [entry[0, :, -length:] for entry in batch.by_row().key_values]  # shorter ones are padded in front
        return cls(batch.owner, length, torch.stack([entry.to(entries[0].device) for entry in entries]))

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
        self._states: dict[str, Hashable] = {}
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """The names of all prefixes, loaded or not."""
        return [] if self._folder is None else self._folder.names()

    def get(self, name: str | RowPrefix | None) -> RowPrefix:
        """The prefix of this name with the present content of its files; None is the plain base.

        A prefix itself, which the caller keeps, is returned as it is.

        Raises:
            UnknownPrefix: if there is none, or it cannot be loaded; a log message says why.
        """
        if name is None:
            return RowPrefix()
        if isinstance(name, RowPrefix):
            return name
        if self._folder is None:
            raise UnknownPrefix(f"There is no prefix named {name!r}.")
        place, state = self._folder.find(name)
        with self._lock:
            if name not in self._bank or self._states[name] != state:
                self._load(name, place)
                self._states[name] = state
            key_values = self._bank.key_values(name, self._device, self._dtype)
            # The files may have changed after `find`: only the version says which values these are.
            key = name, self._bank.versions[name]
        return RowPrefix(key, key_values.shape[2], key_values)

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
