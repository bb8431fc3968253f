"""The chat format of GLM-4 and CodeGeeX4: role tokens, and their notation of tools."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from chatglm_ptuning.chat.message import Conversation, Message
from chatglm_ptuning.chat.roles import ROLE_TOKENS, RoleFormat
from chatglm_ptuning.chat.tools import inner_part
from chatglm_ptuning.exact_json import dumps

# The texts are those of the official chat template (tokenizer_config.json of glm-4-9b-chat).
_INTRODUCTION = (
    "你是一个名为 ChatGLM 的人工智能助手。你是基于智谱AI训练的语言模型 GLM-4 模型开发的，"
    "你的任务是针对用户的问题和要求提供适当的答复和支持。\n\n# 可用工具"
)
_BEHIND_A_TOOL = "\n在调用上述函数时，请使用 Json 格式表示调用的参数。"


class GLM4Roles(RoleFormat):
    """`<|role|>metadata\\ncontent`. Tools have their own system message, in front of the message that has them.

    Tools without a name raise a ValueError.
    """

    name = "glm4"
    special_tokens = ("[gMASK]", "<sop>", *ROLE_TOKENS)
    base_names = re.compile(r".*(glm-?4|codegeex4).*")
    template_sign = "<sop>"
    template = r"""
{%- macro system_message(tools) -%}
    {{- '<|system|>\n' ~ (segment_cut | default('')) ~ '你是一个名为 ChatGLM 的人工智能助手。' -}}
    {{- '你是基于智谱AI训练的语言模型 GLM-4 模型开发的，你的任务是' -}}
    {{- '针对用户的问题和要求提供适当的答复和支持。\n\n# 可用工具' -}}
    {%- for tool in tools -%}
        {%- set function = tool['function'] if tool['function'] is mapping else tool -%}
        {%- if function['name'] is not string -%}
            {{- raise_exception('a tool has no name: describe other tools than functions in a system message') -}}
        {%- endif -%}
        {{- '\n\n## ' ~ function['name'] ~ '\n\n' ~ (function | tojson(indent=4)) -}}
        {{- '\n在调用上述函数时，请使用 Json 格式表示调用的参数。' -}}
    {%- endfor -%}
{%- endmacro -%}
{%- set roles = ['system', 'user', 'assistant', 'observation'] -%}
{%- if tools -%}
    {{- system_message(tools) -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message['role'] not in roles -%}
        {{- raise_exception('GLM-4 has no role "' ~ message['role'] ~ '": use ' ~ roles | join(', ')) -}}
    {%- endif -%}
    {%- if message['tools'] -%}
        {{- system_message(message['tools']) -}}
    {%- endif -%}
    {%- if message['content'] or not message['tools'] -%}
        {{- '<|' ~ message['role'] ~ '|>' ~ (message['metadata'] or '') ~ '\n' -}}
        {{- (segment_cut | default('')) ~ message['content'] -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant|>' -}}
{%- endif -%}
"""

    def show_tools(self, conversation: Conversation) -> Sequence[Message]:
        """See the class; tools beside the messages precede the chat."""
        shown = [Message("system", "", tools=conversation.tools)] if conversation.tools else []
        for message in conversation.messages:
            if message.tools:
                shown.append(Message("system", "", tools=message.tools))
            if message.content or not message.tools:
                shown.append(message if message.tools is None else replace(message, tools=None))
        return shown

    def write_tools(self, message: Message) -> str:
        """See `RoleFormat`."""
        text = _INTRODUCTION
        for tool in map(inner_part, message.tools or ()):
            if not isinstance(tool, Mapping) or not isinstance(tool.get("name"), str):
                raise ValueError("GLM-4's format needs tools that are objects with a 'name'; one of them has none.")
            text += f"\n\n## {tool['name']}\n\n{dumps(tool, indent=4)}{_BEHIND_A_TOOL}"
        return text

    def write_call(self, arguments: Mapping[str, Any]) -> str:
        """A JSON object."""
        return dumps(arguments)

    def last_id(self, answer: Message) -> int:
        """The role of the next message (as in later versions of the official finetune_demo/finetune.py)."""
        calls = answer.arguments is not None or answer.metadata
        return self.role_ids["observation" if calls else "user"]
