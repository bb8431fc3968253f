"""Lengths in tokens as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from chatglm_ptuning.figures import drawing

_BINS = 60


def draw_lengths(source: Sequence[int], target: Sequence[int], max_source: int, max_target: int, path: Path) -> None:
    """Draws two histograms, of sources and of answers, with the limits and the share beyond them, as a PNG.

    Args:
        source, target: tokens of every example before cutting.
    """
    parts = (("source", source, max_source), ("answer", target, max_target))
    with drawing(path, 10, 4, columns=2) as axes:
        for axis, (name, values, limit) in zip(axes, parts, strict=True):
            beyond = sum(value > limit for value in values)
            axis.hist(values, bins=_BINS, color="tab:blue")
            axis.axvline(
                limit, color="tab:red", linestyle="--", label=f"limit {limit}: {beyond} of {len(values)} beyond"
            )
            axis.set(xlabel=f"tokens of the {name}", ylabel="examples", yscale="log")
            axis.grid(alpha=0.3)
            axis.legend(loc="upper right")
