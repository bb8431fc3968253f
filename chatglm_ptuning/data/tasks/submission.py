"""Predictions in the form in which a benchmark takes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging

from chatglm_ptuning.data.tasks.examples import AnyExample, ChoiceExample, TokenExample, has_gold
from chatglm_ptuning.data.tasks.readers import reader_of
from chatglm_ptuning.data.tasks.task import Task
from chatglm_ptuning.files import write_text

logger = logging.get_logger(__name__)

PredictedValue = Any
"""A label, an index of a candidate, a list of tags, or a text, as the task has it."""


def can_submit(task: Task, examples: Sequence[AnyExample]) -> bool:
    """Whether predictions on these examples make a submission: the benchmark takes one, and every id stands once.

    Ask before predicting. Of a split with gold that repeats an id, a warning says that there will be none.

    Raises:
        ValueError: naming both places, if an id stands twice in a split without gold.
    """
    repeated = None if task.submission is None else _repeated_id(examples)
    if repeated is None:
        return task.submission is not None
    if not has_gold(examples):
        raise ValueError(
            f"{repeated}, and a submission has one answer for each. Mend the file, or predict without a submission "
            f"by --max_predict_samples {len(examples)}."
        )
    logger.warning(f"{repeated}: no submission is written.")
    return False


def _repeated_id(examples: Sequence[AnyExample]) -> str | None:
    """What to say of the first id that stands twice; those of an examination are counted in every subject."""
    places: dict[tuple[str | None, str], str] = {}
    for example in examples:
        key = (example.subject if isinstance(example, ChoiceExample) else None, str(example.id))
        if key in places:
            return f"{example.where}: the id {example.id!r} stands twice, first at {places[key]}"
        places[key] = example.where
    return None


def write_submission(
    task: Task,
    examples: Sequence[AnyExample],
    predictions: Sequence[PredictedValue],
    folder: str | Path,
    split: str = "test",
    variant: str | None = None,
) -> Path:
    """Writes the benchmark's submission file for the predictions on a split, in one of its reader's formats.

    Args:
        examples: of the whole split, in the order of its files.
        predictions: one for each: a key of the labels (of a multi-label task a list of them), an index of a candidate,
            tags, or a text.
        variant: goes into the name of the file, for benchmarks that take a file for each training split: FewCLUE calls
            the predictions of a model trained on train_0 `bustm_predict_0.json` (see `submission_variant`).

    Returns:
        The path of the file.

    Raises:
        ValueError: if the benchmark takes no submissions, the numbers differ, an id stands twice, or a prediction is
            no label, index, list of tags or text of the task.
    """
    form = task.submission
    if form is None:
        raise ValueError(f"{task.name} has no submission file: there is no benchmark that takes one.")
    if len(predictions) != len(examples):
        raise ValueError(f"There are {len(predictions)} predictions for {len(examples)} examples.")
    repeated = _repeated_id(examples)
    if repeated is not None:
        raise ValueError(f"{repeated}.")
    for example, prediction in zip(examples, predictions, strict=True):
        _check(task, example, prediction)
    name = form.file_of(split)
    if variant is not None:
        name = f"{Path(name).stem}_{variant}{Path(name).suffix}"
    write = reader_of(task).submissions[form.format]
    path = Path(folder) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, write(examples, predictions))
    return path


def _check(task: Task, example: AnyExample, prediction: PredictedValue) -> None:
    where = f"the prediction for {example.id!r} ({example.where})"
    if isinstance(example, ChoiceExample):
        if isinstance(prediction, bool) or not isinstance(prediction, int):
            raise ValueError(f"{where} must be the index of a candidate, found {prediction!r}.")
        if not 0 <= prediction < len(example.candidates):
            raise ValueError(f"{where} is {prediction}, and there are {len(example.candidates)} candidates.")
    elif isinstance(example, TokenExample):
        if len(prediction) != len(example.tokens):
            raise ValueError(f"{where} has {len(prediction)} tags for {len(example.tokens)} tokens.")
        unknown = [tag for tag in prediction if tag not in task.tags]
        if unknown:
            raise ValueError(f"{where} has the unknown tag {unknown[0]!r}; known are {', '.join(task.tags)}.")
    elif task.multi_label:
        if not isinstance(prediction, list) or any(key not in task.labels for key in prediction):
            raise ValueError(f"{where} must be a list of labels of {task.name}, found {prediction!r}.")
    elif task.labels and prediction not in task.labels:
        raise ValueError(f"{where} is {prediction!r}, which is no label of {task.name}.")
    elif not isinstance(prediction, str):
        raise ValueError(f"{where} must be text, found {prediction!r}.")
