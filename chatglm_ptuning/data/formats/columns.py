"""Rows of columns: a question and its answer, Alpaca's instructions, and plain texts."""

from __future__ import annotations

from chatglm_ptuning.chat.message import Conversation, Document, Message
from chatglm_ptuning.data.formats.fields import answer, names, parsed, shown, text
from chatglm_ptuning.data.sources.rows import Row, fail


def question_and_answer(row: Row, prompt: str, response: str, history: str | None) -> Conversation:
    """The rounds of the history column, then the prompt, then the response, which alone is learned (official ptuning).

    Raises:
        ValueError: if a column is missing or holds no text.
    """
    for name, flag in ((prompt, "--prompt_column"), (response, "--response_column")):
        if name not in row:
            fail(row, f"there is no column {name!r} (the row has {names(row)}); name the right one with {flag}.")
    return Conversation(
        [
            *_rounds(row, history, learned=False),
            Message("user", text(row, row[prompt], f"the column {prompt!r}")),
            Message("assistant", text(row, row[response], f"the column {response!r}"), loss=True),
        ]
    )


def alpaca(row: Row, history: str | None) -> Conversation:
    """Alpaca's `instruction`, `input` and `output`, with `system` and `history` where the row has them.

    The question is the instruction and, on the next line, the input. Answers of the history are learned too.

    Raises:
        ValueError: if a column is missing or holds no text.
    """
    for name in ("instruction", "output"):
        if name not in row:
            fail(row, f"there is no column {name!r}, which the dataset format alpaca needs (the row has {names(row)}).")
    instruction = text(row, row["instruction"], "the column 'instruction'")
    added = text(row, row.get("input"), "the column 'input'")
    system = text(row, row.get("system"), "the column 'system'")
    return Conversation(
        [
            *([Message("system", system)] if system.strip() else []),
            *_rounds(row, history or "history", learned=True),
            Message("user", "\n".join(part for part in (instruction, added) if part)),
            Message("assistant", text(row, row["output"], "the column 'output'"), loss=True),
        ]
    )


def plain_text(row: Row, column: str) -> Document:
    """A text of which everything is learned.

    Raises:
        ValueError: if the column is missing or holds no text.
    """
    if column not in row:
        fail(row, f"there is no column {column!r}, which the dataset format text needs (the row has {names(row)}).")
    return Document(text(row, row[column], f"the column {column!r}"))


def _rounds(row: Row, column: str | None, learned: bool) -> list[Message]:
    rounds = parsed(row.get(column)) if column else None
    if rounds is None or rounds == "":
        return []
    expected = f"the column {column!r} must be a list of [question, answer] pairs"
    if not isinstance(rounds, list):
        fail(row, f"{expected}, not {type(rounds).__name__}; name the right one with --history_column.")
    messages = []
    for number, pair in enumerate(rounds, start=1):
        if not isinstance(pair, list) or len(pair) != 2:
            fail(row, f"{expected}; its round {number} is {shown(pair)}")
        question, reply = (text(row, value, f"round {number} of the column {column!r}") for value in pair)
        messages += [Message("user", question), answer(reply, "", learned)]
    return messages
