"""Contexts to search for an answer, in windows with the question in each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from chatglm_ptuning.data.encoding import EncodedExample
from chatglm_ptuning.data.tasks.examples import Answer, QuestionExample
from chatglm_ptuning.data.tasks.heads.head import Inference, Prediction
from chatglm_ptuning.data.tasks.heads.windows import WindowHead, window_starts
from chatglm_ptuning.data.tasks.task import Task, placeholders
from chatglm_ptuning.model.modeling_heads import ChatGLMForQuestionAnswering

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


class QuestionAnswering(WindowHead):
    """A linear head with two outputs on every token: whether the answer begins there, and whether it ends there."""

    name = "question_answering"
    solves = (QuestionExample,)
    model_class = ChatGLMForQuestionAnswering

    @staticmethod
    def check(task: Task) -> None:
        """Refuses to search a context for a question which comes only behind it.

        A prompt with one question for all texts names none.
        """
        names = placeholders(task.prompt)
        last = len(names) - 1 - names[::-1].index("context") if "context" in names else len(names)
        if "question" in names and "question" not in names[:last]:
            raise ValueError(
                f"{task.origin}: for the head question_answering the prompt must have {{question}} before {{context}}: "
                "the base reads from left to right, and would find the same span for every question. Turn them round, "
                "or take the head generation."
            )

    def windows(self, example: QuestionExample) -> list[SpanWindow]:
        """The windows of a context; they overlap by `doc_stride` tokens.

        Raises:
            ValueError: if question and prompt leave no room for the context.
        """
        frame = self.frame_around("context", example)
        vocabulary = self.tokenizer.vocabulary
        ids, offsets = vocabulary.encode(example.context), vocabulary.offsets(example.context)
        windows = []
        for start in window_starts(len(ids), frame.room, self.doc_stride):
            inside = slice(start, start + frame.room)
            own = [(first, end) if end > first else None for first, end in offsets[inside]]
            windows.append(SpanWindow(*frame.fill(ids[inside], own)))
        return windows

    def encode(self, example: QuestionExample) -> EncodedExample:
        """A row for each window with `start_positions` and `end_positions`.

        A question of which no reference stands in the context has no rows: that it has no answer would be wrong to
        learn.
        """
        answers = example.answers or ()
        if learned_answer(answers) is None:
            return EncodedExample(counted=["without_targets"])
        return EncodedExample.of_sources(
            {"input_ids": window.input_ids} | window.positions(answers) for window in self.windows(example)
        )

    def predict(self, examples: Sequence[QuestionExample], model: Inference) -> list[Prediction]:
        """The span whose first and last token are likeliest in their window, over all windows.

        The window's own position for "no answer" is left out.
        """
        pairs = [(number, window) for number, example in enumerate(examples) for window in self.windows(example)]
        best: list[tuple[float, str]] = [(float("-inf"), "")] * len(examples)
        for places, output in model.outputs([window.input_ids for _, window in pairs], "extracting"):
            for row, place in enumerate(places):
                number, window = pairs[place]
                inside = slice(len(window.input_ids))
                logits = output.start_logits[row, inside], output.end_logits[row, inside]
                found = _best_span(*logits, window, self.max_answer_length)
                if found is not None and found[0] > best[number][0]:
                    best[number] = (found[0], examples[number].context[found[1] : found[2]])
        return [Prediction(text, float(torch.tensor(score).exp())) for score, text in best]


def _best_span(
    start_logits: torch.Tensor, end_logits: torch.Tensor, window: SpanWindow, max_length: int
) -> tuple[float, int, int] | None:
    """Log-probability, first and last + 1 character of a window's likeliest span; None if it holds no context."""
    inside = [position for position, offsets in enumerate(window.offsets) if offsets is not None]
    starts = start_logits.log_softmax(-1).cpu()[inside]
    ends = end_logits.log_softmax(-1).cpu()[inside]
    places = torch.tensor([offsets for offsets in window.offsets if offsets is not None]).reshape(-1, 2)
    best = None
    for further in range(len(inside)):  # how many ids the end is behind the start
        count = len(inside) - further
        fits = places[further:, 1] - places[:count, 0] <= max_length
        if not fits.any():
            break  # spans of more ids are longer still
        scores = (starts[:count] + ends[further:]).masked_fill(~fits, float("-inf"))
        start = int(scores.argmax())
        if best is None or float(scores[start]) > best[0]:
            best = (float(scores[start]), int(places[start, 0]), int(places[start + further, 1]))
    return best
