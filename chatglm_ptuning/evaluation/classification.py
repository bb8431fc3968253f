"""Accuracy, macro-F1 and the confusion matrix of predicted labels; knows nothing of models."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def confusion_matrix(predicted: Sequence[str], expected: Sequence[str], labels: Sequence[str]) -> np.ndarray:
    """Counts, int64 `[num_labels, num_labels + 1]`: a row for each expected label, a column for each predicted one.

    The last column counts predictions that are no label.

    Raises:
        ValueError: if there is nothing to compare, the numbers differ, or an expected label is unknown.
    """
    if not expected or len(predicted) != len(expected):
        raise ValueError(f"There are {len(predicted)} predictions for {len(expected)} expected labels.")
    place = {label: index for index, label in enumerate(labels)}
    matrix = np.zeros((len(labels), len(labels) + 1), dtype=np.int64)
    for prediction, label in zip(predicted, expected, strict=True):
        if label not in place:
            raise ValueError(f"The expected label {label!r} is none of {', '.join(labels)}.")
        matrix[place[label], place.get(prediction, len(labels))] += 1
    return matrix


def classification_scores(predicted: Sequence[str], expected: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """`accuracy` and `macro_f1` in percent.

    Macro-F1 is the mean over the labels that are expected or predicted anywhere, as in scikit-learn's default; a
    prediction that is no label is a miss for the label expected, and counts against no other.

    Raises:
        ValueError: as `confusion_matrix`.
    """
    matrix = confusion_matrix(predicted, expected, labels)
    hits = np.diagonal(matrix)
    both = matrix.sum(axis=1) + matrix[:, :-1].sum(axis=0)
    present = both > 0
    return {
        "accuracy": 100 * float(hits.sum() / matrix.sum()),
        "macro_f1": 100 * float((2 * hits[present] / both[present]).mean()),
    }
