"""The head for answers that are a span of a context."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from chatglm_ptuning.data.encoding import EncodedExample
from chatglm_ptuning.data.tasks.examples import Answer, QuestionExample
from chatglm_ptuning.data.tasks.heads.head import Inference, Prediction
from chatglm_ptuning.data.tasks.heads.windows import Window, WindowHead
from chatglm_ptuning.data.tasks.task import Task, placeholders
from chatglm_ptuning.model.modeling_heads import ChatGLMForQuestionAnswering

NO_ANSWER = 0
"""The position that means "no answer in this window": the first token."""


class QuestionAnswering(WindowHead):
    """A linear head with two outputs on every token: the answer starts there, the answer ends there."""

    name = "question_answering"
    solves = (QuestionExample,)
    model_class = ChatGLMForQuestionAnswering
    smooths_labels = False

    @staticmethod
    def check(task: Task) -> None:
        """Refuses a prompt in which the question only comes after the context.

        A prompt with one question for all texts contains no `{question}`.
        """
        names = placeholders(task.prompt)
        last = len(names) - 1 - names[::-1].index("context") if "context" in names else len(names)
        if "question" in names and "question" not in names[:last]:
            raise ValueError(
                f"{task.origin}: for the head question_answering the prompt must have {{question}} before {{context}}: "
                "the base model reads from left to right, and would find the same span for every question. Swap them, "
                "or use the head generation."
            )

    def windows(self, example: QuestionExample) -> list[Window]:
        """The windows of a context; they overlap by `doc_stride` tokens, and their spans are characters.

        Raises:
            ValueError: if question and prompt leave no room for the context.
        """
        vocabulary = self.tokenizer.vocabulary
        spans = [(first, end) if end > first else None for first, end in vocabulary.offsets(example.context)]
        return self.windows_in("context", example, vocabulary.encode(example.context), spans, are_disjoint=False)

    def encode(self, example: QuestionExample) -> EncodedExample:
        """A row for each window with `start_positions` and `end_positions`.

        A question without a reference in its context has no rows: "no answer" would be the wrong label.
        """
        answers = example.answers or ()
        if _learned_answer(answers) is None:
            return EncodedExample(counted=["without_targets"])
        return EncodedExample.of_sources(
            {"input_ids": window.input_ids} | positions_of(window, answers) for window in self.windows(example)
        )

    def predict(self, examples: Sequence[QuestionExample], model: Inference) -> list[Prediction]:
        """The span with the likeliest first and last token over all windows; never "no answer"."""
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


def positions_of(window: Window, answers: Sequence[Answer]) -> dict[str, int]:
    """`start_positions` and `end_positions`: the smallest span of ids that contains the answer to learn.

    That is the first reference that is in the context. Both are `NO_ANSWER` if the window does not contain all of it.
    """
    nowhere = {"start_positions": NO_ANSWER, "end_positions": NO_ANSWER}
    answer = _learned_answer(answers)
    if answer is None or answer.start is None:
        return nowhere
    last_character = answer.start + len(answer.text) - 1
    spans = [(position, *span) for position, span in enumerate(window.spans) if span is not None]
    first = [found for found in spans if found[1] <= answer.start < found[2]]
    last = [found for found in spans if found[1] <= last_character < found[2]]
    if not first or not last:
        return nowhere
    # Several ids can contain a character, as its bytes. Those that begin latest and end first contain least beside
    # it. Of equal ones the answer has all, from the first byte to the last.
    start = max(first, key=lambda found: found[1])[0]
    end = min(reversed(last), key=lambda found: found[2])[0]
    return {"start_positions": start, "end_positions": max(start, end)}


def _learned_answer(answers: Sequence[Answer]) -> Answer | None:
    return next((answer for answer in answers if answer.start is not None and answer.text), None)


def _best_span(
    start_logits: torch.Tensor, end_logits: torch.Tensor, window: Window, max_length: int
) -> tuple[float, int, int] | None:
    """Log-probability, first and last + 1 character of a window's likeliest span; None without any context."""
    inside = [position for position, span in enumerate(window.spans) if span is not None]
    starts = start_logits.log_softmax(-1).cpu()[inside]
    ends = end_logits.log_softmax(-1).cpu()[inside]
    places = torch.tensor([span for span in window.spans if span is not None]).reshape(-1, 2)
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
