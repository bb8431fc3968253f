"""ShareGPT's `conversations`: messages with `from` and `value`."""

from __future__ import annotations

from chatglm_ptuning.chat.message import Conversation, Message
from chatglm_ptuning.data.formats.fields import answer, learns, named_calls, names, text, tool_list, turns_of
from chatglm_ptuning.data.sources.rows import Row, fail

_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
    "bing": "assistant", "bard": "assistant", "system": "system", "function_call": "call", "tool_call": "call",
    "observation": "observation", "tool": "observation", "function_response": "observation",
    "tool_response": "observation",
}  # fmt: skip
_SPEAKER = "from"
_TEXT = "value"


def sharegpt(row: Row) -> Conversation:
    """Every answer and every tool call is learned unless it says `"loss": false` or `"weight": 0`.

    `system` and `tools` may stand beside the messages, the latter as a list or as JSON text. Answers in front of the
    first question, which cut-off conversations begin with, are left out.

    Raises:
        ValueError: naming file, line and message, for what is not understood.
    """
    messages: list[Message] = []
    for turn, what in turns_of(row, "conversations"):
        if _SPEAKER not in turn or _TEXT not in turn:
            fail(row, f"{what} has {names(turn)}; a message of ShareGPT needs 'from' and 'value'.")
        role = _ROLES.get(str(turn[_SPEAKER]).lower())
        if role is None:
            fail(row, f"{what} is from {turn[_SPEAKER]!r}, which is none of {', '.join(_ROLES)}.")
        loss = learns(row, turn, what)
        if role == "call":
            messages += named_calls(row, turn[_TEXT], what, loss)
        elif role == "assistant":
            messages.append(answer(text(row, turn[_TEXT], what), "", loss))
        else:
            messages.append(Message(role, text(row, turn[_TEXT], what)))
    system = text(row, row.get("system"), "'system'")
    if system.strip() and not (messages and messages[0].role == "system"):
        messages.insert(0, Message("system", system))
    return Conversation(_from_first_question(messages), tools=tool_list(row, row.get("tools"), "'tools'"))


def _from_first_question(messages: list[Message]) -> list[Message]:
    if not any(message.role == "user" for message in messages):
        return messages
    first = next(index for index, message in enumerate(messages) if message.role == "user")
    return [message for message in messages[:first] if message.role == "system"] + messages[first:]
