"""One turn of a chat in the form of the official `chat`: from query and history to ids, from ids to an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from chatglm_ptuning.chat.format import ChatFormat
from chatglm_ptuning.chat.message import ROLES, Conversation, Message
from chatglm_ptuning.chat.tools import call_arguments, tool_names

History = list[dict[str, Any]] | list[tuple[str, str]]
"""Messages with `role`, `content`, perhaps `metadata` and `tools` in the formats with roles, else (query, response)."""
GivenHistory = Sequence[Mapping[str, Any] | Sequence[str]]


class Answer(NamedTuple):
    """What the tokens generated so far mean.

    Attributes:
        response: the text; for a tool call a dictionary with `name` and `parameters`, or `name` and `content` if the
            history lists no tools or the call cannot be read.
        history: the history with the query and this answer; a new list.
        unfinished: whether more tokens may change the last characters, see `Parsed`.
    """

    response: str | dict[str, Any]
    history: History
    unfinished: bool


class ChatTurn:
    """A query with its history.

    Args:
        history: of the turns before; never changed. The formats with roles also take (query, response) pairs.
        role: who says the query; "observation" for a tool's result (formats with roles only).

    Raises:
        ValueError: if the history has another form, or the role is unknown; the message names the entry.
    """

    def __init__(
        self, chat_format: ChatFormat, query: str, history: GivenHistory | None = None, role: str = "user"
    ) -> None:
        self.chat_format = chat_format
        self.query = query
        self.role = role
        roles = ROLES if chat_format.has_roles else ("user",)
        if role not in roles:
            raise ValueError(f"role must be one of {', '.join(roles)} in {chat_format.name}, got {role!r}.")
        history = history or []
        self.history = message_history(history) if chat_format.has_roles else pair_history(history, chat_format.name)

    def input_ids(self) -> list[int]:
        """The conversation up to where the answer starts."""
        messages = [Message.from_dict(entry) for entry in message_history(self.history)]
        return self.chat_format.encode_prompt(Conversation([*messages, Message(self.role, self.query)]))

    def read(self, generated_ids: Sequence[int]) -> Answer:
        """The answer in these ids, which may be the beginning of one; it ends before the first stop id."""
        if not self.chat_format.has_roles:
            (message,), unfinished = self.chat_format.parse(generated_ids)
            return Answer(message.content, [*self.history, (self.query, message.content)], unfinished)
        tools = self._tools()
        messages, unfinished = self.chat_format.parse(generated_ids, tool_names(tools or ()))
        last = messages[-1]
        response: str | dict[str, Any] = last.content
        if last.metadata:
            arguments = None if tools is None else call_arguments(last.content)
            meant = {"content": last.content} if arguments is None else {"parameters": arguments}
            response = {"name": last.metadata, **meant}
        said = [{"role": m.role, "metadata": m.metadata, "content": m.content} for m in messages]
        return Answer(response, [*self.history, {"role": self.role, "content": self.query}, *said], unfinished)

    def _tools(self) -> Sequence[Any] | None:
        """The tools that the system message offers; None if it offers none."""
        first = self.history[0] if self.history else {}
        return first.get("tools") if first.get("role") == "system" else None


def pair_history(history: GivenHistory, chat_format: str) -> list[tuple[str, str]]:
    """A history of (query, response) pairs, checked.

    Raises:
        ValueError: naming the entry that is something else.
    """
    for place, entry in enumerate(history):
        if not _is_pair(entry):
            raise ValueError(
                f"history[{place}] must be a (query, response) pair in the {chat_format} format: {entry!r}."
            )
    return [tuple(entry) for entry in history]


def message_history(history: GivenHistory) -> list[dict[str, Any]]:
    """A history as messages: entries with `role` and `content`; of a (query, response) pair two.

    Raises:
        ValueError: naming the entry that is something else.
    """
    messages: list[dict[str, Any]] = []
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


def _is_pair(entry: Any) -> bool:
    return isinstance(entry, (list, tuple)) and len(entry) == 2 and all(isinstance(side, str) for side in entry)
