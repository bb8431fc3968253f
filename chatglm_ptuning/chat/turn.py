"""One turn of the official `chat`: query and history to ids, and generated ids to an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from chatglm_ptuning.chat.format import ChatFormat
from chatglm_ptuning.chat.message import ROLES, Conversation, Message
from chatglm_ptuning.chat.tools import call_arguments, tool_names

History = list[dict[str, Any]] | list[tuple[str, str]]
"""Messages (`role`, `content`, optionally `metadata`, `tools`) in formats with roles, else (query, response) pairs."""
GivenHistory = Sequence[Mapping[str, Any] | Sequence[str]]


class Answer(NamedTuple):
    """The answer in the tokens generated so far.

    Attributes:
        response: the text; for a tool call a dictionary with `name` and `parameters`, or `name` and `content` if the
            history has no tools or the call cannot be parsed.
        history: the history with the query and this answer; a new list.
        unfinished: whether more tokens may change the last characters, see `Parsed`.
    """

    response: str | dict[str, Any]
    history: History
    unfinished: bool


class ChatTurn:
    """A query with its history.

    Args:
        history: the previous turns; not changed. The formats with roles also take (query, response) pairs.
        role: role of the query; "observation" for a tool's result (formats with roles only).

    Raises:
        ValueError: if the query is not a text, the history has another format, or the role is unknown; the message
            names the entry.
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
        if not isinstance(query, str):
            raise ValueError(f"The query must be a text, got {query!r}.")
        history = history or []
        self.history = message_history(history) if chat_format.has_roles else pair_history(history, chat_format.name)

    def input_ids(self) -> list[int]:
        """Ids of the conversation up to where the answer starts."""
        messages = [Message.from_dict(entry) for entry in message_history(self.history)]
        return self.chat_format.encode_prompt(Conversation([*messages, Message(self.role, self.query)]))

    def read(self, generated_ids: Sequence[int]) -> Answer:
        """The answer in these ids, which may be incomplete; it ends before the first stop id."""
        # The official code takes a tool's name for one even if the history has no tools.
        messages, unfinished = self.chat_format.parse(generated_ids, self.tool_names or None)
        last = messages[-1]
        response: str | dict[str, Any] = last.content
        if last.metadata:
            arguments = None if self._tools is None else call_arguments(last.content)
            meant = {"content": last.content} if arguments is None else {"parameters": arguments}
            response = {"name": last.metadata, **meant}
        return Answer(response, self.history_with(messages), unfinished)

    @property
    def tool_names(self) -> list[str]:
        """Names of the tools that the model may call."""
        return tool_names(self._tools or ())

    @property
    def _tools(self) -> Sequence[Any] | None:
        first = self.history[0] if self.history and self.chat_format.has_roles else {}
        return first.get("tools") if first.get("role") == "system" else None

    def history_with(self, messages: Sequence[Message]) -> History:
        """The history with the query and the messages of an answer, at least one; a new list."""
        if not self.chat_format.has_roles:
            return [*self.history, (self.query, messages[-1].content)]
        said = [{"role": m.role, "metadata": m.metadata, "content": m.content} for m in messages]
        return [*self.history, {"role": self.role, "content": self.query}, *said]


def pair_history(history: GivenHistory, chat_format: str) -> list[tuple[str, str]]:
    """Checks a history of (query, response) pairs.

    Raises:
        ValueError: naming an entry that is not a pair.
    """
    for place, entry in enumerate(history):
        if not _is_pair(entry):
            raise ValueError(
                f"history[{place}] must be a (query, response) pair in the {chat_format} format: {entry!r}."
            )
    return [tuple(entry) for entry in history]


def message_history(history: GivenHistory) -> list[dict[str, Any]]:
    """A history as messages; a (query, response) pair gives two messages.

    Raises:
        ValueError: naming an entry that is neither a message with `role` and `content` nor a pair.
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
