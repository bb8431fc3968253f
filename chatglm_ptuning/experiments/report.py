"""What every experiment leaves for people: tables, in Markdown and on the terminal, and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table as TerminalTable

from chatglm_ptuning.evaluation.figures import find_font, new_figure, save_figure


@dataclass(frozen=True)
class Table:
    """A table of texts whose first column names the rows; columns that are empty in every row are not shown."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""

    def markdown(self) -> str:
        """As a table of Markdown, with the title as a heading above it."""
        used = self._used()
        lines = ["| " + " | ".join(_cell(row[place]) for place in used) + " |" for row in (self.headings, *self.rows)]
        lines.insert(1, "|---|" + "---:|" * (len(used) - 1))
        return (f"## {self.title}\n\n" if self.title else "") + "\n".join(lines)

    def show(self) -> None:
        """Prints it."""
        table = TerminalTable(title=escape(self.title), title_justify="left")
        used = self._used()
        for place in used:
            table.add_column(escape(self.headings[place]), justify="right" if place else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*(escape(row[place]) for place in used))
        Console().print(table)

    def _used(self) -> list[int]:
        return [place for place in range(len(self.headings)) if place == 0 or any(row[place] for row in self.rows)]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def spread(mean: float | None, deviation: float | None, form: str = ".2f", deviation_form: str = ".2f") -> str:
    """A mean with its standard deviation, where there are several runs."""
    if mean is None:
        return "-"
    return f"{mean:{form}}" + ("" if deviation is None else f" ± {deviation:{deviation_form}}")


class Mark(NamedTuple):
    """A point of a line, with the deviations of its coordinates where it is a mean, and what is written beside it."""

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
    figure, axes = new_figure(7, 4.5)
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
    save_figure(figure, path)


Bars = Mapping[str, tuple[float, float | None]]
"""Name of a bar -> its height and its deviation."""


def draw_bars(path: Path, groups: Mapping[str, Bars], captions: Sequence[str], y_label: str, dashed: str = "") -> None:
    """Writes a PNG of grouped bars with their deviations; what `dashed` names is a line across its group instead.

    Names that no font of this machine can show are numbered, in their order.

    Args:
        groups: name of a group -> its bars.
        captions: a second line under the name of each group.
    """
    names = [name for name in dict.fromkeys(name for bars in groups.values() for name in bars) if name != dashed]
    font = find_font([*groups, *names])
    options: dict[str, Any] = {"fontproperties": font} if font else {}
    width = 0.8 / max(len(names), 1)
    figure, axes = new_figure(max(6.0, 1.5 + len(groups) * max(1.2, 0.4 * len(names))), 4.5)
    for place, name in enumerate(names):
        found = [(index, *bars[name]) for index, bars in enumerate(groups.values()) if name in bars]
        axes.bar(
            [index + (place - (len(names) - 1) / 2) * width for index, _, _ in found],
            [height for _, height, _ in found],
            width * 0.95,
            yerr=[np.nan if deviation is None else deviation for _, _, deviation in found],
            capsize=3,
            label=name if font or name.isascii() else f"method {place + 1}",
            color=f"C{place % 10}",
        )
    lines = [(index, bars[dashed][0]) for index, bars in enumerate(groups.values()) if dashed in bars]
    for index, height in lines:
        label = dashed if index == lines[0][0] else None
        axes.hlines(height, index - 0.45, index + 0.45, colors="black", linestyles="dashed", label=label)
    shown = [name if font or name.isascii() else f"group {place + 1}" for place, name in enumerate(groups)]
    ticks = [f"{name}\n{caption}" for name, caption in zip(shown, captions, strict=True)]
    axes.set_xticks(range(len(groups)), ticks, **options)
    axes.set(ylabel=y_label, ylim=(0, None))
    axes.grid(axis="y", alpha=0.3)
    axes.legend(prop=font, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    save_figure(figure, path)
