"""The readers of task files; a new one is registered here."""

from __future__ import annotations

from chatglm_ptuning.data.tasks.readers.choices import C3Reader, ChidReader, ChoicesReader, ExamReader
from chatglm_ptuning.data.tasks.readers.conversations import ConversationReader
from chatglm_ptuning.data.tasks.readers.questions import SquadReader
from chatglm_ptuning.data.tasks.readers.reader import Reader
from chatglm_ptuning.data.tasks.readers.texts import LcstsReader, PairsReader, RowsReader, WinogradReader
from chatglm_ptuning.data.tasks.readers.tokens import BioReader, CluenerReader
from chatglm_ptuning.data.tasks.task import Task

READERS: dict[str, Reader] = {
    reader.name: reader
    for reader in (
        RowsReader(),
        WinogradReader(),
        PairsReader(),
        LcstsReader(),
        BioReader(),
        CluenerReader(),
        SquadReader(),
        ChidReader(),
        C3Reader(),
        ChoicesReader(),
        ExamReader(),
        ConversationReader(),
    )
}
"""By the value of `reader` in task files."""


def reader_of(task: Task) -> Reader:
    """The reader of a task's files."""
    return READERS[task.reader]
