"""What a head is: one way to solve a task, from an example to ids, and from what a model says to a prediction."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from chatglm_ptuning.chat.message import Conversation, Message
from chatglm_ptuning.data.encoding import Encoded
from chatglm_ptuning.data.tasks.examples import Example
from chatglm_ptuning.data.tasks.task import Task
from chatglm_ptuning.data.truncation import longest_that_fits
from chatglm_ptuning.model.modeling_chatglm import ChatGLMPreTrainedModel

if TYPE_CHECKING:
    import torch

    from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer

TOKEN_UNITS = ("characters", "pieces")
DEFAULT_TOKEN_UNIT = "pieces"
CANDIDATE_SCORES = ("sum", "mean", "calibrated")
"""How candidates are ranked: by their log-likelihood, by it per token, or by what the text adds to it."""

Ids = Sequence[int]


@dataclass(frozen=True)
class Prediction:
    """What a model predicts for one example.

    Attributes:
        value: a label, or the list of all labels of a multi-label task, an index of a candidate, tags, or a text.
        confidence: its probability, of tags the least of them; None for written texts.
    """

    value: Any
    confidence: float | None = None


class Inference(Protocol):
    """What a head may ask of a model; `evaluation/inference.py` answers."""

    def outputs(self, rows: Sequence[Ids], what: str) -> Iterator[tuple[list[int], Any]]:
        """The outputs of the model in batches, each with the places of its rows; `what` names the progress bar."""

    def log_likelihoods(self, prompts: Sequence[Ids], candidates: Sequence[Sequence[Ids]]) -> list[torch.Tensor]:
        """For every prompt the log-likelihood of each of its candidates, float32 `[num_candidates]`."""

    def answers(self, prompts: Sequence[Ids]) -> list[str]:
        """A written answer to every prompt."""


@dataclass(frozen=True)
class Head(ABC):
    """One way to solve a task, with the settings by which texts are read.

    Attributes:
        name: what `--head` takes, and a prefix checkpoint records.
        solves: the kinds of examples that it can solve.
        model_class: the class of the model.
        echoes: whether it can read its text twice.
        splits_tokens: whether it heeds `token_unit`.
        masks_candidates: whether predictions need an attention implementation that takes a mask of one's own.
        max_source_length: tokens of a prompt at most. For longer ones the longest texts of the example lose their
            middle, what the task asks stays whole; texts to tag and contexts to search are read in windows that
            overlap by `doc_stride` tokens.
        max_target_length: tokens of an answer to learn at most.
        token_unit: what a tag stands on: `characters` splits the tokenizer's pieces where a character of the file
            ends, `pieces` leaves them whole.
        echo: whether a text to tag or a context to search is read twice. Tags and spans are read off the second copy,
            whose tokens have seen the whole text though attention is causal (Springer et al. 2024, "Repetition
            improves language model embeddings"). Both copies of a window fit into `max_source_length`. The default is
            the head's own, by measurement.
        candidate_scores: one of `CANDIDATE_SCORES`.
        max_answer_length: characters of an extracted answer at most.
    """

    name: ClassVar[str]
    solves: ClassVar[tuple[type[Example], ...]]
    model_class: ClassVar[type[ChatGLMPreTrainedModel]]
    echoes: ClassVar[bool] = False
    splits_tokens: ClassVar[bool] = False
    masks_candidates: ClassVar[bool] = False

    task: Task
    tokenizer: ChatGLMTokenizer
    max_source_length: int = 1024
    max_target_length: int = 128
    doc_stride: int = 64
    token_unit: str = DEFAULT_TOKEN_UNIT
    echo: bool = False
    candidate_scores: str = "sum"
    max_answer_length: int = 50

    def __post_init__(self) -> None:
        for name in ("max_source_length", "max_target_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    @abstractmethod
    def encode(self, example: Any) -> Encoded:
        """The rows to learn an example from: `input_ids`, and what is to be learned.

        Raises:
            ValueError: naming the place in the file, if the prompt without any text is longer than
                `max_source_length`.
        """

    def learn(self, example: Example) -> Encoded:
        """As `encode`; an example that is left out has no rows.

        Raises:
            ValueError: as `encode`; naming the place in the file, for an example without gold.
        """
        left_out = example.left_out_as
        if left_out is not None:
            return Encoded(counted=[left_out])
        if example.gold is None:
            raise ValueError(f"{example.where}: the example has no label or answer to learn.")
        return self.encode(example)

    def ready(self, example: Example) -> Encoded:
        """What `predict` has to know of an example beside what was read: the fields to replace, in one row.

        No row, if the example cannot be predicted.

        Raises:
            ValueError: naming the place in the file, if there is nothing in it to predict.
        """
        return Encoded(rows=[{}])

    def settings(self) -> dict[str, Any]:
        """What the rows of an example depend on, beside the tokenizer; ready for JSON."""
        names = ("max_source_length", "max_target_length", "doc_stride", "token_unit", "echo")
        return {
            "head": type(self).__name__,
            "task": self.task.meaning(),
            **{name: getattr(self, name) for name in names},
        }

    @abstractmethod
    def predict(self, examples: Sequence[Any], model: Inference) -> list[Prediction]:
        """A prediction for every example, in their order.

        Raises:
            ValueError: as `encode`.
        """

    @staticmethod
    def check(task: Task) -> None:
        """Refuses to train on a task that the head can solve in its form, but not learn.

        Raises:
            ValueError: in that case.
        """
        return

    @staticmethod
    def outputs(task: Task) -> list[str] | None:
        """The names of a linear head's outputs, in their order; None for heads without a fixed number of them."""
        return None

    @classmethod
    def model_settings(cls, task: Task) -> dict[str, Any]:
        """What `load_model` is to be told: the class, and what the outputs of a linear head stand for."""
        names = cls.outputs(task)
        if names is None:
            return {"model_class": cls.model_class}
        label2id = {name: place for place, name in enumerate(names)}
        return {"model_class": cls.model_class, "id2label": dict(enumerate(names)), "label2id": label2id}


class PromptHead(Head):
    """A head whose input is the task's prompt as a question in the chat format."""

    def prompt_ids(self, example: Example) -> list[int]:
        """The prompt of an example, to where the model answers.

        Raises:
            ValueError: if the prompt without any text is longer than `max_source_length`.
        """
        return self._fitting_prompt(example)[0]

    def _fitting_prompt(self, example: Example) -> tuple[list[int], int]:
        """As `prompt_ids`, and how long it was before truncation."""
        room, ids = self.max_source_length, self._ids_of(example)
        whole = len(ids)
        if whole > room:
            longest = max(map(len, example.texts().values()), default=0)
            length = longest_that_fits(longest, lambda count: len(self._ids_of(example.shortened(count))) <= room)
            ids = self._ids_of(example.shortened(length))
        if len(ids) > room:
            raise ValueError(f"{example.where}: the prompt does not fit into --max_source_length {room}.")
        return ids, whole

    def answer_ids(self, text: str) -> list[int]:
        """An answer as it follows the prompt, with the token that ends it."""
        return self.tokenizer.chat.encode_answer(Message("assistant", text))

    def _ids_of(self, example: Example) -> list[int]:
        return self.tokenizer.chat.encode_prompt(Conversation([Message("user", example.prompt(self.task))]))
