"""Readers of questions about a context: SQuAD's form, CMRC2018's own, and a hub's flat rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from chatglm_ptuning.data.sources.rows import Row, fail
from chatglm_ptuning.data.tasks.examples import Answer, QuestionExample
from chatglm_ptuning.data.tasks.readers.reader import Reader
from chatglm_ptuning.data.tasks.source import SplitSource, nearest_place
from chatglm_ptuning.data.tasks.submission_formats import id_map

_FORM = (
    'SQuAD\'s one object {"data": [{"paragraphs": [{"context": "...", "qas": [{"id": "1", "question": "...", '
    '"answers": [{"text": "...", "answer_start": 0}]}]}]}]}, or CMRC2018\'s one list [{"context_text": "...", "qas": '
    '[{"query_id": "1", "query_text": "...", "answers": ["..."]}]}]'
)


class SquadReader(Reader):
    """Questions about a context, and the answers that stand in it."""

    name = "squad"
    example = QuestionExample
    options = ("echo",)
    placeholders = ("context", "question")
    submissions: ClassVar = {"answer_map": id_map}

    def read(self, source: SplitSource) -> Iterator[QuestionExample]:
        """As `Reader.read`, from any of these forms:

        - SQuAD's nested form, in which CLUE has CMRC2018 and DRCD: `data`, `paragraphs`, `qas`, `answers` with `text`
          and `answer_start`;
        - CMRC2018's own form: a list of `context_text` with `qas` of `query_text`, `query_id` and `answers` as texts;
        - flat rows of a hub: `context`, `question`, `answers` with lists of `text` and `answer_start`.

        Contexts are kept as they are, so that `answer_start` holds. An answer that does not stand where the file says
        gets the nearest place where it does stand, or None.
        """
        if source.has_flat_rows:
            return source.each(source.rows(), lambda row, _: [_flat(source, row)])
        documents = source.documents(_FORM)
        questions = (question for path, content in documents for question in _questions(path, content))
        return source.each(questions, lambda question, _: [_nested(source, *question)])


def _questions(path: Path, content: Any) -> Iterator[tuple[Path, str, str, Any, Any]]:
    """Each question of a file with its place, its paragraph's, and the paragraph itself."""
    if isinstance(content, list):
        documents = [(f"{path}: document {number}", document) for number, document in enumerate(content, start=1)]
    else:
        documents = _entries(str(path), content, "data", "document")
    for place, document in documents:
        flat = isinstance(document, Mapping) and "context_text" in document
        paragraphs = [(place, document)] if flat else _entries(place, document, "paragraphs", "paragraph")
        for inside, paragraph in paragraphs:
            for where, qa in _entries(inside, paragraph, "qas", "question"):
                yield path, where, inside, paragraph, qa


def _nested(source: SplitSource, path: Path, where: str, inside: str, paragraph: Any, qa: Any) -> QuestionExample:
    if "context_text" in paragraph:
        index, question = _value(where, qa, "query_id"), _value(where, qa, "query_text")
        answers = [(text, None) for _, text in _given(where, qa)]
        return _example(source, f"{path}: {index}", index, paragraph["context_text"], question, answers)
    index, question = _value(where, qa, "id"), _value(where, qa, "question")
    answers = [(_value(at, answer, "text"), answer.get("answer_start")) for at, answer in _given(where, qa)]
    context = _value(inside, paragraph, "context")
    return _example(source, f"{path}: {index}", index, context, question, answers)


def _value(where: str, holder: Any, key: str) -> Any:
    """What an object has under a key.

    Raises:
        ValueError: naming the place, if it is no object or does not have the key.
    """
    if isinstance(holder, Mapping) and key in holder:
        return holder[key]
    found = f"it has {', '.join(holder) or 'nothing'}" if isinstance(holder, Mapping) else f"found {str(holder)[:60]}"
    raise ValueError(f"{where}: there is no key '{key}', {found}; expected {_FORM}.")


def _entries(where: str, holder: Any, key: str, kind: str) -> list[tuple[str, Any]]:
    """The entries of a list in an object, each with its place."""
    entries = _value(where, holder, key)
    if not isinstance(entries, list):
        raise ValueError(f"{where}: '{key}' must be a list, found {str(entries)[:60]}; expected {_FORM}.")
    return [(f"{where}, {kind} {number}", entry) for number, entry in enumerate(entries, start=1)]


def _given(where: str, qa: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The answers of a question, which test files leave out."""
    return _entries(where, qa, "answers", "answer") if qa.get("answers") else []


def _flat(source: SplitSource, row: Row) -> QuestionExample:
    answers = row.get("answers")
    for name in ("id", "context", "question"):
        if name not in row:
            fail(row, f"there is no field '{name}'; the row has {', '.join(row)}.")
    pairs = []
    if isinstance(answers, Mapping):
        pairs = list(zip(answers["text"], answers["answer_start"], strict=True))
    return _example(source, row.where, row["id"], row["context"], row["question"], pairs)


def _example(
    source: SplitSource,
    where: str,
    index: int | str,
    context: str,
    question: str,
    answers: list[tuple[str, int | None]],
) -> QuestionExample:
    for name, value in (("context", context), ("question", question), *(("answer", text) for text, _ in answers)):
        if not isinstance(value, str):
            raise ValueError(f"{where}: the {name} must be text, found {value!r}.")
    for _, start in answers:
        if start is not None and (isinstance(start, bool) or not isinstance(start, int)):
            raise ValueError(f"{where}: 'answer_start' must be the place of a character, found {start!r}.")
    # Test files have no answers, or an empty one that starts at -1.
    given = [(text, start) for text, start in answers if text.strip()]
    if not given and source.needs_gold:
        raise ValueError(f"{where}: the question has no answer, and the split {source.split} needs them.")
    found = tuple(Answer(text, nearest_place(context, text, start or 0)) for text, start in given)
    return QuestionExample(id=index, where=where, context=context, question=question, answers=found or None)
