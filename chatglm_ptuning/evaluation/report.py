"""Scores of predictions, and the files for an error analysis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from chatglm_ptuning.data.tasks.examples import Example, has_gold
from chatglm_ptuning.data.tasks.heads.head import Head, Prediction
from chatglm_ptuning.data.tasks.task import Task
from chatglm_ptuning.figures import draw_bars, draw_confusion_matrix
from chatglm_ptuning.files import write_json, write_lines
from chatglm_ptuning.metrics.sets import ClassScore
from chatglm_ptuning.metrics.task_scores import TaskScores
from chatglm_ptuning.tables import Table
from chatglm_ptuning.version import kit_version

WORST_ERRORS = 20


def score_task(task: Task, examples: Sequence[Example], predictions: Sequence[Prediction]) -> TaskScores:
    """Scores predictions, one per example; examples that are left out (`Example.left_out`) do not count.

    Raises:
        ValueError: if there is nothing to score, the numbers differ, or an example has no gold answer.
    """
    if not examples or len(predictions) != len(examples):
        raise ValueError(f"There are {len(predictions)} predictions for {len(examples)} examples.")
    examples, predictions = _that_count(examples, predictions)
    without = next((example for example in examples if example.gold is None), None)
    if without is not None:
        raise ValueError(f"{without.where}: there is nothing to score against, the split is unlabelled.")
    return type(examples[0]).score(task, examples, [prediction.value for prediction in predictions])


def write_report(
    folder: str | Path,
    task: Task,
    examples: Sequence[Example],
    predictions: Sequence[Prediction],
    settings: Mapping[str, Any] | None = None,
) -> TaskScores | None:
    """Scores, and writes into the folder:

    - `predictions.jsonl`: input, gold, prediction, score, the subject of an examination, and the confidence if known;
    - `metrics.json`: scores, intervals, groups, the label of each name in the picture;
    - `worst_errors.jsonl`: the 20 worst errors, see `worst_errors`;
    - `confusion_matrix.png`, or a bar for each class: `entities.png` for tags, `labels.png` for a multi-label task.

    Args:
        settings: how the predictions were made, for `metrics.json`.

    Returns:
        The scores; None for a split without gold answers, of which only `predictions.jsonl` is written.

    Raises:
        ValueError: as `score_task`.
    """
    folder = Path(folder)
    scores = score_task(task, examples, predictions) if has_gold(examples) else None
    rows = _rows(task, *_that_count(examples, predictions), scores)
    folder.mkdir(parents=True, exist_ok=True)
    if scores is None:
        write_lines(folder / "predictions.jsonl", rows)
        return None
    content: dict[str, Any] = {"task": task.name, "examples": len(rows), **asdict(scores)}
    del content["of_examples"], content["confusion"]
    if settings is not None:
        content["settings"] = dict(settings)
    if scores.confusion is not None:
        names = list(task.labels.values())
        shown = draw_confusion_matrix(folder / "confusion_matrix.png", scores.confusion, names, task.name)
        content["labels_in_picture"] = dict(zip(shown, names, strict=True))
        content["confusion_matrix"] = scores.confusion.tolist()
    for name, table in (("labels", scores.labels), ("entities", scores.entities)):
        if table:
            _draw_class_scores(folder / f"{name}.png", table, task)
    write_lines(folder / "predictions.jsonl", rows)
    write_lines(folder / "worst_errors.jsonl", worst_errors(rows))
    write_json(folder / "metrics.json", content)
    return scores


def _draw_class_scores(path: Path, table: Mapping[str, ClassScore], task: Task) -> None:
    bars = {}
    for name, one in sorted(table.items(), key=lambda entry: -entry[1].f1):
        numbers = f"P {one.precision:.1f}  R {one.recall:.1f}  n {one.support}"
        bars[f"{task.labels.get(name, '')} {name}   {numbers}".strip()] = {"F1": (one.f1, None)}
    draw_bars(path, bars, "F1 (%)", title=task.name)


def worst_errors(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Up to `WORST_ERRORS` wrong rows (`score` below 1), lowest scores first, then highest `confidence` first."""
    wrong = [row for row in rows if row["score"] < 1]
    return sorted(wrong, key=lambda row: (row["score"], -row.get("confidence", 0.0)))[:WORST_ERRORS]


def head_settings(head: Head) -> dict[str, Any]:
    """The settings of a head, for `metrics.json`."""
    return {
        "head": head.name,
        "token_unit": head.token_unit,
        "echo": head.echo,
        "chat_format": head.tokenizer.chat_format,
        "kit_version": kit_version(),
    }


def print_scores(columns: Mapping[str, Mapping[str, float]], title: str = "Scores (%)") -> None:
    """Prints one row per metric and one column per model.

    Args:
        columns: heading of a column -> metric -> score.
    """
    rows = [
        [metric, *(f"{scores[metric]:.2f}" if metric in scores else "" for scores in columns.values())]
        for metric in dict.fromkeys(name for scores in columns.values() for name in scores)
    ]
    Table(["metric", *columns], rows, title).show()


def _that_count(
    examples: Sequence[Example], predictions: Sequence[Prediction]
) -> tuple[list[Example], list[Prediction]]:
    """Examples and predictions without those left out; all of them if there are no gold answers."""
    scored = has_gold(examples)
    kept = [place for place, example in enumerate(examples) if not (scored and example.left_out)]
    return [examples[place] for place in kept], [predictions[place] for place in kept]


def _rows(
    task: Task, examples: Sequence[Example], predictions: Sequence[Prediction], scores: TaskScores | None
) -> list[dict[str, Any]]:
    rows = []
    for place, (example, prediction) in enumerate(zip(examples, predictions, strict=True)):
        row = {
            "id": example.id,
            **({"subject": example.subject} if example.subject else {}),
            "input": example.shown_input(task),
            "gold": example.readable(task, example.gold),
            "prediction": example.readable(task, prediction.value),
        }
        if scores is not None:
            row["score"] = scores.of_examples[place]
        if prediction.confidence is not None:
            row["confidence"] = float(prediction.confidence)
        rows.append(row)
    return rows
