"""Rows of token ids on disk: made once, memory-mapped afterwards, and never seen half-written."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
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
    """Where the environment variable CHATGLM_PTUNING_CACHE says, or `~/.cache/chatglm_ptuning` (XDG_CACHE_HOME)."""
    named = os.environ.get("CHATGLM_PTUNING_CACHE")
    if named:
        return Path(named) / "data"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "chatglm_ptuning" / "data"


class TokenCache:
    """A folder of entries, each made of a key that holds all that its content depends on.

    An entry is a folder that is written under another name and then renamed, so that it is whole or not there. Where
    several processes want the same entry, such as the ranks of a node, one makes it and the others wait; if that one
    is killed, the next makes it anew.

    Args:
        folder: is created with the first entry.
        overwrite: make every entry anew, once in the life of this object.
    """

    def __init__(self, folder: str | Path | None = None, overwrite: bool = False) -> None:
        self.folder = Path(folder) if folder is not None else default_cache_dir()
        self.overwrite = overwrite
        self._made: set[str] = set()

    def entry(self, key: Mapping[str, Any], make: Callable[[Path], None]) -> tuple[Path, bool]:
        """The folder of an entry, and whether it was there already.

        Args:
            make: fills an empty folder with a ROWS_FILE and a FACTS_FILE.

        Raises:
            OSError: if the cache cannot be written to, naming it.
        """
        name = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=16).hexdigest()
        final = self.folder / name
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / f"{name}.lock"):
                anew = self.overwrite and name not in self._made
                if _is_whole(final) and not anew:
                    return final, True
                self._make(final, make)
        except OSError as error:
            raise OSError(
                f"The cache of tokens in {self.folder} cannot be written: {error.strerror or error}. Name a folder "
                "with room by --data_cache_dir."
            ) from error
        self._made.add(name)
        return final, False

    def _make(self, final: Path, make: Callable[[Path], None]) -> None:
        # Whoever holds the lock is alone, so what others began was left by a process that was killed.
        for left in self.folder.glob(f".{final.name}.*"):
            shutil.rmtree(left, ignore_errors=True)
        staged = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=self.folder))
        try:
            make(staged)
            staged.chmod(self.folder.stat().st_mode)
            if final.exists():
                shutil.rmtree(final)
            staged.rename(final)
        finally:
            shutil.rmtree(staged, ignore_errors=True)


def _is_whole(folder: Path) -> bool:
    try:
        facts = read_facts(folder)
        return (folder / ROWS_FILE).stat().st_size == facts["bytes"]
    except (OSError, ValueError, KeyError):
        return False


def read_facts(folder: Path) -> dict[str, Any]:
    """What an entry says about itself."""
    return json.loads((folder / FACTS_FILE).read_text("utf-8"))


def open_rows(folder: Path) -> datasets.Dataset:
    """The rows of an entry, memory-mapped."""
    import datasets

    return datasets.Dataset.from_file(str(folder / ROWS_FILE))


class RowWriter:
    """Writes rows to disk, a few of them in memory at a time.

    Beside its own values (lists of whole or of floating-point numbers, or single whole numbers) every row has `length`
    (of its `input_ids`), `source_length` and `target_length` (before truncation), and `digest`, which is the same for
    rows made of the same content.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._rows: list[dict[str, Any]] = []
        self._tokens = 0
        self._stream: Any = None

    def add(self, row: Mapping[str, Any], source_length: int, target_length: int, digest: int) -> None:
        """Appends one row; all have the same names as the first."""
        length = len(row["input_ids"])
        about = {"length": length, "source_length": source_length, "target_length": target_length, "digest": digest}
        self._rows.append({**row, **about})
        self._tokens += length
        if self._tokens >= _TOKENS_AT_ONCE:
            self._flush()

    def close(self, facts: Mapping[str, Any]) -> None:
        """Finishes the file and writes the facts beside it, which make it whole."""
        self._flush()
        self._stream.close()
        path = self.folder / ROWS_FILE
        with path.open("rb") as written:
            os.fsync(written.fileno())
        write_json(self.folder / FACTS_FILE, {**facts, "bytes": path.stat().st_size})

    def _flush(self) -> None:
        import pyarrow

        if self._stream is None:
            columns = {name: _type_of(name, value) for name, value in (self._rows or [_NO_ROW])[0].items()}
            self._schema = pyarrow.schema(columns)
            self._stream = pyarrow.ipc.new_stream(str(self.folder / ROWS_FILE), self._schema)
        if self._rows:
            self._stream.write_batch(pyarrow.RecordBatch.from_pylist(self._rows, self._schema))
        self._rows, self._tokens = [], 0


_NO_ROW = {"input_ids": [0], "length": 0, "source_length": 0, "target_length": 0, "digest": 0}


def _type_of(name: str, value: Any) -> pyarrow.DataType:
    import pyarrow

    if isinstance(value, list):
        return pyarrow.list_(pyarrow.float32() if isinstance(value[0], float) else pyarrow.int32())
    return pyarrow.int64() if name == "digest" else pyarrow.int32()


def tokenizer_fingerprint(tokenizer: ChatGLMTokenizer) -> str:
    """A hash over the vocabulary, the ids of the special tokens and the chat format."""
    special_ids = sorted(tokenizer.vocabulary.special_ids.items())
    digest = hashlib.blake2b(f"{tokenizer.chat_format} {special_ids}".encode(), digest_size=16)
    digest.update(tokenizer.vocabulary.content())
    return digest.hexdigest()


@functools.cache
def code_fingerprint() -> str:
    """A hash over the code that makes examples of rows."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted([path for room in ("chat", "data", "model") for path in _PACKAGE.glob(f"{room}/**/*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()
