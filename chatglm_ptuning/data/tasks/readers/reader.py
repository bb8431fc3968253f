"""The interface of a reader: it reads one file format, and declares the keys of task files about it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from chatglm_ptuning.data.sources.rows import Row
from chatglm_ptuning.data.tasks.examples import Example
from chatglm_ptuning.data.tasks.source import SplitSource
from chatglm_ptuning.data.tasks.task import Task


class Reader:
    """Reads one kind of files; docs/tasks.md describes each. Subclasses override `read_row` or `read`.

    Attributes:
        name: the value of `reader` in a task file.
        fields: roles whose columns must be named.
        optional_fields: roles whose columns can be named.
        takes_extra_fields: whether further columns can be named, for the prompt.
        needs: keys of task files that only some readers take, and that this one must have.
        options: such keys that this one can have.
        example: the kind of its examples.
        placeholders: names in the prompt, besides `labels` and extra fields; none if the rows contain their prompts.
    """

    name: ClassVar[str]
    fields: ClassVar[tuple[str, ...]] = ()
    optional_fields: ClassVar[tuple[str, ...]] = ()
    takes_extra_fields: ClassVar[bool] = False
    needs: ClassVar[tuple[str, ...]] = ()
    options: ClassVar[tuple[str, ...]] = ()
    example: ClassVar[type[Example]]
    placeholders: ClassVar[tuple[str, ...]] = ()

    def read(self, source: SplitSource) -> Iterator[Example]:
        """The examples of one split, in the order of its files; by default one for each row of them.

        Raises:
            ValueError: naming file, line and field of what is missing or unknown; for a single row, question or
                sentence as `source.bad_rows.add`.
        """
        return source.each(source.rows(), lambda row, index: [self.read_row(source, row, index)])

    def read_row(self, source: SplitSource, row: Row, index: int) -> Example:
        """The example of a row, for readers that do not override `read`.

        Args:
            index: of the row in its split, from 0.

        Raises:
            ValueError: naming file, line and field of what is missing or unknown.
        """
        raise NotImplementedError

    def beside(self, source: SplitSource) -> list[Path]:
        """Further files on which the examples of a split depend."""
        return []

    def example_class(self, task: Task) -> type[Example]:
        """The kind of its examples for a task."""
        return self.example

    def metrics_of(self, task: Task) -> tuple[str, ...]:
        """The metrics that can score a task."""
        return self.example_class(task).metrics

    def extra_fields(self, task: Task) -> dict[str, str]:
        """Role -> column of what only the prompt uses."""
        known = {*self.fields, *self.optional_fields}
        return {role: column for role, column in task.fields.items() if role not in known}
