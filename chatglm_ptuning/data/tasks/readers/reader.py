"""What a reader is: one kind of files, and all that a task file may say about it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from chatglm_ptuning.data.sources.rows import Row
from chatglm_ptuning.data.tasks.examples import Example
from chatglm_ptuning.data.tasks.source import SplitSource
from chatglm_ptuning.data.tasks.task import Task

SubmissionFormat = Callable[[Sequence[Example], Sequence[Any]], str]
"""Examples and their predictions -> the content of a submission file."""


class Reader(ABC):
    """Reads one kind of files; docs/tasks.md describes each.

    Attributes:
        name: what `reader` is in a task file.
        fields: roles that need the name of a column.
        optional_fields: roles that may have one.
        takes_extra_fields: whether further columns may be named, for the prompt.
        needs, options: keys of a task file that only some readers take: those that it must have, and may have.
        example: the kind of examples that it gives.
        placeholders: names that the prompt may use besides `labels` and extra fields.
        submissions: formats of a submission file by their names.
    """

    name: ClassVar[str]
    fields: ClassVar[tuple[str, ...]] = ()
    optional_fields: ClassVar[tuple[str, ...]] = ()
    takes_extra_fields: ClassVar[bool] = False
    needs: ClassVar[tuple[str, ...]] = ()
    options: ClassVar[tuple[str, ...]] = ()
    example: ClassVar[type[Example]]
    placeholders: ClassVar[tuple[str, ...]]
    submissions: ClassVar[Mapping[str, SubmissionFormat]] = {}

    @abstractmethod
    def read(self, source: SplitSource) -> Iterator[Example]:
        """The examples of one split, in the order of its files.

        Raises:
            ValueError: naming file, line and field of what is missing or unknown; of a single row, question or
                sentence as `source.bad_rows.add`.
        """

    def beside(self, source: SplitSource) -> list[Path]:
        """Further files that the examples of a split depend on."""
        return []

    def example_class(self, task: Task) -> type[Example]:
        """The kind of examples that it gives for a task."""
        return self.example

    def metrics_of(self, task: Task) -> tuple[str, ...]:
        """The metrics that can score a task."""
        return self.example_class(task).metrics

    def extra_fields(self, task: Task) -> dict[str, str]:
        """Columns of a task that only its prompt uses."""
        known = {*self.fields, *self.optional_fields}
        return {role: column for role, column in task.fields.items() if role not in known}


class RowReader(Reader):
    """Reads files in which every row is an example."""

    def read(self, source: SplitSource) -> Iterator[Example]:
        return source.each(source.rows(), lambda row, index: [self.read_row(source, row, index)])

    @abstractmethod
    def read_row(self, source: SplitSource, row: Row, index: int) -> Example:
        """The example of a row.

        Args:
            index: its place in the split, from 0.

        Raises:
            ValueError: naming file, line and field of what is missing or unknown.
        """
