"""Confidence intervals by resampling the examples, and standard deviations over runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import fmean, stdev

import numpy as np


def bootstrap_interval(
    statistic: Callable[[np.ndarray], float], num_examples: int, resamples: int = 1000
) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of a score (Efron 1979). It is deterministic.

    Args:
        statistic: the score of the examples at the given places, int64 `[num_examples]`, drawn with replacement.
    """
    generator = np.random.default_rng(0)
    scores = [statistic(generator.integers(num_examples, size=num_examples)) for _ in range(resamples)]
    low, high = np.quantile(scores, [0.025, 0.975])
    return float(low), float(high)


def mean_interval(values: Sequence[float], resamples: int = 1000) -> tuple[float, float]:
    """The interval of the mean of the examples' scores, see `bootstrap_interval`."""
    array = np.asarray(values, dtype=np.float64)
    return bootstrap_interval(lambda places: float(array[places].mean()), len(array), resamples)


def f1_interval(counts: Sequence[tuple[int, int, int]]) -> tuple[float, float]:
    """The interval of micro-averaged F1 in percent, from each example's (right, predicted, expected) counts."""
    array = np.asarray(counts, dtype=np.int64).reshape(-1, 3)

    def score(places: np.ndarray) -> float:
        right, predicted, expected = array[places].sum(axis=0)
        return float(200 * right / max(predicted + expected, 1))

    return bootstrap_interval(score, len(array))


def mean_and_deviation(values: Iterable[float]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation (n - 1); None where there are too few values."""
    values = list(values)
    return fmean(values) if values else None, stdev(values) if len(values) > 1 else None
