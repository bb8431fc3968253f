"""Reading data files: JSON arrays and JSON lines, plain or gzipped, into rows that know where they stand."""

from __future__ import annotations

import codecs
import difflib
import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn

_GZIP_MAGIC = b"\x1f\x8b"
_SPACE = re.compile(r"[ \t\r\n]*")
_SHOWN = 60  # characters of a faulty line in a message
_EXPECTED = "A data file holds one JSON object per line, or one JSON array of objects"


class Row(dict):
    """One JSON object of a data file.

    Attributes:
        path: the file as it was named by the user.
        line: the line that the object starts on, from 1.
    """

    __slots__ = ("line", "path")

    def __init__(self, values: Mapping[str, Any] | Iterable[tuple[str, Any]], path: str, line: int) -> None:
        super().__init__(values)
        self.path = path
        self.line = line

    @property
    def where(self) -> str:
        """`FILE:LINE`, for messages."""
        return f"{self.path}:{self.line}"


def read_rows(path: str | PathLike[str]) -> list[Row]:
    """All objects of a JSON array, or of a file of JSON lines; either may be gzipped.

    Blank lines are skipped and a byte order mark is dropped. The whole file is read before anything else happens, so
    that a fault in its last line shows at once.

    Raises:
        ValueError: if the file is missing, a folder, unreadable, empty, not UTF-8, a damaged gzip file, or if anything
            in it is not a JSON object: naming the file, the line and the start of that line.
    """
    text = read_text(Path(path))
    start = _SPACE.match(text).end()
    if start == len(text):
        raise ValueError(f"{path} is empty. {_EXPECTED}.")
    rows = list(_array_rows(text, str(path), start) if text[start] == "[" else _line_rows(text, str(path)))
    if not rows:
        raise ValueError(f"{path} holds an empty array. {_EXPECTED}.")
    return rows


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, plain or gzipped, without a byte order mark.

    Raises:
        ValueError: if the file is missing, a folder, unreadable, not UTF-8, or a damaged gzip file.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(_missing(path)) from None
    except IsADirectoryError:
        names = sorted(child.name for child in path.iterdir() if ".json" in child.name)
        raise ValueError(
            f"{path} is a folder, not a data file; name one file in it ({_listed(names) or 'it has no JSON files'})."
        ) from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}.") from error
    if data.startswith(_GZIP_MAGIC):
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(
                f"{path} is a gzip file that is damaged or cut off ({error}); make or fetch it again."
            ) from error
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in data[:1000]:
        raise ValueError(
            f"{path} is not UTF-8 text: it is UTF-16 or a binary file. Save it as UTF-8, for example with "
            f"`iconv -f UTF-16 -t UTF-8 {path.name} > utf8.json`."
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}:{line}: not UTF-8 text (byte 0x{data[error.start]:02x}). If it is GBK or GB18030, convert it: "
            f"`iconv -f GB18030 -t UTF-8 {path.name} > utf8.json`."
        ) from None


def _missing(path: Path) -> str:
    if not path.parent.is_dir():
        return f"{path} does not exist, nor does its folder {path.parent.absolute()}; check the path."
    names = [child.name for child in path.parent.iterdir() if child.is_file()]
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5) or sorted(n for n in names if ".json" in n)
    return (
        f"{path} does not exist in {path.parent.absolute()}; "
        f"{f'did you mean {_listed(near)}?' if near else 'that folder has no JSON files.'}"
    )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _line_rows(text: str, path: str) -> Iterator[Row]:
    decoder = json.JSONDecoder(parse_constant=_refuse_constant)
    # Not str.splitlines: it also breaks at characters such as U+2028, which may stand inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = decoder.decode(line)
        except (ValueError, RecursionError) as error:
            _fail(path, number, line, _reason(error))
        yield _row(value, path, number, line)


def _array_rows(text: str, path: str, opening: int) -> Iterator[Row]:
    """Decodes the elements one by one, for the sake of their line numbers."""
    decoder = json.JSONDecoder(parse_constant=_refuse_constant)
    counted, line = 0, 1

    def line_at(position: int) -> int:
        nonlocal counted, line
        line += text.count("\n", counted, position)
        counted = position
        return line

    def source(position: int) -> str:
        return text[text.rfind("\n", 0, position) + 1 :][: 4 * _SHOWN].split("\n")[0]

    position = _SPACE.match(text, opening + 1).end()
    closed = text[position : position + 1] == "]"
    while not closed:
        start = position
        try:
            value, position = decoder.raw_decode(text, start)
        except json.JSONDecodeError as error:
            _fail(path, error.lineno, source(error.pos), _reason(error))
        except (ValueError, RecursionError) as error:
            _fail(path, line_at(start), source(start), _reason(error))
        yield _row(value, path, line_at(start), text[start : start + 2 * _SHOWN])
        position = _SPACE.match(text, position).end()
        mark = text[position : position + 1]
        if mark not in {",", "]"}:
            found = "the file ends" if not mark else f"found {mark!r}"
            _fail(path, line_at(position), source(position), f"expected ',' or ']' behind an element, {found}")
        closed = mark == "]"
        if not closed:
            position = _SPACE.match(text, position + 1).end()
    rest = _SPACE.match(text, position + 1).end()
    if rest < len(text):
        _fail(path, line_at(rest), source(rest), "there is more text behind the end of the array")


def _row(value: Any, path: str, line: int, source: str) -> Row:
    if not isinstance(value, dict):
        _fail(path, line, source, f"expected an object, found {_json_type(value)}")
    return Row(value, path, line)


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


def _fail(path: str, line: int, source: str, reason: str) -> NoReturn:
    source = source.strip()
    shown = source[:_SHOWN] + ("..." if len(source) > _SHOWN else "")
    raise ValueError(f"{path}:{line}: {reason}. The line starts: {shown}\n{_EXPECTED}; correct or delete this line.")
