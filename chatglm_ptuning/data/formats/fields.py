"""Reading single fields, messages and tool calls of a row, with errors that say where the fault is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from chatglm_ptuning.chat.message import Message
from chatglm_ptuning.data.sources.rows import Row, fail

_SHOWN = 60


def names(fields: Mapping[str, Any]) -> str:
    """The fields of a row or an object, for a message."""
    return ", ".join(repr(name) for name in fields) or "none"


def text(row: Row, value: Any, what: str) -> str:
    """A value as text: numbers and booleans as JSON writes them, null as empty text.

    Raises:
        ValueError: if it is an array or an object, or holds half of a surrogate pair.
    """
    if value is None:
        return ""
    if isinstance(value, (bool, int, float)):
        return json.dumps(value)
    if not isinstance(value, str):
        kind = "an array" if isinstance(value, list) else "an object"
        fail(row, f"{what} holds {kind}, not text: {shown(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        fail(row, f"{what} holds half of a surrogate pair ({value[error.start]!a}) at character {error.start + 1}.")
    return value


def parsed(value: Any) -> Any:
    """A list or an object that was written as JSON text, as CSV files and some others have it; else the value."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def shown(value: Any) -> str:
    """The start of a value, for a message."""
    whole = json.dumps(value, ensure_ascii=False, default=str)
    return whole[:_SHOWN] + ("..." if len(whole) > _SHOWN else "")


def turns_of(row: Row, field: str) -> list[tuple[dict[str, Any], str]]:
    """The objects in a list of messages, each with what errors call it.

    Raises:
        ValueError: if there is no such field, or it is no list of objects.
    """
    if field not in row:
        fail(row, f"there is no {field!r}, which this dataset format needs (the row has {names(row)}).")
    turns = parsed(row[field])
    if isinstance(turns, str) and turns.lstrip()[:1] in ("[", "{"):
        fail(row, f"{field!r} holds text that is not valid JSON: {shown(turns)}")
    if not isinstance(turns, list):
        fail(row, f"{field!r} must be a list of messages, not {type(turns).__name__}.")
    named = []
    for number, turn in enumerate(turns, start=1):
        what = f"message {number} of {field!r}"
        if not isinstance(turn, dict):
            fail(row, f'{what} is not an object like {{"role": "user", "content": "..."}}')
        named.append((turn, what))
    return named


def learns(row: Row, turn: Mapping[str, Any], what: str) -> bool:
    """Whether a message is to be learned, if it is an answer: not with `"loss": false`, or OpenAI's `"weight": 0`.

    Raises:
        ValueError: if either is of another type.
    """
    loss, weight = turn.get("loss"), turn.get("weight")
    if loss is not None and not isinstance(loss, bool):
        fail(row, f"{what}: 'loss' must be true or false, not {loss!r}.")
    if weight is not None and weight not in (0, 1):
        fail(row, f"{what}: 'weight' must be 0 or 1, not {weight!r}.")
    return loss is not False and weight != 0


def answer(content: str, metadata: str, loss: bool) -> Message:
    """An answer; a blank one is never learned, as it would teach to say nothing."""
    message = Message("assistant", content, metadata)
    return message if message.is_blank or not loss else Message("assistant", content, metadata, loss=True)


def tool_list(row: Row, value: Any, what: str) -> tuple[Any, ...]:
    """Definitions of tools: a list, a single object, or either as JSON text; nothing if there are none.

    Raises:
        ValueError: if it is something else.
    """
    tools = parsed(value)
    if tools is None or tools == "" or tools == [] or tools == {}:
        return ()
    if isinstance(tools, dict):
        tools = [tools]
    if not isinstance(tools, list):
        fail(row, f"{what} must be a list of tool definitions, not {shown(tools)}")
    text(row, json.dumps(tools, ensure_ascii=False, default=str), what)
    return tuple(tools)


def tool_call(row: Row, name: Any, arguments: Any, what: str, loss: bool) -> Message:
    """An answer that calls a tool.

    Args:
        arguments: an object, or JSON text of one; other text stays as it is.

    Raises:
        ValueError: if there is no name, or the arguments are neither.
    """
    if not isinstance(name, str) or not name.strip() or "\n" in name:
        fail(row, f"{what} is a tool call, which needs the 'name' of the tool (text on one line).")
    arguments = parsed(arguments)
    if arguments is None or arguments == "":
        arguments = {}
    if not isinstance(arguments, (dict, str)):
        fail(row, f"{what} is a tool call, whose arguments must be an object, not {shown(arguments)}")
    # What cannot be encoded in a value shows here and not when it is rendered.
    text(row, str(arguments), what)
    return Message("assistant", "", text(row, name.strip(), what), loss, arguments=arguments)


def named_calls(row: Row, value: Any, what: str, loss: bool) -> list[Message]:
    """The calls in `{"name": ..., "arguments": {...}}`, or in a list of such objects, perhaps as JSON text.

    Raises:
        ValueError: if it is something else.
    """
    calls = parsed(value)
    calls = calls if isinstance(calls, list) else [calls]
    messages = []
    for call in calls:
        if not isinstance(call, dict) or "name" not in call:
            fail(row, f'{what} must be a call like {{"name": "...", "arguments": {{...}}}}, not {shown(value)}')
        messages.append(tool_call(row, call["name"], call.get("arguments", call.get("parameters")), what, loss))
    return messages
