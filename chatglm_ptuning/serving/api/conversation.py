"""OpenAI's messages to a conversation of the chat format, and tool calls in both directions."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from typing import Any

from chatglm_ptuning.chat.format import ChatFormat
from chatglm_ptuning.chat.message import Conversation, Message
from chatglm_ptuning.chat.tools import call_arguments
from chatglm_ptuning.serving.api.schema import (
    AssistantMessage,
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    ToolCall,
    ToolMessage,
    text_of,
)

_ROLES = {"developer": "system", "tool": "observation"}


def offered_tools(request: ChatRequest) -> list[dict[str, Any]]:
    """The tools that the model may call: none with `tool_choice: none`."""
    return [] if request.tool_choice == "none" else [tool.function for tool in request.tools or ()]


def chat_prompt(request: ChatRequest, chat_format: ChatFormat) -> list[int]:
    """Ids of the messages and tools, up to where the answer begins. No text becomes a special token.

    Raises:
        ValueError: for what the chat format does not support.
    """
    said = _messages(request.messages)
    return chat_format.encode_prompt(Conversation(said, tools=tuple(offered_tools(request))))


def text_prompts(request: CompletionRequest, chat_format: ChatFormat) -> list[list[int]]:
    """Ids of every prompt. The start tokens precede it, unless it is given as ids that begin with them.

    Raises:
        ValueError: for an id that the vocabulary does not have.
    """
    start, vocabulary = chat_format.start_ids, chat_format.vocabulary
    found = []
    for prompt in request.prompts:
        if isinstance(prompt, str):
            found.append([*start, *vocabulary.encode(prompt)])
            continue
        if max(prompt) >= len(vocabulary):
            raise ValueError(f"prompt has the token id {max(prompt)}; the vocabulary has {len(vocabulary)}.")
        found.append(prompt if prompt[: len(start)] == start else [*start, *prompt])
    return found


def _messages(messages: Sequence[ChatMessage]) -> list[Message]:
    """The messages. Each of several calls of one answer is followed by its result, as in training."""
    said: list[Message] = []
    placed: set[int] = set()
    for place, message in enumerate(messages):
        if place in placed:
            continue
        if not isinstance(message, AssistantMessage):
            said.append(Message(_ROLES.get(message.role, message.role), text_of(message.content)))
            continue
        content = text_of(message.content) or message.refusal or ""
        calls = message.tool_calls or []
        if content.strip() or not calls:
            said.append(Message("assistant", content))
        results = _results_after(messages, place) if len(calls) > 1 else {}
        for call in calls:
            said.append(_call(call))
            if call.id in results:
                index = results.pop(call.id)
                placed.add(index)
                said.append(Message("observation", text_of(messages[index].content)))
    return said


def _results_after(messages: Sequence[ChatMessage], place: int) -> dict[str, int]:
    """The results right after an answer, by the id of their call."""
    found: dict[str, int] = {}
    for index in range(place + 1, len(messages)):
        message = messages[index]
        if not isinstance(message, ToolMessage):
            break
        if message.tool_call_id is not None:
            found.setdefault(message.tool_call_id, index)
    return found


def _call(call: ToolCall) -> Message:
    written = call.function.arguments
    try:
        arguments = json.loads(written)
    except (ValueError, RecursionError):
        arguments = written
    return Message(
        "assistant", "", metadata=call.function.name, arguments=arguments if isinstance(arguments, dict) else written
    )


def tool_calls(calls: Sequence[Message], at_most_one: bool = False) -> list[dict[str, Any]]:
    """Calls of an answer in OpenAI's form; arguments that cannot be read are passed on as the model wrote them."""
    return [
        {
            "id": f"call_{secrets.token_hex(12)}",
            "type": "function",
            "function": {"name": call.metadata, "arguments": _arguments(call.content)},
        }
        for call in calls[: 1 if at_most_one else None]
    ]


def _arguments(written: str) -> str:
    arguments = call_arguments(written)
    try:
        return written if arguments is None else json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        # A literal of Python that JSON does not have.
        return written
