"""What a model predicts for the examples of a task, by whichever head it has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from chatglm_ptuning.data.collate import PaddingCollator
from chatglm_ptuning.data.tasks.encode import ANSWERING_HEADS, TaskEncoder
from chatglm_ptuning.data.tasks.encode_spans import SpanWindow, encode_question
from chatglm_ptuning.data.tasks.encode_tags import TagWindow, encode_tokens, tags_of
from chatglm_ptuning.data.tasks.examples import AnyExample, ChoiceExample, QuestionExample, TextExample, TokenExample
from chatglm_ptuning.data.tasks.prompt import candidate_answers
from chatglm_ptuning.evaluation.candidates import (
    calibrated,
    candidate_probabilities,
    encode_candidates,
    length_normalised,
    score_candidates,
)
from chatglm_ptuning.evaluation.generate import generate_answers
from chatglm_ptuning.evaluation.parallel import do_together, is_first_process
from chatglm_ptuning.model.zero3 import most_of_processes
from chatglm_ptuning.prefix.batch import PrefixArgument, PrefixBatch

if TYPE_CHECKING:
    from chatglm_ptuning.model.modeling_chatglm import ChatGLMPreTrainedModel


@dataclass(frozen=True)
class Prediction:
    """What a model predicts for one example.

    Attributes:
        value: a label, or the list of all labels of a multi-label task, an index of a candidate, tags, or a text.
        confidence: its probability, of tags the least of them; None for written texts.
    """

    value: Any
    confidence: float | None = None


@dataclass(frozen=True)
class PredictionSettings:
    """How predictions are made.

    Attributes:
        candidate_scores: `sum`, `mean` or `calibrated`, see `TaskArguments`.
        max_answer_length: characters of an extracted answer at most.
    """

    batch_size: int = 8
    max_new_tokens: int = 128
    num_beams: int = 1
    candidate_scores: str = "sum"
    max_answer_length: int = 50


def predict_together(
    model: ChatGLMPreTrainedModel,
    encoder: TaskEncoder,
    examples: Sequence[AnyExample],
    settings: PredictionSettings,
    prefix: PrefixArgument = None,
    *,
    under_engine: bool = False,
) -> list[Prediction]:
    """As `predict`, with the examples shared among the processes, if there are several; all get all predictions."""
    return do_together(examples, lambda share: predict(model, encoder, share, settings, prefix), model, under_engine)


def predict(
    model: ChatGLMPreTrainedModel,
    encoder: TaskEncoder,
    examples: Sequence[AnyExample],
    settings: PredictionSettings,
    prefix: PrefixArgument = None,
) -> list[Prediction]:
    """Predictions in the order of the examples.

    - generation and multiple_choice: the candidate answer (verbalisers, or the example's own) of the highest score
      (`score_candidates`); where there are no candidates, a text written by beam or greedy search;
    - sequence_classification: the label of the highest logit; of a multi-label task all whose sigmoid is above 0.5,
      which are taken to be independent for the confidence;
    - token_classification: the tag of the highest logit for every token of the file;
    - question_answering: the span of the context, over all windows, whose first and last token are likeliest in their
      window, the window's own position for "no answer" left out.

    Args:
        model: of the class that `HEAD_CLASSES` has for the encoder's head.
        prefix: as for a forward pass, one for all examples; by default the selected one.

    Raises:
        ValueError: if a prompt is too long for `max_source_length`, or the prefix is untrained.
    """
    with torch.no_grad():
        prefix = model.resolve_prefix(prefix)
    model.check_prefix_is_trained(prefix)
    if encoder.head == "sequence_classification":
        return _classify(model, encoder, examples, settings, prefix)
    if encoder.head == "token_classification":
        return _tag(model, encoder, examples, settings, prefix)
    if encoder.head == "question_answering":
        return _extract(model, encoder, examples, settings, prefix)
    if chooses_candidates(encoder.head, examples):
        return _choose(model, encoder, examples, settings, prefix)
    return _write(model, encoder, examples, settings, prefix)


def chooses_candidates(head: str, examples: Sequence[AnyExample]) -> bool:
    """Whether `predict` answers such examples by the score of candidates, not by a linear head or a written text."""
    return head in ANSWERING_HEADS and bool(examples) and isinstance(examples[0], (TextExample, ChoiceExample))


def _write(
    model: ChatGLMPreTrainedModel,
    encoder: TaskEncoder,
    examples: Sequence[AnyExample],
    settings: PredictionSettings,
    prefix: PrefixBatch,
) -> list[Prediction]:
    answers = generate_answers(
        model,
        encoder.tokenizer,
        [{"input_ids": encoder.prompt_ids(example)} for example in examples],
        batch_size=settings.batch_size,
        max_new_tokens=settings.max_new_tokens,
        num_beams=settings.num_beams,
        prefix=prefix,
        progress=is_first_process(),
    )
    return [Prediction(answer) for answer in answers]


def _choose(
    model: ChatGLMPreTrainedModel,
    encoder: TaskEncoder,
    examples: Sequence[AnyExample],
    settings: PredictionSettings,
    prefix: PrefixBatch,
) -> list[Prediction]:
    own_candidates = isinstance(examples[0], ChoiceExample)
    answers = [candidate_answers(encoder.task, example) for example in (examples if own_candidates else examples[:1])]
    encoded = [encode_candidates(encoder.tokenizer, row) for row in answers]
    neutral = None
    if settings.candidate_scores == "calibrated":
        neutral = _neutral_scores(model, encoder, examples, encoded, settings, prefix)
    predictions = []
    prompts = [encoder.prompt_ids(example) for example in examples]
    with _progress(len(examples), "scoring candidates") as bar:
        block = settings.batch_size * 8
        for start in range(0, len(prompts), block):
            part = slice(start, start + block)
            candidates = encoded[part] if own_candidates else encoded[0]
            scores = score_candidates(model, prompts[part], candidates, batch_size=settings.batch_size, prefix=prefix)
            for place, row in enumerate(scores, start=start):
                if settings.candidate_scores == "mean":
                    row = length_normalised(row, encoded[place if own_candidates else 0])
                elif neutral is not None:
                    row = calibrated(row, neutral[place if own_candidates else 0])
                best = int(row.argmax())
                value = best if own_candidates else list(encoder.task.labels)[best]
                predictions.append(Prediction(value, float(candidate_probabilities(row)[best])))
            bar.update(len(scores))
    return predictions


def _neutral_scores(
    model: ChatGLMPreTrainedModel,
    encoder: TaskEncoder,
    examples: Sequence[AnyExample],
    encoded: Sequence[Sequence[Sequence[int]]],
    settings: PredictionSettings,
    prefix: PrefixBatch,
) -> list[torch.Tensor]:
    """Scores of every list of candidates behind the prompt of an empty text."""
    empty = [_without_content(example) for example in examples[: len(encoded)]]
    prompts = [encoder.prompt_ids(example) for example in empty]
    return score_candidates(model, prompts, list(encoded), batch_size=settings.batch_size, prefix=prefix)


def _without_content(example: AnyExample) -> AnyExample:
    if isinstance(example, ChoiceExample):
        return ChoiceExample(
            id=example.id, where=example.where, candidates=example.candidates, subject=example.subject,
            category=example.category,
        )  # fmt: skip
    assert isinstance(example, TextExample)
    return TextExample(
        id=example.id, where=example.where, text="", text_pair=None if example.text_pair is None else "",
        fields=dict.fromkeys(example.fields, ""),
    )  # fmt: skip


def _classify(
    model: ChatGLMPreTrainedModel,
    encoder: TaskEncoder,
    examples: Sequence[AnyExample],
    settings: PredictionSettings,
    prefix: PrefixBatch,
) -> list[Prediction]:
    names = list(encoder.task.labels)
    rows = [encoder.prompt_ids(example) for example in examples]
    predictions: list[Prediction] = [Prediction(None)] * len(rows)
    for places, output in _forward(model, encoder, rows, settings, prefix, "classifying"):
        for place, logits in zip(places, output.logits.cpu(), strict=True):
            if encoder.task.multi_label:
                row = logits.sigmoid()
                chosen = [name for name, value in zip(names, row.tolist(), strict=True) if value > 0.5]
                predictions[place] = Prediction(chosen, float(row.maximum(1 - row).prod()))
            else:
                row = logits.softmax(-1)
                best = int(row.argmax())
                predictions[place] = Prediction(names[best], float(row[best]))
    return predictions


def _tag(
    model: ChatGLMPreTrainedModel,
    encoder: TaskEncoder,
    examples: Sequence[TokenExample],
    settings: PredictionSettings,
    prefix: PrefixBatch,
) -> list[Prediction]:
    windows: list[TagWindow] = []
    of_example: list[range] = []
    for example in examples:
        own = encode_tokens(encoder, example)
        of_example.append(range(len(windows), len(windows) + len(own)))
        windows += own
    tags = encoder.task.tags
    chosen: list[list[str]] = [[]] * len(windows)
    sure: list[list[float]] = [[]] * len(windows)
    rows = [window.input_ids for window in windows]
    for places, output in _forward(model, encoder, rows, settings, prefix, "tagging"):
        probabilities, best = output.logits.softmax(-1).max(-1)
        for place, row, values in zip(places, best.tolist(), probabilities.tolist(), strict=True):
            chosen[place] = [tags[index] for index in row[: len(windows[place].input_ids)]]
            sure[place] = values
    predictions = []
    for example, places in zip(examples, of_example, strict=True):
        own = [windows[place] for place in places]
        decided = [
            value
            for place in places
            for span, value in zip(windows[place].spans, sure[place], strict=False)
            if span is not None
        ]
        value = tags_of(own, [chosen[place] for place in places], len(example.tokens))
        predictions.append(Prediction(value, min(decided, default=1.0)))
    return predictions


def _extract(
    model: ChatGLMPreTrainedModel,
    encoder: TaskEncoder,
    examples: Sequence[QuestionExample],
    settings: PredictionSettings,
    prefix: PrefixBatch,
) -> list[Prediction]:
    windows: list[SpanWindow] = []
    of_window: list[int] = []
    for number, example in enumerate(examples):
        own = encode_question(encoder, example)
        windows += own
        of_window += [number] * len(own)
    best: list[tuple[float, str]] = [(float("-inf"), "")] * len(examples)
    rows = [window.input_ids for window in windows]
    for places, output in _forward(model, encoder, rows, settings, prefix, "extracting"):
        for row, place in enumerate(places):
            window, number = windows[place], of_window[place]
            length = len(window.input_ids)
            found = _best_span(
                output.start_logits[row, :length], output.end_logits[row, :length], window, settings.max_answer_length
            )
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


def _forward(
    model: ChatGLMPreTrainedModel,
    encoder: TaskEncoder,
    rows: Sequence[Sequence[int]],
    settings: PredictionSettings,
    prefix: PrefixBatch,
    what: str,
) -> Iterator[tuple[list[int], Mapping[str, torch.Tensor] | Any]]:
    """Outputs of a model with a linear head in batches, the longest rows first, with the places of their rows."""
    collate = PaddingCollator(encoder.tokenizer.pad_token_id, "right")
    order = sorted(range(len(rows)), key=lambda place: len(rows[place]), reverse=True)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad(), _progress(len(rows), what) as bar:
            size = settings.batch_size
            batches = [order[start : start + size] for start in range(0, len(order), size)]
            for turn in range(most_of_processes(model, len(batches))):
                places = batches[min(turn, len(batches) - 1)]
                batch = collate([{"input_ids": rows[place]} for place in places])
                inputs = {name: value.to(model.device) for name, value in batch.items()}
                output = model(**inputs, use_cache=False, prefix=prefix)
                if turn < len(batches):  # after that only other processes have something to compute
                    yield places, output
                    bar.update(len(places))
    finally:
        for module in training:
            module.training = True


@contextmanager
def _progress(total: int, what: str) -> Iterator[tqdm]:
    with tqdm(total=total, desc=what, delay=3, disable=not is_first_process()) as bar:
        yield bar
