"""Formats in which a role token precedes every message: the common part of ChatGLM3 and GLM-4."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from chatglm_ptuning.chat.format import ChatFormat, Parsed, Vocabulary, ends_amid_something, fill_placeholders
from chatglm_ptuning.chat.message import ROLES, Conversation, Message

ROLE_TOKENS = tuple(f"<|{role}|>" for role in ROLES)

# The roles that end an answer. `assistant` is one of them because the models write their thoughts and a tool call as
# two consecutive assistant messages, without a stop token between them.
_ENDS_AN_ANSWER = ("user", "observation", "assistant")
_TOOL_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.\-]*")


class RoleFormat(ChatFormat):
    """Every message is its role token, the encoded line of the metadata, and the encoded content.

    A source prefix precedes the first user message's text. In a supervised answer, all ids after `<|assistant|>` are
    supervised, and the id that ends it: the next role token, or the format's own one at the end.
    """

    has_roles = True
    space: ClassVar[str] = ""
    """The text that the vocabulary puts in front of a text that it encodes."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__(vocabulary)
        self.role_ids = {role: vocabulary.special_ids[f"<|{role}|>"] for role in ROLES}
        self.stop_ids += [self.role_ids["user"], self.role_ids["observation"]]
        self.next_message_id = self.role_ids["assistant"]

    @abstractmethod
    def show_tools(self, conversation: Conversation) -> Sequence[Message]:
        """The messages, with tools where the format writes them."""

    @abstractmethod
    def write_tools(self, message: Message) -> str:
        """The content of a system message with `tools`.

        Raises:
            ValueError: for tools that the format does not support.
        """

    @abstractmethod
    def write_call(self, arguments: Mapping[str, Any]) -> str:
        """The content of a tool call."""

    @abstractmethod
    def last_id(self, answer: Message) -> int:
        """The id that ends an answer at the end of a conversation."""

    def encode_message(self, message: Message, source_prefix: str = "") -> list[int]:
        """The ids of a message: `<|role|>`, metadata and newline, the content.

        Raises:
            ValueError: as `encode`.
        """
        content = self.vocabulary.encode(source_prefix + self._content(message))
        return [self.role_ids[message.role], *self.answer_header(message.metadata), *content]

    def _encode_asked(self, asked: Conversation, opens_answer: bool) -> tuple[list[int], list[bool]]:
        ids = list(self.start_ids)
        mask = [False] * len(ids)
        source_prefix = asked.source_prefix
        learned = False  # whether the previous message is supervised, and so the token that ends it
        for message in self.show_tools(asked):
            prefix, source_prefix = (source_prefix, "") if message.role == "user" else ("", source_prefix)
            ids += self.encode_message(message, prefix)
            mask.append(learned and message.role in _ENDS_AN_ANSWER)
            learned = message.loss
            mask += [learned] * (len(ids) - len(mask))
        if opens_answer:
            ids.append(self.role_ids["assistant"])
            mask.append(learned)
        return ids, mask

    def encode_answer(self, answer: Message, followed_by: str | None = None) -> list[int]:
        """See `ChatFormat`."""
        end = self.role_ids[followed_by] if followed_by in _ENDS_AN_ANSWER else self.last_id(answer)
        return [*self.answer_header(answer.metadata), *self.vocabulary.encode(self._content(answer)), end]

    def answer_header(self, metadata: str = "") -> list[int]:
        """The line after the role token, which is encoded separately from the content."""
        return self.vocabulary.encode(f"{metadata}\n")

    def training_parts(self, conversation: Conversation) -> list[Conversation]:
        """The conversation up to its last supervised answer."""
        whole = conversation.until_last_learned()
        return [whole] if whole.messages else []

    def parse_texts(self, texts: Sequence[str], tool_names: Sequence[str] | None = None) -> Parsed:
        """One message for each text between `<|assistant|>` tokens."""
        messages, text = [], ""
        for text in texts:
            metadata, content = _split_metadata(fill_placeholders(text), tool_names)
            content = content.removeprefix(self.space) if metadata else content.strip()
            messages.append(Message("assistant", content, metadata))
        return Parsed(messages, ends_amid_something(text) or _may_be_metadata(text, tool_names))

    def text_of(self, answer: Message) -> str:
        """See `ChatFormat`."""
        content = self._content(answer)
        return f"{answer.metadata}\n{content}" if answer.metadata else content

    def answer_text(self, ids: Sequence[int]) -> str:
        """See `ChatFormat`; the first line may be metadata or not."""
        parts = (text.partition("\n") for text in self._texts(ids))
        texts = (line + newline + content.removeprefix(self.space) for line, newline, content in parts)
        return "\n".join(text.strip() for text in texts).strip()

    def _content(self, message: Message) -> str:
        if message.role == "system" and message.tools is not None:
            return self.write_tools(message)
        if isinstance(message.arguments, Mapping):
            return self.write_call(message.arguments)
        return message.content if message.arguments is None else message.arguments


def _split_metadata(text: str, tool_names: Sequence[str] | None) -> tuple[str, str]:
    """The metadata line and what follows it.

    A first line that cannot be a tool's name belongs to the answer: a prefix may have learnt to omit the metadata line.
    """
    first, newline, rest = text.partition("\n")
    name = first.strip()
    if newline and (not name or _is_tool_name(name, tool_names)):
        return name, rest
    return "", text


def _may_be_metadata(text: str, tool_names: Sequence[str] | None) -> bool:
    name = text.strip()
    return "\n" not in text and (
        not name or _is_tool_name(name, tool_names) or any(tool.startswith(name) for tool in tool_names or ())
    )


def _is_tool_name(name: str, tool_names: Sequence[str] | None) -> bool:
    if tool_names is None:
        return _TOOL_NAME.fullmatch(name) is not None
    # A model may call a tool that it was not offered, but none if it was offered none.
    return bool(tool_names) and (name in tool_names or _TOOL_NAME.fullmatch(name) is not None)
