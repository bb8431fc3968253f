"""The format of bases that were never taught a chat: they continue a text."""

from __future__ import annotations

import re
from collections.abc import Sequence

from chatglm_ptuning.chat.format import TextFormat
from chatglm_ptuning.chat.message import Message


class PlainText(TextFormat):
    """The contents of the messages, with nothing between them."""

    name = "base"
    # The official bases that were not taught to chat. CodeGeeX2 has ChatGLM2's tokenizer, but its prompts are plain
    # text ("# language: Python"); the base models of ChatGLM3 and GLM-4 are only shown continuing text.
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
        # What continues a text may well start with a space or an indented line.
        return text
