"""Readers of rows: classification of texts and pairs, Winograd schemata, and texts to be generated."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chatglm_ptuning.data.sources.rows import Row, fail
from chatglm_ptuning.data.sources.text import data_suffix, read_text
from chatglm_ptuning.data.tasks.checked_yaml import nearest
from chatglm_ptuning.data.tasks.examples import GenerationExample, MultiLabelExample, TextExample
from chatglm_ptuning.data.tasks.readers.reader import Reader
from chatglm_ptuning.data.tasks.source import SplitSource, is_whole_number, nearest_place
from chatglm_ptuning.data.tasks.task import Task

_LCSTS_DOC = re.compile(
    r"<doc id=(?P<id>\d+)>\s*(?:<human_label>(?P<label>\d)</human_label>\s*)?<summary>\s*(?P<summary>.*?)\s*</summary>"
    r"\s*<short_text>\s*(?P<text>.*?)\s*</short_text>\s*</doc>",
    re.DOTALL,
)
_LCSTS_RELEVANT = 3
"""Test pairs below this human label are left out, as in the paper (Hu et al. 2015, section 4)."""


class RowsReader(Reader):
    """Rows of a table with a text or a pair of texts, and a label or any number of labels."""

    name = "rows"
    example = TextExample
    fields = ("text",)
    optional_fields = ("label", "id")
    takes_extra_fields = True
    needs = ("labels",)
    options = ("drop_labels", "multi_label", "label_separator")
    placeholders = ("text",)

    def example_class(self, task: Task) -> type[TextExample | MultiLabelExample]:
        return MultiLabelExample if task.multi_label else TextExample

    def read_row(self, source: SplitSource, row: Row, index: int) -> TextExample | MultiLabelExample:
        read_gold = _labels if source.task.multi_label else _label
        return self.example_class(source.task)(
            id=source.example_id(row, index),
            where=row.where,
            text=source.text(row, "text"),
            fields={role: source.text(row, role) for role in self.extra_fields(source.task)},
            **read_gold(source, row),
        )


def _label(source: SplitSource, row: Row) -> dict[str, Any]:
    """`label` of a row, None in a split that needs none, and whether it is `left_out`.

    Raises:
        ValueError: if it is missing where it is needed, or unknown.
    """
    task, value = source.task, source.get(row, "label")
    key = _label_key(task, value)
    if value is None or key == "" or (key == "-1" and key not in task.labels):
        return source.missing(row, "label") if source.needs_gold else {"label": None}
    if _known_label(task, row, key) in task.drop_labels:
        return {"left_out": True}
    return {"label": key}


def _labels(source: SplitSource, row: Row) -> dict[str, Any]:
    """`labels` of a row in the order of the task, None in a split that needs none.

    An empty list is a text without any label, and so is empty text where labels are needed.

    Raises:
        ValueError: as `_label`.
    """
    task, value = source.task, source.get(row, "label")
    if value is None or (value == "" and not source.needs_gold):
        return source.missing(row, "label") if source.needs_gold else {"labels": None}
    parts = value if isinstance(value, list) else str(value).split(task.label_separator)
    keys = [_label_key(task, part) for part in parts]
    known = {_known_label(task, row, key) for key in keys if key}
    return {"labels": tuple(key for key in task.labels if key in known)}


def _label_key(task: Task, value: Any) -> str:
    """A label as a key of the task's labels; tables and hubs have whole numbers as floats."""
    if isinstance(value, bool):
        return json.dumps(value)
    if is_whole_number(value) and str(value) not in task.labels:
        return str(int(value))
    return str(float(value) if isinstance(value, float) else value).strip()


def _known_label(task: Task, row: Row, key: str) -> str:
    if key in task.labels or key in task.drop_labels:
        return key
    known = list(task.labels)
    shown = ", ".join(known[:20]) + (f", ... ({len(known)} in all)" if len(known) > 20 else "")
    fail(row, f"the task {task.name} has no label '{key}'{nearest(key, known)}; its labels are {shown}.")


class WinogradReader(Reader):
    """Rows of a text that point at a noun (span 1) and a pronoun (span 2)."""

    name = "winograd"
    example = TextExample
    fields = ("text", "span1_text", "span1_index", "span2_text", "span2_index")
    optional_fields = ("label", "id")
    needs = ("labels",)
    options = ("drop_labels",)
    placeholders = ("text", "span1", "span2")

    def read_row(self, source: SplitSource, row: Row, index: int) -> TextExample:
        """As `Reader.read_row`.

        In the example's text the noun is marked by `[]` and the pronoun by `__`, since the same word may occur twice.
        A span that is not where the file says is marked at its nearest occurrence; without any, where the file says.
        """
        text = source.text(row, "text")
        spans = {role: source.text(row, f"{role}_text") for role in ("span1", "span2")}
        places = []
        for (role, span), marks in zip(spans.items(), ("[]", "__"), strict=True):
            start = source.get(row, f"{role}_index")
            if isinstance(start, str) and start.isdigit():
                start = int(start)
            if isinstance(start, bool) or not isinstance(start, int):
                fail(row, f"{role}_index must be the index of a character, found {start!r}.")
            place = nearest_place(text, span, start)
            if place is None and not 0 <= start < len(text):
                fail(row, f"the text does not contain {role} '{span}', and has no character {start}.")
            place = start if place is None else place
            places.append((place, min(place + len(span), len(text)), marks))
        return TextExample(
            id=source.example_id(row, index),
            where=row.where,
            text=_with_marks(text, places),
            fields=spans,
            **_label(source, row),
        )


def _with_marks(text: str, places: list[tuple[int, int, str]]) -> str:
    """The text with a pair of marks around each span (start, end, marks); of nested spans the longer is outside."""
    marked = []
    for place in range(len(text) + 1):
        ending = sorted((span for span in reversed(places) if span[1] == place), key=lambda span: -span[0])
        starting = sorted((span for span in places if span[0] == place), key=lambda span: -span[1])
        marked += [span[2][1] for span in ending] + [span[2][0] for span in starting]
        marked.append(text[place : place + 1])
    return "".join(marked)


class PairsReader(Reader):
    """Rows with a source text and a target."""

    name = "pairs"
    example = GenerationExample
    fields = ("text", "target")
    optional_fields = ("id",)
    takes_extra_fields = True
    placeholders = ("text",)

    def read_row(self, source: SplitSource, row: Row, index: int) -> GenerationExample:
        text, target = source.text(row, "text"), None
        if source.needs_gold or source.get(row, "target") not in (None, ""):
            target = source.text(row, "target")
        if source.needs_gold and not target.strip():
            column = source.fields["target"]
            fail(row, f"the field '{column}' is empty; the split {source.split} needs a target. Delete the row.")
        return GenerationExample(
            id=source.example_id(row, index),
            where=row.where,
            text=text,
            target=target,
            fields={role: source.text(row, role) for role in self.extra_fields(source.task)},
        )


class LcstsReader(PairsReader):
    """LCSTS as published (`PART_I.txt`: `<doc>` with `<summary>` and `<short_text>`), or as rows."""

    name = "lcsts"
    takes_extra_fields = False

    def read(self, source: SplitSource) -> Iterator[GenerationExample]:
        """As `Reader.read`; of a test split only the pairs that annotators labelled as relevant."""
        if source.paths and all(data_suffix(path) == ".txt" for path in source.paths):
            return (pair for path in source.paths for pair in _lcsts_pairs(source, path))
        return super().read(source)


def _lcsts_pairs(source: SplitSource, path: Path) -> Iterator[GenerationExample]:
    text = read_text(path)
    found = list(_LCSTS_DOC.finditer(text))
    if not found or len(found) != text.count("<doc id="):
        raise ValueError(
            f"{path} has {text.count('<doc id=')} <doc id=...>, of which {len(found)} hold a <summary> and a "
            "<short_text>: it is damaged or not a file of LCSTS."
        )
    line, counted = 1, 0
    for match in found:
        line += text.count("\n", counted, match.start())
        counted = match.start()
        if source.split.startswith("test") and match["label"] and int(match["label"]) < _LCSTS_RELEVANT:
            continue
        yield GenerationExample(
            id=int(match["id"]), where=f"{path}:{line}", text=match["text"], target=match["summary"]
        )
