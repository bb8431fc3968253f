"""One split of a task as its reader gets it: the sources of its rows, and the names of its columns."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import TypeAdapter, ValidationError

from chatglm_ptuning.data.sources.files import DataFile, DataSource
from chatglm_ptuning.data.sources.rows import BadRows, Row, fail
from chatglm_ptuning.data.sources.text import data_suffix
from chatglm_ptuning.data.tasks.checked_yaml import fault_of, nearest
from chatglm_ptuning.data.tasks.examples import Example
from chatglm_ptuning.data.tasks.task import Task
from chatglm_ptuning.exact_json import dumps

Unit = TypeVar("Unit")
Value = TypeVar("Value")
Question = tuple[str, Any, Any, int | str]
"""Its place for messages, its context, itself, and its id if it has none; contents are not checked."""

_WITHOUT_GOLD = ("test", "unlabel")
_ABSENT = object()


@dataclass(frozen=True)
class SplitSource:
    """Where the rows of one split are.

    Attributes:
        sources: files and hub datasets that make up the split.
        fields: role -> column in these sources.
        subject: of an examination.
        bad_rows: counts the rows that cannot be read.
        limit: maximum number of examples to read.
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
        """Whether every row must have its label or answer."""
        return needs_gold(self.split)

    @property
    def paths(self) -> list[Path]:
        """The files among the sources."""
        return [source.path for source in self.sources if isinstance(source, DataFile)]

    @property
    def has_flat_rows(self) -> bool:
        """Whether all sources are tables, as hubs have them also for benchmarks whose files are not tables."""
        return all(data_suffix(path) == ".parquet" for path in self.paths)

    def rows(self, *, json_in_text: bool = True) -> Iterator[Row]:
        """The rows of all sources.

        Args:
            json_in_text: read a .txt file as JSON if it starts with `{` or `[`.
        """
        for source in self.sources:
            yield from source.rows(self.bad_rows, json_in_text=json_in_text)

    def questions(self, of_file: Callable[[Path], Iterable[Question]]) -> Iterator[Question]:
        """The questions of a benchmark with nested documents; on hubs it has a row for each question instead.

        Args:
            of_file: returns the questions of a file; raises ValueError naming the place of unexpected content.
        """
        if self.has_flat_rows:
            return ((row.where, row.get("context"), row, index) for index, row in enumerate(self.rows()))
        return (question for path in self.paths for question in of_file(path))

    def each(self, units: Iterable[Unit], read: Callable[[Unit, int], Iterable[Example]]) -> Iterator[Example]:
        """The examples of rows, or of whatever units a file has. A unit that cannot be read is a bad row.

        Args:
            read: returns the examples of a unit, given its index; raises ValueError naming file and line.

        Raises:
            ValueError: as `bad_rows.add`.
        """
        for index, unit in enumerate(units):
            try:
                examples = list(read(unit, index))
            except ValueError as error:
                self.bad_rows.add(str(error))
                continue
            yield from examples

    def get(self, row: Row, role: str) -> Any:
        """The value of a role; None if the task or the row does not have it."""
        column = self.fields.get(role)
        return None if column is None else _value_of(row, column, None)

    def text(self, row: Row, role: str) -> str:
        """The value of a role as text; a list of texts is joined by `、`.

        Raises:
            ValueError: naming file, line and column, if it is missing or not text.
        """
        column = self.fields[role]
        value = _value_of(row, column, _ABSENT)
        if value is _ABSENT:
            self.missing(row, role)
        return as_text(row, value, column)

    def example_id(self, row: Row, index: int) -> int | str:
        """The id of a row, or `index` if it has none.

        Raises:
            ValueError: naming file and line, if the id is neither a whole number nor text.
        """
        value = self.get(row, "id")
        if value is None:
            others = (row.get(name) for name in ("idx", "id"))  # CLUE has either, even in files of one task
            value = next((other for other in others if type(other) in (int, str) or is_whole_number(other)), None)
        if value is None or value == "":
            return index
        if is_whole_number(value):
            return int(value)
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            fail(row, f"the id must be a whole number or text, found {str(value)[:60]}.")
        return value

    def missing(self, row: Row, role: str) -> NoReturn:
        """Refuses a row in which the column of a role is missing or empty.

        Raises:
            ValueError: always, naming file, line, column and role; or the task file, if it does not name the column.
        """
        if role not in self.fields:
            raise ValueError(f"{self.task.origin}: 'fields' does not name the column of '{role}'.")
        column = self.fields[role]
        value = _value_of(row, column, _ABSENT)
        if value is not _ABSENT:
            no_label = " (for a text without any label, an empty list)" if self.task.multi_label else ""
            fail(
                row,
                f"the field '{column}', the {role} of the task {self.task.name}, is {json.dumps(value)}; the split "
                f"{self.split} needs one in every row{no_label}.",
            )
        fail(
            row,
            f"there is no field '{column}'{nearest(column, list(row))}, the {role} of the task {self.task.name}; the "
            f"row has {', '.join(row) or 'nothing'}.",
        )


def needs_gold(split: str) -> bool:
    """Whether every row of a split must have its label or answer; benchmarks only leave them out of test files."""
    return not split.startswith(_WITHOUT_GOLD)


def is_whole_number(value: Any) -> bool:
    """Whether a value is a float without a fraction, as in columns of whole numbers with gaps."""
    return isinstance(value, float) and value.is_integer()


def _value_of(row: Mapping[str, Any], column: str, absent: Any) -> Any:
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
    """A JSON value as text.

    Raises:
        ValueError: naming file, line and column, for null, an object, or a list of anything but texts.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, (bool, int, float)):
        return dumps(value)
    if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
        return "、".join(value)
    shown = json.dumps(value, ensure_ascii=False)
    fail(row, f"the field '{column}' must be text, found {shown[:60]}{'...' if len(shown) > 60 else ''}.")


def validated(kind: type[Value], value: Any, where: str, expected: str) -> Value:
    """A JSON value as what a benchmark publishes, checked by pydantic.

    Args:
        kind: a type, or a dataclass for objects; further keys are ignored.
        where: file and place, for messages.
        expected: the form that is expected, for messages.

    Raises:
        ValueError: naming the place and the key that is missing or wrong.
    """
    try:
        return _adapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{where}: {fault_of(first, first['loc'])}; expected {expected}.") from error


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def nearest_place(text: str, part: str, place: int) -> int | None:
    """The start of a part of a text: `place`, or else the nearest start; None if the text does not contain it."""
    if place >= 0 and text.startswith(part, place):
        return place
    places = []
    found = text.find(part)
    while found >= 0:
        places.append(found)
        found = text.find(part, found + 1)
    return min(places, key=lambda start: abs(start - place), default=None)


def spellings(path: Path) -> tuple[Path, Path]:
    """A file, and the same file gzipped."""
    return path, path.with_name(f"{path.name}.gz")
