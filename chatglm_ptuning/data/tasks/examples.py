"""What the rows of a task are once they are read: one type for each kind of task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Example:
    """What all examples have.

    Attributes:
        id: as the benchmark's file has it, for its submission file; where a file has none, the place of the row in its
            split, from 0.
        where: `FILE:LINE`, or the nearest there is to it, for messages.
        left_out: whether the file has a label for it that does not count (`drop_labels`): it is predicted, as a
            submission needs every row, and neither learned nor scored.
    """

    id: int | str
    where: str = ""
    left_out: bool = False


@dataclass(frozen=True, kw_only=True)
class TextExample(Example):
    """A text, or a pair of texts, to be classified.

    Attributes:
        label: a key of the task's labels; None in a split without labels.
        labels: of a multi-label task instead, any number of keys in the order of the task; None likewise.
        fields: further fields of the row that the prompt of the task names.
    """

    text: str
    text_pair: str | None = None
    label: str | None = None
    labels: tuple[str, ...] | None = None
    fields: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class GenerationExample(Example):
    """A source text and what is to be written for it.

    Attributes:
        target: None in a split without targets.
    """

    text: str
    target: str | None = None
    fields: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TokenExample(Example):
    """A sentence by characters, or by the tokens of its file, with a BIO tag for each.

    Attributes:
        tokens: `[num_tokens]`.
        tags: `[num_tokens]`, `O`, `B-TYPE` or `I-TYPE`; None in a split without tags.
        entities: type and text of every entity, of a file that says more than tags can, such as one inside another.
    """

    tokens: tuple[str, ...]
    tags: tuple[str, ...] | None = None
    entities: frozenset[tuple[str, str]] | None = None

    @property
    def text(self) -> str:
        """The tokens with nothing between them."""
        return "".join(self.tokens)

    def text_of(self, first: int, last: int) -> str:
        """The text of some tokens, both ends inclusive."""
        return "".join(self.tokens[first : last + 1])


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

    context: str
    question: str
    answers: tuple[Answer, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class ChoiceExample(Example):
    """Candidates of which one is right.

    Attributes:
        answer: index of the right candidate; None in a split without answers.
        subject: of an examination; `category` is the group of subjects that its benchmark puts it in.
    """

    candidates: tuple[str, ...]
    context: str = ""
    question: str = ""
    answer: int | None = None
    subject: str | None = None
    category: str | None = None


AnyExample = TextExample | GenerationExample | TokenExample | QuestionExample | ChoiceExample


def has_gold(examples: Sequence[AnyExample]) -> bool:
    """Whether a split can be scored: all but the rows that are left out have gold, or none."""
    return any(gold_of(example) is not None for example in examples)


def gold_of(example: AnyExample) -> object:
    """What is to be predicted, in the form predictions have: a label or all of them, a target, tags, texts, an index.

    None in a split without it. For a question it is the list of all reference texts.
    """
    if isinstance(example, TextExample):
        return example.label if example.labels is None else list(example.labels)
    if isinstance(example, GenerationExample):
        return example.target
    if isinstance(example, TokenExample):
        return None if example.tags is None else list(example.tags)
    if isinstance(example, QuestionExample):
        return None if example.answers is None else [answer.text for answer in example.answers]
    return example.answer
