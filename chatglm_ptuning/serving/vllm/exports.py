"""Trained prefixes of a folder, exported for vLLM when a request needs one, and again when its files have changed."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Hashable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from chatglm_ptuning.prefix.formats import read_prefix, vllm
from chatglm_ptuning.serving.engine.prefixes import PrefixFolder
from chatglm_ptuning.serving.engine.request import UnknownPrefix

if TYPE_CHECKING:
    from chatglm_ptuning.model.modeling_chatglm import ChatGLMForConditionalGeneration

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Exported:
    """An exported prefix.

    Attributes:
        name: in requests to vLLM: another one for every content of the prefix's files.
        length: number of virtual tokens.
    """

    name: str
    length: int
    path: Path


class Exports:
    """The exported prefixes. Safe for many threads.

    A file is never replaced: requests that still run read it. Only the last but one of a prefix is removed.

    Args:
        model: the base, which may have its parameters on the meta device, with its fingerprint known.
        folder: where the trained prefixes are.
        target: the folder that vLLM reads.
    """

    def __init__(self, model: ChatGLMForConditionalGeneration, folder: PrefixFolder, target: Path) -> None:
        self._model, self._folder, self._target = model, folder, target
        self._found: dict[str, tuple[Hashable, Exported]] = {}
        self._replaced: dict[str, Exported] = {}
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """The names of all prefixes, exported or not."""
        return self._folder.names()

    def get(self, name: str) -> Exported:
        """The prefix with the present content of its files.

        Raises:
            UnknownPrefix: if there is none, or it cannot be served; a log message says why.
        """
        place, key = self._folder.find(name)
        with self._lock:
            known = self._found.get(name)
            if known is not None and known[0] == key:
                return known[1]
            exported = self._export(name, place, key)
            if known is not None:
                if (older := self._replaced.get(name)) is not None:
                    older.path.unlink(missing_ok=True)
                self._replaced[name] = known[1]
            self._found[name] = (key, exported)
            return exported

    def remove(self, name: str) -> None:
        """Exports a prefix again when it is next needed."""
        with self._lock:
            if name in self._found:
                self._found[name] = (None, self._found[name][1])

    def usage(self) -> tuple[int, int]:
        """The number of exported prefixes, and the bytes of their files."""
        with self._lock:
            files = [exported.path for _, exported in self._found.values()]
        return len(files), sum(file.stat().st_size for file in files if file.exists())

    def _export(self, name: str, place: Path, key: Hashable) -> Exported:
        shape = self._model.config.prefix_shape
        try:
            checkpoint = read_prefix(place, shape)
            vllm.check_servable(checkpoint, shape)
            key_values = self._model.fold_prefix(checkpoint).key_values
            folded = replace(checkpoint, parameters={"embedding.weight": key_values.flatten(1)}, heads={})
            served = hashlib.sha256(repr((name, key)).encode()).hexdigest()
            path = vllm.write(self._target, folded, shape, served)
        except (OSError, ValueError) as error:
            logger.warning(f"The prefix {name!r} cannot be served: {error}")
            raise UnknownPrefix(f"The prefix {name!r} cannot be loaded; the log says why.") from error
        return Exported(served, len(key_values), path)
