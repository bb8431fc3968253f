"""The heads that solve tasks; a new one is registered here."""

from __future__ import annotations

from chatglm_ptuning.data.tasks.heads.conversations import ConversationAnswers
from chatglm_ptuning.data.tasks.heads.generation import CandidateScoring, Generation, MultipleChoice
from chatglm_ptuning.data.tasks.heads.head import Head
from chatglm_ptuning.data.tasks.heads.labels import MultiLabelClassification, SequenceClassification
from chatglm_ptuning.data.tasks.heads.spans import QuestionAnswering
from chatglm_ptuning.data.tasks.heads.tags import TokenClassification
from chatglm_ptuning.data.tasks.readers import reader_of
from chatglm_ptuning.data.tasks.task import Task
from chatglm_ptuning.model.modeling_heads import ChatGLMWithHead

HEADS: tuple[type[Head], ...] = (
    SequenceClassification,
    MultiLabelClassification,
    TokenClassification,
    QuestionAnswering,
    MultipleChoice,
    CandidateScoring,
    Generation,
    ConversationAnswers,
)
"""The first that can solve a task is its default head."""

HEAD_NAMES = tuple(dict.fromkeys(head.name for head in HEADS))
LINEAR_HEADS = tuple(dict.fromkeys(head.name for head in HEADS if issubclass(head.model_class, ChatGLMWithHead)))
"""Heads with outputs of their own; all others are the language model itself."""
ECHO_HEADS = tuple(dict.fromkeys(head.name for head in HEADS if head.echoes))
"""Heads that can read their text twice (`Head.echo`)."""


def heads_of(task: Task) -> dict[str, type[Head]]:
    """Name -> head, for every head that can solve a task, the default first."""
    example = reader_of(task).example_class(task)
    return {head.name: head for head in HEADS if example in head.solves}


def head_of(task: Task, name: str | None) -> type[Head]:
    """The head of a name, or the task's default head.

    Raises:
        ValueError: if it cannot solve the task, naming those that can.
    """
    known, name = heads_of(task), name or task.head
    if name not in known:
        raise ValueError(f"The head {name} cannot solve {task.name}; {' or '.join(known)} can.")
    return known[name]
