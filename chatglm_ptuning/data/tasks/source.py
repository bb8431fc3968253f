"""One split of a task as its reader gets it: where its rows are, and what its columns are called."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from chatglm_ptuning.data.sources.files import DataFile, DataSource
from chatglm_ptuning.data.sources.json_rows import json_document
from chatglm_ptuning.data.sources.rows import BadRows, Row, fail
from chatglm_ptuning.data.sources.text import data_suffix
from chatglm_ptuning.data.tasks.checked_yaml import nearest
from chatglm_ptuning.data.tasks.examples import Example
from chatglm_ptuning.data.tasks.task import Task

Unit = TypeVar("Unit")
_WITHOUT_GOLD = ("test", "unlabel")


@dataclass(frozen=True)
class SplitSource:
    """Where the rows of one split are, for a reader.

    Attributes:
        sources: what makes up the split.
        fields: role -> column, as in these sources.
        subject: of an examination.
        bad_rows: counts the rows that cannot be understood.
        limit: so many examples are wanted at most.
    """

    task: Task
    split: str
    sources: Sequence[DataSource] = ()
    fields: Mapping[str, str] = field(default_factory=dict)
    subject: str | None = None
    bad_rows: BadRows = field(default_factory=BadRows)
    limit: int | None = None

    @property
    def needs_gold(self) -> bool:
        """Whether every row must have its label or answer: benchmarks leave them out of test files alone."""
        return needs_gold(self.split)

    @property
    def paths(self) -> list[Path]:
        """The files among the sources."""
        return [source.path for source in self.sources if isinstance(source, DataFile)]

    @property
    def has_flat_rows(self) -> bool:
        """Whether a benchmark of documents comes as a table with a row for each question, as hubs have them."""
        return all(data_suffix(path) == ".parquet" for path in self.paths)

    def rows(self, *, json_in_text: bool = True) -> Iterator[Row]:
        """The rows of all sources, of any type.

        Args:
            json_in_text: read a .txt file as JSON if it starts with `{` or `[`.
        """
        for source in self.sources:
            yield from source.rows(self.bad_rows, json_in_text=json_in_text)

    def each(
        self, units: Iterable[Unit], read: Callable[[Unit, int], Iterable[Example]], first: int = 0
    ) -> Iterator[Example]:
        """The examples of rows, or of whatever else a file holds; what cannot be understood is a bad row.

        Args:
            read: the examples of one, given its place; raises ValueError naming file and line.
            first: the place of the first one.

        Raises:
            ValueError: as `bad_rows.add`.
        """
        for index, unit in enumerate(units, start=first):
            try:
                examples = list(read(unit, index))
            except ValueError as error:
                self.bad_rows.add(str(error))
                continue
            yield from examples

    def documents(self, expected: str) -> list[tuple[Path, Any]]:
        """Each file's one JSON value; for benchmarks whose files are not rows.

        Args:
            expected: what that value is, for the message.
        """
        return [(path, json_document(path, expected)) for path in self.paths]

    def get(self, row: Row, role: str) -> Any:
        """The value of a role; None if the task or the row does not have it."""
        column = self.fields.get(role)
        return None if column is None else value_of(row, column, None)

    def text(self, row: Row, role: str) -> str:
        """The value of a role as text; a list of texts is joined by `、`.

        Raises:
            ValueError: naming file, line and column, if it is missing or no text.
        """
        column = self.fields[role]
        value = value_of(row, column, _ABSENT)
        if value is _ABSENT:
            self.missing(row, role, column)
        return as_text(row, value, column)

    def example_id(self, row: Row, index: int) -> int | str:
        """The id that the row has, or else its place.

        Raises:
            ValueError: naming file and line, if it is neither a whole number nor text.
        """
        value = self.get(row, "id")
        if value is None:
            others = (row.get(name) for name in ("idx", "id"))  # CLUE has either, also in files of one task
            value = next((other for other in others if type(other) in (int, str) or _is_whole(other)), None)
        if value is None or value == "":
            return index
        if _is_whole(value):
            return int(value)
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            fail(row, f"the id must be a whole number or text, found {str(value)[:60]}.")
        return value

    def missing(self, row: Row, role: str, column: str) -> NoReturn:
        """Refuses a row without a column, or with nothing in it."""
        value = value_of(row, column, _ABSENT)
        if value is not _ABSENT:
            no_label = " (of a text without any label, an empty list)" if self.task.multi_label else ""
            fail(
                row,
                f"the field '{column}', which the task {self.task.name} reads as its {role}, is {json.dumps(value)}; "
                f"the split {self.split} needs one in every row{no_label}.",
            )
        fail(
            row,
            f"there is no field '{column}'{nearest(column, list(row))}, which the task {self.task.name} reads as its "
            f"{role}; the row has {', '.join(row) or 'nothing'}.",
        )

    def label(self, row: Row) -> str | None:
        """The label of a row; None in a split that may go without.

        Raises:
            ValueError: if it is missing where it is needed, or unknown.
        """
        value = self.get(row, "label")
        key = self._label_key(value)
        if value is None or key == "" or (key == "-1" and key not in self.task.labels):
            return self._without_label(row)
        return self._known_label(row, key)

    def labels(self, row: Row) -> tuple[str, ...] | None:
        """All labels of a row of a multi-label task, in the order of the task; None in a split that may go without.

        An empty list is a text without any of the labels, and so is empty text where labels are needed.

        Raises:
            ValueError: as `label`.
        """
        value = self.get(row, "label")
        if value is None or (value == "" and not self.needs_gold):
            return self._without_label(row)
        parts = value if isinstance(value, list) else str(value).split(self.task.label_separator)
        keys = [self._label_key(part) for part in parts]
        known = {self._known_label(row, key) for key in keys if key}
        return tuple(key for key in self.task.labels if key in known)

    def _label_key(self, value: Any) -> str:
        """A label as the task may know it; tables and hubs give whole numbers as floats."""
        if isinstance(value, bool):
            return json.dumps(value)
        if _is_whole(value) and str(value) not in self.task.labels:
            return str(int(value))
        return str(value).strip()

    def _without_label(self, row: Row) -> None:
        if self.needs_gold and "label" not in self.fields:
            raise ValueError(f"{self.task.origin}: 'fields' does not say which column is the label.")
        if self.needs_gold:
            self.missing(row, "label", self.fields["label"])

    def _known_label(self, row: Row, key: str) -> str:
        if key in self.task.labels or key in self.task.drop_labels:
            return key
        known = list(self.task.labels)
        shown = ", ".join(known[:20]) + (f", ... ({len(known)} in all)" if len(known) > 20 else "")
        fail(row, f"the task {self.task.name} has no label '{key}'{nearest(key, known)}; its labels are {shown}.")


def needs_gold(split: str) -> bool:
    """Whether every row of a split must have its label or answer."""
    return not split.startswith(_WITHOUT_GOLD)


_ABSENT = object()


def _is_whole(value: Any) -> bool:
    """Whether a float is a whole number, as tables with gaps have them."""
    return isinstance(value, float) and value.is_integer()


def value_of(row: Mapping[str, Any], column: str, absent: Any) -> Any:
    """The value of a column; a dot in its name goes into an object, unless a column has that very name."""
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return absent
        value = value[part]
    return value


def as_text(row: Row, value: Any, column: str) -> str:
    """Text of a JSON value that stands for text.

    Raises:
        ValueError: naming file, line and column, for null, an object, or a list of other things than texts.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, (bool, int, float)):
        return json.dumps(value)
    if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
        return "、".join(value)
    shown = json.dumps(value, ensure_ascii=False)
    fail(row, f"the field '{column}' must be text, found {shown[:60]}{'...' if len(shown) > 60 else ''}.")


def nearest_place(text: str, part: str, place: int) -> int | None:
    """Where a part of a text begins: at `place`, or else where it stands nearest to it; None if it stands nowhere."""
    if place >= 0 and text.startswith(part, place):
        return place
    places = []
    found = text.find(part)
    while found >= 0:
        places.append(found)
        found = text.find(part, found + 1)
    return min(places, key=lambda start: abs(start - place), default=None)
