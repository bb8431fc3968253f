"""Precision, recall and F1 of predicted sets: the labels of a text, or the entities of a sentence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from typing import Any

ItemSets = Sequence[Set[tuple[Any, ...]]]
"""One set of items per example; the first element of an item is its class (label or entity type)."""


@dataclass(frozen=True)
class ClassScore:
    """Scores of one class in percent; `support` is the number of expected items. A ratio of nothing is 0."""

    precision: float
    recall: float
    f1: float
    support: int


def class_scores(
    predicted: ItemSets, expected: ItemSets, classes: Iterable[str] | None = None
) -> tuple[ClassScore, dict[str, ClassScore]]:
    """Micro-averaged scores over all classes, and the scores of each class.

    Args:
        classes: by default every class that is expected or predicted, sorted.
    """
    hits, found, gold = Counter[str](), Counter[str](), Counter[str]()
    for left, right in zip(predicted, expected, strict=True):
        hits.update(item[0] for item in left & right)
        found.update(item[0] for item in left)
        gold.update(item[0] for item in right)
    names = sorted(found | gold) if classes is None else classes
    table = {name: _score(hits[name], found[name], gold[name]) for name in names}
    return _score(hits.total(), found.total(), gold.total()), table


def _score(hits: int, found: int, gold: int) -> ClassScore:
    precision, recall, f1 = (100 * part / max(whole, 1) for part, whole in
                             ((hits, found), (hits, gold), (2 * hits, found + gold)))  # fmt: skip
    return ClassScore(precision, recall, f1, gold)
