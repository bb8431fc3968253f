"""Rows of CSV, TSV and Parquet files, and lines of plain text, streamed."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from transformers.utils import logging

from chatglm_ptuning.data.sources.rows import BadRows, Row, plain_value
from chatglm_ptuning.data.sources.signatures import READ_AT_ONCE
from chatglm_ptuning.data.sources.text import BOM, data_suffix, kind_shown, not_utf8, open_bytes, open_text, text_lines

if TYPE_CHECKING:
    import pyarrow

logger = logging.get_logger(__name__)

TEXT_COLUMN = "text"
"""The column of the rows of a .txt file."""
_WAYS_OUT = {
    "\t": "give the file the suffix .tsv",
    ",": "give the file the suffix .csv",
    ";": "save it as CSV with commas",
}
_PARQUET_BATCH = 256
_CSV: dict[str, Any] = {"delimiter": ",", "strict": True}
_TSV: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
_QUOTED_TSV: dict[str, Any] = {"delimiter": "\t", "strict": True}
_MARKS = {",": "commas", "\t": "tabs"}


def table_rows(path: Path, bad_rows: BadRows) -> Iterator[Row]:
    """Rows of a CSV or TSV file, whose first line names the columns; every value is text.

    TSV has no quoting, as in the files that benchmarks publish: a double quote is text like any other, unless all names
    of columns are in quotes. The first value that looks quoted gives a warning, and so does the first value of a quoted
    file that seems to have swallowed rows. A line may also end in a carriage return alone. Where joined files repeat
    the names of the columns, that line is skipped.

    Raises:
        ValueError: naming file and line, if there are no rows, or the column names are missing or repeated; and as
            `bad_rows.add` for a row that is not UTF-8, has broken quotes, or has another number of values.
    """
    csv.field_size_limit(2**31 - 1)
    columns: list[str] | None = None
    found = False
    warned: set[str] = set()

    def warn(about: str, text: str) -> None:
        if about not in warned:
            warned.add(about)
            logger.warning(f"{path}:{number}: {text}")

    with open_text(path, newline="") as file:
        lines = _Lines(file)
        dialect = _dialect(path, lines)
        needs = "a CSV file" if dialect is _TSV else "double quotes"
        reader = csv.reader(lines, **dialect)
        while True:
            number = reader.line_num + 1
            lines.taken.clear()
            try:
                values = next(reader)
            except StopIteration:
                break
            except csv.Error as error:
                bad_rows.add(
                    f"{path}:{number}: not a row of values: {error}. Quotes inside a quoted value are doubled."
                )
                continue
            if fault := not_utf8(path, number, "".join(values)):
                bad_rows.add(fault)
            elif values and columns is None:
                columns = _columns(values, f"{path}:{number}", dialect["delimiter"])
            elif values and [value.strip() for value in values] == columns:
                warn("joined", "names the columns again, as joined files do. Such lines are skipped.")
            elif values and lines.taken[0] == BOM:
                bad_rows.add(
                    f"{path}:{number}: another file begins here (a byte order mark), but not with the columns "
                    f"{', '.join(columns)}. Name the files one by one, unjoined."
                )
            elif values and len(values) != len(columns):
                joined = " Two files were joined there without a line break." if BOM in "".join(values) else ""
                bad_rows.add(
                    f"{path}:{number}: {len(values)} values, but {len(columns)} columns ({', '.join(columns)}). A "
                    f"value with {_MARKS[dialect['delimiter']]} or line breaks in it needs {needs}.{joined}"
                )
            elif values:
                found = True
                if dialect is _TSV and (quoted := next(filter(_looks_quoted, values), None)):
                    warn(
                        "quotes",
                        f"the value {quoted[:30]} is in double quotes. They are read as text, because TSV has no "
                        "quoting. If they are not part of the text, save the file as CSV.",
                    )
                if lines.look_like_rows(dialect["delimiter"], len(columns)):
                    warn(
                        "swallowed",
                        f"a quoted value has line breaks in it, and each of its {len(lines.taken)} lines looks like a "
                        "row. If the quote is part of a text, write it twice and put the text in quotes.",
                    )
                yield Row(zip(columns, values, strict=True), str(path), number)
    if not found and not bad_rows.count:
        raise ValueError(f"{path} is empty: it needs a line with the names of the columns, and rows below it.")


class _Lines:
    """The lines of a file; byte order marks at their beginnings are taken off.

    Attributes:
        taken: the lines that were read last, a byte order mark as an entry of its own.
    """

    def __init__(self, file: TextIO) -> None:
        self.file = file
        self.taken: list[str] = []
        self.ahead: list[str] = []

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self.ahead.pop(0) if self.ahead else next(self.file)
        text = line.lstrip(BOM)
        self.taken += [BOM, text] if text != line else [text]
        return text

    def first(self) -> str:
        """The first line that is not blank, without reading it."""
        for line in self.file:
            self.ahead.append(line.lstrip(BOM))
            if self.ahead[-1].strip():
                return self.ahead[-1]
        return ""

    def look_like_rows(self, delimiter: str, count: int) -> bool:
        """Whether several lines were read for one row, each with as many values as there are columns."""
        several = count > 1 and len(self.taken) > 1
        return several and all(line.count(delimiter) == count - 1 for line in self.taken)


def _dialect(path: Path, lines: _Lines) -> dict[str, Any]:
    """How the values of a table are separated and quoted."""
    if data_suffix(path) != ".tsv":
        return _CSV
    names = lines.first().rstrip("\r\n").split("\t")
    return _QUOTED_TSV if all(map(_looks_quoted, names)) else _TSV


def _looks_quoted(value: str) -> bool:
    return len(value) > 1 and value[0] == value[-1] == '"'


def _columns(values: list[str], where: str, delimiter: str) -> list[str]:
    """The names of columns; the first may be empty, as pandas writes an index."""
    columns = [value.strip() for value in values]
    other = next((mark for mark in _WAYS_OUT if mark != delimiter and mark in values[0].strip()), None)
    if len(columns) == 1 and other:
        raise ValueError(
            f"{where}: the line with the names of the columns has {other!r} and no {delimiter!r}, which separates the "
            f"columns of this type of file: {_WAYS_OUT[other]}."
        )
    repeated = sorted({column for column in columns if columns.count(column) > 1})
    if repeated or not all(columns[1:]) or not any(columns):
        fault = f"names {', '.join(map(repr, repeated))} twice" if repeated else "has a column without a name"
        raise ValueError(f"{where}: the line with the names of the columns {fault}.")
    return columns


def parquet_rows(path: Path) -> Iterator[Row]:
    """Rows of a Parquet file, with values as of `plain_value`.

    Raises:
        ValueError: naming the file, if it is missing, damaged or empty.
    """
    import pyarrow
    import pyarrow.parquet

    number = 0
    with open_bytes(path) as file:
        start = file.peek(READ_AT_ONCE)[:READ_AT_ONCE]
        if not start.startswith(b"PAR1") and (kind := kind_shown(path, file, start)):
            raise ValueError(f"{path} is not a Parquet file: {kind}")
        try:
            # A Parquet file is read from its end, so a gzipped one is decompressed whole.
            source = file if isinstance(file, io.BufferedReader) else io.BytesIO(file.read())
            batches = pyarrow.parquet.ParquetFile(source).iter_batches(batch_size=_PARQUET_BATCH)
            rows = (row for batch in batches for row in _with_short_floats(batch).to_pylist(maps_as_pydicts="lossy"))
            for number, row in enumerate(rows, start=1):
                values = {key: plain_value(value) for key, value in row.items()}
                yield Row(values, str(path), number, has_lines=False)
        except pyarrow.ArrowException as error:
            raise ValueError(f"{path} is damaged or not a Parquet file: {error}") from error
    if not number:
        raise ValueError(f"{path} is empty: it has no rows.")


def _with_short_floats(batch: pyarrow.RecordBatch) -> pyarrow.RecordBatch:
    """Columns of float32 as the shortest numbers that mean the same: 0.1 instead of 0.10000000149011612."""
    import pyarrow

    for place, field in enumerate(batch.schema):
        if field.type == pyarrow.float32():
            shortest = batch.column(place).cast(pyarrow.string()).cast(pyarrow.float64())
            batch = batch.set_column(place, field.name, shortest)
    return batch


def plain_text_rows(path: Path, bad_rows: BadRows) -> Iterator[Row]:
    """Every line that is not blank, as a row with the column `text`.

    Raises:
        ValueError: if the file is unreadable or empty, and as `bad_rows.add` for a line that is not UTF-8.
    """
    found = False
    for number, line in text_lines(path, bad_rows):
        if line.strip():
            found = True
            yield Row({TEXT_COLUMN: line.rstrip("\r\n")}, str(path), number)
    if not found and not bad_rows.count:
        raise ValueError(f"{path} is empty.")
