"""Reading single fields of a row, with errors that say where the fault stands."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from chatglm_ptuning.data.conversation import Message
from chatglm_ptuning.data.sources.rows import fail

_SHOWN = 60


def names(fields: Mapping[str, Any]) -> str:
    """The fields of a row or an object, for a message."""
    return ", ".join(repr(name) for name in fields) or "none"


def text(row: Mapping[str, Any], value: Any, what: str) -> str:
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


def turns_of(row: Mapping[str, Any], field: str) -> list[tuple[dict[str, Any], str]]:
    """The objects in a list of messages, each with what errors call it.

    Raises:
        ValueError: if the field is no list of objects.
    """
    turns = parsed(row.get(field))
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


def learns(row: Mapping[str, Any], turn: Mapping[str, Any], what: str) -> bool:
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


def tool_list(row: Mapping[str, Any], value: Any, what: str) -> tuple[Any, ...]:
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
