"""Tool calls as the forms write them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from chatglm_ptuning.data.conversation import Message
from chatglm_ptuning.data.forms.fields import parsed, shown, text
from chatglm_ptuning.data.sources.rows import fail


def tool_call(row: Mapping[str, Any], name: Any, arguments: Any, what: str, loss: bool) -> Message:
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


def named_calls(row: Mapping[str, Any], value: Any, what: str, loss: bool) -> list[Message]:
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
