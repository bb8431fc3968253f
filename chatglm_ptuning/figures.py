"""Draws and saves every picture that the kit writes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from chatglm_ptuning.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.font_manager import FontProperties

_ALL_COUNTS = 30
"""Most labels for which each cell of a confusion matrix shows its count."""
_ALL_NAMES = 80
"""Most labels that are all named on the axes."""
NO_LABEL = "-"
"""Column of the predictions that are not a label."""


@contextmanager
def drawing(path: Path, width: float, height: float, columns: int = 1) -> Iterator[Any]:
    """The axes of a new figure, an array of them for several columns; the figure is written as a PNG afterwards.

    It needs no display.

    Args:
        width, height: in inches.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    yield figure.subplots(1, columns)
    with write_atomically(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def find_font(texts: Iterable[str]) -> FontProperties | None:
    """An installed font that has every character of the texts; None if there is none.

    Matplotlib's own fonts have no Chinese characters. Any installed font that has them is found (on Debian and Ubuntu
    `apt install fonts-noto-cjk` or `fonts-wqy-microhei`).
    """
    from matplotlib import font_manager, ft2font

    needed = {ord(character) for text in texts for character in text if not character.isspace()}
    default = font_manager.FontProperties()
    paths = [font_manager.findfont(default), *sorted({entry.fname for entry in font_manager.fontManager.ttflist})]
    # Fonts that were installed after matplotlib wrote its list come last.
    paths += [path for path in sorted(font_manager.findSystemFonts()) if path not in paths]
    for path in paths:
        if "LastResort" in path:  # comes with matplotlib and draws any character as a box with its number
            continue
        try:
            face = ft2font.FT2Font(path)
        except (OSError, RuntimeError):
            continue
        if all(face.get_char_index(character) for character in needed):
            return font_manager.FontProperties(fname=path)
    return None


def draw_confusion_matrix(path: Path, matrix: np.ndarray, names: Sequence[str], title: str = "") -> list[str]:
    """Writes a PNG of shares per expected label, with the counts in the cells if there is room.

    If no font has the characters of the names, the picture shows the labels' numbers from 0 instead.

    Args:
        matrix: `[num_labels, num_labels + 1]` of `classification.confusion_matrix`.
        names: of the labels, as shown to readers.

    Returns:
        The names as they are in the picture.
    """
    font = find_font([*names, title])
    shown = list(names) if font else [str(index) for index in range(len(names))]
    if not matrix[:, -1].any():
        matrix = matrix[:, :-1]
    columns = [*shown, NO_LABEL][: matrix.shape[1]]
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = min(max(4.0, 0.35 * len(names) + 2), 24.0)
    step = -(-len(names) // _ALL_NAMES)
    with drawing(path, side + 1, side) as axes:
        picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        axes.figure.colorbar(picture, ax=axes, fraction=0.046, label="share of the expected label")
        axes.set_xticks(range(0, len(columns), step), columns[::step], rotation=90, fontproperties=font)
        axes.set_yticks(range(0, len(shown), step), shown[::step], fontproperties=font)
        axes.set(xlabel="predicted", ylabel="expected")
        axes.set_title(title if font else "labels by number, see metrics.json", fontproperties=font)
        if len(names) <= _ALL_COUNTS:
            for (row, column), count in np.ndenumerate(matrix):
                if count:
                    colour = "white" if shares[row, column] > 0.5 else "black"
                    axes.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=8)
    return shown


Bars = Mapping[str, tuple[float, float | None]]
"""Name of a bar -> its length in percent, and its standard deviation."""


def draw_bars(path: Path, groups: Mapping[str, Bars], x_label: str, *, title: str = "", dashed: str = "") -> None:
    """Writes a PNG of grouped horizontal bars; the bar named `dashed` is a line across its group instead.

    If no font has the characters of the names, other than ASCII characters are left out.

    Args:
        groups: name of a group -> its bars.
    """
    names = [name for name in dict.fromkeys(name for bars in groups.values() for name in bars) if name != dashed]
    font = find_font([*groups, *names, title])
    rows = list(groups.values())
    thickness = 0.8 / max(len(names), 1)
    with drawing(path, 9, 0.3 * len(rows) * max(len(names), 1) + 1.5) as axes:
        for place, (name, shown) in enumerate(zip(names, _shown(names, font), strict=True)):
            found = [(row, *bars[name]) for row, bars in enumerate(rows) if name in bars]
            heights = [row + (place - (len(names) - 1) / 2) * thickness for row, _, _ in found]
            errors = [np.nan if deviation is None else deviation for _, _, deviation in found]
            drawn = axes.barh(heights, [length for _, length, _ in found], 0.95 * thickness, xerr=errors, label=shown)
            axes.bar_label(drawn, fmt="%.1f", fontsize=8, padding=2)
        lines = [(bars[dashed][0], row) for row, bars in enumerate(rows) if dashed in bars]
        if lines:
            lengths, places = np.array(lines).T
            axes.vlines(lengths, places - 0.45, places + 0.45, "black", linestyles="dashed", label=dashed)
        axes.set_yticks(range(len(rows)), _shown(list(groups), font), fontproperties=font)
        axes.invert_yaxis()
        axes.set(xlim=(0, 105), xlabel=x_label)
        axes.set_title(title if font else "", fontproperties=font)
        axes.grid(axis="x", alpha=0.3)
        if len(names) + bool(lines) > 1:
            axes.legend(prop=font, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def _shown(names: Sequence[str], font: FontProperties | None) -> list[str]:
    if font is not None:
        return list(names)
    ascii_parts = ["".join(filter(str.isascii, name)).strip() for name in names]
    return [part or f"#{number}" for number, part in enumerate(ascii_parts, start=1)]


class Mark(NamedTuple):
    """A point of a line, the standard deviations of its coordinates if it is a mean, and the text beside it."""

    x: float
    y: float
    y_deviation: float | None = None
    x_deviation: float | None = None
    label: str = ""


def draw_lines(
    path: Path,
    lines: Mapping[str, Sequence[Mark]],
    x_label: str,
    y_label: str,
    *,
    log_base: float | None = None,
    dots: Sequence[tuple[float, float]] = (),
) -> None:
    """Writes a PNG of lines through their marks, in their order.

    Args:
        lines: name in the legend -> marks.
        log_base: of a logarithmic x axis; None for a linear one.
        dots: drawn behind the lines, such as the runs that marks are means of.
    """
    with drawing(path, 7, 4.5) as axes:
        axes.plot([x for x, _ in dots], [y for _, y in dots], ".", color="#b0b8c0")
        for name, marks in lines.items():
            xs, ys, y_deviations, x_deviations, labels = zip(*marks, strict=True)
            bars = {"yerr": [value or 0.0 for value in y_deviations], "xerr": [value or 0.0 for value in x_deviations]}
            shown = {side: values for side, values in bars.items() if any(values)}
            axes.errorbar(xs, ys, **shown, marker="o", capsize=3, elinewidth=0.8, label=name)
            for x, y, label in zip(xs, ys, labels, strict=True):
                axes.annotate(label, (x, y), textcoords="offset points", xytext=(6, 6))
        if log_base is not None:
            axes.set_xscale("log", base=log_base)
            ticks = sorted({mark.x for marks in lines.values() for mark in marks})
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.minorticks_off()
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.margins(0.12)
        axes.grid(alpha=0.3)
        if any(lines):
            axes.legend()
