"""Submission files: predictions in the format that a benchmark requires."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from transformers.utils import logging

from chatglm_ptuning.data.tasks.examples import Example, has_gold
from chatglm_ptuning.data.tasks.heads.head import Prediction
from chatglm_ptuning.data.tasks.task import Task
from chatglm_ptuning.files import write_text

logger = logging.get_logger(__name__)

Format = Callable[[Sequence[Example], Sequence[Any]], str]


def can_submit(task: Task, examples: Sequence[Example]) -> bool:
    """Whether predictions on these examples make a submission: the benchmark has one, and every id is unique.

    Call it before predicting. For a split with gold that repeats an id, a warning says that no submission is written.

    Raises:
        ValueError: naming both places, if a split without gold repeats an id.
    """
    repeated = None if task.submission is None else _repeated_id(examples)
    if repeated is None:
        return task.submission is not None
    if not has_gold(examples):
        raise ValueError(
            f"{repeated}, but a submission has one answer for each id. Correct the file, or predict without a "
            f"submission by limiting the number of examples (max_predict_samples {len(examples)})."
        )
    logger.warning(f"{repeated}: no submission is written.")
    return False


def write_submission(
    task: Task,
    examples: Sequence[Example],
    predictions: Sequence[Prediction],
    folder: str | Path,
    split: str = "test",
    variant: str | None = None,
) -> Path:
    """Writes the benchmark's submission file for the predictions on a split.

    Args:
        examples: of the whole split, in the order of its files.
        predictions: one for each example.
        variant: becomes a part of the file name, for benchmarks that require a file for each training split: FewCLUE
            names the predictions of a model trained on train_0 `bustm_predict_0.json` (see `submission_variant`).

    Returns:
        The path of the file.

    Raises:
        ValueError: if the task has no submission file, the numbers differ, an id is repeated, or a prediction is not
            a label, index, list of tags or text of the task.
    """
    submission = task.submission
    if submission is None:
        raise ValueError(f"The task {task.name} has no submission file.")
    if len(predictions) != len(examples):
        raise ValueError(f"There are {len(predictions)} predictions for {len(examples)} examples.")
    repeated = _repeated_id(examples)
    if repeated is not None:
        raise ValueError(f"{repeated}.")
    for example, prediction in zip(examples, predictions, strict=True):
        fault = example.fault_of(task, prediction.value)
        if fault is not None:
            raise ValueError(f"the prediction for {example.id!r} ({example.where}) {fault}")
    name = submission.file_of(split)
    if variant is not None:
        name = f"{Path(name).stem}_{variant}{Path(name).suffix}"
    path = Path(folder) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    values = [example.submitted(found.value) for example, found in zip(examples, predictions, strict=True)]
    write_text(path, FORMATS[submission.format](examples, values))
    return path


def _repeated_id(examples: Sequence[Example]) -> str | None:
    """A message about the first repeated id; an examination counts its ids in every subject."""
    places: dict[tuple[str | None, str], str] = {}
    for example in examples:
        key = (example.subject, str(example.id))
        if key in places:
            return f"{example.where}: duplicate id {example.id!r}, first at {places[key]}"
        places[key] = example.where
    return None


def _lines(key: str) -> Format:
    """`{"id": ID, KEY: PREDICTION}` on each line."""

    def write(examples: Sequence[Example], predictions: Sequence[Any]) -> str:
        rows = ({"id": example.id, key: value} for example, value in zip(examples, predictions, strict=True))
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    return write


def _map(examples: Sequence[Example], predictions: Sequence[Any]) -> str:
    """One object, `{"ID": PREDICTION}`."""
    answers = {str(example.id): prediction for example, prediction in zip(examples, predictions, strict=True)}
    return json.dumps(answers, ensure_ascii=False, indent=2) + "\n"


def _exam_map(examples: Sequence[Example], predictions: Sequence[int]) -> str:
    """One object, `{"SUBJECT": {"ID": "A"}}`."""
    subjects: dict[str, dict[str, str]] = {}
    for example, prediction in zip(examples, predictions, strict=True):
        subjects.setdefault(example.subject or "", {})[str(example.id)] = ascii_uppercase[prediction]
    return json.dumps(subjects, ensure_ascii=False, indent=2) + "\n"


FORMATS: Mapping[str, Format] = {
    "label_lines": _lines("label"),
    "choice_lines": _lines("label"),
    "entity_lines": _lines("label"),
    "answer_lines": _lines("answer"),
    "idiom_map": _map,
    "answer_map": _map,
    "exam_map": _exam_map,
}
"""Contents of submission files by the names that task files use."""
