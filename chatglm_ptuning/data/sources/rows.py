"""A row of a data source with its place in the source, and the count of the rows that could not be used."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from datetime import date, time
from decimal import Decimal
from typing import Any, ClassVar, NoReturn

from chatglm_ptuning.exact_json import WrittenNumber


class Row(dict):
    """One record of a data source.

    Attributes:
        path: the file or hub dataset.
        line: the line on which the record starts, from 1; the number of the row where there are no lines (Parquet,
            hubs).
    """

    __slots__ = ("has_lines", "line", "path")

    def __init__(
        self, values: Mapping[str, Any] | Iterable[tuple[str, Any]], path: str, line: int, has_lines: bool = True
    ) -> None:
        super().__init__(values)
        self.path = path
        self.line = line
        self.has_lines = has_lines

    @property
    def where(self) -> str:
        """`FILE:LINE`, or `FILE row N`, for messages."""
        return f"{self.path}:{self.line}" if self.has_lines else f"{self.path} row {self.line}"

    def digest(self) -> int:
        """64 bits that are the same for rows with the same content."""
        content = repr(sorted(self.items(), key=lambda item: item[0])).encode("utf-8", "surrogatepass")
        return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


def fail(row: Row, text: str) -> NoReturn:
    """Raises the ValueError for a fault in a row, naming its file and line."""
    raise ValueError(f"{row.where}: {text}")


def plain_value(value: Any) -> Any:
    """A value of a table as JSON could hold it.

    Null fields of objects are left out, because Arrow fills them in. Decimal numbers keep their digits. Dates and times
    are text (ISO 8601).
    """
    if isinstance(value, dict):
        return {key: plain_value(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [plain_value(item) for item in value]
    if isinstance(value, Decimal):
        return WrittenNumber(str(value)) if value.is_finite() else float(value)
    return value.isoformat() if isinstance(value, (date, time)) else value


class BadRows:
    """Counts rows that cannot be used, and raises when there are too many.

    Args:
        limit: number of bad rows that are tolerated; None for any number.
        whole: the counter of the data set of which this one counts a part; it counts the same rows.

    Attributes:
        count: number of bad rows.
        messages: the errors of the first `KEPT` of them.
    """

    KEPT: ClassVar[int] = 20

    def __init__(self, limit: int | None = 0, whole: BadRows | None = None) -> None:
        self.limit = limit
        self.whole = whole
        self.count = 0
        self.messages: list[str] = []

    def add(self, message: str) -> None:
        """Counts one bad row.

        Raises:
            ValueError: with this message, if more rows are bad than are tolerated.
        """
        self.count += 1
        if len(self.messages) < self.KEPT:
            self.messages.append(message)
        if self.whole is not None:
            self.whole.add(message)
        if self.limit is not None and self.count > self.limit:
            several = f"More than {self.limit} bad rows (skip_bad_rows). The last one:\n" if self.limit else ""
            raise ValueError(several + message)
