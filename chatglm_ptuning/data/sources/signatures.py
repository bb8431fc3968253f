"""What a file is that is not text, by its first bytes, and what to do with it."""

from __future__ import annotations

import codecs
import zipfile
from typing import BinaryIO

READ_AT_ONCE = 1000
"""Bytes at the beginning of a file that these functions look at."""

_AS_TABLE = "save the sheet as CSV (UTF-8) and name that file"
_AS_TEXT = "save its content as UTF-8 text, JSON or CSV and name that file"
_UNPACK = "unpack it with `{} {{name}}` and name the files in it"

_SIGNATURES = (
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office document (.xls, .doc)", f"{_AS_TABLE}, or {_AS_TEXT}"),
    (b"%PDF-", "a PDF document", _AS_TEXT),
    (b"{\\rtf1", "an RTF document", _AS_TEXT),
    (b"\x1f\x8b", "gzipped twice", _UNPACK.format("gunzip")),
    (b"BZh91AY&SY", "compressed by bzip2", _UNPACK.format("bunzip2")),
    (b"\xfd7zXZ\0", "compressed by xz", _UNPACK.format("unxz")),
    (b"\x28\xb5\x2f\xfd", "compressed by Zstandard", _UNPACK.format("unzstd")),
    (b"\x04\x22\x4d\x18", "compressed by LZ4", _UNPACK.format("unlz4")),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", _UNPACK.format("7z x")),
    (b"Rar!\x1a\x07", "a RAR archive", _UNPACK.format("unrar x")),
    (b"PAR1\x15", "a Parquet file", "give it the suffix .parquet"),
    (b"ARROW1\0\0", "an Arrow file", "convert it with pyarrow: feather.read_table('{name}'), then parquet.write_table"),
    (b"Obj\x01", "an Avro file", "convert it to JSON lines"),
    (b"SQLite format 3\0", "an SQLite database", "export its table as CSV (`sqlite3 -csv -header`)"),
    (b"\x89HDF\r\n", "an HDF5 file", "export its table as CSV or Parquet"),
    (b"\x93NUMPY", "a NumPy array", "write its rows as JSON lines"),
    (b"\x89PNG", "a picture (PNG)", "only text can be learned"),
    (b"\xff\xd8\xff", "a picture (JPEG)", "only text can be learned"),
    (b"GIF89a", "a picture (GIF)", "only text can be learned"),
    (
        b"version https://git-lfs.github.com/spec/",
        "a pointer of Git LFS, not the file itself",
        "download the file with `git lfs pull`, or from the web page of the repository",
    ),
)
_PICKLE = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))
_TAR = (257, b"ustar")
_ZIPPED = (
    ("xl/", "an Excel workbook (.xlsx)", _AS_TABLE),
    ("word/", "a Word document (.docx)", _AS_TEXT),
    ("ppt/", "a PowerPoint presentation (.pptx)", _AS_TEXT),
    ("mimetype", "an OpenDocument file (.ods, .odt) or an e-book (.epub)", f"{_AS_TABLE}, or {_AS_TEXT}"),
    ("Index/", "a document of Numbers or Pages", f"{_AS_TABLE}, or {_AS_TEXT}"),
)
_ARCHIVE = ("a zip archive", _UNPACK.format("unzip"))
_UTF_16 = (("UTF-16LE", 1), ("UTF-16BE", 0))
_BOMS = (
    (codecs.BOM_UTF32_LE, "UTF-32"), (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"), (codecs.BOM_UTF16_BE, "UTF-16"),
)  # fmt: skip


def kind_of(file: BinaryIO, start: bytes) -> tuple[str, str] | None:
    """What a file is that is no text, and the way out, with `{name}` for its name and
    `{suffix}` for its type; None if it may be text.

    Args:
        file: at its beginning; it is read only if the beginning is that of a zip archive.
        start: its first bytes, `READ_AT_ONCE` or all.
    """
    if start.startswith(b"PK\x03\x04"):
        return _kind_of_zip(file)
    for signature, kind, way_out in _SIGNATURES:
        if start.startswith(signature):
            return kind, way_out
    place, mark = _TAR
    if start.startswith(mark, place):
        return "a tar archive", _UNPACK.format("tar -xf")
    if start.startswith(_PICKLE):
        return "a Python pickle, which is not opened for safety", "write its rows as JSON lines"
    if b"\0" in start and encoding_of(start) is None:
        text = start.replace(b"\0", b"")
        if len(text) > 0.9 * len(start) and _is_text(text, "utf-8"):
            return "text with NUL characters", "take them out with `tr -d '\\0' < {name} > clean{suffix}`"
        return "a binary file of an unknown kind", "export it as JSON, CSV or Parquet"
    return None


def _kind_of_zip(file: BinaryIO) -> tuple[str, str]:
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        return "a damaged zip archive, Excel or Word file", "make or download it again"
    for beginning, kind, way_out in _ZIPPED:
        if any(name.startswith(beginning) for name in names):
            return kind, way_out
    return _ARCHIVE


def encoding_of(start: bytes) -> str | None:
    """UTF-16 or UTF-32, by a byte order mark, or by the zero bytes of ASCII characters at every other place."""
    for mark, encoding in _BOMS:
        if start.startswith(mark):
            return encoding
    for encoding, place in _UTF_16:
        if start[place::2].count(0) > start[1 - place :: 2].count(0) and _is_text(start, encoding):
            return encoding
    return None


def _is_text(data: bytes, encoding: str) -> bool:
    text = data[: len(data) // 2 * 2].decode(encoding, "ignore")
    return sum(character.isprintable() or character.isspace() for character in text) > 0.98 * len(text)
