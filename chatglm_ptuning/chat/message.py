"""Messages, conversations and plain texts, independent of chat formats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from chatglm_ptuning.exact_json import dumps

ROLES = ("system", "user", "assistant", "observation")


@dataclass(frozen=True)
class Message:
    """One message of a conversation.

    Attributes:
        role: one of `ROLES`; `observation` is the result of a tool.
        metadata: the rest of the role's line in the formats with roles: the tool's name in a tool call.
        loss: whether the message is supervised; only answers (role `assistant`) can be.
        tools: definitions of tools in a system message, as they were given; None if it has none.
        arguments: arguments of a tool call, by name, or as text that is not a JSON object.

    Raises:
        ValueError: for another role, or for `loss` in a message that is not an answer.
    """

    role: str
    content: str
    metadata: str = ""
    loss: bool = False
    tools: Sequence[Any] | None = None
    arguments: Mapping[str, Any] | str | None = None

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"There is no role {self.role!r}; the roles are {', '.join(ROLES)}.")
        if self.loss and self.role != "assistant":
            raise ValueError(f"A message of the role {self.role!r} cannot be learned, only answers can.")

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> Message:
        """A message in the official notation: `role`, `content`, and optionally `metadata` and `tools`.

        Raises:
            ValueError: if the role is unknown, or there is no text under `content`.
        """
        content = entry.get("content")
        if not isinstance(content, str):
            raise ValueError(f"A message needs text under 'content', got {content!r}.")
        return cls(entry.get("role", ""), content, entry.get("metadata") or "", tools=entry.get("tools"))

    @property
    def is_blank(self) -> bool:
        """Whether it has only white space."""
        return not (self.content.strip() or self.metadata.strip() or self.tools or self.arguments is not None)

    def not_learned(self) -> Message:
        """The same message, not supervised."""
        return replace(self, loss=False) if self.loss else self


@dataclass(frozen=True)
class Conversation:
    """Messages in their order.

    Attributes:
        source_prefix: text in front of the conversation (the official setting `source_prefix`); the chat format decides
            where it is written.
        tools: definitions of tools beside the messages; the chat format decides where they are written.
        followed_by: role of the message after the last one, if messages at the end were dropped.
    """

    messages: list[Message]
    source_prefix: str = ""
    tools: tuple[Any, ...] = ()
    followed_by: str | None = None

    def texts(self) -> list[str]:
        """Everything that is said: tools, contents and arguments."""
        found = [dumps(self.tools)] if self.tools else []
        for message in self.messages:
            structured = [part for part in (message.tools, message.arguments) if part is not None]
            found += [message.metadata, message.content]
            found += [part if isinstance(part, str) else dumps(part) for part in structured]
        return found

    @property
    def answer(self) -> Message | None:
        """The last message if it is an answer, else None."""
        return self.messages[-1] if self.messages and self.messages[-1].role == "assistant" else None

    @property
    def asked(self) -> Conversation:
        """The conversation without its last message if that is an answer."""
        return replace(self, messages=self.messages[:-1]) if self.answer else self

    @property
    def is_learned(self) -> bool:
        """Whether any message is supervised."""
        return any(message.loss for message in self.messages)

    def until_last_learned(self) -> Conversation:
        """The conversation up to the last supervised answer; without messages if there is none."""
        end = max((index + 1 for index, message in enumerate(self.messages) if message.loss), default=0)
        if end == len(self.messages):
            return self
        return replace(self, messages=self.messages[:end], followed_by=self.messages[end].role)

    def not_learned(self) -> Conversation:
        """The same conversation, with no message supervised."""
        return replace(self, messages=[message.not_learned() for message in self.messages])

    def missing_side(self) -> str | None:
        """`empty` if there is neither question nor answer, `one_sided` if there is only one of them, else None.

        The answer is the last supervised one (else the last one with any text); the question is all messages from the
        last user message before it.
        """
        messages = self.messages
        answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
        learned = [index for index in answers if messages[index].loss]
        written = [index for index in answers if not messages[index].is_blank]
        last = (learned or written or [len(messages)])[-1]
        turn = max((index for index in range(last) if messages[index].role == "user"), default=0)
        answered = last < len(messages) and not messages[last].is_blank
        asked = any(message.role != "assistant" and not message.is_blank for message in messages[turn:last])
        if answered and asked:
            return None
        return "one_sided" if answered or asked else "empty"


@dataclass(frozen=True)
class Document:
    """A plain text, all of which is supervised (language modelling)."""

    text: str
    is_learned: ClassVar[bool] = True

    def texts(self) -> list[str]:
        """The text."""
        return [self.text]

    def missing_side(self) -> str | None:
        """`empty` if it has only white space, else None."""
        return None if self.text.strip() else "empty"


def turn_starts(roles: Sequence[str]) -> list[int]:
    """The indices at which the turns of a conversation begin, from the roles of its messages.

    A turn is a user message with all messages up to the next one. System messages at the beginning belong to no turn.
    """
    first = next((index for index, role in enumerate(roles) if role != "system"), len(roles))
    return [index for index, role in enumerate(roles) if index == first or (index > first and role == "user")]
