"""The interface of chat formats: a conversation to token ids with a loss mask, and generated ids to messages.

Every format has a file beside this one and is registered in `formats.py`. Roles and ends are encoded and decoded as
ids, never as text that spells them.
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
"""Placeholders that the official bases write, with the text that the official code shows instead."""


class Vocabulary(Protocol):
    """The part of a vocabulary that chat formats use.

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
        loss_mask: `[seq_len]`; True where the id is supervised. It depends on the position only, so the id of the
            padding token may be supervised, too.
        answer_start: index of the first id of the last answer; the ids before it are its prompt. `seq_len` if the
            conversation does not end with an answer.
    """

    input_ids: list[int]
    loss_mask: list[bool]
    answer_start: int


class Parsed(NamedTuple):
    """The messages in generated ids.

    Attributes:
        messages: at least one, all of the role `assistant`. A tool call has the tool's name as `metadata` and the call
            as `content`, as the model wrote it (`tools.call_arguments` parses it).
        unfinished: whether more ids may change the last characters: an incomplete UTF-8 character or placeholder, or
            text that may become a tool's name.
    """

    messages: list[Message]
    unfinished: bool


class ChatFormat(ABC):
    """The chat format of a family of bases.

    Every sequence begins with the start tokens of the vocabulary, `[gMASK]` and `sop`.

    Class attributes:
        name: the name in tokenizer_config.json and prefix checkpoints.
        special_tokens: special tokens that a vocabulary must have for this format.
        has_roles: whether messages have roles, tools and metadata. The history of `chat` then consists of messages,
            else of (query, response) pairs.
        base_names: matches names of bases that were trained on this format.
        template_sign: a text that occurs only in jinja templates of this format.
        template: the format for other programs, in jinja, without the start tokens. It must give the same ids. If
            `segment_cut` is defined, the template writes it between parts of the text that are encoded separately. All
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
        self.next_message_id: int | None = None
        """The id between two messages of one answer, in formats whose answers may have several."""

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
            ValueError: for a conversation that the format does not support.
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
        """Ids and loss mask of the messages before the last answer.

        Args:
            opens_answer: whether an answer follows; its role token is then included.
        """

    @abstractmethod
    def encode_answer(self, answer: Message, followed_by: str | None = None) -> list[int]:
        """Ids of an answer after its prompt; the last id ends the answer.

        Args:
            followed_by: role of the next message; None at the end of the conversation.

        Raises:
            ValueError: as `encode`.
        """

    def answer_header(self, metadata: str = "") -> list[int]:
        """The ids of an answer in front of its text: the line of its metadata, in formats that have one."""
        return []

    @abstractmethod
    def training_parts(self, conversation: Conversation) -> list[Conversation]:
        """Conversations that together supervise every supervised answer once, each ending with such an answer."""

    def parse(self, ids: Sequence[int], tool_names: Sequence[str] | None = None) -> Parsed:
        """The messages in generated ids, which may be incomplete; they end before the first stop id.

        Args:
            tool_names: names of the tools that the model may call. Any first line that looks like a tool's name is one,
                too, as in the official code, unless there are no tools (empty). None if it is not known.
        """
        return self.parse_texts(self._texts(ids), tool_names)

    @abstractmethod
    def parse_texts(self, texts: Sequence[str], tool_names: Sequence[str] | None = None) -> Parsed:
        """As `parse`, of the decoded texts between `next_message_id`; at least one."""

    def text_of(self, answer: Message) -> str:
        """The text that a model writes for this answer; for a tool call its name and, on the next line, the call."""
        return answer.content

    def answer_text(self, ids: Sequence[int]) -> str:
        """The text of generated ids up to the first stop id, as in `text_of`, stripped of white space."""
        return self._decode(self._until_stop(ids)).strip()

    def _until_stop(self, ids: Sequence[int]) -> list[int]:
        return list(takewhile(lambda index: index not in self.stop_ids, ids))

    def _texts(self, ids: Sequence[int]) -> list[str]:
        """The texts between `next_message_id`, up to the first stop id."""
        runs: list[list[int]] = [[]]
        for index in self._until_stop(ids):
            if index == self.next_message_id:
                runs.append([])
            else:
                runs[-1].append(index)
        return [self._decode(run) for run in runs]

    def _decode(self, ids: Sequence[int]) -> str:
        return self.vocabulary.decode(ids, skip_special_tokens=True)


class TextFormat(ChatFormat):
    """A format whose prompt is encoded as one text; the answer is encoded separately and ends with the end token.

    Earlier answers have no end token, so only the last answer can be supervised. There are no tools.
    """

    no_tools: ClassVar[str]
    """The error message about tools."""

    @abstractmethod
    def prompt_text(self, messages: Sequence[Message]) -> str:
        """The text up to where an answer begins, without start tokens and source prefix."""

    def _encode_asked(self, asked: Conversation, opens_answer: bool) -> tuple[list[int], list[bool]]:
        if any(message.loss for message in asked.messages):
            raise ValueError(
                f"In the chat format {self.name} only the last answer of a conversation can be supervised; "
                "training_parts makes one conversation of each answer."
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
        """One conversation for each supervised answer, with all messages before it as history."""
        return [
            replace(conversation, messages=[*(old.not_learned() for old in conversation.messages[:index]), message])
            for index, message in enumerate(conversation.messages)
            if message.loss
        ]

    def parse_texts(self, texts: Sequence[str], tool_names: Sequence[str] | None = None) -> Parsed:
        """One message with the whole text."""
        text = "".join(texts)
        return Parsed([Message("assistant", self._shown(text))], ends_amid_something(text))

    def _shown(self, text: str) -> str:
        return fill_placeholders(text).strip()

    def _check_no_tools(self, messages: Sequence[Message], tools: Sequence[object] = ()) -> None:
        if tools or any(message.role == "observation" or message.metadata or message.tools for message in messages):
            raise ValueError(self.no_tools)


def fill_placeholders(text: str) -> str:
    """Replaces placeholders as the official code does."""
    for placeholder, shown in _PLACEHOLDERS.items():
        text = text.replace(placeholder, shown)
    return text


def ends_amid_something(text: str) -> bool:
    """Whether a text ends with an incomplete UTF-8 character or placeholder."""
    return text.endswith("\ufffd") or any(
        text.endswith(word[:length]) for word in _PLACEHOLDERS for length in range(1, len(word))
    )
