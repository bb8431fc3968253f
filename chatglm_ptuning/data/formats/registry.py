"""The registry of dataset formats, detection of the format of a row, and the formats that are columns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from chatglm_ptuning.chat.message import Conversation, Document, Message
from chatglm_ptuning.data.formats.fields import answer, names, parsed, shown, text
from chatglm_ptuning.data.formats.messages import chatglm3, messages, sharegpt
from chatglm_ptuning.data.sources.rows import Row
from chatglm_ptuning.data.sources.tables import TEXT_COLUMN

PAIRS = (
    ("content", "summary"), ("prompt", "response"), ("prompt", "completion"), ("question", "answer"),
    ("query", "response"), ("instruction", "response"), ("input", "output"), ("source", "target"),
    ("text", "label"),
)  # fmt: skip
"""Pairs of columns that need not be named."""

ALIASES = {"glm4": "messages", "openai": "messages"}
"""Other names of dataset formats."""

_BESIDE_TEXT = {"", "id", "idx", "url", "title", "source", "meta", "metadata", "date", "timestamp", "lang", "language",
                "license", "__index_level_0__"}  # fmt: skip


@dataclass(frozen=True)
class Columns:
    """What the user says about the rows; None is detected from the field names.

    Attributes:
        prompt, response, history: names of columns.
        dataset_format: one of FORMATS or ALIASES.

    Raises:
        ValueError: if the dataset format is unknown.
    """

    prompt: str | None = None
    response: str | None = None
    history: str | None = None
    dataset_format: str | None = None

    def __post_init__(self) -> None:
        known = (*FORMATS, *ALIASES)
        if self.dataset_format is not None and self.dataset_format not in known:
            raise ValueError(f"dataset_format must be one of {', '.join(known)}, not {self.dataset_format!r}")


@dataclass(frozen=True)
class DatasetFormat:
    """One way of writing instruction rows.

    Attributes:
        fields: the fields of a row, as messages show them.
        read: gives the meaning of a row; raises ValueError without the place, which `read_row` adds.
        fits: whether a row may be of this format.
        has_messages: whether rows hold a list of messages, and so need no named columns.
    """

    fields: str
    read: Callable[[Row, Columns], Conversation | Document]
    fits: Callable[[Row], bool]
    has_messages: bool = False


def read_row(row: Row, columns: Columns) -> tuple[str, Conversation | Document]:
    """The dataset format of a row, and what the row means.

    Raises:
        ValueError: naming file and line, if the fields fit no format, or several, or the row breaks its format.
    """
    try:
        name = _find_format(row, columns)
        return name, FORMATS[name].read(row, columns)
    except ValueError as error:
        raise ValueError(f"{row.where}: {error}") from error


def _find_format(row: Row, columns: Columns) -> str:
    """The named format, the one that the named columns make, or the only one that the fields fit."""
    if columns.dataset_format is not None:
        return ALIASES.get(columns.dataset_format, columns.dataset_format)
    named = [name for name in (columns.prompt, columns.response) if name is not None]
    if named and all(name in row for name in named):
        return "columns"
    # Conversations need no columns, even if a script names some for its other files.
    found = [name for name, known in FORMATS.items() if (known.has_messages or not named) and known.fits(row)]
    if named and not found:
        return "columns"
    if len(found) == 1:
        return found[0]
    fault = f"fit several dataset formats: {', '.join(found)}" if found else "fit no dataset format"
    known = "".join(f"\n  {name}: {known.fields}" for name, known in FORMATS.items())
    raise ValueError(f"the fields {names(row)} {fault}.\nSet dataset_format to one of these:{known}")


def _columns(row: Row, columns: Columns) -> Conversation:
    """The rounds of the history column, then the prompt, then the response, which alone is learned (official ptuning).

    Where a name is missing, it is that of the known pair which fits the row.
    """
    prompt, response = columns.prompt, columns.response
    if prompt is None or response is None:
        matching = [pair for pair in PAIRS if prompt in (None, pair[0]) and response in (None, pair[1])]
        pairs = [pair for pair in matching if pair in _pairs(row)] or matching
        if len(pairs) != 1:
            raise ValueError(
                f"which columns are question and answer? The row has {names(row)}; set prompt_column and "
                "response_column."
            )
        ((prompt, response),) = pairs
    detected = columns.prompt is None and columns.response is None
    history = columns.history or ("history" if detected else None)
    return Conversation(
        [
            *_rounds(row, history, learned=False),
            Message("user", _column(row, prompt, "set prompt_column to the right one")),
            Message("assistant", _column(row, response, "set response_column to the right one"), loss=True),
        ]
    )


def _alpaca(row: Row, columns: Columns) -> Conversation:
    """The question is the instruction and, on the next line, the input. Answers of the history are learned too."""
    needed = "the dataset format alpaca needs it"
    instruction = _column(row, "instruction", needed)
    system, added = (text(row.get(name), f"the column {name!r}") for name in ("system", "input"))
    return Conversation(
        [
            *([Message("system", system)] if system.strip() else []),
            *_rounds(row, columns.history or "history", learned=True),
            Message("user", "\n".join(part for part in (instruction, added) if part)),
            Message("assistant", _column(row, "output", needed), loss=True),
        ]
    )


def _plain_text(row: Row, columns: Columns) -> Document:
    return Document(_column(row, columns.prompt or TEXT_COLUMN, "the dataset format text needs it"))


def _column(row: Row, name: str, way_out: str) -> str:
    if name not in row:
        raise ValueError(f"there is no column {name!r} (the row has {names(row)}); {way_out}.")
    return text(row[name], f"the column {name!r}")


def _rounds(row: Row, column: str | None, learned: bool) -> list[Message]:
    rounds = parsed(row.get(column)) if column else None
    if rounds is None or rounds == "":
        return []
    expected = f"the column {column!r} must be a list of [question, answer] pairs"
    if not isinstance(rounds, list):
        raise ValueError(f"{expected}, not {shown(rounds)}; set history_column to the right one.")
    said = []
    for number, pair in enumerate(rounds, start=1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"{expected}; its round {number} is {shown(pair)}")
        question, reply = (text(value, f"round {number} of the column {column!r}") for value in pair)
        said += [Message("user", question), answer(reply, "", learned)]
    return said


def _pairs(row: Row) -> list[tuple[str, str]]:
    return [pair for pair in PAIRS if pair[0] in row and pair[1] in row]


def _fits_columns(row: Row) -> bool:
    return any(pair != ("input", "output") or not _fits_alpaca(row) for pair in _pairs(row))


def _fits_alpaca(row: Row) -> bool:
    return row.get("instruction") is not None and "output" in row


def _fits_conversations(row: Row, is_sharegpt: bool) -> bool:
    turns = parsed(row.get("conversations"))
    first = turns[0] if isinstance(turns, list) and turns else None
    return turns is not None and is_sharegpt == (isinstance(first, dict) and "from" in first)


def _fits_text(row: Row) -> bool:
    beside = all(name == TEXT_COLUMN or name.lower() in _BESIDE_TEXT or value is None for name, value in row.items())
    return isinstance(row.get(TEXT_COLUMN), str) and beside and not _pairs(row)


FORMATS = {
    "columns": DatasetFormat(
        "two columns, a question and its answer (prompt_column, response_column, history_column)",
        _columns,
        _fits_columns,
    ),
    "alpaca": DatasetFormat("instruction, output; optionally input, system, history", _alpaca, _fits_alpaca),
    "chatglm3": DatasetFormat(
        "conversations of role and content; optionally tools",
        lambda row, _: chatglm3(row),
        lambda row: _fits_conversations(row, is_sharegpt=False),
        has_messages=True,
    ),
    "messages": DatasetFormat(
        "GLM-4's and OpenAI's messages of role and content; optionally tools, tool_calls, weight",
        lambda row, _: messages(row),
        lambda row: row.get("messages") is not None,
        has_messages=True,
    ),
    "sharegpt": DatasetFormat(
        "conversations of from and value; optionally system, tools",
        lambda row, _: sharegpt(row),
        lambda row: _fits_conversations(row, is_sharegpt=True),
        has_messages=True,
    ),
    "text": DatasetFormat(
        "one column of plain text, all of which is learned (prompt_column, default text)", _plain_text, _fits_text
    ),
}
"""Every dataset format by its name."""
