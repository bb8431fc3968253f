"""Contents of submission files, each as one benchmark or several take it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from string import ascii_uppercase
from typing import Any

from chatglm_ptuning.data.tasks.examples import ChoiceExample, Example, TokenExample
from chatglm_ptuning.metrics.entities import spans_of


def id_lines(key: str) -> Callable[[Sequence[Example], Sequence[Any]], str]:
    """`{"id": ID, KEY: PREDICTION}` a line."""

    def write(examples: Sequence[Example], predictions: Sequence[Any]) -> str:
        rows = ({"id": example.id, key: value} for example, value in zip(examples, predictions, strict=True))
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    return write


def id_map(examples: Sequence[Example], predictions: Sequence[Any]) -> str:
    """One object, `{"ID": PREDICTION}`."""
    answers = {str(example.id): prediction for example, prediction in zip(examples, predictions, strict=True)}
    return json.dumps(answers, ensure_ascii=False, indent=2) + "\n"


def exam_map(examples: Sequence[ChoiceExample], predictions: Sequence[int]) -> str:
    """One object, `{"SUBJECT": {"ID": "A"}}`."""
    subjects: dict[str, dict[str, str]] = {}
    for example, prediction in zip(examples, predictions, strict=True):
        subjects.setdefault(example.subject or "", {})[str(example.id)] = ascii_uppercase[prediction]
    return json.dumps(subjects, ensure_ascii=False, indent=2) + "\n"


def entity_lines(examples: Sequence[TokenExample], predictions: Sequence[Sequence[str]]) -> str:
    """`{"id": ID, "label": {TYPE: {TEXT: [[START, END]]}}}` a line, both ends inclusive."""
    lines = []
    for example, tags in zip(examples, predictions, strict=True):
        label: dict[str, dict[str, list[list[int]]]] = {}
        for entity, first, last in spans_of(tags):
            label.setdefault(entity, {}).setdefault(example.text_of(first, last), []).append([first, last])
        lines.append(json.dumps({"id": example.id, "label": label}, ensure_ascii=False) + "\n")
    return "".join(lines)
