"""Readers of rows: classification of texts and pairs, Winograd schemata, and texts to be generated."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from chatglm_ptuning.data.sources.rows import Row, fail
from chatglm_ptuning.data.sources.text import data_suffix, read_text
from chatglm_ptuning.data.tasks.examples import GenerationExample, MultiLabelExample, TextExample
from chatglm_ptuning.data.tasks.readers.reader import RowReader
from chatglm_ptuning.data.tasks.source import SplitSource, nearest_place
from chatglm_ptuning.data.tasks.submission_formats import id_lines
from chatglm_ptuning.data.tasks.task import Task

_LCSTS_DOC = re.compile(
    r"<doc id=(?P<id>\d+)>\s*(?:<human_label>(?P<label>\d)</human_label>\s*)?<summary>\s*(?P<summary>.*?)\s*</summary>"
    r"\s*<short_text>\s*(?P<text>.*?)\s*</short_text>\s*</doc>",
    re.DOTALL,
)
_LCSTS_RELEVANT = 3
"""Test pairs below this human label are left out, as in the paper (Hu et al. 2015, section 4)."""


class _LabelledTextReader(RowReader):
    example = TextExample
    needs = ("labels",)
    submissions: ClassVar = {"label_lines": id_lines("label")}


class RowsReader(_LabelledTextReader):
    """Rows of a table with a text or two and a label, or any number of labels."""

    name = "rows"
    fields = ("text",)
    optional_fields = ("text_pair", "label", "id")
    takes_extra_fields = True
    options = ("drop_labels", "multi_label", "label_separator")
    placeholders = ("text", "text_pair")

    def example_class(self, task: Task) -> type[TextExample]:
        return MultiLabelExample if task.multi_label else TextExample

    def read_row(self, source: SplitSource, row: Row, index: int) -> TextExample | MultiLabelExample:
        shared: dict[str, Any] = {
            "id": source.example_id(row, index),
            "where": row.where,
            "text": source.text(row, "text"),
            "text_pair": source.text(row, "text_pair") if "text_pair" in source.fields else None,
            "fields": {role: source.text(row, role) for role in self.extra_fields(source.task)},
        }
        if source.task.multi_label:
            return MultiLabelExample(**shared, labels=source.labels(row))
        label = source.label(row)
        left_out = label in source.task.drop_labels
        return TextExample(**shared, label=None if left_out else label, left_out=left_out)


class WinogradReader(_LabelledTextReader):
    """Rows of a text in which a noun (span 1) and a pronoun (span 2) are pointed at."""

    name = "winograd"
    fields = ("text", "span1_text", "span1_index", "span2_text", "span2_index")
    optional_fields = ("label", "id")
    options = ("drop_labels",)
    placeholders = ("text", "span1", "span2")

    def read_row(self, source: SplitSource, row: Row, index: int) -> TextExample:
        """As `RowReader.read_row`.

        In the example's text the noun stands in `[]` and the pronoun in `__`, as the same word may stand there twice. A
        span that does not stand where the file says is marked where it stands nearest; if nowhere, where the file says.
        """
        label = source.label(row)
        left_out = label in source.task.drop_labels
        spans = {role: source.text(row, f"{role}_text") for role in ("span1", "span2")}
        return TextExample(
            id=source.example_id(row, index),
            where=row.where,
            text=_mark_spans(source, row, spans),
            label=None if left_out else label,
            left_out=left_out,
            fields=spans,
        )


def _mark_spans(source: SplitSource, row: Row, spans: dict[str, str]) -> str:
    text = source.text(row, "text")
    places = []
    for role, marks in (("span1", "[]"), ("span2", "__")):
        start = source.get(row, f"{role}_index")
        if isinstance(start, str) and start.isdigit():
            start = int(start)
        if isinstance(start, bool) or not isinstance(start, int):
            fail(row, f"{role}_index must be the place of a character, found {start!r}.")
        place = nearest_place(text, spans[role], start)
        if place is None and not 0 <= start < len(text):
            fail(row, f"{role} '{spans[role]}' is not in the text, nor is there a character {start}.")
        place = start if place is None else place
        places.append((place, min(place + len(spans[role]), len(text)), marks))
    return _with_marks(text, places)


def _with_marks(text: str, places: list[tuple[int, int, str]]) -> str:
    """The text with a pair of marks around each span; of spans inside each other, the longer one's are outside."""
    marked = []
    for place in range(len(text) + 1):
        ending = sorted((span for span in reversed(places) if span[1] == place), key=lambda span: -span[0])
        starting = sorted((span for span in places if span[0] == place), key=lambda span: -span[1])
        marked += [span[2][1] for span in ending] + [span[2][0] for span in starting]
        marked.append(text[place : place + 1])
    return "".join(marked)


class PairsReader(RowReader):
    """Rows with a source text and a target."""

    name = "pairs"
    example = GenerationExample
    fields = ("text", "target")
    optional_fields = ("id",)
    takes_extra_fields = True
    placeholders = ("text",)

    def read_row(self, source: SplitSource, row: Row, index: int) -> GenerationExample:
        return GenerationExample(
            id=source.example_id(row, index),
            where=row.where,
            text=source.text(row, "text"),
            target=_target(source, row),
            fields={role: source.text(row, role) for role in self.extra_fields(source.task)},
        )


def _target(source: SplitSource, row: Row) -> str | None:
    value = source.get(row, "target")
    if value in (None, "") and not source.needs_gold:
        return None
    target = source.text(row, "target")
    if not target.strip() and source.needs_gold:
        column = source.fields["target"]
        fail(row, f"the field '{column}' is empty, and the split {source.split} needs a target; delete the row.")
    return target


class LcstsReader(PairsReader):
    """LCSTS as published (`PART_I.txt`: `<doc>` with `<summary>` and `<short_text>`), or as rows."""

    name = "lcsts"
    takes_extra_fields = False

    def read(self, source: SplitSource) -> Iterator[GenerationExample]:
        """As `Reader.read`; of a test split the pairs that people found relevant."""
        if source.paths and all(data_suffix(path) == ".txt" for path in source.paths):
            return (pair for path in source.paths for pair in _lcsts_pairs(source, path))
        return super().read(source)


def _lcsts_pairs(source: SplitSource, path: Path) -> Iterator[GenerationExample]:
    text = read_text(path)
    found = list(_LCSTS_DOC.finditer(text))
    if len(found) != text.count("<doc id="):
        raise ValueError(
            f"{path} has {text.count('<doc id=')} <doc id=...>, of which {len(found)} hold a <summary> and a "
            "<short_text>; it is damaged or not a file of LCSTS."
        )
    if not found:
        raise ValueError(f"{path} holds no <doc id=...>: it is not a file of LCSTS.")
    line, counted = 1, 0
    for match in found:
        line += text.count("\n", counted, match.start())
        counted = match.start()
        if source.split.startswith("test") and match["label"] and int(match["label"]) < _LCSTS_RELEVANT:
            continue
        yield GenerationExample(
            id=int(match["id"]), where=f"{path}:{line}", text=match["text"], target=match["summary"]
        )
