"""Pictures of what went wrong: the confusion matrix, and the scores of every entity type."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from chatglm_ptuning.files import write_atomically
from chatglm_ptuning.metrics.entities import EntityScore

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties

_ALL_NUMBERS = 30
"""Largest number of labels for which each cell shows its count."""
_ALL_NAMES = 80
"""Largest number of labels that are all named on the axes."""
NO_LABEL = "-"
"""Column of the predictions that are no label."""


def find_font(texts: Iterable[str]) -> FontProperties | None:
    """A font of this machine that has every character of the texts; None if there is none.

    Matplotlib's own fonts have no Chinese characters. Any installed font that has them serves (on Debian and Ubuntu
    `apt install fonts-noto-cjk` or `fonts-wqy-microhei`).
    """
    from matplotlib import font_manager, ft2font

    needed = {ord(character) for text in texts for character in text if not character.isspace()}
    default = font_manager.FontProperties()
    paths = [font_manager.findfont(default), *sorted({entry.fname for entry in font_manager.fontManager.ttflist})]
    # Fonts that are installed since matplotlib listed them come last.
    paths += [path for path in sorted(font_manager.findSystemFonts()) if path not in paths]
    for path in paths:
        if "LastResort" in path:  # comes with matplotlib and draws a box with the number of any character
            continue
        try:
            face = ft2font.FT2Font(path)
        except (OSError, RuntimeError):
            continue
        if all(face.get_char_index(character) for character in needed):
            return font_manager.FontProperties(fname=path)
    return None


def draw_confusion_matrix(path: Path, matrix: np.ndarray, names: Sequence[str], title: str = "") -> list[str]:
    """Writes a PNG of shares per expected label, with the counts in the cells where there is room.

    If no font has the characters of the names, labels are numbered from 0 in the picture instead.

    Args:
        matrix: `[num_labels, num_labels + 1]` of `classification.confusion_matrix`.
        names: of the labels, as they are to be read.

    Returns:
        The names as they stand in the picture.
    """
    font = find_font([*names, title])
    shown = list(names) if font else [str(index) for index in range(len(names))]
    if not matrix[:, -1].any():
        matrix = matrix[:, :-1]
    columns = [*shown, NO_LABEL][: matrix.shape[1]]
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = min(max(4.0, 0.35 * len(names) + 2), 24.0)
    figure, axes = new_figure(side + 1, side)
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(picture, ax=axes, fraction=0.046, label="share of the expected label")
    step = -(-len(names) // _ALL_NAMES)
    options: dict[str, Any] = {"fontproperties": font} if font else {}
    axes.set_xticks(range(0, len(columns), step), columns[::step], rotation=90, **options)
    axes.set_yticks(range(0, len(shown), step), shown[::step], **options)
    axes.set(xlabel="predicted", ylabel="expected")
    axes.set_title(title if font else "labels by their number, see metrics.json", **options)
    if len(names) <= _ALL_NUMBERS:
        for (row, column), count in np.ndenumerate(matrix):
            if count:
                colour = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=8)
    save_figure(figure, path)
    return shown


def draw_entity_table(path: Path, table: Mapping[str, EntityScore], names: Mapping[str, str], title: str = "") -> None:
    """Writes a PNG with precision, recall, F1 and number of each entity type, and a bar for F1.

    Args:
        names: entity type -> its name to be read; used if a font has its characters, else the type itself.
    """
    font = find_font([*names.values(), title])
    options: dict[str, Any] = {"fontproperties": font} if font else {}
    rows = sorted(table.items(), key=lambda entry: entry[1].f1)
    labels = [
        f"{f'{names[entity]} ' if font and entity in names else ''}{entity}   P {score.precision:.1f}  "
        f"R {score.recall:.1f}  F1 {score.f1:.1f}  n {score.support}"
        for entity, score in rows
    ]
    figure, axes = new_figure(9, 0.4 * len(rows) + 1.5)
    axes.barh(range(len(rows)), [score.f1 for _, score in rows], color="#4878a8")
    axes.set_yticks(range(len(rows)), labels, **options)
    axes.set(xlim=(0, 100), xlabel="F1 (%)")
    axes.set_title(title if font else "", **options)
    save_figure(figure, path)


def draw_accuracies(
    path: Path, columns: Mapping[str, Mapping[str, float]], names: Mapping[str, str], title: str
) -> None:
    """Writes a PNG with a bar for every subject and category of an examination, one beside the other for each model.

    Args:
        columns: model -> subject or category -> accuracy in percent; the same ones for all.
        names: subject -> its name to be read; used if a font has its characters, else the subject alone.
    """
    font = find_font([*names.values(), title])
    options: dict[str, Any] = {"fontproperties": font} if font else {}
    rows = list(next(iter(columns.values())))
    labels = [f"{names[row]} {row}" if font and row in names else row for row in rows]
    figure, axes = new_figure(9, 0.25 * len(rows) * len(columns) + 1.5)
    thickness = 0.8 / len(columns)
    for place, (model, accuracies) in enumerate(columns.items()):
        heights = [row + (place - (len(columns) - 1) / 2) * thickness for row in range(len(rows))]
        bars = axes.barh(heights, [accuracies[row] for row in rows], thickness, label=model)
        axes.bar_label(bars, fmt="%.1f", fontsize=8, padding=2)
    axes.axvline(25, color="grey", linestyle=":", label="chance")
    axes.set_yticks(range(len(rows)), labels, **options)
    axes.invert_yaxis()
    axes.set(xlim=(0, 105), xlabel="accuracy (%)")
    axes.set_title(title if font else "", **options)
    axes.legend()
    save_figure(figure, path)


def new_figure(width: float, height: float) -> tuple[Figure, Any]:
    """A figure of so many inches with one pair of axes, which needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a figure as a PNG."""
    with write_atomically(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
