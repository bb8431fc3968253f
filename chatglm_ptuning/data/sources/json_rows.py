"""Rows of JSON lines and JSON arrays, read piece by piece, so that a file may be larger than memory; JSON documents."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from chatglm_ptuning.data.sources.rows import BadRows, Row
from chatglm_ptuning.data.sources.text import check_is_text, not_utf8, open_bytes, read_text, text_lines

EXPECTED = "A data file holds one JSON object per line, or one JSON array of objects"
_SPACE = re.compile(r"[ \t\r\n]*")
_SHOWN = 60  # characters of a faulty line in a message
_CHUNK = 1 << 20
_LONGEST_TOKEN = 16  # characters of JSON that may look wrong only because the rest of them is not read yet


def json_rows(path: Path, bad_rows: BadRows) -> Iterator[Row]:
    """The objects of an array, or of lines; blank lines are skipped and a byte order mark is dropped.

    Raises:
        ValueError: naming file and line, if the file is unreadable, empty or not text, or an array is not JSON; and as
            `bad_rows.add` for a line, or an element of an array, that is not an object.
    """
    with open_bytes(path) as file:
        start = file.read(_CHUNK)
        check_is_text(path, start[:1000])
        start = start.removeprefix(codecs.BOM_UTF8)
        while not start.strip() and (more := file.read(_CHUNK)):
            start += more
        if not start.strip():
            raise ValueError(f"{path} is empty. {EXPECTED}.")
        if start.lstrip().startswith(b"["):
            yield from _ArrayReader(file, start, path, bad_rows).rows()
            return
    yield from _line_rows(path, bad_rows)


def _line_rows(path: Path, bad_rows: BadRows) -> Iterator[Row]:
    decoder = json.JSONDecoder(parse_constant=_refuse_constant)
    for number, line in text_lines(path, bad_rows):
        if not line.strip():
            continue
        try:
            value = decoder.decode(line.rstrip("\r\n"))
        except (ValueError, RecursionError) as error:
            bad_rows.add(_message(path, number, line, _reason(error)))
            continue
        if isinstance(value, dict):
            yield Row(value, str(path), number)
        else:
            bad_rows.add(_message(path, number, line, f"expected an object, found {_json_type(value)}"))


def json_document(path: Path, expected: str) -> Any:
    """The one JSON value of a file that holds no rows.

    Args:
        expected: what that value is, for the message.

    Raises:
        ValueError: naming file and line, if it cannot be read.
    """
    text = read_text(path)
    if not text.strip():
        raise ValueError(f"{path} is empty; expected {expected}.")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: {_reason(error)}; expected {expected}.") from error
    except RecursionError as error:
        raise ValueError(f"{path}: {_reason(error)}.") from error


class _ArrayReader:
    """The elements of an array one by one, with their line numbers, and at most a few of them in memory."""

    def __init__(self, file: BinaryIO, start: bytes, path: Path, bad_rows: BadRows) -> None:
        self.file = file
        self.path = path
        self.bad_rows = bad_rows
        self.utf8 = codecs.getincrementaldecoder("utf-8")()
        self.json = json.JSONDecoder(parse_constant=_refuse_constant)
        self.text = ""
        self.position = 0
        self.counted, self.line = 0, 1  # the line that the character `counted` stands on
        self.ended = False
        self._take(start)

    def rows(self) -> Iterator[Row]:
        self._next_mark()
        self.position += 1
        found = False
        closed = self._next_mark() == "]"
        while not closed:
            found = True
            line, source = self._line_at(self.position), self._source(self.position)
            value = self._value()
            if isinstance(value, dict):
                yield Row(value, str(self.path), line)
            else:
                reason = f"expected an object, found {_json_type(value)}"
                self.bad_rows.add(_message(self.path, line, source, reason))
            mark = self._next_mark()
            if mark not in {",", "]"}:
                seen = "the file ends" if not mark else f"found {mark!r}"
                self._fail(self.position, f"expected ',' or ']' behind an element, {seen}")
            closed = mark == "]"
            if not closed:
                self.position += 1
                self._next_mark()
        self.position += 1
        if self._next_mark():
            self._fail(self.position, "there is more text behind the end of the array")
        if not found:
            raise ValueError(f"{self.path} holds an empty array. {EXPECTED}.")

    def _value(self) -> Any:
        while True:
            try:
                value, self.position = self.json.raw_decode(self.text, self.position)
                return value
            except json.JSONDecodeError as error:
                cut_off = error.msg.startswith("Unterminated string") or error.pos > len(self.text) - _LONGEST_TOKEN
                if cut_off and not self.ended:
                    self._fill()
                    continue
                self._fail(error.pos, f"not valid JSON: {error.msg} (column {self._column(error.pos)})")
            except (ValueError, RecursionError) as error:
                self._fail(self.position, _reason(error))

    def _next_mark(self) -> str:
        """The next character that is no white space, at `position` then; empty at the end of the file."""
        while True:
            self.position = _SPACE.match(self.text, self.position).end()
            if self.position < len(self.text) or self.ended:
                return self.text[self.position : self.position + 1]
            self._fill()

    def _fill(self) -> None:
        self._line_at(self.position)
        self.text, self.position, self.counted = self.text[self.position :], 0, 0
        # As much again as is waiting, so that a huge element is not decoded too often.
        self._take(self.file.read(max(_CHUNK, len(self.text))))

    def _take(self, data: bytes) -> None:
        self.ended = not data
        try:
            self.text += self.utf8.decode(data, final=self.ended)
        except UnicodeDecodeError as error:
            line = self._line_at(len(self.text)) + error.object.count(b"\n", 0, error.start)
            raise ValueError(not_utf8(self.path, line, error.object[error.start])) from None

    def _line_at(self, position: int) -> int:
        if position < self.counted:
            return self.line - self.text.count("\n", position, self.counted)
        self.line += self.text.count("\n", self.counted, position)
        self.counted = position
        return self.line

    def _column(self, position: int) -> int:
        return position - self.text.rfind("\n", 0, position)

    def _source(self, position: int) -> str:
        start = self.text.rfind("\n", 0, position) + 1
        return self.text[start : start + 4 * _SHOWN].split("\n")[0]

    def _fail(self, position: int, reason: str) -> NoReturn:
        raise ValueError(_message(self.path, self._line_at(position), self._source(position), reason))


def _json_type(value: Any) -> str:
    if value is None:
        return "null"
    return {list: "an array", str: "a string", bool: "a boolean"}.get(type(value), "a number")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value, write null or a number")


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON: {error.msg} (column {error.colno})"
    return "nested too deeply" if isinstance(error, RecursionError) else f"not valid JSON: {error}"


def _message(path: Path, line: int, source: str, reason: str) -> str:
    source = source.strip()
    shown = source[:_SHOWN] + ("..." if len(source) > _SHOWN else "")
    return f"{path}:{line}: {reason}. The line starts: {shown}\n{EXPECTED}; correct or delete this line."
