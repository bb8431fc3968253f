"""Scores of one task on one split: its metrics with their intervals, and the score of each example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

import numpy as np

from chatglm_ptuning.metrics.classification import classification_scores, confusion_matrix, macro_f1_interval
from chatglm_ptuning.metrics.entities import spans_of
from chatglm_ptuning.metrics.generation import score
from chatglm_ptuning.metrics.intervals import f1_interval, mean_interval
from chatglm_ptuning.metrics.reading_comprehension import answer_f1, exact_match
from chatglm_ptuning.metrics.sets import ClassScore, ItemSets, class_scores

Entities = frozenset[tuple[str, str]]
"""Type and text of each entity of a sentence."""


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
        confusion: of a task with one label for each text, see `confusion_matrix`.
    """

    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    of_examples: list[float]
    groups: dict[str, float] = field(default_factory=dict)
    entities: dict[str, ClassScore] = field(default_factory=dict)
    labels: dict[str, ClassScore] = field(default_factory=dict)
    confusion: np.ndarray | None = None


def score_labels(predictions: Sequence[str], gold: Sequence[str], labels: Sequence[str]) -> TaskScores:
    """Scores of one label for each text."""
    each = [float(left == right) for left, right in zip(predictions, gold, strict=True)]
    intervals = {
        "accuracy": _percent(mean_interval(each)),
        "macro_f1": macro_f1_interval(predictions, gold, labels),
    }
    confusion = confusion_matrix(predictions, gold, labels)
    return TaskScores(classification_scores(predictions, gold, labels), intervals, each, confusion=confusion)


def score_label_sets(
    predictions: Sequence[Sequence[str]], gold: Sequence[Sequence[str]], labels: Sequence[str]
) -> TaskScores:
    """Scores of any number of labels for each text: `micro_f1`, `macro_f1` over all labels, `subset_accuracy`.

    As in scikit-learn; the F1 of a label that is neither expected nor predicted is 0.

    Raises:
        ValueError: if a label is unknown.
    """
    for label in (label for rows in (predictions, gold) for row in rows for label in row):
        if label not in labels:
            raise ValueError(f"The label {label!r} is none of {', '.join(labels)}.")
    found, expected = ([{(label,) for label in row} for row in rows] for rows in (predictions, gold))
    micro, table = class_scores(found, expected, labels)
    exact = [float(left == right) for left, right in zip(found, expected, strict=True)]
    metrics = {
        "micro_f1": micro.f1,
        "macro_f1": fmean(one.f1 for one in table.values()),
        "subset_accuracy": 100 * fmean(exact),
    }
    counts = _counts(found, expected)
    intervals = {"micro_f1": f1_interval(counts), "subset_accuracy": _percent(mean_interval(exact))}
    return TaskScores(metrics, intervals, _f1_of_each(counts), labels=table)


def score_tags(
    predictions: Sequence[Sequence[str]],
    gold: Sequence[Sequence[str]],
    entities: tuple[Sequence[Entities], Sequence[Entities], Sequence[str]] | None = None,
) -> TaskScores:
    """Scores of the entities of BIO tags; an entity is right if its type and both its ends are, as in conlleval.

    Args:
        entities: of a corpus with CLUENER2020's own score (its score.py), the predicted and the expected entities of
            each sentence as the file has them (where one is inside another, tags lose it), and all types. `cluener_f1`
            is the mean over the types of F1; a type that is neither expected nor predicted counts 0.

    Raises:
        ValueError: if a sentence has another number of predicted tags than of expected ones.
    """
    for index, (found, expected) in enumerate(zip(predictions, gold, strict=True)):
        if len(found) != len(expected):
            raise ValueError(
                f"Sentence {index} (counted from 0) has {len(found)} predicted tags, {len(expected)} expected."
            )
    spans = [[set(spans_of(tags)) for tags in rows] for rows in (predictions, gold)]
    micro, table = class_scores(*spans)
    metrics = {"entity_precision": micro.precision, "entity_recall": micro.recall, "entity_f1": micro.f1}
    if entities is not None:
        _, of_types = class_scores(*entities)
        metrics["cluener_f1"] = fmean(one.f1 for one in of_types.values())
    counts = _counts(*spans)
    return TaskScores(metrics, {"entity_f1": f1_interval(counts)}, _f1_of_each(counts), entities=table)


def score_answers(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> TaskScores:
    """Scores of extracted answers, each against all of its references: `cmrc_f1`, `cmrc_em`, `cmrc_average`.

    An empty prediction (no answer) scores 0.
    """
    each = [answer_f1(text, own) for text, own in zip(predictions, references, strict=True)]
    exact = [float(exact_match(text, own)) for text, own in zip(predictions, references, strict=True)]
    f1, em = 100 * fmean(each), 100 * fmean(exact)
    intervals = {"cmrc_f1": _percent(mean_interval(each)), "cmrc_em": _percent(mean_interval(exact))}
    return TaskScores({"cmrc_f1": f1, "cmrc_em": em, "cmrc_average": (f1 + em) / 2}, intervals, each)


def score_choices(
    hits: Sequence[bool], subjects: Sequence[tuple[str | None, str]], groups: Mapping[str, Sequence[str]]
) -> TaskScores:
    """Scores of choices that are right or wrong.

    Args:
        subjects: of each choice, subject and category in an examination; the subject is None elsewhere.
        groups: further sets of subjects to report.
    """
    each = [float(hit) for hit in hits]
    metrics = {"accuracy": 100 * sum(each) / len(each)}
    of_groups = _group_accuracy(hits, subjects, groups)
    return TaskScores(metrics, {"accuracy": _percent(mean_interval(each))}, each, of_groups)


def score_texts(predictions: Sequence[str], gold: Sequence[str], *, with_lengths: bool = True) -> TaskScores:
    """Scores of generated texts, and the mean number of characters of both."""
    metrics, pairs = score(predictions, gold)
    intervals = {name: mean_interval([pair[name] for pair in pairs]) for name in ("rouge-l", "bleu-4")}
    if with_lengths:
        metrics |= {"prediction_length": fmean(map(len, predictions)), "target_length": fmean(map(len, gold))}
    return TaskScores(metrics, intervals, [pair["rouge-l"] / 100 for pair in pairs])


def _group_accuracy(
    hits: Sequence[bool], subjects: Sequence[tuple[str | None, str]], groups: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    """Accuracy by subject, and by category as the mean over its subjects, as C-Eval and CMMLU average.

    A further group is reported if all of its subjects are there.
    """
    of_subject: dict[str, list[bool]] = {}
    categories: dict[str, dict[str, None]] = {}
    for (subject, category), hit in zip(subjects, hits, strict=True):
        if subject is not None:
            of_subject.setdefault(subject, []).append(hit)
            categories.setdefault(category, {})[subject] = None
    accuracy = {subject: 100 * sum(own) / len(own) for subject, own in of_subject.items()}
    sets = categories | {name: own for name, own in groups.items() if all(member in accuracy for member in own)}
    means = {name: fmean(accuracy[member] for member in members) for name, members in sets.items()}
    overall = {"mean of subjects": fmean(accuracy.values())} if accuracy else {}
    return accuracy | means | overall


def _counts(predicted: ItemSets, expected: ItemSets) -> list[tuple[int, int, int]]:
    """The numbers of right, predicted and expected items of each example."""
    return [(len(left & right), len(left), len(right)) for left, right in zip(predicted, expected, strict=True)]


def _f1_of_each(counts: Sequence[tuple[int, int, int]]) -> list[float]:
    """F1 of each example, of its (right, predicted, expected) counts; 1 where there is nothing to find."""
    return [2 * hits / (found + expected) if found + expected else 1.0 for hits, found, expected in counts]


def _percent(interval: tuple[float, float]) -> tuple[float, float]:
    return 100 * interval[0], 100 * interval[1]
