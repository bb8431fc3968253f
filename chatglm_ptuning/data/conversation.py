"""What a row means, whichever form it was written in: a conversation of messages, or a plain text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

ROLES = ("system", "user", "assistant", "observation")


@dataclass(frozen=True)
class Message:
    """One message of a conversation.

    Attributes:
        role: one of `ROLES`.
        metadata: what stands on the line of the role in ChatGLM3's and GLM-4's formats: the tool's name in a call.
        loss: whether the message is to be learned; only answers (role `assistant`) ever are.
        tools: definitions of tools that a system message holds behind its text, as they were given.
        arguments: of a tool call, by name, or as text that is no JSON object; the chat format writes them.
    """

    role: str
    content: str
    metadata: str = ""
    loss: bool = False
    tools: tuple[Any, ...] = ()
    arguments: Mapping[str, Any] | str | None = None

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"unknown role {self.role!r}; the roles are {', '.join(ROLES)}")
        if self.loss and self.role != "assistant":
            raise ValueError(f"a message of the role {self.role!r} cannot be learned, only answers can")

    @property
    def is_blank(self) -> bool:
        """Whether there is nothing but white space in it."""
        return not (self.content.strip() or self.metadata.strip() or self.tools or self.arguments is not None)

    def not_learned(self) -> Message:
        """The same message, as part of what was said before."""
        return replace(self, loss=False) if self.loss else self


@dataclass(frozen=True)
class Conversation:
    """Messages in their order.

    Attributes:
        source_prefix: text in front of the whole conversation (the official `--source_prefix`); the chat format
            decides where it stands.
        tools: definitions of tools that stand beside the messages; the chat format decides where they are shown.
        followed_by: role of the message that stood behind the last one, where messages were left out at the end.
    """

    messages: list[Message]
    source_prefix: str = ""
    tools: tuple[Any, ...] = ()
    followed_by: str | None = None

    def until_last_learned(self) -> Conversation:
        """The conversation without what follows the last answer to be learned; without messages if there is none."""
        end = max((index + 1 for index, message in enumerate(self.messages) if message.loss), default=0)
        if end == len(self.messages):
            return self
        return replace(self, messages=self.messages[:end], followed_by=self.messages[end].role)

    def not_learned(self) -> Conversation:
        """The same conversation with nothing to be learned in it."""
        return replace(self, messages=[message.not_learned() for message in self.messages])

    def missing_side(self) -> str | None:
        """`empty` if there is neither question nor answer, `one_sided` if there is only one of them, else None.

        What counts is the last answer to be learned (else the last one with any text), and what was said since the
        last user message in front of it.
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
    """A plain text, all of which is to be learned (language modelling)."""

    text: str

    def missing_side(self) -> str | None:
        """`empty` if there is nothing but white space in it, else None."""
        return None if self.text.strip() else "empty"
