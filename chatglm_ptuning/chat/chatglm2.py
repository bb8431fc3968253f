"""ChatGLM2's chat format: one text of numbered rounds."""

from __future__ import annotations

import re
from collections.abc import Sequence

from chatglm_ptuning.chat.format import TextFormat
from chatglm_ptuning.chat.message import Message


class ChatGLM2Rounds(TextFormat):
    """`[Round i]\\n\\n问：Q\\n\\n答：A\\n\\n` per turn, the last one up to `答：` (build_prompt of ChatGLM2-6B).

    The format has no system messages: their texts precede the first round. Messages that do not alternate between user
    and assistant raise a ValueError, as do tools.
    """

    name = "chatglm2"
    special_tokens = ("[gMASK]", "sop")
    base_names = re.compile(r".*chatglm2.*")
    template_sign = "问："
    no_tools = "ChatGLM2's format has no tools; use a ChatGLM3 or GLM-4 base, or leave out tool calls and observations."
    template = r"""
{%- set rounds = namespace(count=0) -%}
{%- for message in messages -%}
    {%- if message['role'] == 'user' -%}
        {%- set rounds.count = rounds.count + 1 -%}
        {{- '[Round ' ~ rounds.count ~ ']\n\n问：' ~ message['content'] ~ '\n\n' -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- '答：' ~ message['content'] ~ '\n\n' -}}
    {%- elif message['role'] == 'system' -%}
        {{- message['content'] ~ '\n\n' -}}
    {%- else -%}
        {{- raise_exception('ChatGLM2 has no role "' ~ message['role'] ~ '": use user, assistant or system') -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '答：' -}}
{%- endif -%}
"""

    def prompt_text(self, messages: Sequence[Message]) -> str:
        """See `TextFormat`."""
        first = next((index for index, message in enumerate(messages) if message.role != "system"), len(messages))
        rounds = messages[first:]
        roles = [message.role for message in rounds]
        if not len(rounds) % 2 or roles != ["user", "assistant"] * (len(rounds) // 2) + ["user"]:
            raise ValueError(
                "ChatGLM2's format needs messages that alternate between user and assistant, after any system "
                f"messages; found {', '.join(message.role for message in messages)} in front of an answer."
            )
        text = "".join(f"{message.content}\n\n" for message in messages[:first])
        for index, message in enumerate(rounds):
            if message.role == "user":
                text += f"[Round {index // 2 + 1}]\n\n问：{message.content}\n\n答："
            else:
                text += f"{message.content}\n\n"
        return text
