"""Reading single fields, messages and tool calls of a row. `read_row` adds the place to their errors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from chatglm_ptuning.chat.message import Message
from chatglm_ptuning.data.formats.unread import NotedFields
from chatglm_ptuning.exact_json import dumps, loads

SYSTEM_FIELDS = ("system", "system_prompt")
"""Fields of a row that can hold a system message."""
CONVERSATION_FIELDS = ("conversations", "conversation")
"""Fields of a row that can hold the messages of ChatGLM3 and ShareGPT."""
_SHOWN = 60


def names(fields: Mapping[str, Any]) -> str:
    """The field names of a row or an object, for a message."""
    return ", ".join(repr(name) for name in fields) or "none"


def text(value: Any, what: str) -> str:
    """A value as text: numbers as they were written, booleans as in JSON, null as empty text.

    Raises:
        ValueError: if it is an array or an object, or holds half of a surrogate pair.
    """
    if value is None:
        return ""
    if isinstance(value, (bool, int, float)):
        return dumps(value)
    if not isinstance(value, str):
        kind = "an array" if isinstance(value, list) else "an object"
        raise ValueError(f"{what} holds {kind}, not text: {shown(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"half of a surrogate pair ({value[error.start]!a}) at character {error.start + 1}"
        raise ValueError(f"{what} holds {half}.") from None
    return value


def parsed(value: Any) -> Any:
    """The list or object that JSON text holds, as CSV files have it; any other value as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def shown(value: Any) -> str:
    """The start of a value, for a message."""
    whole = json.dumps(value, ensure_ascii=False, default=str)
    return whole[:_SHOWN] + ("..." if len(whole) > _SHOWN else "")


def turns_of(row: NotedFields, *fields: str) -> list[tuple[NotedFields, str]]:
    """The objects in a list of messages, each with its name for error messages.

    Args:
        fields: names of the field that holds the list; the first one in the row is read.

    Raises:
        ValueError: if there is no such field, or it is not a list of objects.
    """
    field = next((field for field in fields if field in row), None)
    if field is None:
        raise ValueError(f"there is no {fields[0]!r}, which this dataset format needs (the row has {names(row)}).")
    turns = parsed(row[field])
    if not isinstance(turns, list):
        raise ValueError(f"{field!r} must be a list of messages, or valid JSON text of one, not {shown(turns)}")
    named = []
    for number, turn in enumerate(turns, start=1):
        what = f"message {number} of {field!r}"
        if not isinstance(turn, dict):
            raise ValueError(f'{what} is not an object like {{"role": "user", "content": "..."}}')
        named.append((row.message_of(field, turn), what))
    return named


def with_system(said: list[Message], row: NotedFields) -> list[Message]:
    """Messages with the system message that stands beside them, unless they begin with one of their own."""
    if said and said[0].role == "system":
        return said
    for name in SYSTEM_FIELDS:
        if name in row and (system := text(row[name], repr(name))).strip():
            return [Message("system", system), *said]
    return said


def learns(turn: Mapping[str, Any], what: str) -> bool:
    """Whether an answer is learned: not with `"loss": false`, or OpenAI's `"weight": 0`.

    Raises:
        ValueError: if either is of another type.
    """
    loss, weight = turn.get("loss"), turn.get("weight")
    if loss is not None and not isinstance(loss, bool):
        raise ValueError(f"{what}: 'loss' must be true or false, not {loss!r}.")
    if weight is not None and weight not in (0, 1):
        raise ValueError(f"{what}: 'weight' must be 0 or 1, not {weight!r}.")
    return loss is not False and weight != 0


def answer(content: str, metadata: str, loss: bool) -> Message:
    """An answer; a blank one is never learned, because it would teach the model to say nothing."""
    message = Message("assistant", content, metadata)
    return message if message.is_blank or not loss else Message("assistant", content, metadata, loss=True)


def tool_list(value: Any, what: str) -> tuple[Any, ...]:
    """Definitions of tools: a list, a single object, or either as JSON text; empty if there are none.

    Raises:
        ValueError: if it is something else.
    """
    tools = parsed(value)
    if tools in (None, "", [], {}):
        return ()
    if isinstance(tools, dict):
        tools = [tools]
    if not isinstance(tools, list):
        raise ValueError(
            f"{what} must be a list of tool definitions, not {shown(tools)}. If it is something else, list it in "
            "ignored_columns."
        )
    text(json.dumps(tools, ensure_ascii=False, default=str), what)
    return tuple(tools)


def tool_call(name: Any, arguments: Any, what: str, loss: bool) -> Message:
    """An answer that calls a tool.

    Args:
        arguments: an object, or JSON text of one; other text is kept unchanged.

    Raises:
        ValueError: if there is no name, or the arguments are neither.
    """
    if not isinstance(name, str) or not name.strip() or "\n" in name:
        raise ValueError(f"{what} is a tool call, which needs the 'name' of the tool (text on one line).")
    arguments = parsed(arguments)
    arguments = {} if arguments in (None, "") else arguments
    if not isinstance(arguments, (dict, str)):
        raise ValueError(f"{what} is a tool call, whose arguments must be an object, not {shown(arguments)}")
    text(str(arguments), what)  # a value that cannot be encoded fails here, not in the chat format
    return Message("assistant", "", text(name.strip(), what), loss, arguments=arguments)
