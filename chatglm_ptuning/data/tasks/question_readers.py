"""Readers of questions about a context: SQuAD's form, CMRC2018's own, and a hub's flat rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from chatglm_ptuning.data.files import Row
from chatglm_ptuning.data.forms.fields import fail
from chatglm_ptuning.data.tasks.examples import Answer, QuestionExample
from chatglm_ptuning.data.tasks.source import SplitSource, nearest_place


def read_squad(source: SplitSource) -> list[QuestionExample]:
    """Questions and their reference answers.

    - SQuAD's nested form, in which CLUE has CMRC2018 and DRCD: `data`, `paragraphs`, `qas`, `answers` with `text` and
      `answer_start`;
    - CMRC2018's own form: a list of `context_text` with `qas` of `query_text`, `query_id` and `answers` as texts;
    - flat rows of a hub: `context`, `question`, `answers` with lists of `text` and `answer_start`.

    Contexts are kept as they are, so that `answer_start` holds. An answer that does not stand where the file says gets
    the nearest place where it does stand, or None.
    """
    if source.hub_rows is not None:
        return [_flat(source, row) for row in source.hub_rows]
    examples = []
    for path, content in source.documents():
        try:
            examples += list(_nested(source, path, content))
        except KeyError as error:
            raise ValueError(
                f"{path}: there is no key {error} where SQuAD's and CMRC2018's form have it; it is not a file of "
                f"{source.task.name}."
            ) from error
        except (TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not in SQuAD's form nor in CMRC2018's: {error}.") from error
    return examples


def _nested(source: SplitSource, path: Path, content: Any) -> Iterator[QuestionExample]:
    for document in content if isinstance(content, list) else content["data"]:
        if "context_text" in document:
            for qa in document["qas"]:
                answers = [(text, None) for text in qa.get("answers") or ()]
                context, question = document["context_text"], qa["query_text"]
                yield _example(source, f"{path}: {qa['query_id']}", qa["query_id"], context, question, answers)
            continue
        for paragraph in document["paragraphs"]:
            for qa in paragraph["qas"]:
                answers = [(answer["text"], answer.get("answer_start")) for answer in qa.get("answers") or ()]
                where = f"{path}: {qa['id']}"
                yield _example(source, where, qa["id"], paragraph["context"], qa["question"], answers)


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
