"""Readers of multiple choice: ChID, C3, examinations by subject, and rows with a list of candidates."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from string import ascii_uppercase
from typing import Any, ClassVar

from chatglm_ptuning.data.sources.json_rows import json_document
from chatglm_ptuning.data.sources.rows import Row, fail
from chatglm_ptuning.data.tasks.examples import ChoiceExample
from chatglm_ptuning.data.tasks.readers.reader import Reader, RowReader
from chatglm_ptuning.data.tasks.source import SplitSource, as_text
from chatglm_ptuning.data.tasks.splits import spellings
from chatglm_ptuning.data.tasks.submission_formats import exam_map, id_lines, id_map

ASKED_BLANK = "____"
"""Stands for the idiom that is asked for."""
OTHER_BLANK = "〇〇〇〇"
"""Stands for the other missing idioms of the same passage."""

_C3_FORM = "one JSON list of [[context, ...], [question, ...], id]"
_IDIOM = re.compile(r"#idiom\d*#")
_LETTERS = ("A", "B", "C", "D")


class _ChoiceReader(Reader):
    example = ChoiceExample
    options = ("letters",)
    placeholders = ("context", "question", "options")


class ChidReader(_ChoiceReader):
    """ChID: idioms that are missing in a passage."""

    name = "chid"
    submissions: ClassVar = {"answer_lines": id_lines("answer"), "idiom_map": id_map}

    def read(self, source: SplitSource) -> Iterator[ChoiceExample]:
        """As `Reader.read`, an example for each missing idiom.

        CLUE's form: `content` is a list of passages with `#idiom000378#`, and the answers (idiom tag -> index) stand in
        a file of their own, `train_answer.json` beside `train.json`. FewCLUE's: `content` is one passage with one
        `#idiom#`, and `answer` the index.
        """
        answers = {tag: answer for path in self.beside(source) for tag, answer in _idiom_answers(path).items()}

        def read_row(row: Row, index: int) -> Iterable[ChoiceExample]:
            candidates, content = row.get("candidates"), row.get("content")
            if not _are_texts(candidates):
                fail(row, f"there is no field 'candidates' with a list of idioms; the row has {', '.join(row)}.")
            if isinstance(content, str):
                return [_one_blank(source, row, content, candidates, index)]
            if _are_texts(content):
                return _many_blanks(source, row, content, candidates, answers)
            fail(row, f"there is no field 'content' with text or a list of texts; the row has {', '.join(row)}.")

        return source.each(source.rows(), read_row)

    def beside(self, source: SplitSource) -> list[Path]:
        """As `Reader.beside`: CLUE's answers."""
        beside = [spellings(path.with_name(_answers_beside(path))) for path in source.paths]
        return [path for either in beside for path in either if path.is_file()]


def _idiom_answers(path: Path) -> Mapping[str, Any]:
    expected = "one JSON object, idiom tag -> index of the right candidate"
    content = json_document(path, expected)
    if isinstance(content, Mapping):
        return content
    raise ValueError(f"{path} must be {expected}.")


def _answers_beside(path: Path) -> str:
    """The name of the file with the answers to the passages of a file of CLUE's."""
    return f"{Path(path.name.removesuffix('.gz')).stem}_answer.json"


def _one_blank(source: SplitSource, row: Row, content: str, candidates: list[str], index: int) -> ChoiceExample:
    if len(_IDIOM.findall(content)) != 1:
        fail(row, f"'content' must hold one #idiom#, found {len(_IDIOM.findall(content))}.")
    answer = _index(source, row, row.get("answer"), candidates)
    context = _IDIOM.sub(ASKED_BLANK, content)
    return ChoiceExample(
        id=source.example_id(row, index),
        where=row.where,
        context=context,
        candidates=tuple(candidates),
        answer=answer,
    )


def _many_blanks(
    source: SplitSource, row: Row, passages: list[str], candidates: list[str], answers: Mapping[str, Any]
) -> Iterator[ChoiceExample]:
    known = row.get("answers")  # a hub has them in the row, in the order of the blanks
    given = iter(known["candidate_id"] if isinstance(known, Mapping) else [])
    for passage in passages:
        for tag in _IDIOM.findall(passage):
            value = answers.get(tag, next(given, None))
            if value is None and source.needs_gold:
                fail(
                    row,
                    f"there is no answer for {tag}: CLUE has them in a file of their own, "
                    f"{_answers_beside(Path(row.path))} beside {Path(row.path).name}.",
                )
            context = _IDIOM.sub(OTHER_BLANK, passage.replace(tag, ASKED_BLANK))
            yield ChoiceExample(
                id=tag,
                where=row.where,
                context=context,
                candidates=tuple(candidates),
                answer=_index(source, row, value, candidates),
            )


def _index(source: SplitSource, row: Row, value: Any, candidates: list[str]) -> int | None:
    if value is None and not source.needs_gold:
        return None
    if isinstance(value, str) and value in candidates:
        return candidates.index(value)
    letters = ascii_uppercase[: len(candidates)] if source.task.letters else ""
    if isinstance(value, str) and value.strip().upper() in [*letters]:
        return letters.index(value.strip().upper())
    if type(value) is int and str(value) in candidates:
        of_text = candidates.index(str(value))
        if of_text != value and 0 <= value < len(candidates):
            fail(row, f"the answer {value} may be an index, or the candidate with the index {of_text}: write that.")
        return of_text
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(candidates):
        letter = f"a letter from A to {letters[-1]}, " if letters else ""
        fail(
            row,
            f"the answer must be an index below {len(candidates)} into the candidates, {letter}or the text of a "
            f"candidate ({'、'.join(candidates)[:60]}), found {value!r}.",
        )
    return value


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(entry, str) for entry in value)


class ChoicesReader(_ChoiceReader, RowReader):
    """Rows with a list of candidates."""

    name = "choices"
    fields = ("candidates",)
    optional_fields = ("context", "question", "answer", "id")
    submissions: ClassVar = {"answer_lines": id_lines("answer")}

    def read_row(self, source: SplitSource, row: Row, index: int) -> ChoiceExample:
        """As `RowReader.read_row`; the answer is an index (from 0), one of the candidates, or with `letters` its
        letter.
        """
        candidates = _candidates(source, row)
        texts = {role: source.text(row, role) for role in ("context", "question") if role in source.fields}
        answer = source.get(row, "answer")
        if answer is None and source.needs_gold:
            source.missing(row, "answer", source.fields.get("answer", "answer"))
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
        source.missing(row, "candidates", column)
    if not isinstance(given, list) or any(isinstance(entry, list) for entry in given):
        fail(row, f"the field '{column}' must be a list of texts, found {str(given)[:60]}.")
    candidates = [as_text(row, entry, column) for entry in given]
    if len(candidates) < 2:
        fail(row, f"the field '{column}' must have two candidates or more, found {given}.")
    twice = next((text for text in candidates if candidates.count(text) > 1), None)
    if twice is not None and not source.task.letters:  # by letters they are told apart
        fail(row, f"the field '{column}' has the candidate {twice!r} twice; they must differ.")
    return candidates


class C3Reader(_ChoiceReader):
    """C3: questions about a dialogue or text; the file is one nested list."""

    name = "c3"
    submissions: ClassVar = {"choice_lines": id_lines("label")}

    def read(self, source: SplitSource) -> Iterator[ChoiceExample]:
        """As `Reader.read`: a list of `[[context, ...], [{question, choice, answer}, ...], id]`; a hub has a row for
        each question.
        """
        if source.has_flat_rows:
            return source.each(
                source.rows(),
                lambda row, index: [_c3_example(source, row.where, row, row.get("context"), row.get("id", index))],
            )
        documents = source.documents(_C3_FORM)
        questions = (question for path, content in documents for question in _c3_questions(path, content))
        return source.each(questions, lambda question, _: [_c3_example(source, *question)])


def _c3_questions(path: Path, content: Any) -> Iterator[tuple[str, Any, Any, int | str]]:
    """Each question of a file: its place, itself, its contexts, and its id."""
    if not isinstance(content, list):
        raise ValueError(f"{path} must be {_C3_FORM}: it is not a file of C3.")
    for number, entry in enumerate(content):
        where = f"{path}: document {number + 1}"
        if not isinstance(entry, list) or len(entry) < 2 or not isinstance(entry[1], list):
            raise ValueError(f"{where} must be [[context, ...], [question, ...], id].")
        document = entry[2] if len(entry) > 2 else number
        for place, question in enumerate(entry[1]):
            index = question.get("id", f"{document}-{place}") if isinstance(question, Mapping) else place
            yield f"{where}, question {place + 1}", question, entry[0], index


def _c3_example(source: SplitSource, where: str, question: Any, context: Any, index: int | str) -> ChoiceExample:
    if not isinstance(question, Mapping) or not _are_texts(context):
        raise ValueError(f"{where}: expected a list of contexts and an object with question, choice and answer.")
    choices = question.get("choice")
    if not isinstance(question.get("question"), str) or not _are_texts(choices):
        raise ValueError(f"{where}: it must have 'question' and a list 'choice'; it has {', '.join(question)}.")
    answer = question.get("answer") or None
    if answer is None and source.needs_gold:
        raise ValueError(f"{where}: there is no 'answer', and the split {source.split} needs them.")
    place = None if answer is None else _place_of(answer, choices)
    if answer is not None and place is None:
        raise ValueError(f"{where}: the answer '{answer}' is none of the choices {', '.join(choices)}.")
    return ChoiceExample(
        id=index,
        where=where,
        context="\n".join(context),
        question=question["question"],
        candidates=tuple(choices),
        answer=place,
    )


def _place_of(answer: Any, choices: list[str]) -> int | None:
    """Where the answer stands among the choices; white space at the ends counts only if that tells two apart."""
    if answer in choices:
        return choices.index(answer)
    stripped = [choice.strip() for choice in choices]
    wanted = answer.strip() if isinstance(answer, str) else answer
    return stripped.index(wanted) if wanted in stripped else None


class ExamReader(_ChoiceReader, RowReader):
    """C-Eval and CMMLU: a table for each subject."""

    name = "exam"
    needs = ("subjects",)
    options = ("letters", "groups")
    placeholders = (*_ChoiceReader.placeholders, "subject", "category")
    submissions: ClassVar = {"exam_map": exam_map}

    def read_row(self, source: SplitSource, row: Row, index: int) -> ChoiceExample:
        """As `RowReader.read_row`, from `question` (or `Question`), A, B, C, D and the answer."""
        lower = {name.lower(): name for name in row}
        for name in ("question", "a", "b", "c", "d"):
            if name not in lower:
                fail(row, f"there is no column '{name if len(name) > 1 else name.upper()}'; it has {', '.join(row)}.")
        answer = row[lower["answer"]] if "answer" in lower else None
        if isinstance(answer, str):
            answer = answer.strip().upper() or None
        if answer is None and source.needs_gold:
            fail(row, f"there is no answer, and the split {source.split} needs them.")
        if answer not in (None, *_LETTERS):
            fail(row, f"the answer must be A, B, C or D, found {answer!r}.")
        return ChoiceExample(
            id=_exam_id(row, index),
            where=row.where,
            question=as_text(row, row[lower["question"]], "question"),
            candidates=tuple(as_text(row, row[lower[letter]], letter.upper()) for letter in "abcd"),
            answer=None if answer is None else _LETTERS.index(answer),
            subject=source.subject,
            category=source.task.subjects[source.subject or ""].category,
        )


def _exam_id(row: Row, index: int) -> int | str:
    """C-Eval numbers its questions in a column `id`, CMMLU in one without a heading."""
    value = row.get("id", row.get(""))
    if value is None or value == "":
        return index
    return int(value) if isinstance(value, str) and value.isdigit() else value
