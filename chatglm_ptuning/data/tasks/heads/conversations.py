"""The head for instruction files: conversations and plain texts as token ids, truncated to the length limits."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from chatglm_ptuning.chat.message import Conversation, Document, Message
from chatglm_ptuning.data.encoding import EncodedExample
from chatglm_ptuning.data.formats.registry import FORMATS
from chatglm_ptuning.data.tasks.examples import ConversationExample
from chatglm_ptuning.data.tasks.heads.generation import Generation
from chatglm_ptuning.data.truncation import truncate_source
from chatglm_ptuning.model.losses import IGNORED_LABEL

if TYPE_CHECKING:
    from chatglm_ptuning.chat.format import ChatFormat


class ConversationAnswers(Generation):
    """The language model writes the answers of conversations; of plain texts every token is learned.

    For rows with prompt and response columns the limits are those of the official flags: `max_source_length` counts
    all ids before the answer, including `[gMASK] sop`, and `max_target_length` those of the answer, without the end
    token. For rows with a list of messages, and for plain texts, their sum is the limit for all ids. `truncate_source`
    truncates sources; answers are truncated at their end and then have no end token. Plain texts are split into
    pieces, of which only the last has an end token.

    Raises:
        ValueError: if `max_source_length` is too small for the chat format itself.
    """

    solves = (ConversationExample,)

    def __post_init__(self) -> None:
        super().__post_init__()
        shortest = len(self.chat.encode_prompt(self._prefixed(Conversation([Message("user", "？")]))))
        if shortest > self.max_source_length:
            raise ValueError(
                f"max_source_length={self.max_source_length} is too small: in the {self.tokenizer.chat_format} format "
                f"a question of one character takes {shortest} tokens"
                f"{' with the source prefix' if self.task.source_prefix else ''}; increase it."
            )

    @property
    def chat(self) -> ChatFormat:
        """The chat format of the tokenizer."""
        return self.tokenizer.chat

    def _prefixed(self, conversation: Conversation) -> Conversation:
        return replace(conversation, source_prefix=self.task.source_prefix)

    def encode(self, example: ConversationExample) -> EncodedExample:
        """A row for each answer, or piece of a text; `labels` `[seq_len]` are -100 for ids that are not learned.

        Raises:
            ValueError: naming file and line, if the chat format cannot encode the conversation.
        """
        if isinstance(example.content, Document):
            return self._pieces(example.content)
        encoded = EncodedExample()
        conversation = self._prefixed(example.content).until_last_learned()
        for part in self.chat.training_parts(conversation):
            try:
                self._add_row(part, FORMATS[example.dataset_format].has_messages, encoded)
            except ValueError as error:
                raise ValueError(f"{example.where}: {error}") from error
        if not encoded.rows:
            encoded.counted.append("too_long")
        return encoded

    def _pieces(self, document: Document) -> EncodedExample:
        vocabulary, start = self.chat.vocabulary, self.chat.start_ids
        ids = [*vocabulary.encode(self.task.source_prefix + document.text), vocabulary.end_id]
        room = self.max_source_length + self.max_target_length - len(start)
        encoded = EncodedExample()
        for begin in range(0, len(ids), room):
            piece = ids[begin : begin + room]
            encoded.rows.append({"input_ids": start + piece, "labels": [IGNORED_LABEL] * len(start) + piece})
            encoded.lengths.append((len(start), len(piece)))
        return encoded

    def _add_row(self, conversation: Conversation, shares_limits: bool, encoded: EncodedExample) -> None:
        """Adds the row of a conversation that ends with an answer to learn, if it can be truncated to the limits.

        Args:
            shares_limits: whether source and answer can each use the tokens that the other does not need.
        """
        rendered = self.chat.encode(conversation)
        source, target = rendered.answer_start, len(rendered.input_ids) - rendered.answer_start - 1
        source_room, target_room = self.max_source_length, self.max_target_length
        limit = source_room + target_room
        if shares_limits:
            source_room = limit - min(target, target_room)
        counted = []
        if source > source_room:
            truncated = truncate_source(conversation, source_room, self.chat)
            if truncated is None:
                return
            shortened, counted = truncated
            rendered = self.chat.encode(shortened)
        if shares_limits:
            target_room = limit - rendered.answer_start
        ids, mask = rendered.input_ids, rendered.loss_mask
        if target > target_room:
            if target_room <= len(self.chat.answer_header(conversation.messages[-1].metadata)):
                return
            counted.append("target_cut")
            ids = ids[: rendered.answer_start + target_room]
        labels = [index if learned else IGNORED_LABEL for index, learned in zip(ids, mask, strict=False)]
        encoded.counted += counted
        encoded.rows.append({"input_ids": ids, "labels": labels})
        encoded.lengths.append((source, target))

    def ready(self, example: ConversationExample) -> EncodedExample:
        """The prompt of the last answer to be learned (`prompt_ids`), and the text of that answer (`reference`).

        The prompt is truncated to `max_source_length`, the reference is not truncated.

        Raises:
            ValueError: as `encode`; also for plain texts, which contain no question.
        """
        left_out = example.left_out_as
        if left_out is not None:
            return EncodedExample(counted=[left_out])
        if isinstance(example.content, Document):
            raise ValueError(
                f"{example.where}: a plain text has no question to answer; name two columns, or evaluate its loss."
            )
        plain = self._prefixed(example.content).until_last_learned().not_learned()
        try:
            whole = self.chat.encode(plain)
        except ValueError as error:
            raise ValueError(f"{example.where}: {error}") from error
        encoded = EncodedExample(lengths=[(whole.answer_start, len(whole.input_ids) - whole.answer_start - 1)])
        prompt = whole.input_ids[: whole.answer_start]
        if len(prompt) > self.max_source_length:
            truncated = truncate_source(plain, self.max_source_length, self.chat)
            if truncated is None:
                return EncodedExample(counted=["too_long"])
            shortened, encoded.counted = truncated
            prompt = self.chat.encode_prompt(shortened.asked)
        encoded.rows.append({"prompt_ids": prompt, "reference": self.chat.text_of(plain.messages[-1])})
        return encoded

    def prompt_ids(self, example: ConversationExample) -> list[int]:
        """As `PromptHead.prompt_ids`, for an example that went through `ready`."""
        return list(example.prompt_ids)
