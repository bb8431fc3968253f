"""Lengths in tokens as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from chatglm_ptuning.files import write_atomically

_BINS = 60


def draw_lengths(source: Sequence[int], target: Sequence[int], max_source: int, max_target: int, path: Path) -> None:
    """Draws two histograms, of sources and of answers, with the limits and the share beyond them, as a PNG.

    Args:
        source, target: tokens of every example before cutting.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), dpi=120)
    parts = (("source", source, max_source), ("answer", target, max_target))
    for axis, (name, values, limit) in zip(axes, parts, strict=True):
        beyond = sum(value > limit for value in values)
        axis.hist(values, bins=_BINS, color="tab:blue")
        axis.axvline(limit, color="tab:red", linestyle="--", label=f"limit {limit}: {beyond} of {len(values)} beyond")
        axis.set_xlabel(f"tokens of the {name}")
        axis.set_ylabel("examples")
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
        axis.legend(loc="upper right")
    figure.tight_layout()
    with write_atomically(path) as temporary:
        figure.savefig(temporary, format="png")
    pyplot.close(figure)
