"""ChatGLM3's chat format: a role token with metadata in front of every message."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from chatglm_ptuning.chat.message import Conversation, Message
from chatglm_ptuning.chat.roles import ROLE_TOKENS, RoleFormat
from chatglm_ptuning.chat.tools import inner_part
from chatglm_ptuning.exact_json import dumps

# The official ChatGLM3 was trained on tool definitions and calls in exactly this notation (finetune_demo,
# preprocess_utils.py), so it is part of the chat format.
_INTRODUCTION = "Answer the following questions as best as you can. You have access to the following tools:"
_CALL = "```python\ntool_call({arguments})\n```"


class ChatGLM3Roles(RoleFormat):
    """`<|role|>metadata\\n content`. Tools follow the text of the system message, which begins the chat."""

    name = "chatglm3"
    special_tokens = ("[gMASK]", "sop", *ROLE_TOKENS)
    base_names = re.compile(r".*chatglm3.*")
    template_sign = "<|"
    space = " "
    # In a rendered text the cut is the space that sentencepiece puts in front of the content's first piece, so that the
    # text equals the decoded ids.
    template = r"""
{%- set roles = ['system', 'user', 'assistant', 'observation'] -%}
{%- set cut = segment_cut | default(' ') -%}
{%- set beside = namespace(tools=[]) -%}
{%- for tool in tools or [] -%}
    {%- set beside.tools = beside.tools + [tool['function'] if tool['function'] is mapping else tool] -%}
{%- endfor -%}
{%- if tools and messages[0]['role'] != 'system' -%}
    {{- '<|system|>\n' ~ cut ~ 'Answer the following questions as best as you can. ' -}}
    {{- 'You have access to the following tools:\n' ~ (beside.tools | tojson(indent=4)) -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message['role'] not in roles -%}
        {{- raise_exception('ChatGLM3 has no role "' ~ message['role'] ~ '": use ' ~ roles | join(', ')) -}}
    {%- endif -%}
    {%- set content = message['content'] -%}
    {%- if message['role'] == 'system' -%}
        {%- set own = message['tools'] if message['tools'] is defined else none -%}
        {%- if loop.first and tools -%}
            {%- set content = content ~ '\n' ~ (((own or []) + beside.tools) | tojson(indent=4)) -%}
        {%- elif own is not none -%}
            {%- set content = content ~ '\n' ~ (own | tojson(indent=4)) -%}
        {%- endif -%}
    {%- endif -%}
    {{- '<|' ~ message['role'] ~ '|>' ~ (message['metadata'] or '') ~ '\n' ~ (cut if content) ~ content -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant|>' -}}
{%- endif -%}
"""

    def show_tools(self, conversation: Conversation) -> Sequence[Message]:
        """Tools beside the messages belong to the first system message, which is added if there is none."""
        if not conversation.tools:
            return conversation.messages
        tools = [inner_part(tool) for tool in conversation.tools]
        if conversation.messages and conversation.messages[0].role == "system":
            first, *others = conversation.messages
            return [replace(first, tools=[*(first.tools or ()), *tools]), *others]
        return [Message("system", _INTRODUCTION, tools=tools), *conversation.messages]

    def write_tools(self, message: Message) -> str:
        """See `RoleFormat`."""
        return f"{message.content}\n{dumps(message.tools, indent=4)}"

    def write_call(self, arguments: Mapping[str, Any]) -> str:
        """A call in Python; JSON if an argument's name is not a Python name."""
        if not all(name.isidentifier() for name in arguments):
            return dumps(arguments)
        return _CALL.format(arguments=", ".join(f"{name}={value!r}" for name, value in arguments.items()))

    def last_id(self, answer: Message) -> int:
        """`</s>`, as in the official fine-tuning code."""
        return self.vocabulary.end_id
