"""The one door to data files of every type: rows that know where they stand, streamed or all at once."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from chatglm_ptuning.data.hub import HUB_PREFIX, HubDataset
from chatglm_ptuning.data.json_rows import EXPECTED, json_rows
from chatglm_ptuning.data.row import BadRows, Row
from chatglm_ptuning.data.table_rows import parquet_rows, plain_text_rows, separated_rows
from chatglm_ptuning.data.text_input import DATA_SUFFIXES, data_files, data_suffix, listed, open_bytes

__all__ = ["BadRows", "DataFile", "Row", "find_files", "iterate_rows", "read_rows"]

_SPLITS = {
    "train": "train", "training": "train", "dev": "validation", "val": "validation", "valid": "validation",
    "validation": "validation", "eval": "validation", "test": "test", "testing": "test",
}  # fmt: skip
_HASHED_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class DataFile:
    """A file, of whatever type.

    Attributes:
        path: where it is.
        name: how messages call it.
    """

    path: Path
    name: str

    def rows(self, bad_rows: BadRows) -> Iterator[Row]:
        """Its rows, read as they are asked for.

        The suffix tells the type: .csv, .tsv, .parquet, .txt (one row per line, column `text`), and JSON (lines or an
        array) for all others; each may be gzipped.

        Raises:
            ValueError: naming file and line, if the file cannot be read, and as `bad_rows.add` for a bad row.
        """
        suffix = data_suffix(self.path)
        if suffix in (".csv", ".tsv"):
            return separated_rows(self.path, self.name, bad_rows, "," if suffix == ".csv" else "\t")
        if suffix == ".parquet":
            return parquet_rows(self.path, self.name)
        if suffix == ".txt":
            return plain_text_rows(self.path, self.name, bad_rows)
        return json_rows(self.path, self.name, bad_rows)

    def fingerprint(self) -> str:
        """A hash over the content."""
        digest = hashlib.blake2b(digest_size=16)
        # The type is told by the suffix, so it is part of what is read.
        digest.update(data_suffix(self.path).encode())
        with open_bytes(self.path) as file:
            while data := file.read(_HASHED_AT_ONCE):
                digest.update(data)
        return digest.hexdigest()


def find_files(name: str | PathLike[str]) -> list[DataFile | HubDataset]:
    """What a name on the command line stands for: a file, the data files of a folder, of a pattern, or of the hub.

    `hub:OWNER/NAME`, optionally with `?split=SPLIT&config=CONFIG&revision=REVISION`, is a dataset on the hub. Files of
    a folder or a pattern are sorted by name.

    Raises:
        ValueError: if there is nothing of that name, or a folder holds files of several splits.
    """
    text = str(name)
    if text.startswith(HUB_PREFIX):
        return [HubDataset.parse(text)]
    path = Path(text)
    if path.is_dir():
        return [DataFile(child, str(child)) for child in _files_of_folder(path)]
    if not path.exists() and glob.has_magic(text):
        found = sorted(
            match
            for match in glob.iglob(text, recursive=True)  # noqa: PTH207
            if Path(match).is_file()
        )
        if not found:
            raise ValueError(f"No file matches the pattern {text} (from {Path.cwd()}).")
        return [DataFile(Path(match), match) for match in found]
    return [DataFile(path, text)]


def iterate_rows(names: Sequence[str | PathLike[str]], bad_rows: BadRows | None = None) -> Iterator[Row]:
    """The rows of files, folders, patterns and hub datasets one after the other, as they are asked for.

    Raises:
        ValueError: as `find_files` and `DataFile.rows`.
    """
    bad_rows = bad_rows or BadRows()
    for name in names:
        for file in find_files(name):
            yield from file.rows(bad_rows)


def read_rows(path: str | PathLike[str]) -> list[Row]:
    """All rows of a file, folder, pattern or hub dataset, in memory.

    Raises:
        ValueError: as `iterate_rows`; also if there are no rows.
    """
    rows = list(iterate_rows([path]))
    if not rows:
        raise ValueError(f"{path} is empty. {EXPECTED}.")
    return rows


def _files_of_folder(folder: Path) -> list[Path]:
    files = data_files(folder)
    if not files:
        raise ValueError(f"{folder} is a folder without data files ({', '.join(DATA_SUFFIXES)}, also gzipped).")
    splits: dict[str, str] = {}
    for path in files:
        words = path.name.lower().replace("-", ".").replace("_", ".").split(".")
        split = next((_SPLITS[word] for word in words if word in _SPLITS), None)
        if split:
            splits.setdefault(split, path.name)
    if len(splits) > 1:
        raise ValueError(
            f"{folder} holds files of several splits ({listed(list(splits.values()))}); name the files of one, or a "
            f"pattern such as '{folder}/train*'."
        )
    return files
