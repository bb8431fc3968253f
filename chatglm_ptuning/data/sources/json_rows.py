"""Rows of JSON lines and JSON arrays, streamed, so that a file may be larger than memory; JSON documents."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, TextIO

from chatglm_ptuning.data.sources.rows import BadRows, Row
from chatglm_ptuning.data.sources.text import BOM, first_character, not_utf8, open_text, read_text, text_lines
from chatglm_ptuning.exact_json import NUMBERS, loads

EXPECTED = "A data file holds one JSON object per line, or one JSON array of objects"
_NOT_AN_OBJECT = "expected a JSON object"
_SPACE = re.compile(rf"[ \t\r\n{BOM}]*")
_SHOWN = 60  # characters of a faulty line in a message
_CHUNK = 1 << 16  # characters; the rest of a chunk is copied with every element
_LONGEST_TOKEN = 16  # characters of JSON that may look wrong because the rest of them is not read yet


def json_rows(path: Path, bad_rows: BadRows) -> Iterator[Row]:
    """The objects of an array, or of lines; blank lines are skipped. Joined files are read as one.

    Raises:
        ValueError: naming file and line, if the file is unreadable, empty or not text, or an array is not JSON; and as
            `bad_rows.add` for a line, or an element of an array, that is not an object.
    """
    start = first_character(path)
    if not start:
        raise ValueError(f"{path} is empty. {EXPECTED}.")
    yield from _array_rows(path, bad_rows) if start == "[" else _line_rows(path, bad_rows)


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
        return loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: {_reason(error)}; expected {expected}.") from error
    except RecursionError as error:
        raise ValueError(f"{path}: {_reason(error)}.") from error


def _line_rows(path: Path, bad_rows: BadRows) -> Iterator[Row]:
    for number, line in text_lines(path, bad_rows):
        if not line.strip():
            continue
        try:
            value = _DECODER.decode(line.rstrip("\r\n"))
        except (ValueError, RecursionError) as error:
            joined = (
                "a byte order mark inside the line: two files were joined; break the line there" if BOM in line else ""
            )
            bad_rows.add(_message(path, number, joined or _reason(error), line))
            continue
        if isinstance(value, dict):
            yield Row(value, str(path), number)
        else:
            bad_rows.add(_message(path, number, _NOT_AN_OBJECT, line))


def _array_rows(path: Path, bad_rows: BadRows) -> Iterator[Row]:
    with open_text(path) as file:
        array = _ArrayText(file, path)
        while array.next_mark() == "[":  # joined files hold one array after the other
            array.drop(1)
            if array.next_mark() == "]":
                raise ValueError(f"{path}:{array.line}: an empty array. {EXPECTED}.")
            mark = ","
            while mark == ",":
                array.next_mark()
                line, value = array.line, array.take_value()
                if isinstance(value, dict):
                    yield Row(value, str(path), line)
                else:
                    bad_rows.add(_message(path, line, _NOT_AN_OBJECT, json.dumps(value, ensure_ascii=False)))
                mark = array.next_mark()
                if mark not in {",", "]"}:
                    found = f"found {mark!r}" if mark else "the file ends"
                    array.fail(f"expected ',' or ']' after an element, {found}")
                array.drop(1)
        if array.next_mark():
            array.fail("there is more text after the end of the array")


class _ArrayText:
    """The text of an array that is still to be read, of which only the beginning is in memory.

    Attributes:
        line, column: where it begins in the file, from 1 and from 0.
    """

    def __init__(self, file: TextIO, path: Path) -> None:
        self.file, self.path = file, path
        self.text, self.line, self.column = "", 1, 0
        self.ended = False

    def next_mark(self) -> str:
        """Drops white space. Returns the next character; empty text at the end of the file."""
        while True:
            self.drop(_SPACE.match(self.text).end())
            if self.text or self.ended:
                return self.text[:1]
            self._fill()

    def take_value(self) -> Any:
        """Reads the value at the beginning, and drops its text."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text)
                self.drop(end)
                return value
            except json.JSONDecodeError as error:
                unfinished = error.msg.startswith("Unterminated string") or error.pos > len(self.text) - _LONGEST_TOKEN
                if self.ended or not unfinished:
                    self.drop(error.pos - (error.colno - 1))
                    self.fail(f"not valid JSON: {error.msg} (column {self.column + error.colno})")
                self._fill()
            except (ValueError, RecursionError) as error:
                self.fail(_reason(error))

    def drop(self, count: int) -> None:
        dropped, self.text = self.text[:count], self.text[count:]
        self.line += dropped.count("\n")
        self.column = count - dropped.rfind("\n") - 1 if "\n" in dropped else self.column + count

    def fail(self, reason: str) -> NoReturn:
        raise ValueError(_message(self.path, self.line, reason, self.text[: 4 * _SHOWN]))

    def _fill(self) -> None:
        # As much again as is in memory, so that a huge element is not decoded too often.
        data = self.file.read(max(_CHUNK, len(self.text)))
        self.text += data
        self.ended = not data
        if fault := not_utf8(self.path, self.line, self.text):
            raise ValueError(fault)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value, write null or a number")


def _object(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(fields)
    if len(values) < len(fields):
        names = [name for name, _ in fields]
        raise ValueError(f"an object names {next(name for name in names if names.count(name) > 1)!r} twice")
    return values


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_refuse_constant, **NUMBERS)


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON: {error.msg} (column {error.colno})"
    return "nested too deeply" if isinstance(error, RecursionError) else f"not valid JSON: {error}"


def _message(path: Path, line: int, reason: str, source: str) -> str:
    source = source.strip().partition("\n")[0]
    shown = source[:_SHOWN] + ("..." if len(source) > _SHOWN else "")
    return f"{path}:{line}: {reason}, in: {shown}\n{EXPECTED}; correct or delete this line."
