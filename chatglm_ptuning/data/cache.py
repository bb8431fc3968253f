"""Rows of token ids on disk: written once, then memory-mapped, and never incomplete."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from chatglm_ptuning.files import write_json

if TYPE_CHECKING:
    import datasets
    import pyarrow

    from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer

ROWS_FILE = "rows.arrow"
FACTS_FILE = "facts.json"
_TOKENS_AT_ONCE = 1 << 19
_PACKAGE = Path(__file__).resolve().parents[1]


def default_cache_dir() -> Path:
    """`data` in the folder that CHATGLM_PTUNING_CACHE names, or in `chatglm_ptuning` of the user's cache (XDG)."""
    named = os.environ.get("CHATGLM_PTUNING_CACHE")
    if named:
        return Path(named) / "data"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "chatglm_ptuning" / "data"


class TokenCache:
    """A folder of entries, each under a key of everything that its content depends on.

    An entry is a folder that is written under another name and then renamed, so it is complete or not there. If several
    processes want the same entry, such as the ranks of a node, one makes it and the others wait; if that process is
    killed, the next one makes it again.

    Args:
        folder: is created with the first entry.
        overwrite: make every entry again, once in the life of this object.
    """

    def __init__(self, folder: str | Path | None = None, overwrite: bool = False) -> None:
        self.folder = Path(folder) if folder is not None else default_cache_dir()
        self.overwrite = overwrite
        self._made: set[str] = set()

    def entry(self, key: Mapping[str, Any], make: Callable[[Path], Mapping[str, Any]]) -> tuple[Path, bool]:
        """The folder of an entry, and whether it was there already.

        Args:
            make: writes ROWS_FILE into an empty folder, and returns the facts that `read_facts` gives.

        Raises:
            OSError: if the cache cannot be written, naming it.
        """
        name = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=16).hexdigest()
        final = self.folder / name
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / f"{name}.lock"):
                if _is_complete(final) and not (self.overwrite and name not in self._made):
                    return final, True
                self._make(final, make)
        except OSError as error:
            raise OSError(
                f"The cache of tokens in {self.folder} cannot be written: {error.strerror or error}. Set "
                "data_cache_dir to a folder with free space."
            ) from error
        self._made.add(name)
        return final, False

    def _make(self, final: Path, make: Callable[[Path], Mapping[str, Any]]) -> None:
        # Only the process with the lock writes, so another staging folder is of a process that was killed.
        for left in self.folder.glob(f".{final.name}.*"):
            shutil.rmtree(left, ignore_errors=True)
        staged = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=self.folder))
        try:
            facts = make(staged)
            write_json(staged / FACTS_FILE, {**facts, "bytes": (staged / ROWS_FILE).stat().st_size})
            staged.chmod(self.folder.stat().st_mode)
            if final.exists():
                shutil.rmtree(final)
            staged.rename(final)
        finally:
            shutil.rmtree(staged, ignore_errors=True)


def _is_complete(folder: Path) -> bool:
    try:
        return (folder / ROWS_FILE).stat().st_size == read_facts(folder)["bytes"]
    except (OSError, ValueError, KeyError):
        return False


def read_facts(folder: Path) -> dict[str, Any]:
    """The facts about an entry."""
    return json.loads((folder / FACTS_FILE).read_text("utf-8"))


def open_rows(folder: Path) -> datasets.Dataset:
    """The rows of an entry, memory-mapped."""
    import datasets

    return datasets.Dataset.from_file(str(folder / ROWS_FILE))


def write_rows(folder: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes the rows of an entry, a few of them in memory at a time.

    Args:
        rows: all with the same columns: lists of integers (int32) or of floating-point numbers (float32), and
            integers: `length` of the `input_ids`, others (int32), and `digest` (int64).
    """
    import pyarrow

    def type_of(name: str, value: Any) -> pyarrow.DataType:
        if isinstance(value, list):
            return pyarrow.list_(pyarrow.float32() if isinstance(value[0], float) else pyarrow.int32())
        return pyarrow.int64() if name == "digest" else pyarrow.int32()

    remaining = iter(rows)
    batch = list(itertools.islice(remaining, 1))
    schema = pyarrow.schema({name: type_of(name, value) for row in batch for name, value in row.items()})
    with (folder / ROWS_FILE).open("wb") as file:
        with pyarrow.ipc.new_stream(file, schema) as stream:
            while batch:
                tokens = sum(row["length"] for row in batch)
                while tokens < _TOKENS_AT_ONCE and (row := next(remaining, None)):
                    batch.append(row)
                    tokens += row["length"]
                stream.write_batch(pyarrow.RecordBatch.from_pylist(batch, schema))
                batch = list(itertools.islice(remaining, 1))
        file.flush()
        os.fsync(file.fileno())


def tokenizer_fingerprint(tokenizer: ChatGLMTokenizer) -> str:
    """A hash of the vocabulary, the ids of the special tokens and the chat format."""
    special_ids = sorted(tokenizer.vocabulary.special_ids.items())
    digest = hashlib.blake2b(f"{tokenizer.chat_format} {special_ids}".encode(), digest_size=16)
    digest.update(tokenizer.vocabulary.content())
    return digest.hexdigest()


@functools.cache
def code_fingerprint(*more: str) -> str:
    """A hash of the code that makes examples of rows.

    Args:
        more: folders of the package whose code the rows depend on, too.
    """
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(path for room in ("chat", "data", "model", *more) for path in _PACKAGE.glob(f"{room}/**/*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
