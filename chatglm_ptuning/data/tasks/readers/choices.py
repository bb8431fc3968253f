"""Readers of multiple choice: ChID, C3, examinations by subject, and rows with a list of candidates."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from string import ascii_uppercase
from typing import Annotated, Any, NamedTuple

from pydantic import Field
from pydantic.dataclasses import dataclass

from chatglm_ptuning.data.sources.json_rows import json_document
from chatglm_ptuning.data.sources.rows import Row, fail
from chatglm_ptuning.data.tasks.examples import ChoiceExample
from chatglm_ptuning.data.tasks.readers.reader import Reader
from chatglm_ptuning.data.tasks.source import Question, SplitSource, as_text, spellings, validated

ASKED_BLANK = "____"
"""Placeholder of the idiom to choose."""
OTHER_BLANK = "〇〇〇〇"
"""Placeholder of the other missing idioms of the same passage."""

Texts = Annotated[list[str], Field(min_length=1)]


@dataclass(frozen=True)
class ChidRow:
    """A row of ChID: one passage (FewCLUE), or several (CLUE)."""

    candidates: Texts
    content: str | Texts


@dataclass(frozen=True)
class C3Question:
    """A question of C3; `answer` is one of the texts in `choice`."""

    question: str
    choice: Texts
    answer: str | None = None


class C3Document(NamedTuple):
    """A document of C3; its contents are checked question by question."""

    context: Any
    questions: list[Any]
    id: Any = None


_CHID_FORM = 'one passage {"content": "...#idiom#...", "candidates": ["...", ...]}, or a list of them in "content"'
_IDIOMS_FORM = "one JSON object, idiom tag -> index of the right candidate"
_IDIOM = re.compile(r"#idiom\d*#")

_C3_FORM = (
    'one JSON list of [[context, ...], [question, ...], id], a question being {"question": "...", "choice": ["...", '
    '...], "answer": "..."}'
)


class _ChoiceReader(Reader):
    example = ChoiceExample
    options = ("letters",)
    placeholders = ("context", "question", "options")


class ChidReader(_ChoiceReader):
    """ChID: idioms that are missing in a passage."""

    name = "chid"

    def read(self, source: SplitSource) -> Iterator[ChoiceExample]:
        """As `Reader.read`, with an example for each missing idiom.

        CLUE: `content` is a list of passages with `#idiom000378#`, and the answers (idiom tag -> index) are in another
        file, `train_answer.json` beside `train.json`. FewCLUE: `content` is one passage with one `#idiom#`, and
        `answer` is the index.
        """
        answers: dict[str, Any] = {}
        for path in self.beside(source):
            answers |= validated(dict[str, Any], json_document(path, _IDIOMS_FORM), str(path), _IDIOMS_FORM)
        return source.each(source.rows(), lambda row, index: _blanks(source, row, index, answers))

    def beside(self, source: SplitSource) -> list[Path]:
        """As `Reader.beside`: CLUE's answers."""
        beside = [spellings(path.with_name(_answers_beside(path))) for path in source.paths]
        return [path for either in beside for path in either if path.is_file()]


def _answers_beside(path: Path) -> str:
    return f"{Path(path.name.removesuffix('.gz')).stem}_answer.json"


def _blanks(source: SplitSource, row: Row, index: int, answers: dict[str, Any]) -> Iterator[ChoiceExample]:
    passage = validated(ChidRow, row, row.where, _CHID_FORM)
    content, candidates = passage.content, passage.candidates
    is_single = isinstance(content, str)
    tags = [(tag, text) for text in ([content] if is_single else content) for tag in _IDIOM.findall(text)]
    if is_single and len(tags) != 1:
        fail(row, f"'content' must contain one #idiom#, found {len(tags)}.")
    known = row.get("answers")  # a hub has them in the row, in the order of the blanks
    given = iter([row.get("answer")] if is_single else known["candidate_id"] if isinstance(known, dict) else [])
    for tag, text in tags:
        answer = answers.get(tag, next(given, None))
        if answer is None and source.needs_gold and not is_single:
            path = Path(row.path)
            fail(row, f"there is no answer for {tag}: CLUE has them in {_answers_beside(path)} beside {path.name}.")
        yield ChoiceExample(
            id=source.example_id(row, index) if is_single else tag,
            where=row.where,
            context=_IDIOM.sub(OTHER_BLANK, text.replace(tag, ASKED_BLANK)),
            candidates=tuple(candidates),
            answer=_index(source, row, answer, candidates),
        )


def _index(source: SplitSource, row: Row, value: Any, candidates: list[str]) -> int | None:
    """The index of the right candidate, which is given by its text, letter or index."""
    if value is None and not source.needs_gold:
        return None
    if isinstance(value, str) and value in candidates:
        return candidates.index(value)
    letters = ascii_uppercase[: len(candidates)] if source.task.letters else ""
    if isinstance(value, str) and value.strip().upper() in [*letters]:
        return letters.index(value.strip().upper())
    is_index = type(value) is int and 0 <= value < len(candidates)
    if type(value) is int and str(value) in candidates:
        of_text = candidates.index(str(value))
        if of_text != value and is_index:
            fail(row, f"the answer {value} is an index, and also the text of candidate {of_text}: write {of_text}.")
        return of_text
    if not is_index:
        letter = f"a letter from A to {letters[-1]}, " if letters else ""
        fail(
            row,
            f"the answer must be an index below {len(candidates)} into the candidates, {letter}or the text of a "
            f"candidate ({'、'.join(candidates)[:60]}), found {value!r}.",
        )
    return value


class ChoicesReader(_ChoiceReader):
    """Rows with a list of candidates."""

    name = "choices"
    fields = ("candidates",)
    optional_fields = ("context", "question", "answer", "id")

    def read_row(self, source: SplitSource, row: Row, index: int) -> ChoiceExample:
        """As `Reader.read_row`; the answer is an index from 0, a candidate, or with `letters` its letter."""
        candidates = _candidates(source, row)
        texts = {role: source.text(row, role) for role in ("context", "question") if role in source.fields}
        answer = source.get(row, "answer")
        if answer is None and source.needs_gold:
            source.missing(row, "answer")
        return ChoiceExample(
            id=source.example_id(row, index),
            where=row.where,
            candidates=tuple(candidates),
            answer=_index(source, row, answer, candidates),
            **texts,
        )


def _candidates(source: SplitSource, row: Row) -> list[str]:
    column, given = source.fields["candidates"], source.get(row, "candidates")
    if given is None:
        source.missing(row, "candidates")
    if not isinstance(given, list) or any(isinstance(entry, list) for entry in given):
        fail(row, f"the field '{column}' must be a list of texts, found {str(given)[:60]}.")
    candidates = [as_text(row, entry, column) for entry in given]
    if len(candidates) < 2:
        fail(row, f"the field '{column}' must have two candidates or more, found {given}.")
    if len(set(candidates)) < len(candidates) and not source.task.letters:
        fail(row, f"the field '{column}' has equal candidates: {given}; without 'letters' they must differ.")
    return candidates


class C3Reader(_ChoiceReader):
    """C3: questions about a dialogue or text; a file is one nested list."""

    name = "c3"

    def read(self, source: SplitSource) -> Iterator[ChoiceExample]:
        return source.each(source.questions(_c3_questions), lambda question, _: [_c3_example(source, *question)])


def _c3_questions(path: Path) -> Iterator[Question]:
    documents = validated(list[C3Document], json_document(path, _C3_FORM), str(path), _C3_FORM)
    for number, document in enumerate(documents):
        name = number if document.id is None else document.id
        for place, question in enumerate(document.questions):
            where = f"{path}: document {number + 1}, question {place + 1}"
            yield where, document.context, question, f"{name}-{place}"


def _c3_example(source: SplitSource, where: str, context: Any, question: Any, index: int | str) -> ChoiceExample:
    texts = validated(Texts, context, f"{where}, its context", _C3_FORM)
    found = validated(C3Question, question, where, _C3_FORM)
    choices, answer = found.choice, found.answer or None
    if answer is None and source.needs_gold:
        raise ValueError(f"{where}: there is no 'answer'; the split {source.split} needs one.")
    place = None if answer is None else _place_of(answer, choices)
    if answer is not None and place is None:
        raise ValueError(f"{where}: the answer '{answer}' is none of the choices {', '.join(choices)}.")
    return ChoiceExample(
        id=question.get("id", index),
        where=where,
        context="\n".join(texts),
        question=found.question,
        candidates=tuple(choices),
        answer=place,
    )


def _place_of(answer: str, choices: list[str]) -> int | None:
    """The index of an answer; white space around it counts only if no choice is equal."""
    if answer in choices:
        return choices.index(answer)
    stripped = [choice.strip() for choice in choices]
    return stripped.index(answer.strip()) if answer.strip() in stripped else None


class ExamReader(_ChoiceReader):
    """C-Eval and CMMLU: a table for each subject."""

    name = "exam"
    needs = ("subjects",)
    options = ("letters", "groups")
    placeholders = (*_ChoiceReader.placeholders, "subject", "category")

    def read_row(self, source: SplitSource, row: Row, index: int) -> ChoiceExample:
        """As `Reader.read_row`, from the columns question, A, B, C, D and answer, in upper or lower case."""
        cells = {name.lower(): value for name, value in row.items()}
        for name in ("question", *"abcd"):
            if name not in cells:
                fail(row, f"there is no column '{name if len(name) > 1 else name.upper()}'; it has {', '.join(row)}.")
        answer = cells.get("answer")
        if isinstance(answer, str):
            answer = answer.strip().upper() or None
        if answer is None and source.needs_gold:
            fail(row, f"there is no answer; the split {source.split} needs one.")
        if answer not in (None, *"ABCD"):
            fail(row, f"the answer must be A, B, C or D, found {answer!r}.")
        return ChoiceExample(
            id=_exam_id(row, index),
            where=row.where,
            question=as_text(row, cells["question"], "question"),
            candidates=tuple(as_text(row, cells[letter], letter.upper()) for letter in "abcd"),
            answer=None if answer is None else "ABCD".index(answer),
            subject=source.subject,
            category=source.task.subjects[source.subject or ""].category,
        )


def _exam_id(row: Row, index: int) -> int | str:
    """C-Eval numbers its questions in a column `id`, CMMLU in one without a heading."""
    value = row.get("id", row.get(""))
    if value is None or value == "":
        return index
    return int(value) if isinstance(value, str) and value.isdigit() else value
