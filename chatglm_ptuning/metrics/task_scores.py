"""Scores of one task on one split: its metrics with their intervals, and the score of each example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from chatglm_ptuning.metrics.classification import classification_scores, confusion_matrix, macro_f1_interval
from chatglm_ptuning.metrics.entities import EntityScore, cluener_f1, entity_scores, spans_of
from chatglm_ptuning.metrics.generation import score
from chatglm_ptuning.metrics.intervals import f1_interval, mean_interval
from chatglm_ptuning.metrics.multi_label import counts_of_texts, multi_label_scores
from chatglm_ptuning.metrics.reading_comprehension import answer_f1, cmrc_scores, exact_match

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
    entities: dict[str, EntityScore] = field(default_factory=dict)
    labels: dict[str, EntityScore] = field(default_factory=dict)
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
    """Scores of any number of labels for each text."""
    metrics, table = multi_label_scores(predictions, gold, labels)
    counts = counts_of_texts(predictions, gold)
    exact = [float(hits == found == expected) for hits, found, expected in counts]
    intervals = {"micro_f1": f1_interval(counts), "subset_accuracy": _percent(mean_interval(exact))}
    return TaskScores(metrics, intervals, _f1_of_each(counts), labels=table)


def score_tags(
    predictions: Sequence[Sequence[str]],
    gold: Sequence[Sequence[str]],
    entities: tuple[Sequence[Entities], Sequence[Entities], Sequence[str]] | None = None,
) -> TaskScores:
    """Scores of BIO tags.

    Args:
        entities: of a corpus with a score of its own, what `cluener_f1` takes.
    """
    metrics, table = entity_scores(predictions, gold)
    if entities is not None:
        metrics["cluener_f1"] = cluener_f1(*entities)
    counts = []
    for found, expected in zip(predictions, gold, strict=True):
        left, right = set(spans_of(found)), set(spans_of(expected))
        counts.append((len(left & right), len(left), len(right)))
    return TaskScores(metrics, {"entity_f1": f1_interval(counts)}, _f1_of_each(counts), entities=table)


def score_answers(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> TaskScores:
    """Scores of extracted answers, each against all of its references."""
    each = [answer_f1(text, own) for text, own in zip(predictions, references, strict=True)]
    exact = [float(exact_match(text, own)) for text, own in zip(predictions, references, strict=True)]
    intervals = {"cmrc_f1": _percent(mean_interval(each)), "cmrc_em": _percent(mean_interval(exact))}
    return TaskScores(cmrc_scores(predictions, references), intervals, each)


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
    """Scores of written texts, and the mean number of characters of both."""
    singles = [score([prediction], [target]) for prediction, target in zip(predictions, gold, strict=True)]
    intervals = {name: mean_interval([single[name] for single in singles]) for name in ("rouge-l", "bleu-4")}
    metrics = score(predictions, gold)
    if with_lengths:
        metrics["prediction_length"] = sum(map(len, predictions)) / len(predictions)
        metrics["target_length"] = sum(map(len, gold)) / len(gold)
    return TaskScores(metrics, intervals, [single["rouge-l"] / 100 for single in singles])


def _group_accuracy(
    hits: Sequence[bool], subjects: Sequence[tuple[str | None, str]], groups: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    """Accuracy by subject, and by category as the mean over its subjects, which is how C-Eval and CMMLU average.

    Further groups are there if all of their subjects are.
    """
    of_subject: dict[str, list[bool]] = {}
    categories: dict[str, dict[str, None]] = {}
    for (subject, category), hit in zip(subjects, hits, strict=True):
        if subject is not None:
            of_subject.setdefault(subject, []).append(hit)
            categories.setdefault(category, {})[subject] = None
    accuracy = {subject: 100 * sum(own) / len(own) for subject, own in of_subject.items()}
    sets = categories | {name: own for name, own in groups.items() if all(member in accuracy for member in own)}
    means = {name: sum(accuracy[member] for member in members) / len(members) for name, members in sets.items()}
    overall = {"mean of subjects": sum(accuracy.values()) / len(accuracy)} if accuracy else {}
    return accuracy | means | overall


def _f1_of_each(counts: Sequence[tuple[int, int, int]]) -> list[float]:
    """F1 of each example, of its (right, predicted, expected) counts; 1 where there is nothing to find."""
    return [2 * hits / (found + expected) if found + expected else 1.0 for hits, found, expected in counts]


def _percent(interval: tuple[float, float]) -> tuple[float, float]:
    return 100 * interval[0], 100 * interval[1]
