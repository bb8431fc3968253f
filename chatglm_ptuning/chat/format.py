"""What a chat format is: from a conversation to token ids with a mask of what is learned, and from ids back to it.

The formats are one file each beside this one, registered in `formats.py`. Token ids carry the structure: roles and ends
are written and read as ids, never as text that spells them.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import ClassVar, NamedTuple, Protocol

from chatglm_ptuning.chat.message import Conversation, Message

_NEVER = re.compile(r"(?!)")
_TEMPLATE_CHECK = """
{%- for message in messages if message['content'] is not string -%}
    {{- raise_exception('a message of the role "' ~ message['role'] ~ '" has no text under "content"') -}}
{%- endfor -%}
"""
_PLACEHOLDERS = {"[[训练时间]]": "2023年"}
"""Placeholders that the official bases learnt to write, with what the official code shows instead."""


class Vocabulary(Protocol):
    """What a chat format needs to know of a vocabulary.

    Attributes:
        special_ids: special tokens to ids.
        start_tokens: the special tokens with which every sequence starts.
        end_id: the id that ends a text.
    """

    special_ids: Mapping[str, int]
    start_tokens: Sequence[str]
    end_id: int

    def encode(self, text: str) -> list[int]:
        """Ids of the text, none of them special."""

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Text of the ids; bytes that are no UTF-8 (yet) are U+FFFD."""


class Encoded(NamedTuple):
    """A conversation as ids.

    Attributes:
        input_ids: `[seq_len]`.
        loss_mask: `[seq_len]`; True where the id is learned, that is predicted from those before it. It goes by
            position, so an id that serves as padding elsewhere is learned like any other.
        answer_start: index of the first id of the last answer; the ids before it are the prompt to generate it from.
            The length if the conversation does not end with an answer.
    """

    input_ids: list[int]
    loss_mask: list[bool]
    answer_start: int


class Parsed(NamedTuple):
    """What generated ids mean.

    Attributes:
        messages: at least one, all of the role `assistant`. A tool call has the tool's name as `metadata` and the call
            as `content`, as the model wrote it (`tools.call_arguments` reads it).
        unfinished: whether more ids may change the last characters: half a UTF-8 character, half a placeholder, or
            what may turn out to be a tool's name.
    """

    messages: list[Message]
    unfinished: bool


class ChatFormat(ABC):
    """How a family of bases writes a chat.

    Every sequence begins with the start tokens of the vocabulary, `[gMASK]` and `sop`.

    Class attributes:
        name: as tokenizer_config.json and prefix checkpoints record it.
        special_tokens: those that a vocabulary must have for it, beside its start tokens.
        has_roles: whether messages have roles, tools and metadata. `chat` keeps its history as messages then, else as
            (query, response) pairs.
        base_names: matches names of bases that were taught this format.
        template_sign: a text by which a base's own jinja template shows that it is of this format.
        template: the format for other programs, in jinja, without the start tokens. It must give the same ids. It may
            write `segment_cut`, where that is defined, between two parts of the text that are encoded apart. All
            contents are texts.
    """

    name: ClassVar[str]
    special_tokens: ClassVar[Sequence[str]] = ()
    has_roles: ClassVar[bool] = False
    base_names: ClassVar[re.Pattern[str]] = _NEVER
    template_sign: ClassVar[str | None] = None
    template: ClassVar[str]

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.start_ids = [vocabulary.special_ids[token] for token in vocabulary.start_tokens]
        self.stop_ids = [vocabulary.end_id]
        """The ids that end an answer."""

    @classmethod
    def fits(cls, vocabulary: Vocabulary) -> bool:
        """Whether a vocabulary has the special tokens of this format."""
        return all(token in vocabulary.special_ids for token in cls.special_tokens)

    @property
    def chat_template(self) -> str:
        """The whole jinja template."""
        start = "{{- '" + "".join(self.vocabulary.start_tokens) + "' -}}"
        return start + _TEMPLATE_CHECK + self.template.strip()

    def encode(self, conversation: Conversation) -> Encoded:
        """Ids and loss mask of a conversation.

        Raises:
            ValueError: for what the format cannot write: see the format.
        """
        answer = conversation.answer
        ids, mask = self._encode_asked(conversation.asked, opens_answer=answer is not None)
        start = len(ids)
        if answer is not None:
            ids += self.encode_answer(answer, conversation.followed_by)
            mask += [answer.loss] * (len(ids) - start)
        return Encoded(ids, mask, start)

    def encode_prompt(self, conversation: Conversation) -> list[int]:
        """Ids of a conversation, up to where the next answer begins.

        Raises:
            ValueError: as `encode`.
        """
        return self._encode_asked(conversation, opens_answer=True)[0]

    @abstractmethod
    def _encode_asked(self, asked: Conversation, opens_answer: bool) -> tuple[list[int], list[bool]]:
        """Ids and loss mask of what precedes the last answer.

        Args:
            opens_answer: whether an answer follows; what opens it, such as a role token, is then included.
        """

    @abstractmethod
    def encode_answer(self, answer: Message, followed_by: str | None = None) -> list[int]:
        """Ids of an answer as they follow a prompt; the last one ends it.

        Args:
            followed_by: role of the next message; None at the end of the conversation.

        Raises:
            ValueError: as `encode`.
        """

    def answer_header(self, metadata: str = "") -> list[int]:
        """The ids of an answer that precede its text: the line of its metadata, in formats that have one."""
        return []

    @abstractmethod
    def training_parts(self, conversation: Conversation) -> list[Conversation]:
        """Conversations that together hold every answer to be learned once, each ending with one."""

    @abstractmethod
    def parse(self, ids: Sequence[int], tool_names: Sequence[str] = ()) -> Parsed:
        """The messages in generated ids, which may be the beginning of an answer; it ends before the first stop id.

        Args:
            tool_names: names of the tools that the model may call.
        """

    def text_of(self, answer: Message) -> str:
        """What a model writes to give this answer: of a tool call the tool's name and, on the next line, the call."""
        return answer.content

    def answer_text(self, ids: Sequence[int]) -> str:
        """The text of generated ids up to the first stop id, as `text_of` gives it, without white space around it."""
        return self._decode(self._until_stop(ids)).strip()

    def _until_stop(self, ids: Sequence[int]) -> list[int]:
        return list(takewhile(lambda index: index not in self.stop_ids, ids))

    def _decode(self, ids: Sequence[int]) -> str:
        return self.vocabulary.decode(ids, skip_special_tokens=True)


class TextFormat(ChatFormat):
    """A format whose prompt is one text, encoded as a whole; the answer is encoded apart, and ended by the end token.

    Earlier answers have no end token, so that only the last answer can be learned. There are no tools.
    """

    no_tools: ClassVar[str]
    """What is said to someone who has tools."""

    @abstractmethod
    def prompt_text(self, messages: Sequence[Message]) -> str:
        """The text up to where an answer begins; the start tokens and a source prefix go in front of it."""

    def _encode_asked(self, asked: Conversation, opens_answer: bool) -> tuple[list[int], list[bool]]:
        if any(message.loss for message in asked.messages):
            raise ValueError(
                "In this chat format only the last answer of a conversation can be learned; use training_parts to make "
                "one conversation of each."
            )
        self._check_no_tools(asked.messages, asked.tools)
        text = asked.source_prefix + self.prompt_text(asked.messages)
        ids = [*self.start_ids, *self.vocabulary.encode(text)]
        return ids, [False] * len(ids)

    def encode_answer(self, answer: Message, followed_by: str | None = None) -> list[int]:
        """See `ChatFormat`."""
        self._check_no_tools([answer])
        return [*self.vocabulary.encode(answer.content), self.vocabulary.end_id]

    def training_parts(self, conversation: Conversation) -> list[Conversation]:
        """One for each answer to be learned, with all that precedes it as history, as the model meets it in a chat."""
        return [
            replace(conversation, messages=[*(old.not_learned() for old in conversation.messages[:index]), message])
            for index, message in enumerate(conversation.messages)
            if message.loss
        ]

    def parse(self, ids: Sequence[int], tool_names: Sequence[str] = ()) -> Parsed:
        """One message with the whole text."""
        text = self._decode(self._until_stop(ids))
        return Parsed([Message("assistant", self._shown(text))], ends_amid_something(text))

    def _shown(self, text: str) -> str:
        return fill_placeholders(text).strip()

    def _check_no_tools(self, messages: Sequence[Message], tools: Sequence[object] = ()) -> None:
        if tools or any(message.role == "observation" or message.metadata or message.tools for message in messages):
            raise ValueError(self.no_tools)


def fill_placeholders(text: str) -> str:
    """The text as the official code shows it."""
    for placeholder, shown in _PLACEHOLDERS.items():
        text = text.replace(placeholder, shown)
    return text


def ends_amid_something(text: str) -> bool:
    """Whether a text ends within a UTF-8 character or a placeholder."""
    return text.endswith("\ufffd") or any(
        text.endswith(word[:length]) for word in _PLACEHOLDERS for length in range(1, len(word))
    )
