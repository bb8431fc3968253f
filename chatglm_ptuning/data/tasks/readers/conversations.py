"""Reader of instruction files: rows of conversations and plain texts, in any dataset format."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from chatglm_ptuning.data.formats.fields import names
from chatglm_ptuning.data.formats.registry import Columns, read_row
from chatglm_ptuning.data.sources.rows import Row, fail
from chatglm_ptuning.data.tasks.examples import ConversationExample
from chatglm_ptuning.data.tasks.readers.reader import Reader
from chatglm_ptuning.data.tasks.source import SplitSource


class ConversationReader(Reader):
    """Conversations and plain texts; the rows contain both prompts and answers."""

    name = "conversations"
    example = ConversationExample
    optional_fields = ("prompt", "response", "history")
    options = ("dataset_format", "ignored_columns", "source_prefix")

    def read(self, source: SplitSource) -> Iterator[ConversationExample]:
        """As `Reader.read`; after the last row, refuses a split in which no row has the history column."""
        task = source.task
        columns = Columns(**source.fields, dataset_format=task.dataset_format, ignored=task.ignored_columns)
        # A single row may do without history; if no row has the column, its name must be wrong.
        without: Row | None = None
        has_history = columns.history is None

        def read(row: Row, index: int) -> list[ConversationExample]:
            nonlocal has_history, without
            example = self.example_of(row, columns, index)
            has_history = has_history or columns.history in row
            if not has_history and without is None and example.dataset_format in ("columns", "alpaca"):
                without = row
            return [example]

        yield from itertools.islice(source.each(source.rows(json_in_text=False), read), source.limit)
        if not has_history and without is not None:
            fail(
                without,
                f"no row has the column {columns.history!r} (this one has {names(without)}); set "
                "history_column to the right one, or leave it out.",
            )

    def example_of(self, row: Row, columns: Columns, index: int = 0) -> ConversationExample:
        """The example of a row.

        Raises:
            ValueError: as `read_row`.
        """
        name, content, unread = read_row(row, columns)
        return ConversationExample(
            id=index, where=row.where, dataset_format=name, content=content, unread=unread, row_digest=row.digest()
        )
