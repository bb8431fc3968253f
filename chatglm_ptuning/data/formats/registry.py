"""The registry of dataset formats, detection of the format of a row, and the formats that are columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from chatglm_ptuning.chat.message import Conversation, Document, Message
from chatglm_ptuning.data.formats.fields import (
    CONVERSATION_FIELDS,
    answer,
    names,
    parsed,
    shown,
    text,
    tool_list,
    with_system,
)
from chatglm_ptuning.data.formats.messages import chatglm3, is_sharegpt, messages, sharegpt
from chatglm_ptuning.data.formats.unread import NotedFields
from chatglm_ptuning.data.sources.rows import Row
from chatglm_ptuning.data.sources.tables import TEXT_COLUMN

PAIRS = (
    ("content", "summary"), ("prompt", "response"), ("prompt", "completion"), ("question", "answer"),
    ("query", "response"), ("instruction", "response"), ("input", "output"), ("source", "target"),
    ("input", "target"), ("problem", "solution"), ("ask", "answer"), ("text", "label"),
)  # fmt: skip
"""Pairs of columns that need not be named."""

ALIASES = {"glm4": "messages", "openai": "messages"}
"""Other names of dataset formats."""

Fields = Mapping[str, Any]

_JOINED = ("input", "context")
"""Columns whose text is joined to the question, each on a line of its own."""

_BESIDE_TEXT = {"", "id", "idx", "url", "title", "source", "meta", "metadata", "date", "timestamp", "lang", "language",
                "license", "__index_level_0__"}  # fmt: skip


@dataclass(frozen=True)
class Columns:
    """What the user says about the rows; None is detected from the field names.

    Attributes:
        prompt, response, history: names of columns.
        dataset_format: one of FORMATS or ALIASES.
        ignored: names of fields that are left out; also KEY or FIELD.KEY, for a key of the messages in a field that
            the dataset format does not read.

    Raises:
        ValueError: if the dataset format is unknown.
    """

    prompt: str | None = None
    response: str | None = None
    history: str | None = None
    dataset_format: str | None = None
    ignored: Sequence[str] = ()

    @property
    def are_detected(self) -> bool:
        """Whether the user names neither question nor answer."""
        return self.prompt is None and self.response is None

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
    read: Callable[[NotedFields, Columns], Conversation | Document]
    fits: Callable[[Fields], bool]
    has_messages: bool = False


class ReadRow(NamedTuple):
    """What a row means.

    Attributes:
        dataset_format: one of FORMATS.
        unread: the fields with text that the dataset format does not read, besides those known to be without meaning
            and those that are ignored; `FIELD.KEY` for a key of the messages in a field.
    """

    dataset_format: str
    content: Conversation | Document
    unread: tuple[str, ...]


def read_row(row: Row, columns: Columns) -> ReadRow:
    """The dataset format of a row, what the row means, and what is not read.

    Raises:
        ValueError: naming file and line, if the fields fit no format, or several; if the row breaks its format; if
            fields that are not read hold most of the row's text, and the user has not named the columns.
    """
    try:
        fields = NotedFields({name: value for name, value in row.items() if name not in columns.ignored})
        name = _find_format(fields, columns)
        fields.noted.clear()
        content = FORMATS[name].read(fields, columns)
        unread, whole = fields.unread(content.texts(), columns.ignored)
        chosen = not FORMATS[name].has_messages and not columns.are_detected
        if sum(unread.values()) > whole and not chosen and content.missing_side() is None:
            raise ValueError(_most_is_unread(name, unread, whole))
        return ReadRow(name, content, tuple(unread))
    except ValueError as error:
        raise ValueError(f"{row.where}: {error}") from error


def _most_is_unread(name: str, unread: Mapping[str, int], whole: int) -> str:
    shown = ", ".join(map(repr, unread))
    columns = "" if FORMATS[name].has_messages else "name the columns by prompt_column and response_column; or "
    return (
        f"most of the text of the row would be left out: the dataset format {name} ({FORMATS[name].fields}) does not "
        f"read {shown} ({sum(unread.values())} characters; it reads {whole}). Join the text to a field that is read; "
        f"or {columns}list what is to be left out in ignored_columns."
    )


def _find_format(row: Fields, columns: Columns) -> str:
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


def _columns(row: NotedFields, columns: Columns) -> Conversation:
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
    history = columns.history or ("history" if columns.are_detected else None)
    question = _column(row, prompt, "set prompt_column to the right one")
    reply = _column(row, response, "set response_column to the right one")
    said = [
        *_rounds(row, history, learned=False),
        Message("user", _joined(row, question, but=(prompt, response)) if columns.are_detected else question),
        Message("assistant", reply, loss=True),
    ]
    return Conversation(with_system(said, row), tools=tool_list(row.get("tools"), "'tools'"))


def _alpaca(row: NotedFields, columns: Columns) -> Conversation:
    """The question is the instruction and, on the next line, the input. Answers of the history are learned too."""
    needed = "the dataset format alpaca needs it"
    said = [
        *_rounds(row, columns.history or "history", learned=True),
        Message("user", _joined(row, _column(row, "instruction", needed))),
        Message("assistant", _column(row, "output", needed), loss=True),
    ]
    return Conversation(with_system(said, row), tools=tool_list(row.get("tools"), "'tools'"))


def _joined(row: NotedFields, question: str, but: tuple[str, ...] = ()) -> str:
    """A question and, on the next lines, what belongs to it, as LLaMA-Factory joins `query` to `prompt`."""
    parts = [question]
    for name in _JOINED:
        if name in row and name not in but:
            value, what = row[name], f"the column {name!r} (to leave it out, list it in ignored_columns)"
            several = isinstance(value, list) and all(isinstance(passage, str) for passage in value)
            parts += [text(passage, what) for passage in (value if several else [value])]
    return "\n".join(part for part in parts if part)


def _plain_text(row: NotedFields, columns: Columns) -> Document:
    row.leave_out("title")  # of an article, whose text is read
    return Document(_column(row, columns.prompt or TEXT_COLUMN, "the dataset format text needs it"))


def _column(row: NotedFields, name: str, way_out: str) -> str:
    if name not in row:
        raise ValueError(f"there is no column {name!r} (the row has {names(row)}); {way_out}.")
    return text(row[name], f"the column {name!r}")


def _rounds(row: NotedFields, column: str | None, learned: bool) -> list[Message]:
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


def _pairs(row: Fields) -> list[tuple[str, str]]:
    return [pair for pair in PAIRS if pair[0] in row and pair[1] in row]


def _fits_columns(row: Fields) -> bool:
    return any(pair != ("input", "output") or not _fits_alpaca(row) for pair in _pairs(row))


def _fits_alpaca(row: Fields) -> bool:
    return row.get("instruction") is not None and "output" in row


def _fits_conversations(row: Fields, of_sharegpt: bool) -> bool:
    turns = parsed(next((row[field] for field in CONVERSATION_FIELDS if field in row), None))
    if not isinstance(turns, list):  # text is a mistake in `conversations`, but may be another thing in `conversation`
        return turns is not None and "conversations" in row and not of_sharegpt
    first = turns[0] if turns else None
    return of_sharegpt == (isinstance(first, dict) and is_sharegpt(first))


def _fits_text(row: Fields) -> bool:
    beside = all(name == TEXT_COLUMN or name.lower() in _BESIDE_TEXT or value is None for name, value in row.items())
    return isinstance(row.get(TEXT_COLUMN), str) and beside and not _pairs(row)


FORMATS = {
    "columns": DatasetFormat(
        "two columns, a question and its answer (prompt_column, response_column, history_column); optionally input, "
        "context, system, history, tools",
        _columns,
        _fits_columns,
    ),
    "alpaca": DatasetFormat(
        "instruction, output; optionally input, context, system, history, tools", _alpaca, _fits_alpaca
    ),
    "chatglm3": DatasetFormat(
        "conversations of role and content; optionally system, tools",
        lambda row, _: chatglm3(row),
        lambda row: _fits_conversations(row, of_sharegpt=False),
        has_messages=True,
    ),
    "messages": DatasetFormat(
        "GLM-4's and OpenAI's messages of role and content; optionally system, tools, tool_calls, weight",
        lambda row, _: messages(row),
        lambda row: row.get("messages") is not None,
        has_messages=True,
    ),
    "sharegpt": DatasetFormat(
        "conversations of from and value; optionally system, tools",
        lambda row, _: sharegpt(row),
        lambda row: _fits_conversations(row, of_sharegpt=True),
        has_messages=True,
    ),
    "text": DatasetFormat(
        "one column of plain text, all of which is learned (prompt_column, default text)", _plain_text, _fits_text
    ),
}
"""Every dataset format by its name."""
