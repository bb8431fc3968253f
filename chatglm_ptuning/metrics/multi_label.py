"""Scores of texts that have any number of labels; knows nothing of models."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from chatglm_ptuning.metrics.entities import EntityScore

LabelSets = Sequence[Sequence[str]]
"""The labels of several texts."""


def multi_label_scores(
    predicted: LabelSets, expected: LabelSets, labels: Sequence[str]
) -> tuple[dict[str, float], dict[str, EntityScore]]:
    """`micro_f1`, `macro_f1` and `subset_accuracy` in percent, and the scores of every label.

    As in scikit-learn: micro-F1 over all pairs of text and label, macro-F1 the mean over all labels (0 for one that is
    neither expected nor predicted), subset accuracy the share of texts whose labels are all right and none too many.

    Raises:
        ValueError: if there is nothing to compare, the numbers differ, or a label is unknown.
    """
    found, gold = _indicators(predicted, expected, labels)
    hits, found_of, gold_of = (found & gold).sum(0), found.sum(0), gold.sum(0)
    each = _ratio(2 * hits, found_of + gold_of)
    scores = {
        "micro_f1": float(_ratio(2 * hits.sum(), found_of.sum() + gold_of.sum())),
        "macro_f1": float(each.mean()),
        "subset_accuracy": 100 * float((found == gold).all(1).mean()),
    }
    precision, recall = _ratio(hits, found_of), _ratio(hits, gold_of)
    table = {
        label: EntityScore(float(precision[place]), float(recall[place]), float(each[place]), int(gold_of[place]))
        for place, label in enumerate(labels)
    }
    return scores, table


def counts_of_texts(predicted: LabelSets, expected: LabelSets) -> list[tuple[int, int, int]]:
    """For every text how many labels are right, predicted and expected."""
    return [
        (len(set(found) & set(gold)), len(set(found)), len(set(gold)))
        for found, gold in zip(predicted, expected, strict=True)
    ]


def _indicators(predicted: LabelSets, expected: LabelSets, labels: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    if not expected or len(predicted) != len(expected):
        raise ValueError(f"There are {len(predicted)} predictions for {len(expected)} texts.")
    place = {label: index for index, label in enumerate(labels)}
    arrays = []
    for rows in (predicted, expected):
        array = np.zeros((len(rows), len(labels)), dtype=bool)
        for number, row in enumerate(rows):
            for label in row:
                if label not in place:
                    raise ValueError(f"The label {label!r} is none of {', '.join(labels)}.")
                array[number, place[label]] = True
        arrays.append(array)
    return arrays[0], arrays[1]


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Percent; 0 of nothing."""
    return 100 * np.divide(part, whole, out=np.zeros(np.shape(part)), where=np.asarray(whole) > 0)
