"""Rows that heads learn, in memory: of instruction files, and of the examples of any task."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from chatglm_ptuning.data.encoding import EncodedExample, Lengths, encode_examples
from chatglm_ptuning.data.formats.registry import Columns
from chatglm_ptuning.data.report import PreparationReport
from chatglm_ptuning.data.sources.rows import BadRows, Row
from chatglm_ptuning.data.tasks.examples import ConversationExample, Example
from chatglm_ptuning.data.tasks.heads.conversations import ConversationAnswers
from chatglm_ptuning.data.tasks.heads.head import Head
from chatglm_ptuning.data.tasks.readers.conversations import ConversationReader
from chatglm_ptuning.data.tasks.source import SplitSource
from chatglm_ptuning.data.tasks.task import Task
from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer

Prepared = tuple[list[dict[str, Any]], PreparationReport]
DETECT = Columns()


def encode_all(encode: Callable[[Example], EncodedExample], examples: Iterable[Example], workers: int = 1) -> Prepared:
    report, lengths = PreparationReport(), Lengths()
    rows: list[dict[str, Any]] = []
    how = {"num_workers": workers, "progress": False}
    for _, encoded in encode_examples(encode, examples, report, BadRows(), **how):
        rows += encoded.rows
        lengths.add(encoded)
    report.check_not_empty()
    report.set_lengths(lengths)
    return rows, report


class Rows(list):
    """Rows in the place of a file."""

    def rows(self, bad_rows: BadRows, *, json_in_text: bool) -> Iterator[Row]:
        for number, row in enumerate(self, start=1):
            yield row if isinstance(row, Row) else Row(row, "rows", number)


def conversation_head(
    tokenizer: ChatGLMTokenizer, source: int, target: int, prefix: str = "", columns: Columns = DETECT
) -> ConversationAnswers:
    return ConversationAnswers(Task.of_files(["rows.json"], columns, prefix), tokenizer, source, target)


def conversations(rows: Iterable[dict], head: Head) -> Iterator[ConversationExample]:
    return ConversationReader().read(SplitSource(head.task, "rows", [Rows(rows)], head.task.fields))


def training_rows(
    tokenizer: ChatGLMTokenizer,
    rows: Iterable[dict],
    source: int,
    target: int,
    prefix: str = "",
    columns: Columns = DETECT,
    workers: int = 1,
) -> Prepared:
    head = conversation_head(tokenizer, source, target, prefix, columns)
    return encode_all(head.learn, conversations(rows, head), workers=workers)


def prompts(
    tokenizer: ChatGLMTokenizer, rows: Iterable[dict], source: int, target: int, columns: Columns = DETECT
) -> Prepared:
    head = conversation_head(tokenizer, source, target, columns=columns)
    ready, report = encode_all(head.ready, conversations(rows, head))
    return [{"input_ids": row["prompt_ids"], "reference": row["reference"]} for row in ready], report


def rows_of(head: Head, examples: Sequence[Example]) -> list[dict[str, Any]]:
    return encode_all(head.learn, examples)[0]
