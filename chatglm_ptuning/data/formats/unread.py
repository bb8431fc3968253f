"""The text of a row that its dataset format does not read: noted while the row is read, reported, or refused."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

WITHOUT_MEANING = {
    "id", "idx", "index", "uuid", "guid", "hash", "md5", "url", "uri", "link", "source", "origin", "from", "dataset",
    "split", "file", "filename", "path", "repo", "meta", "metadata", "date", "time", "datetime", "timestamp", "at",
    "created", "updated", "lang", "language", "langdetect", "locale", "license", "copyright", "version", "author",
    "model", "generator", "annotator", "score", "rating", "reward", "quality", "confidence", "difficulty", "level",
    "category", "categories", "subcategory", "cate", "topic", "type", "kind", "tag", "domain",
    "编号", "序号", "来源", "链接", "日期", "时间", "作者", "分类", "类别", "类型", "领域", "评分", "语言",
}  # fmt: skip
"""Last words of field names that say something about a row, and are no part of its conversation; in the singular."""
_LONGEST_NOTE = 200  # characters of such a value; a longer one is a text, whatever its name
_LONGEST_MARK = 30  # characters, such as `<|im_start|>assistant\n` and `<|im_end|>`
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z0-9]+|[^\W_a-zA-Z0-9]+")
_PANDAS_INDEX = re.compile(r"|__index_level_\d+__|Unnamed: \d+")


class NotedFields(dict):
    """The fields of a row or message; notes which of them are read by name.

    Attributes:
        noted: the names of those fields.
        inner: the messages in the fields, as (name of the field, message).
    """

    def __init__(self, fields: Mapping[str, Any]) -> None:
        super().__init__(fields)
        self.noted: set[str] = set()
        self.inner: list[tuple[str, NotedFields]] = []

    def __getitem__(self, name: str) -> Any:
        self.noted.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """As `dict.get`; the field counts as read."""
        self.noted.add(name)
        return super().get(name, default)

    def leave_out(self, name: str) -> None:
        """Counts a field as read: the dataset format knows that its text is not needed."""
        self.noted.add(name)

    def message_of(self, field: str, message: Mapping[str, Any]) -> NotedFields:
        """A message in a field, whose own fields are noted too."""
        self.inner.append((field, NotedFields(message)))
        return self.inner[-1][1]

    def unread(self, said: Iterable[str], ignored: Iterable[str] = ()) -> tuple[dict[str, int], int]:
        """What was not read although it is text, and not known to be without meaning.

        Args:
            said: the texts of the conversation. A field that repeats one of them, or is composed of them, is not lost.
            ignored: names of fields that the user leaves out.

        Returns:
            Characters by field, with `FIELD.KEY` for a key of the messages in it; and the characters of all that was
            read.
        """
        said = [text.strip() for text in said if text.strip()]
        whole = sum(map(len, said))
        ignored = set(ignored)
        found: dict[str, int] = {}
        for label, name, value in self._not_noted():
            if label in ignored or name in ignored:
                continue
            texts = list(_texts(value))
            if all(_is_note(name, text) for text in texts):
                continue
            kept = [text for text in texts if not _repeats(text, said, whole)]
            if kept:
                found[label] = found.get(label, 0) + sum(map(len, kept))
        return found, whole

    def _not_noted(self) -> Iterator[tuple[str, str, Any]]:
        for name, value in self.items():
            if name not in self.noted:
                yield name, name, value
        for field, message in self.inner:
            for name, value in message.items():
                if name not in message.noted:
                    yield f"{field}.{name}", name, value


def _texts(value: Any) -> Iterator[str]:
    """The texts in a value that have a letter or a Chinese character."""
    if isinstance(value, str):
        if any(map(str.isalpha, value)):
            yield value.strip()
    elif isinstance(value, (Mapping, list)):
        for entry in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(entry)


def _is_note(name: str, text: str) -> bool:
    if _PANDAS_INDEX.fullmatch(name):
        return True
    words = _WORDS.findall(name)
    last = words[-1].lower().rstrip("0123456789") if words else ""
    known = not WITHOUT_MEANING.isdisjoint((last, last.removesuffix("s")))
    return known and (len(text) <= _LONGEST_NOTE or text.startswith(("http://", "https://")))


def _repeats(text: str, said: list[str], whole: int) -> bool:
    """Whether a text is one of the conversation's, or the whole conversation with marks, as a template writes it."""
    marks = len(text) - whole
    return text in said or (marks <= max(whole, _LONGEST_MARK * len(said)) and all(other in text for other in said))
