"""Contexts to search for an answer, in windows with the question in each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chatglm_ptuning.data.tasks.encode_windows import frame_of, window_starts
from chatglm_ptuning.data.tasks.examples import Answer, QuestionExample

if TYPE_CHECKING:
    from chatglm_ptuning.data.tasks.encode import TaskEncoder

NO_ANSWER = 0
"""The position that a window without the answer points to: the first token."""


@dataclass(frozen=True)
class SpanWindow:
    """A part of a context with the question around it.

    Attributes:
        input_ids: `[seq_len]`.
        offsets: `[seq_len]`; (first, last + 1) of the context's characters that the id stands for, None outside it.
    """

    input_ids: list[int]
    offsets: list[tuple[int, int] | None]

    def positions(self, answers: Sequence[Answer]) -> dict[str, int]:
        """`start_positions` and `end_positions` of `learned_answer`: the ids with the least text that holds it.

        `NO_ANSWER` for both if it is not wholly inside, or if the context does not have it.
        """
        answer = learned_answer(answers)
        if answer is None or answer.start is None:
            return {"start_positions": NO_ANSWER, "end_positions": NO_ANSWER}
        first, last = self._holding(answer.start), self._holding(answer.start + len(answer.text) - 1)
        if not first or not last:
            return {"start_positions": NO_ANSWER, "end_positions": NO_ANSWER}
        # A character may stand in several ids, by its bytes: those that begin latest and end first hold least beside
        # it. Of equals the answer has all, from the first byte to the last.
        start = max(first, key=lambda position: self._span(position)[0])
        end = min(reversed(last), key=lambda position: self._span(position)[1])
        return {"start_positions": start, "end_positions": max(start, end)}

    def _holding(self, character: int) -> list[int]:
        return [
            position
            for position, offsets in enumerate(self.offsets)
            if offsets is not None and offsets[0] <= character < offsets[1]
        ]

    def _span(self, position: int) -> tuple[int, int]:
        offsets = self.offsets[position]
        assert offsets is not None
        return offsets


def learned_answer(answers: Sequence[Answer]) -> Answer | None:
    """The reference that is learned: the first that stands in the context; None if none does."""
    return next((answer for answer in answers if answer.start is not None and answer.text), None)


def encode_question(encoder: TaskEncoder, example: QuestionExample) -> list[SpanWindow]:
    """The windows of a context; they overlap by `doc_stride` tokens.

    Raises:
        ValueError: if question and prompt leave no room for the context.
    """
    values = {"question": example.question, "context": example.context}
    frame = frame_of(encoder, "context", values, example.where)
    vocabulary = encoder.tokenizer.vocabulary
    ids, offsets = vocabulary.encode(example.context), vocabulary.offsets(example.context)
    windows = []
    for start in window_starts(len(ids), frame.room, encoder.doc_stride):
        inside = slice(start, start + frame.room)
        own = [(first, end) if end > first else None for first, end in offsets[inside]]
        windows.append(SpanWindow(*frame.fill(ids[inside], own)))
    return windows
