"""From a task's examples to rows of token ids for the head that solves it; one function pair for every head."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers.utils import logging

from chatglm_ptuning.chat.message import Conversation, Message
from chatglm_ptuning.data.tasks.encode_spans import encode_question, learned_answer
from chatglm_ptuning.data.tasks.encode_tags import DEFAULT_TOKEN_UNIT, encode_tokens
from chatglm_ptuning.data.tasks.examples import (
    AnyExample,
    QuestionExample,
    TextExample,
    TokenExample,
    gold_of,
    has_gold,
)
from chatglm_ptuning.data.tasks.prompt import answer_text, longest_text, render_prompt, with_texts_of
from chatglm_ptuning.data.tasks.readers import READERS, heads_of
from chatglm_ptuning.data.tasks.task import Task, placeholders
from chatglm_ptuning.model.losses import IGNORED_LABEL

if TYPE_CHECKING:
    from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer

logger = logging.get_logger(__name__)

HEADS = tuple(dict.fromkeys(head for reader in READERS.values() for head in reader.heads))
"""Every way to solve a task."""
ECHO_HEADS = ("token_classification", "question_answering")
"""Heads that may read their text twice (`TaskEncoder.echo`)."""
ANSWERING_HEADS = ("generation", "multiple_choice")
"""Heads that are the language model itself: what is learned is the text of the answer."""


@dataclass(frozen=True)
class TaskEncoder:
    """Makes model inputs of the examples of one task for one head.

    Texts to classify and questions to answer are prompts in the chat format of the tokenizer; a sequence
    classification ends where the answer's text would begin, so that its last state is the one that would say it.
    Texts to tag and contexts to search stand in the task's prompt without the chat's roles, with `echo` twice.

    Attributes:
        head: one of the task's heads.
        max_source_length: tokens of a prompt at most. For longer ones the longest texts of the example lose their
            middle, what the task asks stays whole; texts to tag and contexts to search are read in windows that
            overlap by `doc_stride` tokens.
        max_target_length: tokens of an answer to learn at most.
        token_unit: what a tag stands on: `characters` splits the tokenizer's pieces where a character of the file
            ends, `pieces` leaves them whole.
        echo: whether a text to tag or a context to search is read twice. Tags and spans are read off the second copy,
            whose tokens have seen the whole text though attention is causal (Springer et al. 2024, "Repetition
            improves language model embeddings"). Both copies of a window fit into `max_source_length`.
    """

    task: Task
    tokenizer: ChatGLMTokenizer
    head: str
    max_source_length: int = 1024
    max_target_length: int = 128
    doc_stride: int = 64
    token_unit: str = DEFAULT_TOKEN_UNIT
    echo: bool = False

    def training_rows(self, examples: Sequence[AnyExample]) -> list[dict[str, Any]]:
        """Rows with `input_ids` and what is to be learned, for `PaddingCollator`:

        - generation, multiple_choice: `labels` `[seq_len]`, -100 on the prompt;
        - sequence_classification: `labels`, the number of the label, or for several at once 0.0 and 1.0 for each;
        - token_classification: `labels` `[seq_len]`, the number of the tag on one token of each character, else -100;
        - question_answering: `start_positions` and `end_positions`; 0 in a window without the answer. A question of
          which no reference stands in the context has no rows: that it has no answer would be wrong to learn.

        Examples that are left out (`Example.left_out`) have no rows.

        Raises:
            ValueError: naming the place in the file, for an example without gold, or too long a prompt; if there are
                examples and none has rows.
        """
        rows, left_out = [], []
        for example in examples:
            if example.left_out and has_gold(examples):
                continue
            if gold_of(example) is None:
                raise ValueError(f"{example.where}: the example has no label or answer to learn.")
            own = self._training_rows_of(example)
            rows += own
            left_out += [] if own else [example.where]
        if left_out:
            what = f"{len(left_out)} questions are left out: no reference stands in the context (first: {left_out[0]})."
            if not rows:
                raise ValueError(f"There is nothing to learn: {what}")
            logger.warning(what)
        return rows

    def _training_rows_of(self, example: AnyExample) -> list[dict[str, Any]]:
        if isinstance(example, TokenExample) and self.head == "token_classification":
            return [
                {"input_ids": window.input_ids, "labels": window.labels(example, self.task.tags)}
                for window in encode_tokens(self, example)
            ]
        if isinstance(example, QuestionExample) and self.head == "question_answering":
            if learned_answer(example.answers or ()) is None:
                return []
            return [
                {"input_ids": window.input_ids} | window.positions(example.answers or ())
                for window in encode_question(self, example)
            ]
        if isinstance(example, TextExample) and self.head == "sequence_classification":
            return [{"input_ids": self.prompt_ids(example), "labels": self._label_number(example)}]
        prompt = self.prompt_ids(example)
        answer = self.tokenizer.chat.encode_answer(Message("assistant", answer_text(self.task, example) or ""))
        if len(answer) > self.max_target_length + 1:
            answer = answer[: self.max_target_length]
        return [{"input_ids": prompt + answer, "labels": [IGNORED_LABEL] * len(prompt) + answer}]

    def _label_number(self, example: TextExample) -> int | list[float]:
        if self.task.multi_label:
            return [float(key in (example.labels or ())) for key in self.task.labels]
        return list(self.task.labels).index(example.label or "")

    def prompt_ids(self, example: AnyExample) -> list[int]:
        """The prompt of an example in the chat format, to its end or, for a linear head, to where the text begins.

        Raises:
            ValueError: if the prompt without any text is longer than `max_source_length`.
        """
        chat = self.tokenizer.chat
        header = chat.answer_header() if self.head == "sequence_classification" else []

        def ids_of(candidate: AnyExample) -> list[int]:
            asked = Conversation([Message("user", render_prompt(self.task, candidate))])
            return [*chat.encode_prompt(asked), *header]

        ids = ids_of(example)
        if len(ids) <= self.max_source_length:
            return ids
        longest = longest_text(example)
        # The fewest characters off the longest text, as `cut_source` does it for a conversation.
        taken = bisect_left(
            range(longest),
            True,
            key=lambda count: len(ids_of(with_texts_of(example, longest - count))) <= self.max_source_length,
        )
        ids = ids_of(with_texts_of(example, longest - taken))
        if len(ids) > self.max_source_length:
            raise ValueError(
                f"{example.where}: the prompt does not fit into --max_source_length {self.max_source_length}."
            )
        return ids


def head_of(task: Task, head: str | None) -> str:
    """The head to solve the task with: the one asked for, or the task's own.

    Raises:
        ValueError: if it cannot solve the task, naming those that can.
    """
    head = task.head if head is None else head
    if head not in heads_of(task):
        raise ValueError(f"--head {head} cannot solve {task.name}; {' or '.join(heads_of(task))} can.")
    return head


def check_order(task: Task, head: str) -> None:
    """Refuses to train a head that searches a context for a question which comes only behind it.

    Raises:
        ValueError: in that case; a prompt with one question for all texts names none.
    """
    names = placeholders(task.prompt)
    last = len(names) - 1 - names[::-1].index("context") if "context" in names else len(names)
    if head == "question_answering" and "question" in names and "question" not in names[:last]:
        raise ValueError(
            f"{task.origin}: for the head question_answering the prompt must have {{question}} before {{context}}: the "
            "base reads from left to right, and would find the same span for every question. Turn them round, or take "
            "the head generation."
        )


def label_names(task: Task, head: str) -> Sequence[str] | None:
    """The names of a linear head's outputs, in their order; None for heads without a fixed number of them."""
    if head == "sequence_classification":
        return list(task.labels)
    return list(task.tags) if head == "token_classification" else None
