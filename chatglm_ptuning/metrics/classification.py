"""Accuracy, macro-F1 and the confusion matrix of predicted labels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from chatglm_ptuning.metrics.intervals import bootstrap_interval


def confusion_matrix(predicted: Sequence[str], expected: Sequence[str], labels: Sequence[str]) -> np.ndarray:
    """Counts, int64 `[num_labels, num_labels + 1]`: a row for each expected label, a column for each predicted one.

    The last column counts predictions that are not a label.

    Raises:
        ValueError: if an expected label is unknown.
    """
    return _count(_cells(predicted, expected, labels), len(labels))


def classification_scores(predicted: Sequence[str], expected: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """`accuracy` and `macro_f1` in percent.

    Macro-F1 is the mean over the labels that are expected or predicted anywhere, as in scikit-learn's default. A
    prediction that is not a label is a miss for the expected label and a false positive for none.

    Raises:
        ValueError: as `confusion_matrix`.
    """
    matrix = confusion_matrix(predicted, expected, labels)
    return {"accuracy": 100 * float(np.diagonal(matrix).sum() / matrix.sum()), "macro_f1": _macro_f1(matrix)}


def macro_f1_interval(predicted: Sequence[str], expected: Sequence[str], labels: Sequence[str]) -> tuple[float, float]:
    """The interval of macro-F1 in percent, see `bootstrap_interval`."""
    cells = _cells(predicted, expected, labels)
    return bootstrap_interval(lambda places: _macro_f1(_count(cells[places], len(labels))), len(cells))


def _cells(predicted: Sequence[str], expected: Sequence[str], labels: Sequence[str]) -> np.ndarray:
    """The cell of the flattened confusion matrix that each example counts in."""
    place = {label: index for index, label in enumerate(labels)}
    unknown = next((label for label in expected if label not in place), None)
    if unknown is not None:
        raise ValueError(f"The expected label {unknown!r} is none of {', '.join(labels)}.")
    rows = np.array([place[label] for label in expected])
    columns = np.array([place.get(label, len(labels)) for label in predicted])
    return rows * (len(labels) + 1) + columns


def _count(cells: np.ndarray, num_labels: int) -> np.ndarray:
    return np.bincount(cells, minlength=num_labels * (num_labels + 1)).reshape(num_labels, num_labels + 1)


def _macro_f1(matrix: np.ndarray) -> float:
    both = matrix.sum(axis=1) + matrix[:, :-1].sum(axis=0)
    present = both > 0
    return 100 * float((2 * np.diagonal(matrix)[present] / both[present]).mean())
