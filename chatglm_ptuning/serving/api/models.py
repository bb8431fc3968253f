"""The models of a server: the base, and each prefix of the folder under its folder's name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from chatglm_ptuning.files import read_json_object_or_empty
from chatglm_ptuning.prefix.formats.kit import METADATA_FILE
from chatglm_ptuning.serving.api.errors import ApiError
from chatglm_ptuning.serving.engine.engine import Engine
from chatglm_ptuning.serving.engine.prefixes import PrefixFolder
from chatglm_ptuning.serving.engine.request import UnknownPrefix
from chatglm_ptuning.serving.vllm.engine import VllmEngine

BASE = "base"
"""The name of the model without prefix."""
_SHOWN = ("task", "training", "pre_seq_len", "prefix_projection", "base_model_name", "chat_format", "kit_version")


class Models:
    """Names of models to prefixes, and what is known about them. Safe for many threads.

    Args:
        base: the folder or the hub name of the base.
        started: time at which the server was started, in seconds since 1970.
    """

    def __init__(self, engine: Engine | VllmEngine, folder: PrefixFolder, base: str, started: float) -> None:
        self._engine, self._folder = engine, folder
        self._base, self._started = base, started
        self._unloaded: frozenset[str] = frozenset()

    @property
    def names(self) -> list[str]:
        """Names of all models that are served, the base first."""
        hidden = {BASE, *self._unloaded}
        return [BASE, *(name for name in self._engine.prefix_names() if name not in hidden)]

    def prefix_of(self, model: str) -> str | None:
        """The name of the model's prefix; None for the base.

        Raises:
            ApiError: if it was unloaded. Whether there is such a prefix, the engine says.
        """
        if model in self._unloaded:
            raise ApiError(404, f"The model {model!r} was unloaded.", "model_not_found", "model")
        return None if model == BASE else model

    def describe(self, model: str) -> dict[str, Any]:
        """A model in OpenAI's form, with task and training summary of its prefix.

        Raises:
            ApiError: if there is no such model.
        """
        if (prefix := self.prefix_of(model)) is None:
            return _model(BASE, self._started, base_model_name=Path(self._base).name)
        try:
            place, _ = self._folder.find(prefix)
            created = place.stat().st_mtime
        except (UnknownPrefix, OSError):
            raise ApiError(404, f"There is no model {model!r}.", "model_not_found", "model") from None
        metadata = read_json_object_or_empty(place / METADATA_FILE)
        return _model(prefix, created, **{name: metadata.get(name) for name in _SHOWN})

    def load(self, name: str) -> dict[str, Any]:
        """Loads a prefix now, again if it is in memory, and serves it.

        Raises:
            ApiError: if it is the base.
            UnknownPrefix: if there is none, or it cannot be loaded.
        """
        self._check_is_prefix(name)
        self._engine.load_prefix(name)
        self._unloaded -= {name}
        return self.describe(name)

    def unload(self, name: str) -> None:
        """Removes a prefix from memory, and does not serve it until it is loaded again. Running answers go on.

        Raises:
            ApiError: if it is the base, or there is none.
        """
        self._check_is_prefix(name)
        self.describe(name)
        self._unloaded |= {name}
        self._engine.unload_prefix(name)

    def _check_is_prefix(self, name: str) -> None:
        if name == BASE:
            raise ApiError(400, f"{BASE!r} is the base; only prefixes are loaded and unloaded.", param="name")


def _model(name: str, created: float, **known: Any) -> dict[str, Any]:
    # JSON has no NaN, which a training summary may hold.
    known = json.loads(json.dumps(known), parse_constant=lambda _: None)
    return {"id": name, "object": "model", "created": int(created), "owned_by": "chatglm-ptuning", **known}
