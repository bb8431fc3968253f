"""Opening text files of any size: gzip, UTF-8, and what is said about those that are something else."""

from __future__ import annotations

import codecs
import difflib
import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from chatglm_ptuning.data.sources.rows import BadRows

DATA_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".txt")
_GZIP_MAGIC = b"\x1f\x8b"
_LISTED = 5


def data_suffix(path: Path) -> str:
    """The suffix that tells what is in the file, in lower case, without a `.gz` behind it."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def data_files(folder: Path) -> list[Path]:
    """The data files in a folder, by name."""
    return sorted(path for path in folder.iterdir() if path.is_file() and data_suffix(path) in DATA_SUFFIXES)


@contextmanager
def open_bytes(path: Path) -> Iterator[BinaryIO]:
    """Opens a file for reading, unpacking it on the way if it is gzipped.

    Raises:
        ValueError: naming the file, if it is missing, unreadable, or a gzip file that is damaged or cut off, which may
            show only at its end.
    """
    try:
        with path.open("rb") as raw:
            packed = raw.peek(2)[:2] == _GZIP_MAGIC
            with gzip.open(raw) if packed else raw as file:
                yield file
    except FileNotFoundError:
        raise ValueError(_missing(path)) from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{path} is a gzip file that is damaged or cut off ({error}); make or fetch it again."
        ) from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}.") from error


def check_is_text(path: Path, start: bytes) -> None:
    """Refuses UTF-16 and binary files by their first bytes.

    Raises:
        ValueError: naming the file and how to convert it.
    """
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in start:
        raise ValueError(
            f"{path} is not UTF-8 text: it is UTF-16 or a binary file. Save it as UTF-8, for example with "
            f"`iconv -f UTF-16 -t UTF-8 {path.name} > utf8{data_suffix(path)}`."
        )


def not_utf8(path: Path, line: int, byte: int) -> str:
    """The message about bytes that are no UTF-8."""
    return (
        f"{path}:{line}: not UTF-8 text (byte 0x{byte:02x}). If it is GBK or GB18030, convert it: "
        f"`iconv -f GB18030 -t UTF-8 {path.name} > utf8{data_suffix(path)}`."
    )


def text_lines(path: Path, bad_rows: BadRows) -> Iterator[tuple[int, str]]:
    """Numbered lines, from 1, each with its line end; without a byte order mark at the start.

    A line ends in a line feed and nowhere else: characters such as U+2028 may stand inside a JSON string.

    Raises:
        ValueError: as `open_bytes` and `check_is_text`, and as `bad_rows.add` for a line that is not UTF-8.
    """
    with open_bytes(path) as file:
        for number, data in enumerate(file, start=1):
            if number == 1:
                check_is_text(path, data[:1000])
                data = data.removeprefix(codecs.BOM_UTF8)
            try:
                line = data.decode("utf-8")
            except UnicodeDecodeError as error:
                bad_rows.add(not_utf8(path, number, data[error.start]))
                continue
            yield number, line


def read_text(path: Path) -> str:
    """The whole text of a file, plain or gzipped, without a byte order mark.

    Raises:
        ValueError: as `text_lines`, for the first line that is not UTF-8.
    """
    return "".join(line for _, line in text_lines(path, BadRows()))


def listed(names: list[str]) -> str:
    """Some names for a message."""
    return ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "")


def _missing(path: Path) -> str:
    if not path.parent.is_dir():
        hint = ""
        if str(path).count("/") == 1 and not path.suffix:
            hint = f" For a dataset on a hub write huggingface:{path}."
        return f"{path} does not exist, nor does its folder {path.parent.absolute()}; check the path.{hint}"
    near = difflib.get_close_matches(path.name, [child.name for child in path.parent.iterdir()], n=3, cutoff=0.5)
    names = near or [child.name for child in data_files(path.parent)]
    return (
        f"{path} does not exist in {path.parent.absolute()}; "
        f"{f'did you mean {listed(names)}?' if names else 'that folder has no data files.'}"
    )
