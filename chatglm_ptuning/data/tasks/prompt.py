"""From an example to the prompt, its candidate answers and the right one; no tokens yet."""

from __future__ import annotations

from dataclasses import replace
from string import ascii_uppercase
from typing import Any

from chatglm_ptuning.data.tasks.examples import (
    AnyExample,
    ChoiceExample,
    GenerationExample,
    QuestionExample,
    TextExample,
    TokenExample,
)
from chatglm_ptuning.data.tasks.task import Task
from chatglm_ptuning.data.truncation import without_middle


def render_prompt(task: Task, example: AnyExample) -> str:
    """The prompt of an example, without any answer."""
    values = {"labels": "、".join(task.labels.values())}
    if isinstance(example, (TextExample, GenerationExample)):
        values |= {**example.fields, "text": example.text}
        if isinstance(example, TextExample) and example.text_pair is not None:
            values["text_pair"] = example.text_pair
    elif isinstance(example, TokenExample):
        values["text"] = example.text
    else:
        values |= {"context": example.context, "question": example.question}
    if isinstance(example, ChoiceExample):
        values["options"] = _options(task, example)
        if example.subject is not None:
            values |= {"subject": task.subjects[example.subject].title, "category": example.category or ""}
    return task.prompt.format(**values)


def longest_text(example: AnyExample) -> int:
    """Characters of the longest text that `with_texts_of` shortens."""
    return max(map(len, _texts(example).values()), default=0)


def with_texts_of(example: AnyExample, length: int) -> AnyExample:
    """The example with each of its texts at most so many characters long; what is longer loses its middle.

    What the task adds around them is no part of it, nor are candidates: what is asked stays whole.
    """
    changed: dict[str, Any] = {name: without_middle(text, length) for name, text in _texts(example).items()}
    if isinstance(example, (TextExample, GenerationExample)):
        changed = {name: text for name, text in changed.items() if name not in example.fields} | {
            "fields": {name: changed[name] for name in example.fields}
        }
    return replace(example, **changed)


def _texts(example: AnyExample) -> dict[str, str]:
    if isinstance(example, TextExample) and example.text_pair is not None:
        return {**example.fields, "text": example.text, "text_pair": example.text_pair}
    if isinstance(example, (TextExample, GenerationExample)):
        return {**example.fields, "text": example.text}
    if isinstance(example, (QuestionExample, ChoiceExample)):
        return {"context": example.context, "question": example.question}
    return {}


def candidate_answers(task: Task, example: AnyExample) -> list[str]:
    """The texts among which the answer is, in the order of the labels or of the example's candidates.

    Raises:
        ValueError: if the task has no fixed answers.
    """
    if isinstance(example, ChoiceExample):
        return _letters(example) if task.letters else list(example.candidates)
    if isinstance(example, TextExample):
        return list(task.labels.values())
    raise ValueError(f"The task {task.name} has no candidate answers: they are written, tagged or extracted.")


def answer_text(task: Task, example: AnyExample) -> str | None:
    """What is to be answered: a verbaliser (or several), a candidate or its letter, a target, or the first reference.

    None in a split without it, and for tags, which have no text.
    """
    if isinstance(example, TextExample) and example.labels is not None:
        return "、".join(task.labels[key] for key in example.labels)
    if isinstance(example, TextExample):
        return None if example.label is None else task.labels[example.label]
    if isinstance(example, ChoiceExample):
        return None if example.answer is None else candidate_answers(task, example)[example.answer]
    if isinstance(example, GenerationExample):
        return example.target
    if isinstance(example, QuestionExample) and example.answers:
        return example.answers[0].text
    return None


def _letters(example: ChoiceExample) -> list[str]:
    return list(ascii_uppercase[: len(example.candidates)])


def _options(task: Task, example: ChoiceExample) -> str:
    if task.letters:
        return "\n".join(
            f"{letter}. {text}" for letter, text in zip(_letters(example), example.candidates, strict=True)
        )
    return "、".join(example.candidates)
