"""Rows of CSV, TSV and Parquet files, and lines of plain text, read piece by piece."""

from __future__ import annotations

import csv
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from chatglm_ptuning.data.sources.rows import BadRows, Row, without_nulls
from chatglm_ptuning.data.sources.text import open_bytes, text_lines

TEXT_COLUMN = "text"
"""The column that the lines of a .txt file are given."""
_PARQUET_BATCH = 256
_AFTER_LONE_CARRIAGE_RETURN = re.compile("(?<=\r)(?=[^\n])")


def csv_rows(path: Path, bad_rows: BadRows) -> Iterator[Row]:
    """Rows of a CSV file, whose first line names the columns; every value is text.

    Raises:
        ValueError: as `_rows_of_table`; and as `bad_rows.add` for a row with broken quotes.
    """
    return _rows_of_table(
        path, _csv_values(path, bad_rows), bad_rows, "commas or line breaks in it needs double quotes"
    )


def tsv_rows(path: Path, bad_rows: BadRows) -> Iterator[Row]:
    """Rows of a TSV file, whose first line names the columns; every value is text.

    There is no quoting, as in the TSV files that benchmarks publish: a double quote is text like any other.

    Raises:
        ValueError: as `_rows_of_table`.
    """
    return _rows_of_table(path, _tsv_values(path, bad_rows), bad_rows, "tabs or line breaks in it needs a CSV file")


def _csv_values(path: Path, bad_rows: BadRows) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    last = 0

    def lines() -> Iterator[str]:
        nonlocal last
        for last, line in _table_lines(path, bad_rows):  # noqa: B007
            yield line

    reader = csv.reader(lines(), strict=True)
    while True:
        start = last + 1
        try:
            yield start, next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            bad_rows.add(f"{path}:{start}: not a row of values: {error}. Quotes inside a quoted value are doubled.")


def _tsv_values(path: Path, bad_rows: BadRows) -> Iterator[tuple[int, list[str]]]:
    for number, line in _table_lines(path, bad_rows):
        line = line.rstrip("\r\n")
        yield number, line.split("\t") if line else []


def _table_lines(path: Path, bad_rows: BadRows) -> Iterator[tuple[int, str]]:
    """Numbered lines, which may also end in a carriage return alone."""
    more = 0
    for number, line in text_lines(path, bad_rows):
        for place, part in enumerate(_AFTER_LONE_CARRIAGE_RETURN.split(line)):
            yield number + more + place, part
        more += place


def _rows_of_table(path: Path, lines: Iterator[tuple[int, list[str]]], bad_rows: BadRows, needs: str) -> Iterator[Row]:
    """Rows of the values of lines, of which the first names the columns.

    Args:
        needs: what a value needs that cannot stand there as it is, for a message.

    Raises:
        ValueError: naming file and line, if there are no rows, or the first line names no columns, or one twice; and
            as `bad_rows.add` for a row with more or fewer values.
    """
    columns: list[str] | None = None
    found = False
    for number, values in lines:
        if not values:
            continue
        if columns is None:
            columns = _columns(values, f"{path}:{number}")
        elif len(values) != len(columns):
            bad_rows.add(
                f"{path}:{number}: {len(values)} values, but {len(columns)} columns ({', '.join(columns)}). A value "
                f"with {needs}."
            )
        else:
            found = True
            yield Row(zip(columns, values, strict=True), str(path), number)
    if not found and not bad_rows.count:
        raise ValueError(f"{path} is empty: it needs a line with the names of the columns, and rows below it.")


def _columns(values: list[str], where: str) -> list[str]:
    """The names of columns; the first may be empty, as pandas writes an index."""
    columns = [value.strip() for value in values]
    repeated = sorted({column for column in columns if columns.count(column) > 1})
    if repeated or not all(columns[1:]) or not any(columns):
        fault = f"names {', '.join(map(repr, repeated))} twice" if repeated else "has a column without a name"
        raise ValueError(f"{where}: the line with the names of the columns {fault}.")
    return columns


def parquet_rows(path: Path) -> Iterator[Row]:
    """Rows of a Parquet file; fields of nested objects that are null are left out.

    Raises:
        ValueError: naming the file, if it is missing, damaged or empty.
    """
    import pyarrow
    import pyarrow.parquet

    with open_bytes(path) as file:
        try:
            # Parquet is read from its end, which a gzip stream only has when it is unpacked.
            source = file if isinstance(file, io.BufferedReader) else io.BytesIO(file.read())
            number = 0
            for batch in pyarrow.parquet.ParquetFile(source).iter_batches(batch_size=_PARQUET_BATCH):
                for values in batch.to_pylist(maps_as_pydicts="lossy"):
                    number += 1
                    named = {key: without_nulls(value) for key, value in values.items()}
                    yield Row(named, str(path), number, has_lines=False)
        except pyarrow.ArrowException as error:
            raise ValueError(f"{path} is not a Parquet file, or a damaged one: {error}") from error
    if not number:
        raise ValueError(f"{path} is empty: it has no rows.")


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
