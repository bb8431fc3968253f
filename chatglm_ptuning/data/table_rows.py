"""Rows of CSV, TSV and Parquet files, and lines of plain text, read piece by piece."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chatglm_ptuning.data.row import BadRows, Row
from chatglm_ptuning.data.text_input import open_bytes, text_lines

TEXT_COLUMN = "text"
"""The column that the lines of a .txt file are given."""
_PARQUET_BATCH = 256


def separated_rows(path: Path, name: str, bad_rows: BadRows, delimiter: str) -> Iterator[Row]:
    """Rows of a CSV or TSV file whose first line names the columns; every value is text.

    Raises:
        ValueError: naming file and line, if the file is unreadable or its first line names no columns, or one twice;
            and as `bad_rows.add` for a row with more or fewer values, or with broken quotes.
    """
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    numbers = _LastLine()
    reader = csv.reader(numbers.of(text_lines(path, name, bad_rows)), delimiter=delimiter, strict=True)
    columns: list[str] | None = None
    found = False
    while True:
        start = numbers.last + 1
        try:
            values = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            bad_rows.add(f"{name}:{start}: not a row of values: {error}. Quotes inside a quoted value are doubled.")
            continue
        if not values:
            continue
        if columns is None:
            columns = _columns(values, name, start)
        elif len(values) != len(columns):
            bad_rows.add(
                f"{name}:{start}: {len(values)} values, but {len(columns)} columns ({', '.join(columns)}). A value "
                f"with {'tabs' if delimiter == chr(9) else 'commas'} or line breaks in it stands in double quotes."
            )
        else:
            found = True
            yield Row(zip(columns, values, strict=True), name, start)
    if not found and not bad_rows.count:
        raise ValueError(f"{name} is empty: it needs a line with the names of the columns, and rows below it.")


class _LastLine:
    """Remembers the number of the line that was read last: csv counts none that were skipped."""

    def __init__(self) -> None:
        self.last = 0

    def of(self, lines: Iterator[tuple[int, str]]) -> Iterator[str]:
        for number, line in lines:
            self.last = number
            yield line


def _columns(values: list[str], name: str, line: int) -> list[str]:
    columns = [value.strip() for value in values]
    repeated = sorted({column for column in columns if columns.count(column) > 1})
    if repeated or not all(columns):
        fault = f"names {', '.join(map(repr, repeated))} twice" if repeated else "has a column without a name"
        raise ValueError(f"{name}:{line}: the line with the names of the columns {fault}.")
    return columns


def parquet_rows(path: Path, name: str) -> Iterator[Row]:
    """Rows of a Parquet file; fields of nested objects that are null are left out, as Parquet fills them in.

    Raises:
        ValueError: naming the file, if it is missing, damaged or empty.
    """
    import pyarrow
    import pyarrow.parquet

    with open_bytes(path) as file:
        try:
            # Parquet is read from its end, which a gzip stream only has when it is unpacked.
            source = file if isinstance(file, io.BufferedReader) else io.BytesIO(file.read())
            table = pyarrow.parquet.ParquetFile(source)
            number = 0
            for batch in table.iter_batches(batch_size=_PARQUET_BATCH):
                for values in batch.to_pylist(maps_as_pydicts="lossy"):
                    number += 1
                    yield Row(
                        {key: _without_nulls(value) for key, value in values.items()}, name, number, has_lines=False
                    )
        except pyarrow.ArrowException as error:
            raise ValueError(f"{name} is not a Parquet file, or a damaged one: {error}") from error
    if not number:
        raise ValueError(f"{name} is empty: it has no rows.")


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def plain_text_rows(path: Path, name: str, bad_rows: BadRows) -> Iterator[Row]:
    """Every line that is not blank, as a row with the column `text`.

    Raises:
        ValueError: if the file is unreadable or empty, and as `bad_rows.add` for a line that is not UTF-8.
    """
    found = False
    for number, line in text_lines(path, name, bad_rows):
        if line.strip():
            found = True
            yield Row({TEXT_COLUMN: line.rstrip("\r\n")}, name, number)
    if not found and not bad_rows.count:
        raise ValueError(f"{name} is empty.")
