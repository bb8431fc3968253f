"""Scores of several runs in short."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean, stdev


def mean_and_deviation(values: Iterable[float]) -> tuple[float | None, float | None]:
    """Mean and standard deviation of a sample; None where there are too few values for them."""
    values = list(values)
    return fmean(values) if values else None, stdev(values) if len(values) > 1 else None
