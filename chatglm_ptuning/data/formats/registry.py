"""Which dataset format a row has: recognised by its fields, or named by the user."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from chatglm_ptuning.chat.message import Conversation, Document
from chatglm_ptuning.data.formats.columns import alpaca, plain_text, question_and_answer
from chatglm_ptuning.data.formats.fields import names, parsed
from chatglm_ptuning.data.formats.messages import chatglm3, messages
from chatglm_ptuning.data.formats.sharegpt import sharegpt
from chatglm_ptuning.data.sources.rows import Row, fail
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
    """What the user said about the rows; what is None is recognised by the fields.

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
        if self.dataset_format is not None and self.dataset_format not in (*FORMATS, *ALIASES):
            known = ", ".join((*FORMATS, *ALIASES))
            raise ValueError(f"--dataset_format must be one of {known}, not {self.dataset_format!r}")


@dataclass(frozen=True)
class DatasetFormat:
    """One way of writing instruction rows.

    Attributes:
        fields: what a row has, for people.
        read: what a row means; raises ValueError naming its file and line.
        fits: in which ways a row's fields fit, for people; empty if they do not.
        has_messages: whether it holds a list of messages, and so needs no columns.
    """

    fields: str
    read: Callable[[Row, Columns], Conversation | Document]
    fits: Callable[[Row], list[str]]
    has_messages: bool = False


def find_format(row: Row, columns: Columns) -> str:
    """The format of a row: the named one, the one that its named columns make, or the only one that its fields fit.

    Raises:
        ValueError: naming file and line, the fields and the known formats, if the fields fit none, or several.
    """
    if columns.dataset_format is not None:
        return ALIASES.get(columns.dataset_format, columns.dataset_format)
    named = [name for name in (columns.prompt, columns.response) if name is not None]
    # A file of conversations needs no columns, whatever a script names.
    candidates = {name: known for name, known in FORMATS.items() if known.has_messages or not named}
    found = {} if named and all(name in row for name in named) else _fitting(row, candidates)
    if named and not found:
        return "columns"
    fits = [fit for ways in found.values() for fit in ways]
    if len(fits) == 1:
        return next(iter(found))
    known = "".join(f"\n  {name}: {known.fields}" for name, known in FORMATS.items())
    known = f"The dataset formats, which --dataset_format names:{known}"
    if not found:
        fail(row, f"no dataset format has these fields: {names(row)}.\n{known}")
    fail(row, f"the fields {names(row)} fit several dataset formats ({'; '.join(fits)}).\n{known}")


def read_row(row: Row, columns: Columns) -> tuple[str, Conversation | Document]:
    """The dataset format of a row, and what the row means.

    Raises:
        ValueError: naming file and line, if the format is ambiguous, or something in the row is not of that format.
    """
    name = find_format(row, columns)
    return name, FORMATS[name].read(row, columns)


def _fitting(row: Row, candidates: Mapping[str, DatasetFormat]) -> dict[str, list[str]]:
    found = {name: known.fits(row) for name, known in candidates.items()}
    return {name: ways for name, ways in found.items() if ways}


def _columns(row: Row, columns: Columns) -> Conversation:
    if columns.prompt is not None and columns.response is not None:
        return question_and_answer(row, columns.prompt, columns.response, columns.history)
    pairs = _pairs(row)
    if columns.prompt is not None or columns.response is not None:
        pairs = [pair for pair in PAIRS if columns.prompt in (None, pair[0]) and columns.response in (None, pair[1])]
        pairs = [pair for pair in pairs if pair[0] in row and pair[1] in row] or pairs
    if len(pairs) != 1:
        fail(
            row,
            f"which columns are question and answer? The row has {names(row)}; name both with --prompt_column and "
            "--response_column.",
        )
    # A row that is recognised by its fields is read with all of them.
    recognised = columns.prompt is None and columns.response is None
    return question_and_answer(
        row, *pairs[0], columns.history or ("history" if recognised and "history" in row else None)
    )


def _pairs(row: Row) -> list[tuple[str, str]]:
    return [(prompt, response) for prompt, response in PAIRS if prompt in row and response in row]


def _fits_columns(row: Row) -> list[str]:
    taken = [("input", "output")] if _fits_alpaca(row) else []
    return [" and ".join(pair) for pair in _pairs(row) if pair not in taken]


def _fits_alpaca(row: Row) -> list[str]:
    return ["alpaca"] if row.get("instruction") is not None and "output" in row else []


def _fits_conversations(row: Row, name: str) -> list[str]:
    if row.get("conversations") is None:
        return []
    turns = parsed(row["conversations"])
    first = turns[0] if isinstance(turns, list) and turns else None
    is_sharegpt = isinstance(first, dict) and "from" in first
    return [name] if is_sharegpt == (name == "sharegpt") else []


def _fits_text(row: Row) -> list[str]:
    beside = all(name == TEXT_COLUMN or name.lower() in _BESIDE_TEXT or value is None for name, value in row.items())
    return ["text"] if isinstance(row.get(TEXT_COLUMN), str) and beside and not _pairs(row) else []


FORMATS = {
    "columns": DatasetFormat(
        "two columns, a question and its answer (--prompt_column, --response_column, --history_column)",
        _columns,
        _fits_columns,
    ),
    "alpaca": DatasetFormat(
        "instruction, output; perhaps input, system, history",
        lambda row, columns: alpaca(row, columns.history),
        _fits_alpaca,
    ),
    "chatglm3": DatasetFormat(
        "conversations of role and content; perhaps tools",
        lambda row, _: chatglm3(row),
        lambda row: _fits_conversations(row, "chatglm3"),
        has_messages=True,
    ),
    "messages": DatasetFormat(
        "GLM-4's and OpenAI's messages of role and content; perhaps tools, tool_calls, weight",
        lambda row, _: messages(row),
        lambda row: [] if row.get("messages") is None else ["messages"],
        has_messages=True,
    ),
    "sharegpt": DatasetFormat(
        "conversations of from and value; perhaps system, tools",
        lambda row, _: sharegpt(row),
        lambda row: _fits_conversations(row, "sharegpt"),
        has_messages=True,
    ),
    "text": DatasetFormat(
        "one column of plain text, all of which is learned (--prompt_column, default text)",
        lambda row, columns: plain_text(row, columns.prompt or TEXT_COLUMN),
        _fits_text,
    ),
}
"""Every dataset format by its name."""
