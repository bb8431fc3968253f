"""Predictions in the form in which a benchmark takes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers.utils import logging

from chatglm_ptuning.data.tasks.examples import Example, has_gold
from chatglm_ptuning.data.tasks.heads.head import Prediction
from chatglm_ptuning.data.tasks.readers import reader_of
from chatglm_ptuning.data.tasks.task import Task
from chatglm_ptuning.files import write_text

logger = logging.get_logger(__name__)


def can_submit(task: Task, examples: Sequence[Example]) -> bool:
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


def _repeated_id(examples: Sequence[Example]) -> str | None:
    """What to say of the first id that stands twice; those of an examination are counted in every subject."""
    places: dict[tuple[str | None, str], str] = {}
    for example in examples:
        key = (example.subject, str(example.id))
        if key in places:
            return f"{example.where}: the id {example.id!r} stands twice, first at {places[key]}"
        places[key] = example.where
    return None


def write_submission(
    task: Task,
    examples: Sequence[Example],
    predictions: Sequence[Prediction],
    folder: str | Path,
    split: str = "test",
    variant: str | None = None,
) -> Path:
    """Writes the benchmark's submission file for the predictions on a split, in one of its reader's formats.

    Args:
        examples: of the whole split, in the order of its files.
        predictions: one for each.
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
        fault = example.fault_of(task, prediction.value)
        if fault is not None:
            raise ValueError(f"the prediction for {example.id!r} ({example.where}) {fault}")
    name = form.file_of(split)
    if variant is not None:
        name = f"{Path(name).stem}_{variant}{Path(name).suffix}"
    write = reader_of(task).submissions[form.format]
    path = Path(folder) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, write(examples, [prediction.value for prediction in predictions]))
    return path
