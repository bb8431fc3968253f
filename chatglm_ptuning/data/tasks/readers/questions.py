"""Reader of questions about a context: SQuAD's format, CMRC2018's own, and a hub's rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AliasChoices, BeforeValidator, Field, StrictInt
from pydantic.dataclasses import dataclass

from chatglm_ptuning.data.sources.json_rows import json_document
from chatglm_ptuning.data.tasks.examples import Answer, QuestionExample
from chatglm_ptuning.data.tasks.readers.reader import Reader
from chatglm_ptuning.data.tasks.source import Question, SplitSource, nearest_place, validated

_FORM = (
    'SQuAD\'s one object {"data": [{"paragraphs": [{"context": "...", "qas": [{"id": "1", "question": "...", '
    '"answers": [{"text": "...", "answer_start": 0}]}]}]}]}, or CMRC2018\'s one list [{"context_text": "...", "qas": '
    '[{"query_id": "1", "query_text": "...", "answers": ["..."]}]}]'
)


def _answers(answers: Any) -> Any:
    """The answers as SQuAD has them; hubs have a list for each key, CMRC2018 has texts, and test files have none."""
    if isinstance(answers, Mapping) and all(isinstance(values, list) for values in answers.values()):
        answers = [dict(zip(answers, values, strict=True)) for values in zip(*answers.values(), strict=True)]
    if isinstance(answers, list):
        return [{"text": answer} if isinstance(answer, str) else answer for answer in answers]
    return answers or []


@dataclass(frozen=True)
class SquadAnswer:
    """An answer and the index of its first character."""

    text: str
    answer_start: StrictInt | None = None


@dataclass(frozen=True)
class SquadQuestion:
    """A question, by the keys of SQuAD or of CMRC2018's own format."""

    id: Annotated[int | str, Field(validation_alias=AliasChoices("id", "query_id"))]
    question: Annotated[str, Field(validation_alias=AliasChoices("question", "query_text"))]
    answers: Annotated[tuple[SquadAnswer, ...], BeforeValidator(_answers)] = ()


@dataclass(frozen=True)
class SquadParagraph:
    """A context and its questions, which are checked one by one."""

    context: Annotated[Any, Field(validation_alias=AliasChoices("context", "context_text"))]
    qas: list[Any]


@dataclass(frozen=True)
class SquadDocument:
    """The paragraphs of a document."""

    paragraphs: list[SquadParagraph]


def _document(value: Any) -> Any:
    """A document; CMRC2018's own format has a paragraph in its place."""
    return {"paragraphs": [value]} if isinstance(value, Mapping) and "paragraphs" not in value else value


@dataclass(frozen=True)
class SquadFile:
    """A whole file."""

    data: list[Annotated[SquadDocument, BeforeValidator(_document)]]


class SquadReader(Reader):
    """Questions about a context that contains the answers."""

    name = "squad"
    example = QuestionExample
    options = ("echo",)
    placeholders = ("context", "question")

    def read(self, source: SplitSource) -> Iterator[QuestionExample]:
        """As `Reader.read`.

        Contexts are kept unchanged, so that `answer_start` holds. The start of an answer is the nearest place at which
        the context contains it, or None.
        """
        return source.each(source.questions(_questions), lambda question, _: [_example(source, *question)])


def _questions(path: Path) -> Iterator[Question]:
    content = json_document(path, _FORM)
    file = validated(SquadFile, {"data": content} if isinstance(content, list) else content, str(path), _FORM)
    for number, document in enumerate(file.data, start=1):
        for place, paragraph in enumerate(document.paragraphs, start=1):
            for index, question in enumerate(paragraph.qas, start=1):
                where = f"{path}: document {number}, paragraph {place}, question {index}"
                yield where, paragraph.context, question, index


def _example(source: SplitSource, where: str, context: Any, question: Any, _: int | str) -> QuestionExample:
    found = validated(SquadQuestion, question, where, _FORM)
    if not isinstance(context, str):
        raise ValueError(f"{where}: the context must be text, found {context!r}.")
    # Test files have no answers, or an empty one that starts at -1.
    given = [answer for answer in found.answers if answer.text.strip()]
    if not given and source.needs_gold:
        raise ValueError(f"{where}: '{found.id}' has no answer; the split {source.split} needs one.")
    answers = tuple(
        Answer(answer.text, nearest_place(context, answer.text, answer.answer_start or 0)) for answer in given
    )
    return QuestionExample(id=found.id, where=where, context=context, question=found.question, answers=answers or None)
