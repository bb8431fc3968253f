"""Which form a row is written in: told by its fields, or named by the user."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from chatglm_ptuning.data.conversation import Conversation, Document
from chatglm_ptuning.data.forms import columns as by_columns
from chatglm_ptuning.data.forms.fields import names, parsed
from chatglm_ptuning.data.forms.messages import chatglm3, messages
from chatglm_ptuning.data.forms.sharegpt import sharegpt
from chatglm_ptuning.data.sources.rows import fail
from chatglm_ptuning.data.sources.tables import TEXT_COLUMN

FORMS = {
    "columns": "two columns, a question and its answer (--prompt_column, --response_column, --history_column)",
    "alpaca": "instruction, output; perhaps input, system, history",
    "chatglm3": "conversations of role and content; perhaps tools",
    "messages": "GLM-4's and OpenAI's messages of role and content; perhaps tools, tool_calls, weight",
    "sharegpt": "conversations of from and value; perhaps system, tools",
    "text": "one column of plain text, all of which is learned (--prompt_column, default text)",
}
"""Every form with the fields it is known by."""

PAIRS = (
    ("content", "summary"), ("prompt", "response"), ("prompt", "completion"), ("question", "answer"),
    ("query", "response"), ("instruction", "response"), ("input", "output"), ("source", "target"),
    ("text", "label"),
)  # fmt: skip
"""Pairs of columns that need not be named."""

ALIASES = {"glm4": "messages", "openai": "messages"}
"""Other names of forms."""

MESSAGE_FORMS: dict[str, tuple[Callable[..., Conversation], str]] = {
    "chatglm3": (chatglm3, "conversations"),
    "sharegpt": (sharegpt, "conversations"),
    "messages": (messages, "messages"),
}
"""The forms that hold a list of messages, with what reads them and the field of that list."""

_BESIDE_TEXT = {"", "id", "idx", "url", "title", "source", "meta", "metadata", "date", "timestamp", "lang", "language",
                "license", "__index_level_0__"}  # fmt: skip


@dataclass(frozen=True)
class Columns:
    """What the user said about the rows; None means: tell it by the fields.

    Attributes:
        prompt, response, history: names of columns.
        form: one of FORMS or ALIASES.

    Raises:
        ValueError: if the form is unknown.
    """

    prompt: str | None = None
    response: str | None = None
    history: str | None = None
    form: str | None = None

    def __post_init__(self) -> None:
        if self.form is not None and self.form not in (*FORMS, *ALIASES):
            known = ", ".join((*FORMS, *ALIASES))
            raise ValueError(f"--data_form must be one of {known}, not {self.form!r}")


def find_form(row: Mapping[str, Any], columns: Columns) -> str:
    """The form of a row: the named one, the one that its named columns make, or the only one that its fields fit.

    Raises:
        ValueError: naming file and line, the fields found and the forms known, if its fields fit none, or several.
    """
    if columns.form is not None:
        return ALIASES.get(columns.form, columns.form)
    if columns.prompt is not None or columns.response is not None:
        # A file of conversations needs no columns, whatever a script names.
        missing = [name for name in (columns.prompt, columns.response) if name is not None and name not in row]
        return (missing and _form_of_messages(row)) or "columns"
    pairs = _pairs(row)
    found = [form for form in (_form_of_messages(row),) if form]
    if row.get("instruction") is not None and "output" in row:
        found.append("alpaca")
        pairs = [pair for pair in pairs if pair != ("input", "output")]
    found += ["columns"] * len(pairs)
    if not found and isinstance(row.get(TEXT_COLUMN), str) and _nothing_beside_text(row):
        found.append("text")
    if len(found) == 1:
        return found[0]
    if not found:
        fail(row, f"no form of data has these fields: {names(row)}.\n{_known()}")
    fits = [" and ".join(pair) for pair in pairs] + [form for form in found if form != "columns"]
    fail(row, f"the fields {names(row)} fit several forms ({'; '.join(fits)}).\n{_known()}")


def understand(
    row: Mapping[str, Any], columns: Columns, source_prefix: str = ""
) -> tuple[str, Conversation | Document]:
    """The form of a row, and what the row means.

    Raises:
        ValueError: naming file and line, if its form is not clear, or something in it is not of that form.
    """
    form = find_form(row, columns)
    if form == "columns":
        return form, by_columns.question_and_answer(row, *_named_columns(row, columns), source_prefix)
    if form == "alpaca":
        return form, by_columns.alpaca(row, columns.history, source_prefix)
    if form == "text":
        return form, by_columns.plain_text(row, columns.prompt or TEXT_COLUMN)
    reader, field = MESSAGE_FORMS[form]
    if field not in row:
        fail(row, f"there is no {field!r}, which the form {form} needs (the row has {names(row)}).")
    return form, reader(row, source_prefix, field)


def to_conversation(row: Mapping[str, Any], columns: Columns, source_prefix: str = "") -> Conversation | Document:
    """What a row means; see `understand`."""
    return understand(row, columns, source_prefix)[1]


def _named_columns(row: Mapping[str, Any], columns: Columns) -> tuple[str, str, str | None]:
    if columns.prompt is not None and columns.response is not None:
        return columns.prompt, columns.response, columns.history
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
    # A row that is understood by its fields is understood with all of them.
    unnamed = columns.prompt is None and columns.response is None
    return *pairs[0], columns.history or ("history" if unnamed and "history" in row else None)


def _pairs(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(prompt, response) for prompt, response in PAIRS if prompt in row and response in row]


def _form_of_messages(row: Mapping[str, Any]) -> str | None:
    present = [field for field in ("conversations", "messages") if row.get(field) is not None]
    if len(present) == 2:
        fail(row, f"it has both 'conversations' and 'messages'; say which with --data_form.\n{_known()}")
    if not present:
        return None
    if present == ["messages"]:
        return "messages"
    turns = parsed(row["conversations"])
    first = turns[0] if isinstance(turns, list) and turns else None
    return "sharegpt" if isinstance(first, dict) and "from" in first else "chatglm3"


def _nothing_beside_text(row: Mapping[str, Any]) -> bool:
    return all(name == TEXT_COLUMN or name.lower() in _BESIDE_TEXT or value is None for name, value in row.items())


def _known() -> str:
    lines = [f"  {name}: {fields}" for name, fields in FORMS.items()]
    return "The forms, which --data_form names:\n" + "\n".join(lines)
