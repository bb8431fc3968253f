"""One turn of a chat in the family's formats: from query and history to token ids, from generated ids to an answer.

Token ids carry the structure: roles and stops are read from ids, never from text that spells them.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from chatglm_ptuning.model.chat_templates import ROLE_FORMATS

if TYPE_CHECKING:
    from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer

Message = dict[str, Any]
"""`role` and `content`; of an assistant also `metadata` (a tool's name or ""), of a system perhaps `tools`."""
History = list[Message] | list[tuple[str, str]]
"""Messages in the formats with roles (chatglm3, glm4), (query, response) pairs in the others (chatglm2, base)."""

_REPLACED = {"[[训练时间]]": "2023年"}
"""Placeholders that the official bases learnt to write, with what the official code shows instead."""
_TOOL_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.\-]*")
_FENCED = re.compile(r"```[^\n]*\n(.*?)```", re.DOTALL)


class Answer(NamedTuple):
    """What the tokens generated so far mean.

    Attributes:
        response: the text; for a tool call a dictionary with `name` and `parameters`, or `name` and `content` if the
            history lists no tools or the call cannot be read.
        history: the history with the query and this answer; a new list.
        unfinished: whether the last characters may still change: half a UTF-8 character, half a placeholder, or what
            may turn out to be a tool's name.
    """

    response: str | dict[str, Any]
    history: History
    unfinished: bool


def stop_ids(tokenizer: ChatGLMTokenizer) -> list[int]:
    """The ids that end an answer: eos, and in a format with roles those that can follow an assistant."""
    roles = ["<|user|>", "<|observation|>"] if tokenizer.chat_format in ROLE_FORMATS else []
    return [tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(roles)]


class ChatTurn:
    """A query with its history, in the tokenizer's chat format.

    Args:
        history: of the turns before; never changed. The formats with roles also take (query, response) pairs.
        role: who says the query; "observation" for a tool's result (formats with roles only).

    Raises:
        ValueError: if the history has another form, or the role is unknown; the message names the entry.
    """

    def __init__(
        self,
        tokenizer: ChatGLMTokenizer,
        query: str,
        history: Sequence[Mapping[str, Any] | Sequence[str]] | None = None,
        role: str = "user",
    ) -> None:
        self.tokenizer = tokenizer
        self.query = query
        self.role = role
        self.stop_ids = stop_ids(tokenizer)
        self._with_roles = tokenizer.chat_format in ROLE_FORMATS
        roles = ("system", "user", "assistant", "observation") if self._with_roles else ("user",)
        if role not in roles:
            raise ValueError(f"role must be one of {', '.join(roles)} in {tokenizer.chat_format}, got {role!r}.")
        self.history = _messages(history or []) if self._with_roles else _pairs(history or [], tokenizer.chat_format)

    def input_ids(self) -> list[int]:
        """The conversation up to where the answer starts."""
        if self._with_roles:
            inputs = self.tokenizer.build_chat_input(self.query, history=self.history, role=self.role)
        elif self.tokenizer.chat_format == "chatglm2":
            inputs = self.tokenizer([self.tokenizer.build_prompt(self.query, history=self.history)])
        else:
            inputs = self.tokenizer(["".join(query + response for query, response in self.history) + self.query])
        return [int(index) for index in inputs["input_ids"][0]]

    def read(self, generated_ids: Sequence[int]) -> Answer:
        """The answer in these ids, which may be the beginning of one; it ends before the first stop id."""
        end = next((place for place, index in enumerate(generated_ids) if index in self.stop_ids), len(generated_ids))
        return self._read_messages(generated_ids[:end]) if self._with_roles else self._read_text(generated_ids[:end])

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def _read_text(self, ids: Sequence[int]) -> Answer:
        text = self._decode(ids)
        # What continues a text may well start with a space or an indented line.
        response = text if self.tokenizer.chat_format == "base" else _replace(text).strip()
        return Answer(response, [*self.history, (self.query, response)], _ends_amid_something(text))

    def _read_messages(self, ids: Sequence[int]) -> Answer:
        assistant = self.tokenizer.convert_tokens_to_ids("<|assistant|>")
        tools = _tool_names(self.history)
        history = [*self.history, {"role": self.role, "content": self.query}]
        response: str | dict[str, Any] = ""
        text = ""
        for text in map(self._decode, _split(ids, assistant)):
            metadata, content = _split_metadata(_replace(text), tools or ())
            if not metadata:
                response = content = content.strip()
            else:
                parameters = None if tools is None else _parse_parameters(content)
                meant = {"content": content} if parameters is None else {"parameters": parameters}
                response = {"name": metadata, **meant}
            history.append({"role": "assistant", "metadata": metadata, "content": content})
        return Answer(response, history, _ends_amid_something(text) or _may_be_metadata(text, tools or ()))


def _messages(history: Sequence[Mapping[str, Any] | Sequence[str]]) -> list[Message]:
    messages: list[Message] = []
    for place, entry in enumerate(history):
        if isinstance(entry, Mapping) and isinstance(entry.get("role"), str) and "content" in entry:
            messages.append(dict(entry))
        elif _is_pair(entry):
            query, response = entry
            messages.append({"role": "user", "content": query})
            messages.append({"role": "assistant", "metadata": "", "content": response})
        else:
            raise ValueError(f"history[{place}] must have role and content, or be a (query, response) pair: {entry!r}.")
    return messages


def _pairs(history: Sequence[Mapping[str, Any] | Sequence[str]], chat_format: str) -> list[tuple[str, str]]:
    for place, entry in enumerate(history):
        if not _is_pair(entry):
            raise ValueError(
                f"history[{place}] must be a (query, response) pair in the {chat_format} format: {entry!r}."
            )
    return [tuple(entry) for entry in history]


def _is_pair(entry: Any) -> bool:
    return isinstance(entry, (list, tuple)) and len(entry) == 2 and all(isinstance(side, str) for side in entry)


def _split(ids: Sequence[int], separator: int) -> list[list[int]]:
    runs: list[list[int]] = [[]]
    for index in ids:
        if index == separator:
            runs.append([])
        else:
            runs[-1].append(index)
    return runs


def _replace(text: str) -> str:
    for placeholder, shown in _REPLACED.items():
        text = text.replace(placeholder, shown)
    return text


def _ends_amid_something(text: str) -> bool:
    if text.endswith("\ufffd"):
        return True
    return any(text.endswith(word[:length]) for word in _REPLACED for length in range(1, len(word)))


def _tool_names(history: Sequence[Message]) -> list[str] | None:
    """Names of the tools that the system message offers; None if it offers none."""
    if not history or history[0]["role"] != "system" or "tools" not in history[0]:
        return None
    tools = [tool.get("function", tool) for tool in history[0]["tools"] if isinstance(tool, Mapping)]
    return [tool["name"] for tool in tools if isinstance(tool, Mapping) and isinstance(tool.get("name"), str)]


def _split_metadata(text: str, tools: Sequence[str]) -> tuple[str, str]:
    """The metadata line and what follows it.

    A first line that can be no tool's name belongs to the answer: a prefix may have learnt to leave the line out.
    """
    first, newline, rest = text.partition("\n")
    name = first.strip()
    if newline and (not name or name in tools or _TOOL_NAME.fullmatch(name)):
        return name, rest
    return "", text


def _may_be_metadata(text: str, tools: Sequence[str]) -> bool:
    name = text.strip()
    return "\n" not in text and (
        not name or _TOOL_NAME.fullmatch(name) is not None or any(tool.startswith(name) for tool in tools)
    )


def _parse_parameters(content: str) -> dict[str, Any] | None:
    """The arguments of a tool call, as a JSON object, a literal or `tool_call(name=literal, ...)`; None if unreadable.

    The text comes from the model and is parsed, never run.
    """
    fenced = _FENCED.search(content)
    code = (fenced.group(1) if fenced else content).strip()
    try:
        parameters = json.loads(code)
    except ValueError:
        parameters = _parse_call(code)
    except RecursionError:
        return None
    return parameters if isinstance(parameters, dict) else None


def _parse_call(code: str) -> Any:
    try:
        expression = ast.parse(code, mode="eval").body
        if not isinstance(expression, ast.Call):
            return ast.literal_eval(expression)
        if expression.args or any(keyword.arg is None for keyword in expression.keywords):
            return None
        return {keyword.arg: ast.literal_eval(keyword.value) for keyword in expression.keywords}
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return None
