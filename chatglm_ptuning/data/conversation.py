"""What a row means: a conversation of messages, whichever columns it was written in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from chatglm_ptuning.data.files import Row

ROLES = ("system", "user", "assistant", "observation")
CONVERSATIONS = "conversations"

# The official ChatGLM3 model has seen tool definitions and tool calls in exactly these forms (finetune_demo,
# preprocess_utils.py), so they are part of its chat format.
_TOOLS_INTRODUCTION = "Answer the following questions as best as you can. You have access to the following tools:\n"
_TOOL_CALL = "```python\ntool_call({arguments})\n```"


@dataclass(frozen=True)
class Message:
    """One message of a conversation.

    Attributes:
        role: one of `ROLES`.
        metadata: what stands on the line of the role in ChatGLM3's format: the tool's name in a tool call.
        loss: whether the message is to be learned; only answers (role `assistant`) ever are.
    """

    role: str
    content: str
    metadata: str = ""
    loss: bool = False

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"unknown role {self.role!r}; the roles are {', '.join(ROLES)}")
        if self.loss and self.role != "assistant":
            raise ValueError(f"a message of the role {self.role!r} cannot be learned, only answers can")

    @property
    def is_blank(self) -> bool:
        """Whether there is nothing but white space in it."""
        return not (self.content.strip() or self.metadata.strip())


@dataclass(frozen=True)
class Conversation:
    """Messages in their order.

    Attributes:
        source_prefix: text in front of the whole conversation (the official `--source_prefix`); the chat format
            decides where it stands.
    """

    messages: list[Message]
    source_prefix: str = ""

    def until_last_learned(self) -> Conversation:
        """The conversation without what follows the last answer to be learned; without messages if there is none."""
        end = max((index + 1 for index, message in enumerate(self.messages) if message.loss), default=0)
        return Conversation(self.messages[:end], self.source_prefix)

    def missing_side(self) -> str | None:
        """`empty` if there is neither question nor answer, `one_sided` if there is only one of them, else None.

        What counts is the last answer to be learned (else the last one with any text), and what was said since the
        last user message in front of it.
        """
        messages = self.messages
        answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
        learned = [index for index in answers if messages[index].loss]
        written = [index for index in answers if not messages[index].is_blank]
        last = (learned or written or [len(messages)])[-1]
        turn = max((index for index in range(last) if messages[index].role == "user"), default=0)
        answered = last < len(messages) and not messages[last].is_blank
        asked = any(message.role != "assistant" and not message.is_blank for message in messages[turn:last])
        if answered and asked:
            return None
        return "one_sided" if answered or asked else "empty"


@dataclass(frozen=True)
class Columns:
    """Names of the columns that hold prompt, response and, optionally, the previous rounds."""

    prompt: str = "prompt"
    response: str = "response"
    history: str | None = None


def holds_conversation(row: Mapping[str, Any], columns: Columns) -> bool:
    """Whether the row is in ChatGLM3's `conversations` form instead of prompt and response columns."""
    return CONVERSATIONS in row and columns.prompt not in row


def to_conversation(row: Mapping[str, Any], columns: Columns, source_prefix: str = "") -> Conversation:
    """The conversation that a row holds.

    - Prompt and response columns: the rounds of the history column (`[[question, answer], ...]`; null or left out
      means none), then the prompt, then the response, which alone is learned (official ChatGLM2 ptuning).
    - `conversations`: a list of `{"role", "content"}` with ChatGLM3's roles and, optionally, `metadata` and `loss`.
      Every answer with text in it is learned unless it says `"loss": false`; on other roles `loss` has no effect
      (official ChatGLM3 fine-tuning, except that tool output is never learned). The official role `tool`
      (`name`, `parameters`, `observation`) becomes a tool call and its observation; `tools` beside
      `conversations` becomes a system message, `tools` of a system message a part of it.

    Numbers and booleans are turned into text as JSON writes them; null is empty text.

    Raises:
        ValueError: naming file and line, if a column is missing, or a value is not text.
    """
    if holds_conversation(row, columns):
        return Conversation(_messages(row), source_prefix)
    prompt = _column(row, columns.prompt, "--prompt_column")
    response = _column(row, columns.response, "--response_column")
    return Conversation(
        [
            *_history(row, columns.history),
            Message("user", _text(row, prompt, f"the column {columns.prompt!r}")),
            Message("assistant", _text(row, response, f"the column {columns.response!r}"), loss=True),
        ],
        source_prefix,
    )


def fail(row: Mapping[str, Any], text: str) -> NoReturn:
    """Raises the ValueError for a fault in a row, naming its file and line."""
    raise ValueError(f"{row.where if isinstance(row, Row) else 'a row'}: {text}")


def _column(row: Mapping[str, Any], name: str, flag: str) -> Any:
    if name not in row:
        fail(row, f"there is no column {name!r} (the row has {_names(row)}); name the right one with {flag}.")
    return row[name]


def _names(row: Mapping[str, Any]) -> str:
    return ", ".join(repr(name) for name in row) or "none"


def _text(row: Mapping[str, Any], value: Any, what: str) -> str:
    if value is None:
        return ""
    if isinstance(value, (bool, int, float)):
        return json.dumps(value)
    if not isinstance(value, str):
        kind = "an array" if isinstance(value, list) else "an object"
        shown = json.dumps(value, ensure_ascii=False)
        fail(row, f"{what} holds {kind}, not text: {shown[:60]}{'...' if len(shown) > 60 else ''}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        fail(row, f"{what} holds half of a surrogate pair ({value[error.start]!a}) at character {error.start + 1}.")
    return value


def _history(row: Mapping[str, Any], column: str | None) -> list[Message]:
    rounds = row.get(column) if column else None
    if rounds is None:
        return []
    expected = f"the column {column!r} must be a list of [question, answer] pairs"
    if not isinstance(rounds, list):
        fail(row, f"{expected}, not {type(rounds).__name__}; name the right one with --history_column.")
    messages = []
    for number, pair in enumerate(rounds, start=1):
        if not isinstance(pair, list) or len(pair) != 2:
            fail(row, f"{expected}; its round {number} is {json.dumps(pair, ensure_ascii=False)[:60]}")
        question, answer = (_text(row, value, f"round {number} of the column {column!r}") for value in pair)
        messages += [Message("user", question), Message("assistant", answer)]
    return messages


def _messages(row: Mapping[str, Any]) -> list[Message]:
    turns = row[CONVERSATIONS]
    if not isinstance(turns, list):
        fail(row, f"{CONVERSATIONS!r} must be a list of messages, not {type(turns).__name__}.")
    messages = []
    if row.get("tools"):
        messages.append(Message("system", _TOOLS_INTRODUCTION + _definitions(row, row["tools"])))
    for number, turn in enumerate(turns, start=1):
        what = f"message {number} of {CONVERSATIONS!r}"
        if not isinstance(turn, dict):
            fail(row, f'{what} is not an object like {{"role": "user", "content": "..."}}')
        loss = turn.get("loss", True)
        if not isinstance(loss, bool):
            fail(row, f"{what}: 'loss' must be true or false, not {loss!r}.")
        messages += _tool_call(row, turn, what, loss) if turn.get("role") == "tool" else [_turn(row, turn, what, loss)]
    return messages


def _turn(row: Mapping[str, Any], turn: dict[str, Any], what: str, loss: bool) -> Message:
    for key in ("role", "content"):
        if key not in turn:
            fail(row, f"{what} has no {key!r} (it has {_names(turn)}); a message needs 'role' and 'content'.")
    if turn["role"] not in ROLES:
        fail(row, f"{what} has the unknown role {turn['role']!r}; the roles are {', '.join(ROLES)} and tool.")
    content = _text(row, turn["content"], what)
    if turn["role"] == "system" and turn.get("tools"):
        content = f"{content}\n{_definitions(row, turn['tools'])}"
    metadata = _text(row, turn.get("metadata"), f"the metadata of {what}")
    if "\n" in metadata:
        fail(row, f"the metadata of {what} has a line break in it; it is the rest of the role's line.")
    message = Message(turn["role"], content, metadata)
    # A blank answer would teach to say nothing.
    if message.role != "assistant" or message.is_blank or not loss:
        return message
    return Message(message.role, content, metadata, loss=True)


def _definitions(row: Mapping[str, Any], tools: Any) -> str:
    return _text(row, json.dumps(tools, indent=4, ensure_ascii=False), "'tools'")


def _tool_call(row: Mapping[str, Any], turn: dict[str, Any], what: str, loss: bool) -> list[Message]:
    name, parameters = turn.get("name"), turn.get("parameters")
    if not isinstance(name, str) or not name.strip() or not isinstance(parameters, dict):
        fail(row, f"{what} is a tool call, which needs 'name' (text) and 'parameters' (an object).")
    arguments = ", ".join(f"{key}={value!r}" for key, value in parameters.items())
    call = _text(row, _TOOL_CALL.format(arguments=arguments), what)
    observation = turn.get("observation")
    if not isinstance(observation, str):
        observation = json.dumps(observation, ensure_ascii=False)
    return [
        Message("assistant", call, _text(row, name, what), loss),
        Message("observation", _text(row, observation, f"the observation of {what}")),
    ]
