"""What a reader is: one kind of files, and all that a task file may say about it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from chatglm_ptuning.data.sources.rows import Row
from chatglm_ptuning.data.tasks.examples import AnyExample
from chatglm_ptuning.data.tasks.source import SplitSource
from chatglm_ptuning.data.tasks.task import Task

SubmissionFormat = Callable[[Sequence[AnyExample], Sequence[Any]], str]
"""Examples and their predictions -> the content of a submission file."""


class Reader(ABC):
    """Reads one kind of files; docs/tasks.md describes each.

    Attributes:
        name: what `reader` is in a task file.
        fields: roles that need the name of a column.
        optional_fields: roles that may have one.
        takes_extra_fields: whether further columns may be named, for the prompt.
        needs, options: keys of a task file that only some readers take: those that it must have, and may have.
        heads: that can solve the task, the usual one first.
        placeholders: names that the prompt may use besides `labels` and extra fields.
        metrics: that can score the task.
        submissions: formats of a submission file by their names.
    """

    name: ClassVar[str]
    fields: ClassVar[tuple[str, ...]] = ()
    optional_fields: ClassVar[tuple[str, ...]] = ()
    takes_extra_fields: ClassVar[bool] = False
    needs: ClassVar[tuple[str, ...]] = ()
    options: ClassVar[tuple[str, ...]] = ()
    heads: ClassVar[tuple[str, ...]]
    placeholders: ClassVar[tuple[str, ...]]
    metrics: ClassVar[tuple[str, ...]]
    submissions: ClassVar[Mapping[str, SubmissionFormat]] = {}

    @abstractmethod
    def read(self, source: SplitSource) -> Iterator[AnyExample]:
        """The examples of one split, in the order of its files.

        Raises:
            ValueError: naming file, line and field of what is missing or unknown; of a single row, question or
                sentence as `source.bad_rows.add`.
        """

    def heads_of(self, task: Task) -> tuple[str, ...]:
        """Every head that can solve a task, the usual one first."""
        return self.heads

    def metrics_of(self, task: Task) -> tuple[str, ...]:
        """The metrics that can score a task."""
        return self.metrics

    def extra_fields(self, task: Task) -> dict[str, str]:
        """Columns of a task that only its prompt uses."""
        known = {*self.fields, *self.optional_fields}
        return {role: column for role, column in task.fields.items() if role not in known}


class RowReader(Reader):
    """Reads files in which every row is an example."""

    def read(self, source: SplitSource) -> Iterator[AnyExample]:
        """As `Reader.read`."""
        return source.each(source.rows(), lambda row, index: [self.read_row(source, row, index)])

    @abstractmethod
    def read_row(self, source: SplitSource, row: Row, index: int) -> AnyExample:
        """The example of a row.

        Args:
            index: its place in the split, from 0.

        Raises:
            ValueError: naming file, line and field of what is missing or unknown.
        """
