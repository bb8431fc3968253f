"""What makes rendering a jinja chat template to ids safe.

A rendered chat is one string, in which a user who writes `<|user|>` looks like the template itself. While a chat is
rendered for its ids, `RenderGuard` therefore breaks up every special token that the caller's strings spell, by a
random mark drawn for this one call. What then still spells a token was written by the template; the marks are taken
out again afterwards. Any Unicode text comes through unchanged, and nothing can be forged without guessing the mark.
The templates themselves write plain spellings, so that other programs can render them too.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Mapping
from typing import Any

from transformers.utils import get_json_schema

from chatglm_ptuning.model.vocabulary import Vocabulary


class RenderGuard:
    """Tells the tokens that a template writes from those that the caller's text spells, for one rendering.

    `segment_cut` is given to the template, which writes it where the text is to be encoded in two parts.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        spelled = (*vocabulary.special_ids, *vocabulary.named_tokens.values())
        self._spelled_by_caller = re.compile("|".join(map(re.escape, spelled)))
        self._written_by_template = vocabulary.written_by_templates
        self._mark = secrets.token_hex(16)
        self.segment_cut = secrets.token_hex(16)

    def protect(self, value: Any) -> Any:
        """A copy of messages, tools or other template inputs in which no string spells a special token.

        Raises:
            TypeError: on a value that is not of JSON's types, whose text could not be seen here.
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
        raise TypeError(f"A chat is made of strings, numbers, lists and mappings; {value!r} is a {type(value)}.")

    def parts(self, rendered: str) -> Iterator[tuple[str, bool]]:
        """The rendered text in order, as pairs of a string and whether it is a special token."""
        for segment in rendered.split(self.segment_cut):
            for index, part in enumerate(self._written_by_template.split(segment)):
                is_special = index % 2 == 1
                if part:
                    yield part if is_special else part.replace(self._mark, ""), is_special
