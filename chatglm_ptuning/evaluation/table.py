"""Scores as a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table


def print_scores(columns: Mapping[str, Mapping[str, float]], title: str = "Scores (%)") -> None:
    """Prints one row per metric and one column per scored model.

    Args:
        columns: by the column's heading, metric -> score.
    """
    table = Table("metric", title=title)
    for heading in columns:
        table.add_column(heading, justify="right")
    for metric in dict.fromkeys(name for scores in columns.values() for name in scores):
        table.add_row(metric, *(f"{scores[metric]:.2f}" if metric in scores else "" for scores in columns.values()))
    Console().print(table)
