"""Readers of named entities: BIO tags in their several formats, and CLUENER's spans."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

from pydantic import Field

from chatglm_ptuning.data.sources.json_rows import json_rows
from chatglm_ptuning.data.sources.rows import Row, fail
from chatglm_ptuning.data.sources.text import read_text
from chatglm_ptuning.data.tasks.checked_yaml import nearest
from chatglm_ptuning.data.tasks.examples import TokenExample
from chatglm_ptuning.data.tasks.readers.reader import Reader
from chatglm_ptuning.data.tasks.source import SplitSource, validated
from chatglm_ptuning.data.tasks.task import Task

_JOINT = "\x02"
"""Separates the tokens, and the tags, of a row of the table in which Baidu published MSRA's corpus."""

Sentence = Callable[[int], TokenExample]
"""Reads a sentence, given its index; raises ValueError naming file and line."""


class _TokenReader(Reader):
    example = TokenExample
    needs = ("labels",)
    options = ("echo",)
    placeholders = ("text",)


class BioReader(_TokenReader):
    """Sentences with a BIO tag for each token."""

    name = "bio"
    optional_fields = ("tokens", "tags", "id")

    def read(self, source: SplitSource) -> Iterator[TokenExample]:
        """As `Reader.read`, from any of these formats:

        - JSON rows with two lists;
        - lines of a token, a tab or space, and a tag, with an empty line between sentences;
        - a table of `text_a` and `label` whose cells hold all tokens and all tags of a sentence.

        Lines can have further columns between token and tag, as in CoNLL-2003, whose `-DOCSTART-` lines are left out.
        """
        if source.has_flat_rows:
            sentences = (partial(_read_row, source, row) for row in source.rows())
        else:
            sentences = (sentence for path in source.paths for sentence in _sentences(source, path))
        return source.each(sentences, lambda sentence, index: [sentence(index)])


def _sentences(source: SplitSource, path: Path) -> Iterator[Sentence]:
    text = read_text(path)
    start = text.lstrip()
    if start[:1] in ("{", "[") and not _ends_in_tag(source, start.partition("\n")[0]):
        yield from (partial(_read_row, source, row) for row in json_rows(path, source.bad_rows))
        return
    lines = ["" if line.startswith("-DOCSTART-") else line for line in re.split("\r\n?|\n", text)]
    headings = lines[0].split("\t")
    if headings == ["text_a", "label"] or (headings == ["text_a"] and not source.needs_gold):
        for number, line in enumerate(lines[1:], start=2):
            if line.strip():
                yield partial(_read_table_row, source, f"{path}:{number}", line.split("\t"), headings)
        return
    is_tagged = source.needs_gold or any("\t" in line.strip() or _ends_in_tag(source, line) for line in lines)
    sentences: list[list[tuple[str, str]]] = [[]]
    for number, line in enumerate(lines, start=1):
        if line.strip():
            sentences[-1].append((f"{path}:{number}", line))
        elif sentences[-1]:
            sentences.append([])
    if not sentences[0]:
        raise ValueError(f"{path} holds no sentence.")
    width = len(_columns(sentences[0][0][1])) if is_tagged else 1
    for sentence in sentences:
        if sentence:
            yield partial(_read_lines, source, sentence, width, is_tagged)


def _ends_in_tag(source: SplitSource, line: str) -> bool:
    """Whether a line is a token and its tag; the token may be `[` or `{`, with which JSON begins, too."""
    return len(line.split()) > 1 and line.split()[-1] in source.task.tags


def _read_row(source: SplitSource, row: Row, index: int) -> TokenExample:
    columns = {"tokens": "tokens", "tags": "ner_tags", **source.fields}
    named = replace(source, fields=columns)
    tokens, tags = named.get(row, "tokens"), named.get(row, "tags")
    if tokens is None:
        named.missing(row, "tokens")
    if tags is None and source.needs_gold:
        named.missing(row, "tags")
    tokens = list(tokens) if isinstance(tokens, str) else tokens
    for role, values in (("tokens", tokens), ("tags", [] if tags is None else tags)):
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            what = f"the field '{columns[role]}' must be a list of texts, found {str(values)[:60]}"
            fail(row, f"{what}; numbers do not say which tag they are.")
    return _example(source, named.example_id(row, index), row.where, tokens, tags)


def _read_table_row(source: SplitSource, where: str, cells: list[str], headings: list[str], index: int) -> TokenExample:
    if len(cells) != len(headings):
        raise ValueError(f"{where}: {len(cells)} cells under the headings {' and '.join(headings)}.")
    tokens, *tags = (cell.split(_JOINT) for cell in cells)
    return _example(source, index, where, tokens, tags[0] if tags else None)


def _read_lines(
    source: SplitSource, lines: list[tuple[str, str]], width: int, is_tagged: bool, index: int
) -> TokenExample:
    """The example of a sentence.

    Args:
        lines: place and text of each.
        width: number of columns in the file's first line.
    """
    rows = []
    for where, line in lines:
        columns = _columns(line) if is_tagged else line.split()
        shown = f"found {line[:60]!r}."
        if not is_tagged and len(columns) > 1:
            text = "a split without tags has a token on each line and nothing else"
            raise ValueError(f"{where}: {len(columns)} columns; {text}, {shown}")
        if is_tagged and (len(columns) < 2 or not columns[0]):
            raise ValueError(f"{where}: expected a token, a tab or space, and a tag; {shown}")
        is_uneven = len(columns) != width and max(len(columns), width) > 2
        if is_tagged and (is_uneven or (len(columns) > 2 and columns[-1] not in source.task.tags)):
            raise ValueError(
                f"{where}: {len(columns)} columns; expected a token and a tag. Columns between them are ignored if "
                f"every line has as many ({width}) and the last is a tag of {source.task.name}; {shown}"
            )
        rows.append(columns)
    tags = [columns[-1] for columns in rows] if is_tagged else None
    return _example(source, index, lines[0][0], [columns[0] for columns in rows], tags)


def _columns(line: str) -> list[str]:
    """The cells of a line, which are separated by a tab or, in a line without tabs, by spaces."""
    separator = "\t" if "\t" in line else " "
    token, _, tag = line.rpartition(separator)
    if token and not token.strip(separator):  # the token is itself a space or tab
        return [token, tag]
    return [cell for cell in line.split(separator) if cell or separator == "\t"]


def _example(
    source: SplitSource, index: int | str, where: str, tokens: Sequence[str], tags: Sequence[str] | None
) -> TokenExample:
    known = source.task.tags
    if not tokens and source.needs_gold:
        raise ValueError(f"{where}: there is no text to tag; delete the row.")
    if tags is not None and len(tags) != len(tokens):
        raise ValueError(f"{where}: {len(tokens)} tokens and {len(tags)} tags; every token needs one tag.")
    for place, tag in enumerate(tags or ()):
        if tag not in known:
            raise ValueError(
                f"{where}: the task {source.task.name} has no tag '{tag}'{nearest(tag, known)}, at token {place + 1} "
                f"'{tokens[place]}'; its tags are {', '.join(known)}."
            )
    return TokenExample(id=index, where=where, tokens=tuple(tokens), tags=None if tags is None else tuple(tags))


Spans = dict[str, dict[str, list[Annotated[list[int], Field(min_length=2, max_length=2)]]]]

_CLUENER_ROW = (
    'a row like {"text": "王宁在沪", "label": {"name": {"王宁": [[0, 1]]}, "address": {"沪": [[3, 3]]}}}: '
    "entity type -> text -> list of [start, end], characters from 0, both inclusive"
)


class CluenerReader(_TokenReader):
    """CLUENER2020: rows of `text` and `label`."""

    name = "cluener"

    def metrics_of(self, task: Task) -> tuple[str, ...]:
        """As `Reader.metrics_of`, with the corpus's own metric, which needs the entities in its files."""
        return (*super().metrics_of(task), "cluener_f1")

    def read_row(self, source: SplitSource, row: Row, index: int) -> TokenExample:
        """As `Reader.read_row`; `label` is entity type -> text -> list of `[start, end]`, both inclusive.

        Every character is a token. Of two overlapping entities the longer one gets the tags, because BIO can hold only
        one of them; the example's `entities` are all of them.
        """
        text, label = row.get("text"), row.get("label")
        if not isinstance(text, str):
            fail(row, f"there is no field 'text' with text; the row has {', '.join(row)}.")
        if label is None and source.needs_gold:
            fail(
                row,
                f"there is no field 'label' with entities; the row has {', '.join(row)}; expected {_CLUENER_ROW}.",
            )
        spans = None
        if label is not None:
            spans = validated(dict[str, Spans], {"label": label}, row.where, _CLUENER_ROW)["label"]
        tags = None if spans is None else _tags_of(source.task, row, text, spans)
        with_id = replace(source, fields={"id": "id"})
        example = _example(source, with_id.example_id(row, index), row.where, list(text), tags)
        if spans is None:
            return example
        return replace(example, entities=frozenset((entity, own) for entity, texts in spans.items() for own in texts))


def _tags_of(task: Task, row: Row, text: str, spans: Spans) -> list[str]:
    places = []
    for entity, texts in spans.items():
        if entity not in task.labels:
            known = list(task.labels)
            fail(row, f"unknown entity type '{entity}'{nearest(entity, known)}; known are {', '.join(known)}.")
        for own, (start, end) in ((own, place) for own, found in texts.items() for place in found):
            if text[start : end + 1] != own:
                fail(row, f"characters {start} to {end} of the text are '{text[start : end + 1]}', not '{own}'.")
            places.append((start, end, entity))
    tags = ["O"] * len(text)
    for start, end, entity in sorted(places, key=lambda place: (place[0] - place[1], place[0])):
        if all(tag == "O" for tag in tags[start : end + 1]):
            tags[start : end + 1] = [f"B-{entity}", *[f"I-{entity}"] * (end - start)]
    return tags
