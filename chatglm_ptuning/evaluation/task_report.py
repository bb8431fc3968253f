"""Scores of a task as its benchmark computes them, and the files that show what went wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from chatglm_ptuning.data.tasks.examples import (
    AnyExample,
    ChoiceExample,
    GenerationExample,
    QuestionExample,
    TextExample,
    TokenExample,
    gold_of,
    has_gold,
)
from chatglm_ptuning.data.tasks.prompt import candidate_answers, render_prompt
from chatglm_ptuning.data.tasks.submission import write_submission
from chatglm_ptuning.data.tasks.task import Task
from chatglm_ptuning.evaluation.figures import draw_confusion_matrix, draw_entity_table
from chatglm_ptuning.evaluation.task_predictions import Prediction
from chatglm_ptuning.files import write_json, write_text
from chatglm_ptuning.metrics.bootstrap import f1_interval, mean_interval
from chatglm_ptuning.metrics.classification import classification_scores, confusion_matrix, macro_f1_interval
from chatglm_ptuning.metrics.entities import EntityScore, cluener_f1, entities_of, entity_scores, spans_of
from chatglm_ptuning.metrics.generation import score
from chatglm_ptuning.metrics.multi_label import counts_of_texts, multi_label_scores
from chatglm_ptuning.metrics.reading_comprehension import answer_f1, cmrc_scores, exact_match

WORST_ERRORS = 20


@dataclass(frozen=True)
class TaskScores:
    """Scores of one task on one split.

    Attributes:
        metrics: in percent; the task's own metric is among them.
        intervals: metric -> 95 % bootstrap interval, in percent.
        of_examples: the score of each example that counts, from 0 to 1.
        groups: subject, category or further group of an examination -> accuracy in percent.
        entities: type -> its scores.
        labels: of a multi-label task, label -> its scores.
    """

    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    of_examples: list[float]
    groups: dict[str, float] = field(default_factory=dict)
    entities: dict[str, EntityScore] = field(default_factory=dict)
    labels: dict[str, EntityScore] = field(default_factory=dict)


def score_task(task: Task, examples: Sequence[AnyExample], predictions: Sequence[Any]) -> TaskScores:
    """Scores predictions: labels, lists of labels, indices of candidates, tags, or texts, one for each example.
    Examples that are left out (`Example.left_out`) do not count.

    Raises:
        ValueError: if there is nothing to score, the numbers differ, or an example has no gold answer.
    """
    if not examples or len(predictions) != len(examples):
        raise ValueError(f"There are {len(predictions)} predictions for {len(examples)} examples.")
    examples, predictions = _scored(examples, examples), _scored(examples, predictions)
    gold = [gold_of(example) for example in examples]
    if None in gold:
        raise ValueError(
            f"{examples[gold.index(None)].where}: there is nothing to score against, the split is unlabelled."
        )
    if task.multi_label:
        return _score_label_sets(predictions, gold, list(task.labels))
    if isinstance(examples[0], TextExample):
        return _score_labels(predictions, gold, list(task.labels))
    if isinstance(examples[0], ChoiceExample):
        # By what is answered, not by index: of candidates with the same text either is right, unless letters tell them.
        answers = [candidate_answers(task, example) for example in examples]
        hits = [own[left] == own[right] for own, left, right in zip(answers, predictions, gold, strict=True)]
        return _of_hits({"accuracy": 100 * sum(hits) / len(hits)}, hits, _group_accuracy(task, examples, hits))
    if isinstance(examples[0], TokenExample):
        return _score_tags(task, examples, predictions, gold)
    if isinstance(examples[0], QuestionExample):
        each = [answer_f1(text, references) for text, references in zip(predictions, gold, strict=True)]
        exact = [float(exact_match(text, references)) for text, references in zip(predictions, gold, strict=True)]
        intervals = {"cmrc_f1": _percent(mean_interval(each)), "cmrc_em": _percent(mean_interval(exact))}
        return TaskScores(cmrc_scores(predictions, gold), intervals, each)
    return _score_texts(predictions, gold)


def write_task_report(
    folder: str | Path,
    task: Task,
    examples: Sequence[AnyExample],
    predictions: Sequence[Any],
    confidences: Sequence[float] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> TaskScores:
    """Scores, and writes into the folder:

    - `metrics.json`: scores, intervals, groups, the label of each number in the picture;
    - `predictions.jsonl`: input, gold, prediction, score, the subject of an examination, and the confidence if given;
    - `worst_errors.jsonl`: the 20 worst, the surest first, or where no confidences are given those of lowest score;
    - `confusion_matrix.png`, or a table with a bar for each: `entities.png` for tags, `labels.png` for a multi-label
      task.

    Args:
        confidences: how sure the model was of each prediction.
        settings: how the predictions were made; goes into `metrics.json`.

    Raises:
        ValueError: as `score_task`.
    """
    scores = score_task(task, examples, predictions)
    confidences = None if confidences is None else _scored(examples, confidences)
    examples, predictions = _scored(examples, examples), _scored(examples, predictions)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = _rows(task, examples, predictions, scores, confidences)
    content: dict[str, Any] = {"task": task.name, "examples": len(examples), **asdict(scores)}
    content.pop("of_examples")
    if settings is not None:
        content["settings"] = dict(settings)
    if scores.labels:
        draw_entity_table(folder / "labels.png", scores.labels, task.labels, task.name)
    elif isinstance(examples[0], TextExample):
        matrix = confusion_matrix(predictions, [example.label for example in examples], list(task.labels))
        shown = draw_confusion_matrix(folder / "confusion_matrix.png", matrix, list(task.labels.values()), task.name)
        content["labels_in_picture"] = dict(zip(shown, task.labels.values(), strict=True))
        content["confusion_matrix"] = matrix.tolist()
    elif scores.entities:
        draw_entity_table(folder / "entities.png", scores.entities, task.labels, task.name)
    _write_lines(folder / "predictions.jsonl", rows)
    _write_lines(folder / "worst_errors.jsonl", worst_errors(rows))
    write_json(folder / "metrics.json", content)
    return scores


def write_results(
    folder: str | Path,
    task: Task,
    examples: Sequence[AnyExample],
    predictions: Sequence[Prediction],
    split: str,
    variant: str | None = None,
    *,
    may_submit: bool = True,
    settings: Mapping[str, Any] | None = None,
) -> TaskScores | None:
    """All files about the predictions on a split: the report where it has gold, and the benchmark's submission.

    Args:
        variant: see `write_submission`.
        may_submit: False if the examples are not the whole split, which no benchmark takes, or not `can_submit`.
        settings: see `write_task_report`.

    Returns:
        The scores; None for a split without gold, of which `predictions.jsonl` is written without scores.

    Raises:
        ValueError: as `score_task` and `write_submission`.
    """
    values = [prediction.value for prediction in predictions]
    sure = [prediction.confidence for prediction in predictions]
    confidences = None if None in sure else sure
    scores = None
    if not has_gold(examples):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _write_lines(folder / "predictions.jsonl", _rows(task, examples, values, None, confidences))
    else:
        scores = write_task_report(folder, task, examples, values, confidences, settings)
    if task.submission is not None and may_submit:
        write_submission(task, examples, values, folder, split, variant)
    return scores


def worst_errors(rows: Sequence[dict[str, Any]], number: int = WORST_ERRORS) -> list[dict[str, Any]]:
    """The wrong rows (`score` below 1): the lowest scores first, and among equals the surest (`confidence`)."""
    wrong = [row for row in rows if row["score"] < 1]
    return sorted(wrong, key=lambda row: (row["score"], -row.get("confidence", 0.0)))[:number]


def _scored(examples: Sequence[AnyExample], values: Sequence[Any]) -> list[Any]:
    """Of values that stand beside examples, those of the examples that count; all of them if there is no gold."""
    scored = has_gold(examples)
    return [value for example, value in zip(examples, values, strict=True) if not (scored and example.left_out)]


def _score_labels(predictions: Sequence[str], gold: list[Any], labels: list[str]) -> TaskScores:
    hits = [left == right for left, right in zip(predictions, gold, strict=True)]
    scores = _of_hits(classification_scores(predictions, gold, labels), hits)
    scores.intervals["macro_f1"] = macro_f1_interval(predictions, gold, labels)
    return scores


def _score_label_sets(predictions: Sequence[list[str]], gold: list[Any], labels: list[str]) -> TaskScores:
    metrics, table = multi_label_scores(predictions, gold, labels)
    counts = counts_of_texts(predictions, gold)
    each = [2 * hits / (found + expected) if found + expected else 1.0 for hits, found, expected in counts]
    exact = [float(hits == found == expected) for hits, found, expected in counts]
    intervals = {"micro_f1": f1_interval(counts), "subset_accuracy": _percent(mean_interval(exact))}
    return TaskScores(metrics, intervals, each, labels=table)


def _of_hits(metrics: dict[str, float], hits: list[bool], groups: dict[str, float] | None = None) -> TaskScores:
    each = [float(hit) for hit in hits]
    return TaskScores(metrics, {"accuracy": _percent(mean_interval(each))}, each, groups or {})


def _group_accuracy(task: Task, examples: Sequence[ChoiceExample], hits: Sequence[bool]) -> dict[str, float]:
    """Accuracy by subject, and by category as the mean over its subjects, which is how C-Eval and CMMLU average.

    The task's further groups are there if all of their subjects are.
    """
    subjects: dict[str, list[bool]] = {}
    categories: dict[str, dict[str, None]] = {}
    for example, hit in zip(examples, hits, strict=True):
        if example.subject is not None:
            subjects.setdefault(example.subject, []).append(hit)
            categories.setdefault(example.category or "", {})[example.subject] = None
    groups = {subject: 100 * sum(own) / len(own) for subject, own in subjects.items()}
    means = {category: sum(groups[name] for name in names) / len(names) for category, names in categories.items()}
    for name, members in task.groups.items():
        if all(member in groups for member in members):
            means[name] = sum(groups[member] for member in members) / len(members)
    overall = {"mean of subjects": sum(groups.values()) / len(groups)} if groups else {}
    return groups | means | overall


def _score_tags(
    task: Task, examples: Sequence[TokenExample], predictions: Sequence[Sequence[str]], gold: list[Any]
) -> TaskScores:
    metrics, table = entity_scores(predictions, gold)
    if task.reader == "cluener":
        found = [entities_of(example.text, tags) for example, tags in zip(examples, predictions, strict=True)]
        expected = [
            entities_of(example.text, tags) if example.entities is None else example.entities
            for example, tags in zip(examples, gold, strict=True)
        ]
        metrics["cluener_f1"] = cluener_f1(found, expected, list(task.labels))
    counts = []
    for found, expected in zip(predictions, gold, strict=True):
        left, right = set(spans_of(found)), set(spans_of(expected))
        counts.append((len(left & right), len(left), len(right)))
    each = [2 * hits / (found + expected) if found + expected else 1.0 for hits, found, expected in counts]
    return TaskScores(metrics, {"entity_f1": f1_interval(counts)}, each, entities=table)


def _score_texts(predictions: Sequence[str], gold: list[Any]) -> TaskScores:
    singles = [score([prediction], [target]) for prediction, target in zip(predictions, gold, strict=True)]
    intervals = {name: mean_interval([single[name] for single in singles]) for name in ("rouge-l", "bleu-4")}
    metrics = score(predictions, gold)
    metrics["prediction_length"] = sum(map(len, predictions)) / len(predictions)
    metrics["target_length"] = sum(map(len, gold)) / len(gold)
    return TaskScores(metrics, intervals, [single["rouge-l"] / 100 for single in singles])


def _percent(interval: tuple[float, float]) -> tuple[float, float]:
    return 100 * interval[0], 100 * interval[1]


def _rows(
    task: Task,
    examples: Sequence[AnyExample],
    predictions: Sequence[Any],
    scores: TaskScores | None,
    confidences: Sequence[float] | None,
) -> list[dict[str, Any]]:
    rows = []
    for place, (example, prediction) in enumerate(zip(examples, predictions, strict=True)):
        text = example.text if isinstance(example, (TokenExample, GenerationExample)) else render_prompt(task, example)
        subject = {"subject": example.subject} if isinstance(example, ChoiceExample) and example.subject else {}
        row = {
            "id": example.id,
            **subject,
            "input": text,
            "gold": _readable(task, example, gold_of(example)),
            "prediction": _readable(task, example, prediction),
        }
        if scores is not None:
            row["score"] = scores.of_examples[place]
        if confidences is not None:
            row["confidence"] = float(confidences[place])
        rows.append(row)
    return rows


def _readable(task: Task, example: AnyExample, value: Any) -> Any:
    """Candidates or their letters instead of indices, entities instead of tags."""
    if isinstance(example, ChoiceExample) and isinstance(value, int):
        return candidate_answers(task, example)[value]
    if isinstance(example, TokenExample) and value is not None:
        return [
            {"type": entity, "text": example.text_of(first, last), "start": first}
            for entity, first, last in spans_of(value)
        ]
    return value


def _write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
