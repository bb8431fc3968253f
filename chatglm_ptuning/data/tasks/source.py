"""One split of a task as its reader gets it: found files or rows of a hub, and what its columns are called."""

from __future__ import annotations

import csv
import difflib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from chatglm_ptuning.data.forms.fields import fail
from chatglm_ptuning.data.json_rows import json_rows
from chatglm_ptuning.data.row import BadRows, Row
from chatglm_ptuning.data.tasks.task import Task
from chatglm_ptuning.data.text_input import read_text

_WITHOUT_GOLD = ("test", "unlabel")
_TABLES = {".tsv": "\t", ".csv": ","}


@dataclass(frozen=True)
class SplitSource:
    """Where the rows of one split are, for a reader.

    Attributes:
        paths: the files that make up the split; empty if `hub_rows` are given.
        hub_rows: rows that a hub gave.
        fields: role -> column, as in these files or rows.
        subject: of an examination.
    """

    task: Task
    split: str
    paths: tuple[Path, ...] = ()
    hub_rows: tuple[Row, ...] | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    subject: str | None = None

    @property
    def needs_gold(self) -> bool:
        """Whether every row must have its label or answer: benchmarks leave them out of test files alone."""
        return not self.split.startswith(_WITHOUT_GOLD)

    def rows(self) -> list[Row]:
        """The rows of all files, whatever kind of table they are."""
        if self.hub_rows is not None:
            return list(self.hub_rows)
        return [row for path in self.paths for row in read_table(path)]

    def documents(self, expected: str) -> list[tuple[Path, Any]]:
        """Each file's one JSON value; for benchmarks whose files are not rows.

        Args:
            expected: what that value is, for the message.
        """
        return [(path, _read_json(path, expected)) for path in self.paths]

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
        near = difflib.get_close_matches(column, row, n=1, cutoff=0.5)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        fail(
            row,
            f"there is no field '{column}', which the task {self.task.name} reads as its {role}; the row has "
            f"{', '.join(row) or 'nothing'}.{hint}",
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
        near = difflib.get_close_matches(key, self.task.labels, n=1, cutoff=0.5)
        hint = f" (did you mean '{near[0]}'?)" if near else ""
        known = list(self.task.labels)
        shown = ", ".join(known[:20]) + (f", ... ({len(known)} in all)" if len(known) > 20 else "")
        fail(row, f"the task {self.task.name} has no label '{key}'{hint}; its labels are {shown}.")


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


def read_table(path: Path) -> list[Row]:
    """The rows of JSON, JSON lines, TSV (without quoting) or CSV with a line of headings; any of them may be gzipped.

    Raises:
        ValueError: naming the file and line of what cannot be read.
    """
    suffix = Path(path.name.removesuffix(".gz")).suffix
    if suffix not in _TABLES:
        return list(json_rows(path, str(path), BadRows()))
    # newline="" inside: a quoted cell of a CSV may hold line feeds.
    lines = io.StringIO(read_text(path), newline="")
    quoting = csv.QUOTE_NONE if suffix == ".tsv" else csv.QUOTE_MINIMAL
    reader = csv.reader(lines, delimiter=_TABLES[suffix], quoting=quoting)
    try:
        headings = next(reader, None)
        if not headings:
            raise ValueError(f"{path} is empty; its first line must be the headings of the columns.")
        rows, line = [], reader.line_num + 1
        for cells in reader:
            if cells and len(cells) != len(headings):
                raise ValueError(
                    f"{path}:{line}: {len(cells)} cells under {len(headings)} headings ({', '.join(headings)})."
                )
            if cells:
                rows.append(Row(zip(headings, cells, strict=True), str(path), line))
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: not a table: {error}.") from error
    if not rows:
        raise ValueError(f"{path} has headings and no rows.")
    return rows


def find_files(task: Task, source: Path, split: str, subject: str | None = None) -> tuple[Path, ...]:
    """The files of a split in a folder as it was published, or in one of its subfolders of the task's name.

    Args:
        source: the folder; or one file, which is then the split.

    Raises:
        ValueError: if the task has no such split, or a file is missing, naming both and what is there instead.
    """
    if split not in task.files:
        near = difflib.get_close_matches(split, task.files, n=1, cutoff=0.4)
        hint = f" (did you mean '{near[0]}'?)" if near else ""
        raise ValueError(f"The task {task.name} has no split '{split}'{hint}; it has {', '.join(task.files)}.")
    if source.is_file():
        return (source,)
    if not source.is_dir():
        raise ValueError(
            f"{source} does not exist. Name the folder with the files of {task.name}; or, online, its place on a hub: "
            "huggingface, modelscope, huggingface:OWNER/NAME or modelscope:OWNER/NAME."
        )
    bases = [source, *(source / folder for folder in (*task.folders, task.name) if (source / folder).is_dir())]
    wanted = [tuple(name.format(subject=subject) for name in names) for names in task.files[split]]
    for base in bases:
        for names in wanted:
            found = [next((path for path in spellings(base / name) if path.is_file()), None) for name in names]
            if all(found):
                return tuple(path for path in found if path is not None)
            if any(found):
                missing = [name for name, path in zip(names, found, strict=True) if path is None]
                raise ValueError(
                    f"{base} has only a part of {task.name}, split {split}: {', '.join(missing)} is missing."
                )
    there = sorted(child.name for child in source.iterdir())
    is_of_a_hub = any(any(source.glob(pattern)) for pattern in ("*.parquet", "*/*.parquet"))
    raise ValueError(
        f"{source} has no file of {task.name}, split {split}: looked for {' or '.join(' + '.join(n) for n in wanted)}"
        f" in {', '.join(dict.fromkeys(str(base) for base in bases))}; the folder holds "
        f"{', '.join(there[:12]) + (', ...' if len(there) > 12 else '') or 'nothing'}."
        + (f" A copy of a hub's repository is read by huggingface:{source}." if is_of_a_hub else "")
    )


def spellings(path: Path) -> tuple[Path, Path]:
    """A file, and the same gzipped."""
    return path, path.with_name(f"{path.name}.gz")


def _read_json(path: Path, expected: str) -> Any:
    text = read_text(path)
    if not text.strip():
        raise ValueError(f"{path} is empty; expected {expected}.")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}:{error.lineno}: not valid JSON: {error.msg} (column {error.colno}); expected {expected}."
        ) from error
    except RecursionError as error:
        raise ValueError(f"{path}: nested too deeply.") from error


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
