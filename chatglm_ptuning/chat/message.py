"""What is said, before any chat format writes it: messages, conversations of messages, and plain texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

ROLES = ("system", "user", "assistant", "observation")


@dataclass(frozen=True)
class Message:
    """One message of a conversation.

    Attributes:
        role: one of `ROLES`; `observation` is the result of a tool.
        metadata: the rest of the role's line in the formats with roles: the tool's name in a tool call.
        loss: whether the message is learned; only answers (role `assistant`) ever are.
        tools: definitions of tools that a system message brings, as they were given; None if it brings none.
        arguments: of a tool call, by name, or as text that is not a JSON object; the chat format writes them.

    Raises:
        ValueError: for another role, or if a message that is no answer has `loss`.
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
        """The message in the form of the official chats: `role`, `content`, perhaps `metadata` and `tools`.

        Raises:
            ValueError: if the role is unknown, or there is no text under `content`.
        """
        content = entry.get("content")
        if not isinstance(content, str):
            raise ValueError(f"A message needs text under 'content', got {content!r}.")
        return cls(entry.get("role", ""), content, entry.get("metadata") or "", tools=entry.get("tools"))

    @property
    def is_blank(self) -> bool:
        """Whether it holds nothing but white space."""
        return not (self.content.strip() or self.metadata.strip() or self.tools or self.arguments is not None)

    def not_learned(self) -> Message:
        """The same message, which is not learned."""
        return replace(self, loss=False) if self.loss else self


@dataclass(frozen=True)
class Conversation:
    """Messages in their order.

    Attributes:
        source_prefix: text in front of the conversation (the official `--source_prefix`); the chat format decides
            where it stands.
        tools: definitions of tools that are given beside the messages; the chat format decides where they stand.
        followed_by: role of the message that followed the last one, where messages at the end were left out.
    """

    messages: list[Message]
    source_prefix: str = ""
    tools: tuple[Any, ...] = ()
    followed_by: str | None = None

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
        """Whether any of it is learned."""
        return any(message.loss for message in self.messages)

    def until_last_learned(self) -> Conversation:
        """The conversation up to the last answer that is learned; without messages if none is learned."""
        end = max((index + 1 for index, message in enumerate(self.messages) if message.loss), default=0)
        if end == len(self.messages):
            return self
        return replace(self, messages=self.messages[:end], followed_by=self.messages[end].role)

    def not_learned(self) -> Conversation:
        """The same conversation, of which nothing is learned."""
        return replace(self, messages=[message.not_learned() for message in self.messages])

    def missing_side(self) -> str | None:
        """`empty` if there is neither question nor answer, `one_sided` if there is only one of them, else None.

        The answer is the last one that is learned (else the last one with any text), the question all since the last
        user message before it.
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
    """A plain text, all of which is learned (language modelling)."""

    text: str
    is_learned: ClassVar[bool] = True

    def missing_side(self) -> str | None:
        """`empty` if it holds nothing but white space, else None."""
        return None if self.text.strip() else "empty"


def turn_starts(roles: Sequence[str]) -> list[int]:
    """Where the turns of a conversation begin, by the roles of its messages.

    A turn is a user message with all that follows it up to the next one. System messages at the beginning belong to no
    turn.
    """
    first = next((index for index, role in enumerate(roles) if role != "system"), len(roles))
    return [index for index, role in enumerate(roles) if index == first or (index > first and role == "user")]
