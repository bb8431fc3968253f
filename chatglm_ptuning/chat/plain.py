"""The format of bases without chat training: they continue a text."""

from __future__ import annotations

import re
from collections.abc import Sequence

from chatglm_ptuning.chat.format import TextFormat
from chatglm_ptuning.chat.message import Message


class PlainText(TextFormat):
    """The contents of the messages, without separators."""

    name = "base"
    # The official bases without chat training. CodeGeeX2 has ChatGLM2's tokenizer, but its prompts are plain text
    # ("# language: Python"); the base models of ChatGLM3 and GLM-4 continue text.
    base_names = re.compile(r"codegeex2.*|chatglm3-6b-base.*|glm-?4-9b(-base)?(-hf)?")
    no_tools = (
        "A base without chat format has no tools; use a chat model, or leave out tools, tool calls and observations."
    )
    template = r"""
{%- for message in messages -%}
    {{- message['content'] -}}
{%- endfor -%}
"""

    def prompt_text(self, messages: Sequence[Message]) -> str:
        """See `TextFormat`."""
        return "".join(message.content for message in messages)

    def _shown(self, text: str) -> str:
        # The continuation of a text may start with a space or an indented line.
        return text
