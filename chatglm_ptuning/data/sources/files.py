"""From names on the command line to rows: files of every type, folders, patterns and hubs, streamed."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from chatglm_ptuning.data.sources.hub import HubDataset, is_on_hub
from chatglm_ptuning.data.sources.json_rows import json_rows
from chatglm_ptuning.data.sources.rows import BadRows, Row
from chatglm_ptuning.data.sources.tables import parquet_rows, plain_text_rows, table_rows
from chatglm_ptuning.data.sources.text import DATA_SUFFIXES, data_files, data_suffix, first_character, open_bytes

_READERS = {".csv": table_rows, ".tsv": table_rows, ".txt": plain_text_rows}
_SPLITS = {
    "train": "train", "training": "train", "dev": "validation", "val": "validation", "valid": "validation",
    "validation": "validation", "eval": "validation", "test": "test", "testing": "test",
}  # fmt: skip
_HASHED_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class DataFile:
    """A file of any type."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def rows(self, bad_rows: BadRows, *, json_in_text: bool = False) -> Iterator[Row]:
        """Its rows, streamed.

        The suffix gives the type: .csv, .tsv, .parquet, .txt (one row per line, column `text`), and JSON (lines or an
        array) for all others; each may be gzipped.

        Args:
            json_in_text: read a .txt file as JSON if it starts with `{` or `[`.

        Raises:
            ValueError: naming file and line, if the file cannot be read, and as `bad_rows.add` for a bad row.
        """
        suffix = data_suffix(self.path)
        if suffix == ".parquet":
            return parquet_rows(self.path)
        if suffix == ".txt" and json_in_text and first_character(self.path) in {"{", "["}:
            return json_rows(self.path, bad_rows)
        return _READERS.get(suffix, json_rows)(self.path, bad_rows)

    def fingerprint(self) -> str:
        """A hash of the content, and of the suffix, which decides how the content is read."""
        digest = hashlib.blake2b(data_suffix(self.path).encode(), digest_size=16)
        with open_bytes(self.path) as file:
            while data := file.read(_HASHED_AT_ONCE):
                digest.update(data)
        return digest.hexdigest()


DataSource = DataFile | HubDataset


def find_sources(name: str | PathLike[str]) -> list[DataSource]:
    """Resolves a name of the command line to data sources.

    A name is a file, a folder of data files, a pattern, or a dataset on a hub: `huggingface:OWNER/NAME` or
    `modelscope:OWNER/NAME`, optionally with `?split=SPLIT&config=CONFIG&revision=REVISION`. The files of a folder or a
    pattern are sorted by name.

    Raises:
        ValueError: if there is nothing of that name, or a folder holds files of several splits.
    """
    text = str(name)
    if is_on_hub(text):
        dataset = HubDataset.parse(text)
        if not dataset.repository:
            raise ValueError(f"{text}: name the dataset, {dataset.hub}:OWNER/NAME.")
        return [dataset]
    path = Path(text)
    if path.is_dir():
        return [DataFile(child) for child in _files_of_folder(path)]
    if path.exists() or not glob.has_magic(text):
        return [DataFile(path)]
    matches = sorted(glob.iglob(text, recursive=True))  # noqa: PTH207
    found = [DataFile(Path(match)) for match in matches if Path(match).is_file()]
    if not found:
        raise ValueError(f"No file matches the pattern {text} (from {Path.cwd()}).")
    return found


def iterate_rows(names: Sequence[str | PathLike[str]], bad_rows: BadRows | None = None) -> Iterator[Row]:
    """The rows of files, folders, patterns and datasets on hubs in turn, streamed.

    Raises:
        ValueError: as `find_sources` and `DataFile.rows`.
    """
    bad_rows = bad_rows or BadRows()
    for name in names:
        for source in find_sources(name):
            yield from source.rows(bad_rows)


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
            f"{folder} holds files of several splits ({', '.join(splits.values())}); name the files of one split, "
            f"or a pattern such as '{folder}/train*'."
        )
    return files
