"""Readers of named entities: BIO tags in their several forms, and CLUENER's spans."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from chatglm_ptuning.data.sources.json_rows import json_rows
from chatglm_ptuning.data.sources.rows import Row, fail
from chatglm_ptuning.data.sources.text import read_text
from chatglm_ptuning.data.tasks.checked_yaml import nearest
from chatglm_ptuning.data.tasks.examples import TokenExample
from chatglm_ptuning.data.tasks.readers.reader import Reader, RowReader
from chatglm_ptuning.data.tasks.source import SplitSource
from chatglm_ptuning.data.tasks.submission_formats import entity_lines
from chatglm_ptuning.data.tasks.task import Task

_JOINT = "\x02"
"""Between the tokens, and between the tags, of a row of the table that Baidu published MSRA's corpus in."""

_CLUENER_ROW = (
    'A row looks like {"text": "王宁在沪", "label": {"name": {"王宁": [[0, 1]]}, "address": {"沪": [[3, 3]]}}}: '
    "characters count from 0, and both ends are inside."
)


class BioReader(Reader):
    """Sentences with a BIO tag for each token."""

    name = "bio"
    example = TokenExample
    optional_fields = ("tokens", "tags", "id")
    needs = ("labels",)
    options = ("echo",)
    placeholders = ("text",)

    def read(self, source: SplitSource) -> Iterator[TokenExample]:
        """As `Reader.read`, from any of these forms:

        - JSON rows with two lists;
        - lines of a token, a tab or space, and a tag, with an empty line between sentences;
        - a table of `text_a` and `label` whose cells hold all tokens and all tags of a sentence.

        Lines may have further columns between token and tag, as in CoNLL-2003, whose `-DOCSTART-` lines are left out.
        """
        if source.has_flat_rows:
            yield from _from_rows(source, source.rows())
            return
        first = 0
        for path in source.paths:
            text = read_text(path)
            if text.lstrip()[:1] in ("{", "[") and not _ends_in_tag(source, text.lstrip().partition("\n")[0]):
                found = _from_rows(source, json_rows(path, source.bad_rows), first)
            else:
                found = _from_lines(source, path, text, first)
            for example in found:
                first += 1
                yield example


def _ends_in_tag(source: SplitSource, line: str) -> bool:
    """Whether a line is a token and its tag; also one that begins as JSON does, with the token `[` or `{`."""
    return len(line.split()) > 1 and line.split()[-1] in source.task.tags


def _from_rows(source: SplitSource, rows: Iterable[Row], first: int = 0) -> Iterator[TokenExample]:
    columns = {"tokens": "tokens", "tags": "ner_tags", **source.fields}
    named = replace(source, fields=columns)

    def read(row: Row, index: int) -> list[TokenExample]:
        tokens, tags = named.get(row, "tokens"), named.get(row, "tags")
        if tokens is None:
            named.missing(row, "list of tokens", columns["tokens"])
        if tags is None and source.needs_gold:
            named.missing(row, "list of tags", columns["tags"])
        tokens = list(tokens) if isinstance(tokens, str) else tokens
        _check_texts(row, columns["tokens"], tokens)
        if tags is not None:
            _check_texts(row, columns["tags"], tags)
        return [_example(source, named.example_id(row, index), row.where, tokens, tags)]

    return source.each(rows, read, first)


def _check_texts(row: Row, column: str, values: Any) -> None:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        shown = str(values)[:60]
        fail(
            row, f"the field '{column}' must be a list of texts, found {shown}; numbers do not say which tag they are."
        )


def _from_lines(source: SplitSource, path: Path, text: str, first: int) -> Iterator[TokenExample]:
    lines = ["" if line.startswith("-DOCSTART-") else line for line in re.split("\r\n?|\n", text)]
    headings = lines[0].split("\t")
    if headings == ["text_a", "label"] or (headings == ["text_a"] and not source.needs_gold):
        return _from_table(source, path, lines, first)
    tagged = source.needs_gold or any("\t" in line.strip() or _ends_in_tag(source, line) for line in lines)
    sentences = _sentences(lines)
    if not sentences:
        raise ValueError(f"{path} holds no sentence.")
    width = len(_columns(sentences[0][0][1]))

    def read(sentence: list[tuple[int, str]], index: int) -> list[TokenExample]:
        split = _tagged_columns if tagged else _token_alone
        columns = [split(source, f"{path}:{number}", line, width) for number, line in sentence]
        tags = [cells[-1] for cells in columns] if tagged else None
        return [_example(source, index, f"{path}:{sentence[0][0]}", [cells[0] for cells in columns], tags)]

    return source.each(sentences, read, first)


def _sentences(lines: Sequence[str]) -> list[list[tuple[int, str]]]:
    """The numbered lines of each sentence."""
    sentences: list[list[tuple[int, str]]] = []
    ended = True
    for number, line in enumerate(lines, start=1):
        if line.strip() and ended:
            sentences.append([])
        ended = not line.strip()
        if not ended:
            sentences[-1].append((number, line))
    return sentences


def _token_alone(_: SplitSource, where: str, line: str, __: int) -> list[str]:
    columns = line.split()
    if len(columns) > 1:
        raise ValueError(
            f"{where}: {len(columns)} columns; a split without tags has a token on each line and nothing else, found "
            f"{line[:60]!r}."
        )
    return columns


def _tagged_columns(source: SplitSource, where: str, line: str, width: int) -> list[str]:
    columns = _columns(line)
    if len(columns) < 2 or not columns[0]:
        raise ValueError(f"{where}: expected a token, a tab or space, and a tag; found {line[:60]!r}.")
    uneven = len(columns) != width and max(len(columns), width) > 2
    if uneven or (len(columns) > 2 and columns[-1] not in source.task.tags):
        raise ValueError(
            f"{where}: {len(columns)} columns; expected a token and a tag. Columns between them are left out if every "
            f"line has as many ({width}) and a tag of {source.task.name} in the last; found {line[:60]!r}."
        )
    return columns


def _from_table(source: SplitSource, path: Path, lines: Sequence[str], first: int) -> Iterator[TokenExample]:
    headings = lines[0].split("\t")

    def read(line: tuple[int, str], index: int) -> list[TokenExample]:
        where, cells = f"{path}:{line[0]}", line[1].split("\t")
        if len(cells) != len(headings):
            raise ValueError(f"{where}: {len(cells)} cells under the headings {' and '.join(headings)}.")
        tokens, tags = (cell.split(_JOINT) for cell in cells) if len(cells) == 2 else (cells[0].split(_JOINT), None)
        return [_example(source, index, where, tokens, tags)]

    rows = [(number, line) for number, line in enumerate(lines[1:], start=2) if line.strip()]
    return source.each(rows, read, first)


def _columns(line: str) -> list[str]:
    """The cells of a line, between which stands a tab or, in a line without any, one space or more."""
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
        raise ValueError(f"{where}: {len(tokens)} tokens and {len(tags)} tags; there must be a tag for each token.")
    for place, tag in enumerate(tags or ()):
        if tag not in known:
            raise ValueError(
                f"{where}: the task {source.task.name} has no tag '{tag}'{nearest(tag, known)}, at token {place + 1} "
                f"'{tokens[place]}'; its tags are {', '.join(known)}."
            )
    return TokenExample(id=index, where=where, tokens=tuple(tokens), tags=None if tags is None else tuple(tags))


class CluenerReader(RowReader):
    """CLUENER2020: rows of `text` and `label`."""

    name = "cluener"
    example = TokenExample
    needs = ("labels",)
    options = ("echo",)
    placeholders = ("text",)
    submissions: ClassVar = {"entity_lines": entity_lines}

    def metrics_of(self, task: Task) -> tuple[str, ...]:
        """As `Reader.metrics_of`, with the corpus's own, for which its files have the entities."""
        return (*super().metrics_of(task), "cluener_f1")

    def read_row(self, source: SplitSource, row: Row, index: int) -> TokenExample:
        """As `RowReader.read_row`; `label` is entity type -> surface -> list of `[start, end]`, both ends inclusive.

        Every character is a token. Where two entities overlap, the longer one gets the tags, as BIO holds one of them;
        the example's `entities` are all of them.
        """
        text, label = row.get("text"), row.get("label")
        if not isinstance(text, str):
            fail(row, f"there is no field 'text' with text in it; the row has {', '.join(row)}.")
        if label is None and source.needs_gold:
            fail(row, f"there is no field 'label' with entities in it; the row has {', '.join(row)}. {_CLUENER_ROW}")
        tags = None if label is None else _span_tags(source, row, text, label)
        with_id = replace(source, fields={"id": "id"})
        example = _example(source, with_id.example_id(row, index), row.where, list(text), tags)
        if label is None:
            return example
        entities = frozenset((entity, surface) for entity, texts in label.items() for surface in texts)
        return replace(example, entities=entities)


def _span_tags(source: SplitSource, row: Row, text: str, label: Any) -> list[str]:
    try:
        spans = [
            (int(start), int(end), entity, surface)
            for entity, surfaces in label.items()
            for surface, places in surfaces.items()
            for start, end in places
        ]
    except (AttributeError, TypeError, ValueError):
        shown = str(label)[:60]
        fail(row, f"'label' must be entity type -> text -> list of [start, end], found {shown}. {_CLUENER_ROW}")
    for start, end, entity, surface in spans:
        if entity not in source.task.labels:
            known = list(source.task.labels)
            fail(row, f"unknown entity type '{entity}'{nearest(entity, known)}; known are {', '.join(known)}.")
        if text[start : end + 1] != surface:
            fail(
                row,
                f"'{surface}' does not stand at characters {start} to {end} of the text, where "
                f"'{text[start : end + 1]}' stands.",
            )
    tags = ["O"] * len(text)
    for start, end, entity, _ in sorted(spans, key=lambda span: (span[0] - span[1], span[0])):
        if all(tag == "O" for tag in tags[start : end + 1]):
            tags[start : end + 1] = [f"B-{entity}", *[f"I-{entity}"] * (end - start)]
    return tags
