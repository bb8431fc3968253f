"""Keeps special tokens in a user's text ordinary text when a jinja chat template is rendered to ids.

A rendered chat is one string, in which a user's `<|user|>` looks like one of the template. `RenderGuard` therefore
inserts a random mark, drawn for each call, into every special token that the caller's strings spell. The special tokens
in the rendered text are then those of the template, and the marks are removed afterwards. Any Unicode text is
preserved, and a token cannot be forged without guessing the mark. The templates themselves spell special tokens
plainly, so that other programs can render them.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Mapping
from typing import Any

from transformers.utils import get_json_schema

from chatglm_ptuning.model.vocabulary import Vocabulary


class RenderGuard:
    """Distinguishes the special tokens of a template from those that the caller's text spells, for one rendering.

    The template writes `segment_cut` where the text is encoded in two parts.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        spelled = (*vocabulary.special_ids, *vocabulary.named_tokens.values())
        self._spelled_by_caller = re.compile("|".join(map(re.escape, spelled)))
        self._vocabulary = vocabulary
        self._mark = secrets.token_hex(16)
        self.segment_cut = secrets.token_hex(16)

    def protect(self, value: Any) -> Any:
        """A copy of messages, tools or other template inputs in which no string spells a special token.

        Raises:
            TypeError: for a value that is not of JSON's types, whose text cannot be checked.
        """
        if value is None or isinstance(value, (bool, int, float)):
            return value
        if isinstance(value, str):
            return self._spelled_by_caller.sub(lambda match: match[0][0] + self._mark + match[0][1:], value)
        if isinstance(value, Mapping):
            return {self.protect(key): self.protect(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.protect(item) for item in value]
        if hasattr(value, "messages"):
            return self.protect(value.messages)
        if callable(value):
            return self.protect(get_json_schema(value))
        raise TypeError(f"A chat must consist of strings, numbers, lists and mappings; {value!r} is a {type(value)}.")

    def parts(self, rendered: str) -> Iterator[tuple[str, bool]]:
        """The parts of the rendered text in order, each with whether it is a special token."""
        for segment in rendered.split(self.segment_cut):
            for part, is_special in self._vocabulary.parts(segment):
                yield part if is_special else part.replace(self._mark, ""), is_special
