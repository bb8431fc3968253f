"""Reads rows of instruction files as conversations and plain texts."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from chatglm_ptuning.chat.message import Conversation, Document
from chatglm_ptuning.data.formats.fields import names
from chatglm_ptuning.data.formats.registry import Columns, read_row
from chatglm_ptuning.data.sources.rows import BadRows, Row, fail


@dataclass(frozen=True, kw_only=True)
class ConversationExample:
    """A row of an instruction file.

    Attributes:
        id: place of the row in its files, from 0.
        where: `FILE:LINE`, or the nearest there is to it, for messages.
        dataset_format: one of `FORMATS`.
        content: what the row means.
        digest: 64 bits, the same for rows of the same content.
    """

    id: int
    where: str
    dataset_format: str
    content: Conversation | Document
    digest: int


def read_conversations(
    rows: Iterable[Row], columns: Columns, bad_rows: BadRows | None = None, limit: int | None = None
) -> Iterator[ConversationExample]:
    """What the rows mean, in their order, read as they are asked for.

    Args:
        bad_rows: counts those that cannot be understood; without it, the first ends the reading.
        limit: so many examples at most.

    Raises:
        ValueError: as `bad_rows.add`; and, at the end, if no row has the history column.
    """
    bad_rows = bad_rows or BadRows()
    # A single row may do without history; if no row has the column, its name must be wrong.
    without_history: Row | None = None
    has_history = columns.history is None
    for row, example in itertools.islice(_understood(rows, columns, bad_rows), limit):
        has_history = has_history or columns.history in row
        if not has_history and without_history is None and example.dataset_format in ("columns", "alpaca"):
            without_history = row
        yield example
    if not has_history and without_history is not None:
        fail(
            without_history,
            f"no row has the column {columns.history!r} (this one has {names(without_history)}); name the right one "
            "with --history_column, or leave that out.",
        )


def read_conversation(row: Row, columns: Columns, index: int = 0) -> ConversationExample:
    """What a row means.

    Raises:
        ValueError: naming file and line, if it cannot be understood.
    """
    name, content = read_row(row, columns)
    return ConversationExample(id=index, where=row.where, dataset_format=name, content=content, digest=row.digest())


def _understood(rows: Iterable[Row], columns: Columns, bad_rows: BadRows) -> Iterator[tuple[Row, ConversationExample]]:
    for index, row in enumerate(rows):
        try:
            example = read_conversation(row, columns, index)
        except ValueError as error:
            bad_rows.add(str(error))
            continue
        yield row, example
