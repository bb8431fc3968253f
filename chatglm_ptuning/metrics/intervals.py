"""How sure a score is: intervals by resampling the examples, deviations over runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import fmean, stdev

import numpy as np


def bootstrap_interval(
    statistic: Callable[[np.ndarray], float],
    num_examples: int,
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """The percentile interval of a score over resampled examples (Efron 1979); the same for the same seed.

    Args:
        statistic: the score of the examples at the given places, int64 `[num_examples]`, some of them repeated.

    Raises:
        ValueError: if there are no examples or a setting is out of range.
    """
    if num_examples < 1 or resamples < 1 or not 0 < confidence < 1:
        raise ValueError(
            f"num_examples={num_examples} and resamples={resamples} must be at least 1, and confidence={confidence} "
            "between 0 and 1."
        )
    generator = np.random.default_rng(seed)
    scores = [statistic(generator.integers(num_examples, size=num_examples)) for _ in range(resamples)]
    low, high = np.quantile(scores, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def mean_interval(values: Sequence[float], **options: float) -> tuple[float, float]:
    """The interval of the mean of the examples' own scores; options as in `bootstrap_interval`."""
    array = np.asarray(values, dtype=np.float64)
    return bootstrap_interval(lambda places: float(array[places].mean()), len(array), **options)


def f1_interval(counts: Sequence[tuple[int, int, int]], **options: float) -> tuple[float, float]:
    """The interval of micro-averaged F1 in percent, of each example's (right, predicted, expected) counts."""
    array = np.asarray(counts, dtype=np.int64).reshape(-1, 3)

    def score(places: np.ndarray) -> float:
        right, predicted, expected = array[places].sum(axis=0)
        return float(200 * right / max(predicted + expected, 1))

    return bootstrap_interval(score, len(array), **options)


def mean_and_deviation(values: Iterable[float]) -> tuple[float | None, float | None]:
    """Mean and standard deviation of a sample; None where there are too few values for them."""
    values = list(values)
    return fmean(values) if values else None, stdev(values) if len(values) > 1 else None
