"""The rows of a task after reading: one class for each kind of gold.

The kinds are a label, any number of labels, a written text, tags, a span and a choice. The class says what the prompt
can show of a row, and how predictions are checked, shown and scored.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any, ClassVar

from chatglm_ptuning.chat.message import Conversation, Document
from chatglm_ptuning.data.tasks.task import Task
from chatglm_ptuning.data.truncation import without_middle
from chatglm_ptuning.metrics import task_scores
from chatglm_ptuning.metrics.entities import entities_of, spans_of
from chatglm_ptuning.metrics.task_scores import Entities, TaskScores

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, kw_only=True)
class Example(ABC):
    """One row.

    Attributes:
        metrics: that `score` computes.
        submissions: names in `submission.FORMATS` that can hold its predictions.
        dataset_format: of a row of an instruction file.
        unread: fields of such a row whose text is left out, see `ReadRow`.
        id: as in the benchmark's file, for the submission; without one, the index of the row in its split, from 0.
        where: `FILE:LINE`, or the nearest to it, for messages.
        left_out: whether its label is one of the task's `drop_labels`. It is predicted, because a submission needs
            every row, but neither learned nor scored.
        subject: of an examination.
    """

    metrics: ClassVar[tuple[str, ...]]
    submissions: ClassVar[tuple[str, ...]] = ()
    dataset_format: ClassVar[str] = ""
    unread: ClassVar[Sequence[str]] = ()

    id: int | str
    where: str = ""
    left_out: bool = False
    subject: str | None = None

    @property
    @abstractmethod
    def gold(self) -> Any:
        """The gold, in the format of a prediction; None in a split without gold."""

    @classmethod
    @abstractmethod
    def score(cls, task: Task, examples: Sequence[Self], predictions: Sequence[Any]) -> TaskScores:
        """Scores of the predictions for examples that all have gold."""

    def fault_of(self, task: Task, prediction: Any) -> str | None:
        """Why a prediction, by default text, cannot be submitted; None if it can."""
        return None if isinstance(prediction, str) else f"must be text, found {prediction!r}."

    def submitted(self, prediction: Any) -> Any:
        """A prediction as submission files contain it, ready for JSON."""
        return prediction

    def texts(self) -> dict[str, str]:
        """The texts that can be truncated, by their names in the prompt."""
        return {}

    def shortened(self, length: int) -> Self:
        """The example with each of its texts truncated in the middle to at most `length` characters."""
        return replace(self, **{name: without_middle(text, length) for name, text in self.texts().items()})

    def placeholders(self, task: Task) -> dict[str, str]:
        """The text for each name that the prompt can contain, except `labels`."""
        return self.texts()

    def prompt(self, task: Task) -> str:
        """The task's prompt for this example, without an answer."""
        return task.prompt.format(labels=task.label_list, **self.placeholders(task))

    def candidate_answers(self, task: Task) -> Mapping[Any, str]:
        """Prediction -> text of that answer, in order; empty if the answer is written, tagged or extracted."""
        return {}

    def answer_text(self, task: Task) -> str | None:
        """The gold as the text of an answer; None in a split without gold."""
        candidates = self.candidate_answers(task)
        return candidates[self.gold] if candidates and self.gold is not None else self.gold

    @property
    def digest(self) -> int:
        """64 bits that are equal for rows of equal content."""
        content = repr(replace(self, id=0, where="")).encode("utf-8", "surrogatepass")
        return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)

    @property
    def left_out_as(self) -> str | None:
        """The counter of `PreparationReport` for rows from which nothing can be learned; None for all others."""
        return "without_targets" if self.left_out else None

    def said(self) -> tuple[str, str, int]:
        """All text that the model is given, all text that it is to answer, and the number of answers."""
        return "\n".join(self.texts().values()), "", 1

    def shown_input(self, task: Task) -> str:
        """The input in `predictions.jsonl`."""
        return self.prompt(task)

    def readable(self, task: Task, prediction: Any) -> Any:
        """A prediction, or the gold, in `predictions.jsonl`."""
        return prediction

    def counted(self, task: Task) -> list[str]:
        """The names by which `tasks show` counts the gold."""
        return []


def has_gold(examples: Sequence[Example]) -> bool:
    """Whether a split can be scored: either all rows have gold, except those that are left out, or none."""
    return any(example.gold is not None for example in examples)


@dataclass(frozen=True, kw_only=True)
class _RowExample(Example):
    text: str
    fields: Mapping[str, str] = field(default_factory=dict)

    def texts(self) -> dict[str, str]:
        return {**self.fields, "text": self.text}

    def shortened(self, length: int) -> Self:
        short = {name: without_middle(text, length) for name, text in self.texts().items()}
        return replace(self, text=short.pop("text"), fields=short)


@dataclass(frozen=True, kw_only=True)
class TextExample(_RowExample):
    """A text, or a pair of texts, to be classified.

    Attributes:
        label: a key of the task's labels; None in a split without labels.
        fields: further texts of the row that the prompt can show; the second text of a pair is `text_pair`.
    """

    metrics = ("accuracy", "macro_f1")
    submissions = ("label_lines",)

    label: str | None = None

    @property
    def gold(self) -> str | None:
        return self.label

    @classmethod
    def score(cls, task: Task, examples: Sequence[TextExample], predictions: Sequence[str]) -> TaskScores:
        return task_scores.score_labels(predictions, [example.label for example in examples], list(task.labels))

    def fault_of(self, task: Task, prediction: Any) -> str | None:
        return None if prediction in task.labels else f"is {prediction!r}, which is no label of {task.name}."

    def candidate_answers(self, task: Task) -> Mapping[str, str]:
        return task.labels

    def counted(self, task: Task) -> list[str]:
        return [] if self.label is None else [task.labels[self.label]]


@dataclass(frozen=True, kw_only=True)
class MultiLabelExample(_RowExample):
    """A text, or a pair of texts, with any number of labels.

    Attributes:
        labels: keys in the order of the task; None in a split without labels.
        fields: as of `TextExample`.
    """

    metrics = ("micro_f1", "macro_f1", "subset_accuracy")
    submissions = TextExample.submissions

    labels: tuple[str, ...] | None = None

    @property
    def gold(self) -> list[str] | None:
        return None if self.labels is None else list(self.labels)

    @classmethod
    def score(cls, task: Task, examples: Sequence[MultiLabelExample], predictions: Sequence[list[str]]) -> TaskScores:
        return task_scores.score_label_sets(predictions, [example.gold for example in examples], list(task.labels))

    def fault_of(self, task: Task, prediction: Any) -> str | None:
        if isinstance(prediction, list) and all(key in task.labels for key in prediction):
            return None
        return f"must be a list of labels of {task.name}, found {prediction!r}."

    def answer_text(self, task: Task) -> str | None:
        return None if self.labels is None else "、".join(self.counted(task))

    def counted(self, task: Task) -> list[str]:
        return [task.labels[key] for key in self.labels or ()]


@dataclass(frozen=True, kw_only=True)
class GenerationExample(_RowExample):
    """A source text and the text to be written for it.

    Attributes:
        target: None in a split without targets.
        fields: as of `TextExample`.
    """

    metrics = ("rouge-l", "bleu-4")

    target: str | None = None

    @property
    def gold(self) -> str | None:
        return self.target

    @classmethod
    def score(cls, task: Task, examples: Sequence[GenerationExample], predictions: Sequence[str]) -> TaskScores:
        return task_scores.score_texts(predictions, [example.target for example in examples])

    def shown_input(self, task: Task) -> str:
        return self.text


@dataclass(frozen=True, kw_only=True)
class ConversationExample(Example):
    """A row of an instruction file.

    Attributes:
        row_digest: of all of its fields.
        prompt_ids: token ids of the prompt of its last answer, truncated by the head that predicts (`Head.ready`).
        reference: the text of that answer.
    """

    metrics = ("rouge-l", "bleu-4")

    content: Conversation | Document
    dataset_format: str = ""
    unread: Sequence[str] = ()
    row_digest: int = 0
    prompt_ids: Sequence[int] = ()
    reference: str | None = None

    @property
    def gold(self) -> str | Conversation | Document:
        return self.content if self.reference is None else self.reference

    @classmethod
    def score(cls, task: Task, examples: Sequence[ConversationExample], predictions: Sequence[str]) -> TaskScores:
        return task_scores.score_texts(predictions, [example.gold for example in examples], with_lengths=False)

    @property
    def digest(self) -> int:
        return self.row_digest

    @property
    def left_out_as(self) -> str | None:
        return self.content.missing_side() or (None if self.content.is_learned else "without_targets")

    def said(self) -> tuple[str, str, int]:
        if isinstance(self.content, Document):
            return "", self.content.text, 1
        answers = [message for message in self.content.messages if message.role == "assistant"]
        source = "\n".join(message.content for message in self.content.messages if message.role != "assistant")
        target = "\n".join(
            message.content if message.arguments is None else f"{message.metadata} {message.arguments}"
            for message in answers
        )
        return source, target, len(answers)


@dataclass(frozen=True, kw_only=True)
class TokenExample(Example):
    """A sentence as characters, or as the tokens of its file, with a BIO tag for each.

    Attributes:
        tokens: `[num_tokens]`.
        tags: `[num_tokens]`, `O`, `B-TYPE` or `I-TYPE`; None in a split without tags.
        entities: type and text of every entity, if the file has more than tags can say, such as nested entities.
    """

    metrics = ("entity_f1",)
    submissions = ("entity_lines",)

    tokens: tuple[str, ...]
    tags: tuple[str, ...] | None = None
    entities: Entities | None = None

    @property
    def gold(self) -> list[str] | None:
        return None if self.tags is None else list(self.tags)

    @property
    def text(self) -> str:
        """The concatenated tokens."""
        return "".join(self.tokens)

    @classmethod
    def score(cls, task: Task, examples: Sequence[TokenExample], predictions: Sequence[Sequence[str]]) -> TaskScores:
        """As `Example.score`, with CLUENER2020's own score if the files contained entities."""
        known = [example.entities for example in examples]
        found = [entities_of(example.text, tags) for example, tags in zip(examples, predictions, strict=True)]
        as_in_file = None if None in known else (found, known, list(task.labels))
        return task_scores.score_tags(predictions, [example.gold for example in examples], as_in_file)

    def fault_of(self, task: Task, prediction: Any) -> str | None:
        if len(prediction) != len(self.tokens):
            return f"has {len(prediction)} tags for {len(self.tokens)} tokens."
        unknown = [tag for tag in prediction if tag not in task.tags]
        return f"has the unknown tag {unknown[0]!r}; known are {', '.join(task.tags)}." if unknown else None

    def submitted(self, prediction: Sequence[str]) -> dict[str, dict[str, list[list[int]]]]:
        """As `Example.submitted`: entity type -> text -> list of `[start, end]`, both inclusive."""
        label: dict[str, dict[str, list[list[int]]]] = {}
        for entity, first, last in spans_of(prediction):
            label.setdefault(entity, {}).setdefault(self._text_of(first, last), []).append([first, last])
        return label

    def placeholders(self, task: Task) -> dict[str, str]:
        return {"text": self.text}

    def answer_text(self, task: Task) -> str | None:
        if self.tags is None:
            return None
        return (
            "、".join(f"{entity['text']} ({entity['type']})" for entity in self.readable(task, self.tags))
            or "no entity"
        )

    def shown_input(self, task: Task) -> str:
        return self.text

    def readable(self, task: Task, prediction: Sequence[str] | None) -> list[dict[str, Any]] | None:
        if prediction is None:
            return None
        return [
            {"type": entity, "text": self._text_of(first, last), "start": first}
            for entity, first, last in spans_of(prediction)
        ]

    def counted(self, task: Task) -> list[str]:
        return [entity for entity, _, _ in spans_of(self.tags or ())]

    def _text_of(self, first: int, last: int) -> str:
        return "".join(self.tokens[first : last + 1])


@dataclass(frozen=True)
class Answer:
    """An answer in a context.

    Attributes:
        start: index of its first character in the context; None if the context does not contain it.
    """

    text: str
    start: int | None


@dataclass(frozen=True, kw_only=True)
class QuestionExample(Example):
    """A question about a context.

    Attributes:
        answers: all references; None in a split without answers.
    """

    metrics = ("cmrc_f1", "cmrc_em")
    submissions = ("answer_map",)

    context: str
    question: str
    answers: tuple[Answer, ...] | None = None

    @property
    def gold(self) -> list[str] | None:
        return None if self.answers is None else [answer.text for answer in self.answers]

    @classmethod
    def score(cls, task: Task, examples: Sequence[QuestionExample], predictions: Sequence[str]) -> TaskScores:
        return task_scores.score_answers(predictions, [example.gold for example in examples])

    def texts(self) -> dict[str, str]:
        return {"context": self.context, "question": self.question}

    def answer_text(self, task: Task) -> str | None:
        """The first reference."""
        return self.answers[0].text if self.answers else None


@dataclass(frozen=True, kw_only=True)
class ChoiceExample(Example):
    """Candidates of which one is right.

    Attributes:
        answer: index of the right candidate; None in a split without answers.
        category: of an examination, the benchmark's group of subjects.
    """

    metrics = ("accuracy",)
    submissions = ("answer_lines", "choice_lines", "idiom_map", "exam_map")

    candidates: tuple[str, ...]
    context: str = ""
    question: str = ""
    answer: int | None = None
    category: str | None = None

    @property
    def gold(self) -> int | None:
        return self.answer

    @classmethod
    def score(cls, task: Task, examples: Sequence[ChoiceExample], predictions: Sequence[int]) -> TaskScores:
        # By the text of the answer, not by index: of two equal candidates either is right, unless letters differ.
        hits = [
            example.readable(task, prediction) == example.answer_text(task)
            for example, prediction in zip(examples, predictions, strict=True)
        ]
        subjects = [(example.subject, example.category or "") for example in examples]
        return task_scores.score_choices(hits, subjects, task.groups)

    def fault_of(self, task: Task, prediction: Any) -> str | None:
        if type(prediction) is int and 0 <= prediction < len(self.candidates):
            return None
        return f"must be the index of one of {len(self.candidates)} candidates, found {prediction!r}."

    def texts(self) -> dict[str, str]:
        return {"context": self.context, "question": self.question}

    def placeholders(self, task: Task) -> dict[str, str]:
        listed = "、".join(self.candidates)
        if task.letters:
            listed = "\n".join(map("{}. {}".format, ascii_uppercase, self.candidates))
        title = {} if self.subject is None else {"subject": task.subjects[self.subject].title}
        return {**self.texts(), "options": listed, "category": self.category or "", **title}

    def candidate_answers(self, task: Task) -> dict[int, str]:
        return dict(enumerate(ascii_uppercase[: len(self.candidates)] if task.letters else self.candidates))

    def readable(self, task: Task, prediction: int | None) -> str | None:
        return None if prediction is None else self.candidate_answers(task)[prediction]

    def counted(self, task: Task) -> list[str]:
        return [] if self.answer is None else [f"candidate {self.answer + 1}"]
