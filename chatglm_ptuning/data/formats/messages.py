"""Rows with a list of messages: ChatGLM3's and ShareGPT's `conversations`, GLM-4's and OpenAI's `messages`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from chatglm_ptuning.chat.message import ROLES, Conversation, Message
from chatglm_ptuning.data.formats.fields import (
    CONVERSATION_FIELDS,
    answer,
    learns,
    names,
    parsed,
    shown,
    text,
    tool_call,
    tool_list,
    turns_of,
    with_system,
)
from chatglm_ptuning.data.formats.unread import NotedFields
from chatglm_ptuning.exact_json import dumps

_SAME_ROLE = {"developer": "system", "function": "observation", "tool": "observation"}
_SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
    "bing": "assistant", "bard": "assistant", "system": "system", "function_call": "call", "tool_call": "call",
    "observation": "observation", "tool": "observation", "function_response": "observation",
    "tool_response": "observation",
}  # fmt: skip

_ROUNDS = (("human", "assistant"), ("input", "output"))
"""Keys of a question and its answer, where an object of ShareGPT's format holds both: Firefly's and XTuner's."""


def chatglm3(row: NotedFields) -> Conversation:
    """ChatGLM3's `conversations`: every answer with text is learned unless it says `"loss": false`.

    `metadata` is on the line of the role. The role `tool` (`name`, `parameters`, `observation`) becomes a tool
    call and its observation. `tools` may be a field beside the messages, or of a system message. As in the official
    fine-tuning, except that tool output is never learned.

    Raises:
        ValueError: naming the message, for what is not understood.
    """
    said: list[Message] = []
    for turn, what in turns_of(row, *CONVERSATION_FIELDS):
        loss = learns(turn, what)
        if turn.get("role") == "tool":
            if not isinstance(turn.get("name"), str) or not isinstance(parsed(turn.get("parameters")), dict):
                raise ValueError(f"{what} is a tool call, which needs 'name' (text) and 'parameters' (an object).")
            seen = turn.get("observation")
            seen = seen if isinstance(seen, str) else dumps(seen)
            said.append(tool_call(turn["name"], turn["parameters"], what, loss))
            said.append(Message("observation", text(seen, f"the observation of {what}")))
        else:
            said.append(_message(turn, what, loss, (*ROLES, "tool")))
    return Conversation(with_system(said, row), tools=tool_list(row.get("tools"), "'tools'"))


def messages(row: NotedFields) -> Conversation:
    """GLM-4's and OpenAI's `messages`: every answer with text is learned unless `loss` or `weight` forbids it.

    `tool_calls` become one call each, followed by its result (found by `tool_call_id`), because the family knows one
    call at a time. `developer` is `system`; `tool` and `function` are `observation`. Of content in parts the texts are
    taken.

    Raises:
        ValueError: naming the message, for what is not understood, such as images.
    """
    turns = turns_of(row, "messages")
    known = (*ROLES, *_SAME_ROLE)
    said: list[Message] = []
    placed: set[int] = set()
    for place, (turn, what) in enumerate(turns):
        if place in placed:
            continue
        loss, calls = learns(turn, what), []
        if turn.get("role") == "assistant":
            turn.setdefault("content", None)
            calls = _calls(turn, what)
        if not calls or _content(turn, what).strip():
            said.append(_message(turn, what, loss, known))
        results = _results_after(turns, place) if len(calls) > 1 else {}
        for identity, name, arguments in calls:
            said.append(tool_call(name, arguments, what, loss))
            found = results.pop(identity, None) if isinstance(identity, str) else None
            if found is not None:
                said.append(_message(*turns[found], False, known))
                placed.add(found)
    tools = row.get("tools") if row.get("tools") is not None else row.get("functions")
    return Conversation(with_system(said, row), tools=tool_list(tools, "'tools'"))


def is_sharegpt(turn: Mapping[str, Any]) -> bool:
    """Whether an object of a conversation is ShareGPT's, not ChatGLM3's."""
    return "from" in turn or any(all(key in turn for key in keys) for keys in _ROUNDS)


def sharegpt(row: NotedFields) -> Conversation:
    """ShareGPT's `conversations`: every answer and tool call is learned unless `loss` or `weight` forbids it.

    `system` and `tools` may stand beside the messages, the latter as a list or as JSON text. An object may also hold
    a whole round, a question and its answer, and `system` before them. Answers before the first
    question, with which truncated conversations begin, are left out.

    Raises:
        ValueError: naming the message, for what is not understood.
    """
    said: list[Message] = []
    for turn, what in turns_of(row, *CONVERSATION_FIELDS):
        if asked_and_said := next((keys for keys in _ROUNDS if all(key in turn for key in keys)), None):
            if system := text(turn.get("system"), f"'system' of {what}").strip():
                said.append(Message("system", system))
            question, reply = (text(turn[key], f"{key!r} of {what}") for key in asked_and_said)
            said += [Message("user", question), answer(reply, "", learns(turn, what))]
            continue
        if "from" not in turn or "value" not in turn:
            raise ValueError(f"{what} has {names(turn)}; a message of ShareGPT needs 'from' and 'value'.")
        role = _SHAREGPT_ROLES.get(str(turn["from"]).lower())
        if role is None:
            raise ValueError(f"{what} is from {turn['from']!r}, which is none of {', '.join(_SHAREGPT_ROLES)}.")
        loss = learns(turn, what)
        if role == "call":
            said += _named_calls(turn["value"], what, loss)
        else:
            content = text(turn["value"], what)
            said.append(answer(content, "", loss) if role == "assistant" else Message(role, content))
    said = with_system(said, row)
    asked = next((place for place, message in enumerate(said) if message.role == "user"), 0)
    said = [message for message in said[:asked] if message.role == "system"] + said[asked:]
    return Conversation(said, tools=tool_list(row.get("tools"), "'tools'"))


def _message(turn: NotedFields, what: str, loss: bool, known: tuple[str, ...]) -> Message:
    """A message that is no tool call; `content` may be missing beside `tools`.

    Args:
        known: the roles of the dataset format.
    """
    for key in ("role", "content"):
        if key not in turn and not (key == "content" and turn.get("tools")):
            raise ValueError(f"{what} has no {key!r} (it has {names(turn)}); a message needs 'role' and 'content'.")
    turn.leave_out("name")  # of a speaker or a tool; the family's chat formats have no place for it
    role = turn["role"]
    if role not in known:
        raise ValueError(
            f"{what} has the unknown role {role!r}; the roles are {', '.join(known[:-1])} and {known[-1]}."
        )
    content = _content(turn, what)
    metadata = text(turn.get("metadata"), f"the metadata of {what}")
    if "\n" in metadata:
        raise ValueError(f"the metadata of {what} has a line break in it; it is the rest of the role's line.")
    role = _SAME_ROLE.get(role, role)
    if role == "assistant":
        return answer(content, metadata, loss)
    tools = tool_list(turn.get("tools"), f"'tools' of {what}") if role == "system" else None
    return Message(role, content, metadata, tools=tools or None)


def _content(turn: NotedFields, what: str) -> str:
    content = turn.get("content")
    if content is None:
        return text(turn.get("refusal"), what)
    if not isinstance(content, list):
        return text(content, what)
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind not in ("text", "refusal"):
            raise ValueError(f"{what} has a part of the type {kind!r}; only text can be learned.")
        parts.append(text(part.get(kind), what))
    return "".join(parts)


def _calls(turn: NotedFields, what: str) -> list[tuple[Any, Any, Any]]:
    """`(id, name, arguments)` of every call."""
    calls = parsed(turn.get("tool_calls")) or []
    if not isinstance(calls, list):
        raise ValueError(f"'tool_calls' of {what} must be a list, not {shown(calls)}")
    found = []
    for call in calls:
        function = parsed(call.get("function", call)) if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise ValueError(f"a tool call of {what} is not understood: {shown(call)}")
        found.append((call.get("id"), function.get("name"), function.get("arguments")))
    single = parsed(turn.get("function_call"))
    if single not in (None, "", {}):
        if not isinstance(single, dict):
            raise ValueError(f"'function_call' of {what} must be an object, not {shown(single)}")
        found.append((None, single.get("name"), single.get("arguments")))
    return found


def _results_after(turns: Sequence[tuple[NotedFields, str]], place: int) -> dict[str, int]:
    """The `tool` messages right after a message, by their `tool_call_id`: ids may come again in later turns."""
    results: dict[str, int] = {}
    for index in range(place + 1, len(turns)):
        turn = turns[index][0]
        if turn.get("role") != "tool":
            break
        if isinstance(turn.get("tool_call_id"), str):
            results.setdefault(turn["tool_call_id"], index)
    return results


def _named_calls(value: Any, what: str, loss: bool) -> list[Message]:
    """The calls in `{"name": ..., "arguments": {...}}`, or in a list of such objects, also as JSON text."""
    calls = parsed(value)
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        if not isinstance(call, dict) or "name" not in call:
            raise ValueError(f'{what} must be a call like {{"name": "...", "arguments": {{...}}}}, not {shown(value)}')
        found.append(tool_call(call["name"], call.get("arguments", call.get("parameters")), what, loss))
    return found
