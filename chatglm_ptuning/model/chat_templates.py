"""The chat forms of ChatGLM2 and ChatGLM3 as jinja templates, and what makes rendering them to ids safe.

A rendered chat is one string, in which a user who writes `<|user|>` looks like the template itself. While a chat is
rendered for its ids, `RenderGuard` therefore breaks up every special token that the caller's strings spell, by a
random mark drawn for this one call. What then still spells a token was written by the template; the marks are taken
out again afterwards. Any Unicode text comes through unchanged, and nothing can be forged without guessing the mark.
The templates themselves write plain spellings, so that other programs can render them too.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from transformers.utils import get_json_schema

from chatglm_ptuning.model.vocabulary import ROLE_TOKENS, SPECIAL_TOKENS

CHAT_FORMATS = ("chatglm2", "chatglm3")

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

CHAT_TEMPLATES = {"chatglm2": _CHATGLM2.strip(), "chatglm3": _CHATGLM3.strip()}
"""Chat format to jinja template."""

_SPELLED_BY_CALLER = re.compile("|".join(map(re.escape, (*SPECIAL_TOKENS, "<s>", "</s>", "<unk>"))))
# `sop` and `eop` are parts of words, too: in a template, `sop` counts only where every chat has it.
_WRITTEN_BY_TEMPLATE = re.compile(rf"(\[gMASK\]|(?<=\[gMASK\])sop|</s>|{'|'.join(map(re.escape, ROLE_TOKENS))})")


def recognise_chat_format(chat_template: Any, names: Iterable[str]) -> str | None:
    """The chat format that a template writes, or else the one of the base that a name speaks of; None if none does.

    Args:
        chat_template: jinja text, several by name, or None.
        names: model names or paths; only the last part of a path counts.
    """
    text = str(chat_template or "")
    if "问：" in text:
        return "chatglm2"
    if "<|" in text:
        return "chatglm3"
    for name in names:
        last = re.split(r"[/\\]|--", name.rstrip("/\\"))[-1].lower()
        if "chatglm2" in last or "codegeex2" in last:
            return "chatglm2"
        if "chatglm3" in last:
            return "chatglm3"
    return None


class RenderGuard:
    """Tells the tokens that a template writes from those that the caller's text spells, for one rendering.

    `segment_cut` is given to the template, which writes it where the text is to be encoded in two parts.
    """

    def __init__(self) -> None:
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
            return _SPELLED_BY_CALLER.sub(lambda match: match[0][0] + self._mark + match[0][1:], value)
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
            for index, part in enumerate(_WRITTEN_BY_TEMPLATE.split(segment)):
                is_special = index % 2 == 1
                if part:
                    yield part if is_special else part.replace(self._mark, ""), is_special
