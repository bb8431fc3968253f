"""The chat formats of the family as jinja templates, and what makes rendering them to ids safe.

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

ROLE_FORMATS = ("chatglm3", "glm4")
"""The formats in which every message stands behind the token of its role."""

# ChatGLM2 numbers the rounds and has one text for all of a chat. It knows no system message: one is put in front.
_CHATGLM2 = r"""
{{- '[gMASK]sop' -}}
{%- set rounds = namespace(count=0) -%}
{%- for message in messages -%}
    {%- if message['content'] is not string -%}
        {{- raise_exception('message ' ~ loop.index ~ ' has no text under "content"') -}}
    {%- endif -%}
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

# ChatGLM3 encodes a message's header and its content apart. `segment_cut` stands between the two where the ids are
# wanted; otherwise it is the space that sentencepiece puts in front of the content's first piece, so that the text is
# that of the decoded ids. Tools given by argument have transformers' form, {"type": "function", "function": {...}},
# of which ChatGLM3 was shown the inner part; tools inside a system message are taken as they are.
_CHATGLM3 = r"""
{%- macro inner_part(tools) -%}
    {%- set functions = namespace(list=[]) -%}
    {%- for tool in tools -%}
        {%- set functions.list = functions.list + [tool['function'] if tool['function'] is mapping else tool] -%}
    {%- endfor -%}
    {{- functions.list | tojson(indent=4) -}}
{%- endmacro -%}
{%- set roles = ['system', 'user', 'assistant', 'observation'] -%}
{%- set cut = segment_cut | default(' ') -%}
{{- '[gMASK]sop' -}}
{%- if tools and messages[0]['role'] != 'system' -%}
    {{- '<|system|>\n' ~ cut ~ 'Answer the following questions as best as you can. ' -}}
    {{- 'You have access to the following tools:\n' ~ inner_part(tools) -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message['role'] not in roles -%}
        {{- raise_exception('ChatGLM3 has no role "' ~ message['role'] ~ '": use ' ~ roles | join(', ')) -}}
    {%- endif -%}
    {%- if message['content'] is not string -%}
        {{- raise_exception('message ' ~ loop.index ~ ' has no text under "content"') -}}
    {%- endif -%}
    {{- '<|' ~ message['role'] ~ '|>' ~ (message['metadata'] or '') ~ '\n' ~ cut ~ message['content'] -}}
    {%- if message['role'] == 'system' and message['tools'] is defined -%}
        {{- '\n' ~ (message['tools'] | tojson(indent=4)) -}}
    {%- elif message['role'] == 'system' and loop.first and tools -%}
        {{- '\n' ~ inner_part(tools) -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant|>' -}}
{%- endif -%}
"""

# GLM-4 encodes a message's header and its content apart, too, but its vocabulary adds no space. Tools stand in a
# system message of their own in front of the message that has them (tokenizer_config.json of glm-4-9b-chat, whose
# wording the base was trained on); given by argument, in front of the chat.
_GLM4 = r"""
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
{{- '[gMASK]<sop>' -}}
{%- if tools -%}
    {{- system_message(tools) -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message['role'] not in roles -%}
        {{- raise_exception('GLM-4 has no role "' ~ message['role'] ~ '": use ' ~ roles | join(', ')) -}}
    {%- endif -%}
    {%- if message['content'] is not string -%}
        {{- raise_exception('message ' ~ loop.index ~ ' has no text under "content"') -}}
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

# A base that was not trained to chat continues a text: the messages' contents, with nothing between them.
_BASE = r"""
{{- '[gMASK]sop' -}}
{%- for message in messages -%}
    {%- if message['content'] is not string -%}
        {{- raise_exception('message ' ~ loop.index ~ ' has no text under "content"') -}}
    {%- endif -%}
    {{- message['content'] -}}
{%- endfor -%}
"""

CHAT_TEMPLATES = {
    "chatglm2": _CHATGLM2.strip(),
    "chatglm3": _CHATGLM3.strip(),
    "glm4": _GLM4.strip(),
    "base": _BASE.strip(),
}
"""Chat format to jinja template; that of `base` starts as ChatGLM2 and ChatGLM3 do."""

CHAT_FORMATS = tuple(CHAT_TEMPLATES)
"""`chatglm2` (numbered rounds in one text), `chatglm3` and `glm4` (role tokens), `base` (no chat, plain text)."""


def template_of(chat_format: str, vocabulary: Vocabulary) -> str:
    """The jinja template of a format, with the start tokens of a vocabulary."""
    template = CHAT_TEMPLATES[chat_format]
    return template.replace("[gMASK]sop", "".join(vocabulary.start_tokens)) if chat_format == "base" else template


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
