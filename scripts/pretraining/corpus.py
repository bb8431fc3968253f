"""Reads the folders of text that a small base model is pre-trained on; README.md in this folder documents them."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LABELLED_TASKS = ("iflytek", "csldcp", "ocnli", "bustm", "chid", "csl")
"""FewCLUE tasks whose labelled training rows become instructions; the kit never reports scores on them."""
ROLES = ("system", "user", "assistant", "observation")
_HELD_OUT_DOCUMENTS = 1000  # of each documents file; at most a tenth of it
_WINDOW = 12


@dataclass(frozen=True)
class Corpus:
    """Everything that is read from the folders.

    Attributes:
        documents: plain texts to train on, shuffled by a fixed seed.
        plain: those of the documents that no instruction may be made from.
        conversations: lists of `{"role", "content"}`, as the instruction files have them.
        labelled: FewCLUE task name -> its training rows.
        held_out: documents that are only measured on; some of each documents file.
    """

    documents: list[str]
    plain: frozenset[str]
    conversations: list[list[dict[str, str]]]
    labelled: dict[str, list[dict]]
    held_out: list[str]


def read_jsonl(path: Path) -> Iterator[dict]:
    """Yields the rows of a JSON lines file, gzipped or plain.

    Raises:
        ValueError: naming file and line, if a line is not a JSON object.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: not valid JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}.")
            yield row


def _field(path: Path, number: int, row: dict, name: str, kind: type) -> object:
    value = row.get(name)
    if not isinstance(value, kind):
        raise ValueError(f'{path}:{number}: expected the field "{name}" ({kind.__name__}), found {sorted(row)}.')
    return value


def _messages(path: Path, number: int, row: dict) -> list[dict[str, str]]:
    messages = _field(path, number, row, "messages", list)
    for message in messages:
        if message.get("role") not in ROLES or not isinstance(message.get("content"), str):
            raise ValueError(
                f'{path}:{number}: a message needs a "role" of {", ".join(ROLES)} and a "content"; found {message}.'
            )
    return messages


def _text_of(row: dict) -> str:
    return row.get("text") or row.get("sentence") or row.get("content") or "".join(row.get("tokens", ()))


class _Excluded:
    """Finds texts of development and test splits, also inside longer documents."""

    def __init__(self, texts: set[str]) -> None:
        self._texts = texts
        self._by_start: dict[str, list[str]] = {}
        for text in sorted(texts):
            if len(text) >= _WINDOW:
                self._by_start.setdefault(text[:_WINDOW], []).append(text)

    def in_document(self, document: str) -> bool:
        if document in self._texts:
            return True
        windows = (document[place : place + _WINDOW] for place in range(len(document) - _WINDOW + 1))
        return any(text in document for window in windows for text in self._by_start.get(window, ()))


def _files(folders: list[Path], pattern: str) -> list[Path]:
    return [
        path for folder in folders for path in sorted(folder.glob(pattern)) if path.name.endswith((".jsonl", ".gz"))
    ]


def read_corpus(folders: list[Path], fewclue: Path | None = None) -> Corpus:
    """Reads documents and conversations, without any text of a development or test split.

    Args:
        folders: each with `*documents.jsonl[.gz]` (field `text`) or `*instructions.jsonl[.gz]` (field `messages`);
            `*_dev.jsonl[.gz]` and `*_test.jsonl[.gz]` beside them (fields `text` or `tokens`) are excluded, and
            documents that equal a `text` of `*_train.jsonl[.gz]` stay plain text.
        fewclue: one folder per FewCLUE task, with `train_few_all.json` and `dev_*.json`.

    Raises:
        FileNotFoundError: if no folder has a documents file.
        ValueError: naming file and line, if a row has not the field that its file must have.
    """
    document_files = _files(folders, "*documents.jsonl*")
    if not document_files:
        raise FileNotFoundError(f"No *documents.jsonl or *documents.jsonl.gz in {', '.join(map(str, folders))}.")
    split_files = [path for split in ("dev", "test") for path in _files(folders, f"*_{split}.jsonl*")]
    if fewclue is not None:
        split_files += sorted(fewclue.glob("*/dev_*.json"))
    excluded = _Excluded({_text_of(row) for path in split_files for row in read_jsonl(path)} - {""})
    documents, held_out = [], []
    for path in document_files:
        rows = enumerate(read_jsonl(path), 1)
        texts = {str(_field(path, number, row, "text", str)) for number, row in rows}
        clean = sorted(text for text in texts if not excluded.in_document(text))
        random.Random(0).shuffle(clean)
        held = min(_HELD_OUT_DOCUMENTS, len(clean) // 10)
        held_out += clean[:held]
        documents += clean[held:]
    random.Random(0).shuffle(documents)
    conversations = [
        _messages(path, number, row)
        for path in _files(folders, "*instructions.jsonl*")
        for number, row in enumerate(read_jsonl(path), 1)
    ]
    plain = {row["text"] for path in _files(folders, "*_train.jsonl*") for row in read_jsonl(path) if "text" in row}
    labelled = {}
    for task in LABELLED_TASKS if fewclue is not None else ():
        labelled[task] = list(read_jsonl(fewclue / task / "train_few_all.json"))
    return Corpus(documents, frozenset(plain), conversations, labelled, held_out)
