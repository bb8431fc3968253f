"""What the rows of a task are once they are read.

There is a class for each kind of gold: a label, any number of labels, a written text, tags, a span, a choice. It says
what the prompt may show of a row, and how predictions are checked, shown and scored.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from chatglm_ptuning.chat.message import Conversation, Document
from chatglm_ptuning.data.tasks.task import Task
from chatglm_ptuning.data.truncation import without_middle
from chatglm_ptuning.metrics import task_scores
from chatglm_ptuning.metrics.entities import entities_of, spans_of
from chatglm_ptuning.metrics.task_scores import Entities, TaskScores

if TYPE_CHECKING:
    from typing_extensions import Self


class Said(NamedTuple):
    """The texts of an example.

    Attributes:
        source: all that is given to the model.
        target: all that it is to answer.
        answers: how often it answers.
    """

    source: str
    target: str
    answers: int


@dataclass(frozen=True, kw_only=True)
class Example(ABC):
    """One row.

    Attributes:
        metrics: that `score` computes.
        dataset_format: of a row of an instruction file.
        id: as the benchmark's file has it, for its submission file; where a file has none, the place of the row in its
            split, from 0.
        where: `FILE:LINE`, or the nearest there is to it, for messages.
        left_out: whether the file has a label for it that does not count (`drop_labels`): it is predicted, as a
            submission needs every row, and neither learned nor scored.
        subject: of an examination.
    """

    metrics: ClassVar[tuple[str, ...]]
    dataset_format: ClassVar[str] = ""

    id: int | str
    where: str = ""
    left_out: bool = False
    subject: str | None = None

    @property
    @abstractmethod
    def gold(self) -> Any:
        """What is to be predicted, in the form that predictions have; None in a split without it."""

    @classmethod
    @abstractmethod
    def score(cls, task: Task, examples: Sequence[Self], predictions: Sequence[Any]) -> TaskScores:
        """Scores of the predictions for examples that all have gold."""

    def fault_of(self, task: Task, prediction: Any) -> str | None:
        """What is wrong with a prediction, which for most kinds is a text; None if it can be submitted."""
        return None if isinstance(prediction, str) else f"must be text, found {prediction!r}."

    # The prompt

    def texts(self) -> dict[str, str]:
        """The texts that may be shortened, by their names in the prompt."""
        return {}

    def with_texts(self, texts: Mapping[str, str]) -> Self:
        """The example with other texts, by the names of `texts`."""
        return replace(self, **texts)

    def placeholders(self, task: Task) -> dict[str, str]:
        """What stands for each name that the prompt may use besides `labels`."""
        return self.texts()

    def prompt(self, task: Task) -> str:
        """The prompt of the task for this example, without any answer."""
        return task.prompt.format(labels="、".join(task.labels.values()), **self.placeholders(task))

    def shortened(self, length: int) -> Self:
        """The example with each text at most so many characters long; what is longer loses its middle."""
        return self.with_texts({name: without_middle(text, length) for name, text in self.texts().items()})

    # The answer

    def candidate_answers(self, task: Task) -> list[str]:
        """The texts among which the answer is, in the order of the labels or of the example's own candidates.

        Raises:
            ValueError: if the task has no fixed answers.
        """
        raise ValueError(f"The task {task.name} has no candidate answers: they are written, tagged or extracted.")

    def choice(self, task: Task, place: int) -> Any:
        """The prediction that chooses the candidate at a place."""
        return place

    def answer_text(self, task: Task) -> str | None:
        """What is to be answered, as text; None in a split without gold."""
        return self.gold

    # What the check of data looks at

    @property
    def digest(self) -> int:
        """64 bits that are the same for rows of the same content."""
        content = repr(replace(self, id=0, where="")).encode("utf-8", "surrogatepass")
        return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)

    @property
    def left_out_as(self) -> str | None:
        """The counter of `PreparationReport` that it is left out by; None if something can be learned of it."""
        return "without_targets" if self.left_out else None

    def said(self) -> Said:
        """What is said in it, as text."""
        return Said("\n".join(self.texts().values()), "", 1)

    # Reports

    def shown_input(self, task: Task) -> str:
        """What `predictions.jsonl` shows as the input."""
        return self.prompt(task)

    def readable(self, task: Task, prediction: Any) -> Any:
        """What `predictions.jsonl` shows of a prediction or of the gold."""
        return prediction

    def counted(self, task: Task) -> list[str]:
        """The names under which `tasks show` counts the gold."""
        return []


def has_gold(examples: Sequence[Example]) -> bool:
    """Whether a split can be scored: all but the rows that are left out have gold, or none."""
    return any(example.gold is not None for example in examples)


@dataclass(frozen=True, kw_only=True)
class _RowExample(Example):
    text: str
    text_pair: str | None = None
    fields: Mapping[str, str] = field(default_factory=dict)

    def texts(self) -> dict[str, str]:
        pair = {} if self.text_pair is None else {"text_pair": self.text_pair}
        return {**self.fields, "text": self.text, **pair}

    def with_texts(self, texts: Mapping[str, str]) -> Self:
        own = {name: text for name, text in texts.items() if name not in self.fields}
        return replace(self, **own, fields={name: texts[name] for name in self.fields})


@dataclass(frozen=True, kw_only=True)
class TextExample(_RowExample):
    """A text, or a pair of texts, to be classified.

    Attributes:
        label: a key of the task's labels; None in a split without labels.
        fields: further fields of the row that the prompt of the task names.
    """

    metrics = ("accuracy", "macro_f1")

    label: str | None = None

    @property
    def gold(self) -> str | None:
        return self.label

    @classmethod
    def score(cls, task: Task, examples: Sequence[TextExample], predictions: Sequence[str]) -> TaskScores:
        return task_scores.score_labels(predictions, [example.label for example in examples], list(task.labels))

    def fault_of(self, task: Task, prediction: Any) -> str | None:
        return None if prediction in task.labels else f"is {prediction!r}, which is no label of {task.name}."

    def candidate_answers(self, task: Task) -> list[str]:
        return list(task.labels.values())

    def choice(self, task: Task, place: int) -> str:
        return list(task.labels)[place]

    def answer_text(self, task: Task) -> str | None:
        return None if self.label is None else task.labels[self.label]

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
    """A source text and what is to be written for it.

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
        content: what the row means.
        dataset_format: in which it is written.
        row_digest: of all of its fields.
        prompt_ids: of the prompt of its last answer, made to fit by the head that predicts (`Head.ready`).
        reference: the text of that answer, likewise.
    """

    metrics = ("rouge-l", "bleu-4")

    content: Conversation | Document
    dataset_format: str = ""
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

    def said(self) -> Said:
        if isinstance(self.content, Document):
            return Said("", self.content.text, 1)
        answers = [message for message in self.content.messages if message.role == "assistant"]
        source = "\n".join(message.content for message in self.content.messages if message.role != "assistant")
        target = "\n".join(
            message.content if message.arguments is None else f"{message.metadata} {message.arguments}"
            for message in answers
        )
        return Said(source, target, len(answers))


@dataclass(frozen=True, kw_only=True)
class TokenExample(Example):
    """A sentence by characters, or by the tokens of its file, with a BIO tag for each.

    Attributes:
        tokens: `[num_tokens]`.
        tags: `[num_tokens]`, `O`, `B-TYPE` or `I-TYPE`; None in a split without tags.
        entities: type and text of every entity, of a file that says more than tags can, such as one inside another.
    """

    metrics = ("entity_f1",)

    tokens: tuple[str, ...]
    tags: tuple[str, ...] | None = None
    entities: Entities | None = None

    @property
    def gold(self) -> list[str] | None:
        return None if self.tags is None else list(self.tags)

    @property
    def text(self) -> str:
        """The tokens with nothing between them."""
        return "".join(self.tokens)

    def text_of(self, first: int, last: int) -> str:
        """The text of some tokens, both ends inclusive."""
        return "".join(self.tokens[first : last + 1])

    @classmethod
    def score(cls, task: Task, examples: Sequence[TokenExample], predictions: Sequence[Sequence[str]]) -> TaskScores:
        """As `Example.score`, with CLUENER2020's own score where the files gave entities."""
        known = [example.entities for example in examples]
        found = [entities_of(example.text, tags) for example, tags in zip(examples, predictions, strict=True)]
        as_in_file = None if None in known else (found, known, list(task.labels))
        return task_scores.score_tags(predictions, [example.gold for example in examples], as_in_file)

    def fault_of(self, task: Task, prediction: Any) -> str | None:
        if len(prediction) != len(self.tokens):
            return f"has {len(prediction)} tags for {len(self.tokens)} tokens."
        unknown = [tag for tag in prediction if tag not in task.tags]
        return f"has the unknown tag {unknown[0]!r}; known are {', '.join(task.tags)}." if unknown else None

    def placeholders(self, task: Task) -> dict[str, str]:
        return {"text": self.text}

    def answer_text(self, task: Task) -> str | None:
        """The entities, for people."""
        if self.tags is None:
            return None
        found = (f"{self.text_of(first, last)} ({entity})" for entity, first, last in spans_of(self.tags))
        return "、".join(found) or "no entity"

    def shown_input(self, task: Task) -> str:
        return self.text

    def readable(self, task: Task, prediction: Sequence[str] | None) -> list[dict[str, Any]] | None:
        if prediction is None:
            return None
        return [
            {"type": entity, "text": self.text_of(first, last), "start": first}
            for entity, first, last in spans_of(prediction)
        ]

    def counted(self, task: Task) -> list[str]:
        return [entity for entity, _, _ in spans_of(self.tags or ())]


@dataclass(frozen=True)
class Answer:
    """An answer that stands in a context.

    Attributes:
        start: index of its first character; None if the context does not hold it.
    """

    text: str
    start: int | None


@dataclass(frozen=True, kw_only=True)
class QuestionExample(Example):
    """A question about a context.

    Attributes:
        answers: every reference; None in a split without answers.
    """

    metrics = ("cmrc_f1", "cmrc_em")

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
        category: of an examination, the group of subjects that its benchmark puts the subject in.
    """

    metrics = ("accuracy",)

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
        # By what is answered, not by index: of candidates with the same text either is right, unless letters tell them.
        hits = [
            example.readable(task, prediction) == example.answer_text(task)
            for example, prediction in zip(examples, predictions, strict=True)
        ]
        subjects = [(example.subject, example.category or "") for example in examples]
        return task_scores.score_choices(hits, subjects, task.groups)

    def fault_of(self, task: Task, prediction: Any) -> str | None:
        if isinstance(prediction, bool) or not isinstance(prediction, int):
            return f"must be the index of a candidate, found {prediction!r}."
        if not 0 <= prediction < len(self.candidates):
            return f"is {prediction}, and there are {len(self.candidates)} candidates."
        return None

    def texts(self) -> dict[str, str]:
        return {"context": self.context, "question": self.question}

    def placeholders(self, task: Task) -> dict[str, str]:
        listed = "、".join(self.candidates)
        if task.letters:
            pairs = zip(self.candidate_answers(task), self.candidates, strict=True)
            listed = "\n".join(f"{letter}. {text}" for letter, text in pairs)
        title = {} if self.subject is None else {"subject": task.subjects[self.subject].title}
        return {**self.texts(), "options": listed, "category": self.category or "", **title}

    def candidate_answers(self, task: Task) -> list[str]:
        return list(ascii_uppercase[: len(self.candidates)] if task.letters else self.candidates)

    def answer_text(self, task: Task) -> str | None:
        return self.readable(task, self.answer)

    def readable(self, task: Task, prediction: int | None) -> str | None:
        return None if prediction is None else self.candidate_answers(task)[prediction]

    def counted(self, task: Task) -> list[str]:
        return [] if self.answer is None else [f"candidate {self.answer + 1}"]
