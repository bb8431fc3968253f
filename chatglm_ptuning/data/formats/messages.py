"""Rows whose messages have a `role` and a `content`: ChatGLM3's `conversations`, GLM-4's and OpenAI's `messages`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from chatglm_ptuning.chat.message import ROLES, Conversation, Message
from chatglm_ptuning.data.formats.fields import (
    answer,
    learns,
    names,
    parsed,
    shown,
    text,
    tool_call,
    tool_list,
    turns_of,
)
from chatglm_ptuning.data.sources.rows import Row, fail

_SAME_ROLE = {"developer": "system", "function": "observation", "tool": "observation"}
_NEEDED = "a message needs 'role' and 'content'"


def chatglm3(row: Row) -> Conversation:
    """ChatGLM3's `conversations`: every answer with text in it is learned unless it says `"loss": false`.

    `metadata` stands on the line of the role. The role `tool` (`name`, `parameters`, `observation`) becomes a tool
    call and its observation. `tools` may stand beside the messages or in a system message. (Official fine-tuning,
    except that tool output is never learned.)

    Raises:
        ValueError: naming file, line and message, for what is not understood.
    """
    messages: list[Message] = []
    for turn, what in turns_of(row, "conversations"):
        loss = learns(row, turn, what)
        if turn.get("role") == "tool":
            messages += _call_and_observation(row, turn, what, loss)
        else:
            messages.append(_message(row, turn, what, loss, (*ROLES, "tool")))
    return Conversation(messages, tools=tool_list(row, row.get("tools"), "'tools'"))


def messages(row: Row) -> Conversation:
    """GLM-4's and OpenAI's `messages`: every answer with text in it is learned unless it says otherwise.

    Otherwise is `"loss": false` or `"weight": 0`. `tool_calls` become one call each, followed by its result (found by
    `tool_call_id`), as the family knows one call at a time. `developer` is `system`; `tool` and `function` are
    `observation`. Of content in parts the texts are taken.

    Raises:
        ValueError: naming file, line and message, for what is not understood, such as images.
    """
    turns = turns_of(row, "messages")
    said: list[Message] = []
    placed: set[int] = set()
    for place, (turn, what) in enumerate(turns):
        role = turn.get("role")
        if place in placed:
            continue
        loss = learns(row, turn, what)
        calls = _calls(row, turn, what) if role == "assistant" else []
        known = (*ROLES, *_SAME_ROLE)
        if not calls or _content(row, turn, what).strip():
            said.append(_message(row, turn, what, loss, known, content_optional=role == "assistant"))
        results = _results_behind(turns, place) if len(calls) > 1 else {}
        for identity, name, arguments in calls:
            said.append(tool_call(row, name, arguments, what, loss))
            found = results.pop(identity, None) if isinstance(identity, str) else None
            if found is not None:
                said.append(_message(row, *turns[found], False, known))
                placed.add(found)
    tools = row.get("tools") if row.get("tools") is not None else row.get("functions")
    return Conversation(said, tools=tool_list(row, tools, "'tools'"))


def _results_behind(turns: Sequence[tuple[Mapping[str, Any], str]], place: int) -> dict[str, int]:
    """The `tool` messages directly behind a message, by their `tool_call_id`: ids may come again in later turns."""
    results: dict[str, int] = {}
    for index in range(place + 1, len(turns)):
        turn = turns[index][0]
        if turn.get("role") != "tool":
            break
        if isinstance(turn.get("tool_call_id"), str):
            results.setdefault(turn["tool_call_id"], index)
    return results


def _message(
    row: Row,
    turn: Mapping[str, Any],
    what: str,
    loss: bool,
    known: tuple[str, ...],
    content_optional: bool = False,
) -> Message:
    for key in ("role", "content"):
        if key not in turn and not (key == "content" and (content_optional or turn.get("tools"))):
            fail(row, f"{what} has no {key!r} (it has {names(turn)}); {_NEEDED}.")
    role = turn["role"]
    if role not in known:
        fail(row, f"{what} has the unknown role {role!r}; the roles are {', '.join(known[:-1])} and {known[-1]}.")
    content = _content(row, turn, what)
    metadata = text(row, turn.get("metadata"), f"the metadata of {what}")
    if "\n" in metadata:
        fail(row, f"the metadata of {what} has a line break in it; it is the rest of the role's line.")
    role = _SAME_ROLE.get(role, role)
    if role == "assistant":
        return answer(content, metadata, loss)
    tools = tool_list(row, turn.get("tools"), f"'tools' of {what}") if role == "system" else None
    return Message(role, content, metadata, tools=tools or None)


def _content(row: Row, turn: Mapping[str, Any], what: str) -> str:
    content = turn.get("content")
    if content is None:
        return text(row, turn.get("refusal"), what)
    if not isinstance(content, list):
        return text(row, content, what)
    parts = []
    for part in content:
        if isinstance(part, dict) and part.get("type") in ("text", "refusal"):
            parts.append(text(row, part.get(part["type"]), what))
        else:
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            fail(row, f"{what} has a part of the type {kind!r}; only text can be learned from.")
    return "".join(parts)


def _calls(row: Row, turn: Mapping[str, Any], what: str) -> list[tuple[Any, Any, Any]]:
    """`(id, name, arguments)` of every call."""
    calls = parsed(turn.get("tool_calls")) or []
    if not isinstance(calls, list):
        fail(row, f"'tool_calls' of {what} must be a list, not {shown(calls)}")
    found = []
    for call in calls:
        function = parsed(call.get("function", call)) if isinstance(call, dict) else None
        if not isinstance(function, dict):
            fail(row, f"a tool call of {what} is not understood: {shown(call)}")
        found.append((call.get("id"), function.get("name"), function.get("arguments")))
    single = parsed(turn.get("function_call"))
    if isinstance(single, dict):
        found.append((None, single.get("name"), single.get("arguments")))
    return found


def _call_and_observation(row: Row, turn: Mapping[str, Any], what: str, loss: bool) -> list[Message]:
    if not isinstance(turn.get("name"), str) or not isinstance(parsed(turn.get("parameters")), dict):
        fail(row, f"{what} is a tool call, which needs 'name' (text) and 'parameters' (an object).")
    observation = turn.get("observation")
    if not isinstance(observation, str):
        observation = json.dumps(observation, ensure_ascii=False)
    return [
        tool_call(row, turn["name"], turn["parameters"], what, loss),
        Message("observation", text(row, observation, f"the observation of {what}")),
    ]
