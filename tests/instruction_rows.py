"""Rows of instruction files as rows of token ids, in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from chatglm_ptuning.data.conversation_encoder import ConversationEncoder
from chatglm_ptuning.data.conversations import read_conversations
from chatglm_ptuning.data.encoding import encode_all
from chatglm_ptuning.data.formats.registry import Columns
from chatglm_ptuning.data.report import PreparationReport
from chatglm_ptuning.data.sources.rows import Row
from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer

Prepared = tuple[list[dict[str, Any]], PreparationReport]
DETECT = Columns()


def training_rows(
    tokenizer: ChatGLMTokenizer,
    rows: Iterable[dict],
    source: int,
    target: int,
    prefix: str = "",
    columns: Columns = DETECT,
    workers: int = 1,
) -> Prepared:
    encoder = ConversationEncoder(tokenizer, source, target, prefix)
    return encode_all(
        encoder.training_rows, read_conversations(_placed(rows), columns), num_workers=workers, progress=False
    )


def prompts(
    tokenizer: ChatGLMTokenizer, rows: Iterable[dict], source: int, target: int, columns: Columns = DETECT
) -> Prepared:
    encoder = ConversationEncoder(tokenizer, source, target)
    return encode_all(encoder.prompt, read_conversations(_placed(rows), columns), progress=False)


def _placed(rows: Iterable[dict]) -> Iterator[Row]:
    for number, row in enumerate(rows, start=1):
        yield row if isinstance(row, Row) else Row(row, "rows", number)
