"""Opening text files of any size: gzip, UTF-8, and error messages for files that are something else."""

from __future__ import annotations

import difflib
import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO

from chatglm_ptuning.data.sources.rows import BadRows
from chatglm_ptuning.data.sources.signatures import READ_AT_ONCE, encoding_of, kind_of

DATA_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".txt")
_GZIP_MAGIC = b"\x1f\x8b"
_LISTED = 5

BOM = "\ufeff"
"""The byte order mark, as a character."""


def data_suffix(path: Path) -> str:
    """The suffix that gives the type of the file, in lower case, without a trailing `.gz`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def data_files(folder: Path) -> list[Path]:
    """The data files in a folder, sorted by name."""
    return sorted(path for path in folder.iterdir() if path.is_file() and data_suffix(path) in DATA_SUFFIXES)


@contextmanager
def open_bytes(path: Path) -> Iterator[BinaryIO]:
    """Opens a file for reading, and decompresses it if it is gzipped.

    Raises:
        ValueError: naming the file, if it is missing, unreadable, or a damaged or truncated gzip file. Damage may show
            only at the end of the file.
    """
    try:
        with path.open("rb") as raw:
            packed = raw.peek(2)[:2] == _GZIP_MAGIC
            with gzip.open(raw) if packed else raw as file:
                yield file
    except FileNotFoundError:
        raise ValueError(_missing(path)) from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is a damaged or truncated gzip file ({error}); make or download it again.") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}.") from error


@contextmanager
def open_text(path: Path, newline: str = "\n") -> Iterator[TextIO]:
    """Opens a UTF-8 file, plain or gzipped; a byte order mark is dropped.

    Args:
        newline: as of `open`. By default a line ends in a line feed and nowhere else: characters such as U+2028 may
            be inside a JSON string.

    Returns:
        A file in which bytes that are not UTF-8 are lone surrogates; `not_utf8` finds them.

    Raises:
        ValueError: as `open_bytes`; if the file is UTF-16 or binary, saying what it is and the way out.
    """
    with open_bytes(path) as file:
        start = file.peek(READ_AT_ONCE)[:READ_AT_ONCE]
        if found := kind_shown(path, file, start):
            raise ValueError(f"{path} is not UTF-8 text: {found}")
        if encoding := encoding_of(start):
            raise ValueError(f"{path} is not UTF-8 text: it is {encoding}. Convert it: {_conversion(path, encoding)}.")
        yield io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline)


def kind_shown(path: Path, file: BinaryIO, start: bytes) -> str | None:
    """A sentence with what a file is that is no text, and one with the way out; None if it may be text.

    Args:
        file, start: as of `kind_of`.
    """
    found = kind_of(file, start)
    if found is None:
        return None
    kind, way_out = found
    way_out = way_out.format(name=path.name, suffix=data_suffix(path))
    return f"it is {kind}. {way_out[0].upper()}{way_out[1:]}."


def not_utf8(path: Path, line: int, text: str) -> str | None:
    """The error message about a text of a file opened by `open_text`; None if all of it is UTF-8.

    Args:
        line: on which the text starts.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) - 0xDC00
        return (
            f"{path}:{line + text.count(chr(10), 0, error.start)}: not UTF-8 text (byte 0x{byte:02x}). If it is GBK or "
            f"GB18030, convert it: {_conversion(path, 'GB18030')}."
        )
    return None


def _conversion(path: Path, encoding: str) -> str:
    convert = f"iconv -f {encoding} -t UTF-8"
    packed = path.suffix.lower() == ".gz"
    return f"`{f'gunzip -c {path.name} | {convert}' if packed else f'{convert} {path.name}'} > utf8{data_suffix(path)}`"


def text_lines(path: Path, bad_rows: BadRows) -> Iterator[tuple[int, str]]:
    """Numbered lines, from 1, each with its line feed, and without the byte order marks that joined files have inside.

    Raises:
        ValueError: as `open_text`, and as `bad_rows.add` for a line that is not UTF-8.
    """
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if fault := not_utf8(path, number, line):
                bad_rows.add(fault)
            else:
                yield number, line.lstrip(BOM)


def read_text(path: Path) -> str:
    """The whole text of a file, plain or gzipped, without a byte order mark.

    Raises:
        ValueError: as `text_lines`, for the first line that is not UTF-8.
    """
    return "".join(line for _, line in text_lines(path, BadRows()))


def first_character(path: Path) -> str:
    """The first character of a file that is not white space; empty text if there is none.

    Raises:
        ValueError: as `open_text`.
    """
    with open_text(path) as file:
        while chunk := file.read(1000):
            if rest := chunk.replace(BOM, "").lstrip():
                return rest[0]
    return ""


def _missing(path: Path) -> str:
    if not path.parent.is_dir():
        hint = ""
        if str(path).count("/") == 1 and not path.suffix:
            hint = f" For a dataset on a hub write huggingface:{str(path).removeprefix('hub:')}."
        return f"{path} does not exist, nor does its folder {path.parent.absolute()}; check the path.{hint}"
    near = difflib.get_close_matches(path.name, [child.name for child in path.parent.iterdir()], n=3, cutoff=0.5)
    names = near or [child.name for child in data_files(path.parent)]
    listed = ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "")
    hint = f"did you mean {listed}?" if names else "that folder has no data files."
    return f"{path} does not exist in {path.parent.absolute()}; {hint}"
