"""Tables of results, in Markdown and on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table as TerminalTable


@dataclass(frozen=True)
class Table:
    """A table of texts; the first column names the rows, and columns that are empty in every row are left out."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""

    def markdown(self) -> str:
        """The table in Markdown, with the title as a heading above it."""
        used = self._used()
        lines = ["| " + " | ".join(_cell(row[place]) for place in used) + " |" for row in (self.headings, *self.rows)]
        lines.insert(1, "|---|" + "---:|" * (len(used) - 1))
        return (f"## {self.title}\n\n" if self.title else "") + "\n".join(lines)

    def show(self) -> None:
        """Prints the table."""
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
    """A mean with its standard deviation, if there is one."""
    if mean is None:
        return "-"
    return f"{mean:{form}}" + ("" if deviation is None else f" ± {deviation:{deviation_form}}")
