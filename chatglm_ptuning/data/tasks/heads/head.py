"""The interface of a head: one way to solve a task, from examples to token ids, and from outputs to predictions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from chatglm_ptuning.chat.message import Conversation, Message
from chatglm_ptuning.data.encoding import EncodedExample
from chatglm_ptuning.data.tasks.examples import Example
from chatglm_ptuning.data.tasks.task import Task
from chatglm_ptuning.data.truncation import longest_that_fits
from chatglm_ptuning.model.modeling_chatglm import ChatGLMPreTrainedModel

if TYPE_CHECKING:
    import torch

    from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer

TokenUnit = Literal["pieces", "characters"]
DEFAULT_TOKEN_UNIT: TokenUnit = "pieces"
CandidateScores = Literal["sum", "mean", "calibrated"]
"""How candidates are ranked: by log-likelihood, by log-likelihood per token, or by how much the text raises it."""

Ids = Sequence[int]


@dataclass(frozen=True)
class Prediction:
    """A prediction for one example.

    Attributes:
        value: a label, a list of labels for a multi-label task, the index of a candidate, tags, or text.
        confidence: its probability, for tags the lowest of them; None for written text.
    """

    value: Any
    confidence: float | None = None


class Inference(Protocol):
    """The predictions that a head can request of a model; `evaluation/inference.py` implements it."""

    def outputs(self, rows: Sequence[Ids], what: str) -> Iterator[tuple[list[int], Any]]:
        """The model's outputs in batches, each with the indices of its rows; `what` names the progress bar."""

    def log_likelihoods(self, prompts: Sequence[Ids], candidates: Sequence[Sequence[Ids]]) -> list[torch.Tensor]:
        """For every prompt the log-likelihood of each of its candidates, float32 `[num_candidates]`."""

    def answers(self, prompts: Sequence[Ids]) -> list[str]:
        """The generated answer to every prompt."""


@dataclass(frozen=True)
class Head(ABC):
    """One way to solve a task, with its settings.

    Attributes:
        name: of the head, which a prefix checkpoint records.
        solves: the kinds of examples that it can solve.
        echoes: whether it supports `echo`.
        splits_tokens: whether it uses `token_unit`.
        masks_candidates: whether its predictions need an attention implementation that takes a custom mask.
        smooths_labels: whether its loss is over classes of which one is right, so that label smoothing is defined.
        max_source_length: maximum number of tokens of a prompt. In longer prompts the longest texts of the example are
            truncated in the middle; the task's own words are kept. Texts to tag and contexts to search are read in
            windows that overlap by `doc_stride` tokens.
        max_target_length: maximum number of tokens of an answer to learn.
        token_unit: the unit of tags: `characters` splits the tokenizer's pieces at the ends of the file's characters,
            `pieces` keeps them whole.
        echo: whether a text to tag or a context to search is in the prompt twice. Tags and spans are predicted on the
            second copy, whose tokens have seen the whole text although attention is causal (Springer et al. 2024,
            "Repetition improves language model embeddings"). Both copies of a window fit into `max_source_length`. The
            default is the head's, by measurement.
        candidate_scores: how candidate answers are ranked: by the sum of log-likelihoods, by their mean, or calibrated.
        max_answer_length: maximum number of characters of an extracted answer.
    """

    name: ClassVar[str]
    solves: ClassVar[tuple[type[Example], ...]]
    model_class: ClassVar[type[ChatGLMPreTrainedModel]]
    echoes: ClassVar[bool] = False
    splits_tokens: ClassVar[bool] = False
    masks_candidates: ClassVar[bool] = False
    smooths_labels: ClassVar[bool] = True

    task: Task
    tokenizer: ChatGLMTokenizer
    max_source_length: int = 1024
    max_target_length: int = 128
    doc_stride: int = 64
    token_unit: TokenUnit = DEFAULT_TOKEN_UNIT
    echo: bool = False
    candidate_scores: CandidateScores = "sum"
    max_answer_length: int = 50

    def __post_init__(self) -> None:
        for name in ("max_source_length", "max_target_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    @abstractmethod
    def encode(self, example: Any) -> EncodedExample:
        """The training rows of an example: `input_ids` and the labels or positions to learn.

        Raises:
            ValueError: naming the place in the file, if the prompt without the example's texts is longer than
                `max_source_length`.
        """

    def learn(self, example: Example) -> EncodedExample:
        """As `encode`; an example that is left out has no rows.

        Raises:
            ValueError: as `encode`; for an example without gold, naming the place in the file.
        """
        left_out = example.left_out_as
        if left_out is not None:
            return EncodedExample(counted=[left_out])
        if example.gold is None:
            raise ValueError(f"{example.where}: the example has no label or answer to learn.")
        return self.encode(example)

    def ready(self, example: Example) -> EncodedExample:
        """The fields of an example that `predict` needs replaced, as one row; no row if it cannot be predicted.

        Raises:
            ValueError: naming the place in the file, if there is nothing in it to predict.
        """
        return EncodedExample(rows=[{}])

    def settings(self) -> dict[str, Any]:
        """What the rows of an example depend on, besides the tokenizer; ready for JSON."""
        names = ("max_source_length", "max_target_length", "doc_stride", "token_unit", "echo")
        return {
            "head": type(self).__name__,
            "task": self.task.meaning(),
            **{name: getattr(self, name) for name in names},
        }

    @abstractmethod
    def predict(self, examples: Sequence[Any], model: Inference) -> list[Prediction]:
        """A prediction for every example, in order.

        Raises:
            ValueError: as `encode`.
        """

    @staticmethod
    def check(task: Task) -> None:
        """Refuses to train on a task whose prompt the head cannot learn from.

        Raises:
            ValueError: naming the task's file and the way out.
        """
        return

    @staticmethod
    def outputs(task: Task) -> list[str] | None:
        """The names of a linear head's outputs, in order; None for heads without a fixed number of outputs."""
        return None

    @classmethod
    def model_settings(cls, task: Task) -> dict[str, Any]:
        """Arguments for `load_model`: the class, and the names of a linear head's outputs."""
        names = cls.outputs(task)
        if names is None:
            return {"model_class": cls.model_class}
        label2id = {name: place for place, name in enumerate(names)}
        return {"model_class": cls.model_class, "id2label": dict(enumerate(names)), "label2id": label2id}


class PromptHead(Head):
    """A head whose input is the task's prompt as a user message in the chat format."""

    def prompt_ids(self, example: Example) -> list[int]:
        """The token ids of an example's prompt, up to where the model answers.

        Raises:
            ValueError: as `encode`.
        """
        return self._fitting_prompt(example)[0]

    def _fitting_prompt(self, example: Example) -> tuple[list[int], int]:
        """`prompt_ids`, and their number before truncation."""
        room, ids = self.max_source_length, self._ids_of(example)
        whole = len(ids)
        if whole > room:
            longest = max(map(len, example.texts().values()), default=0)
            length = longest_that_fits(longest, lambda count: len(self._ids_of(example.shortened(count))) <= room)
            ids = self._ids_of(example.shortened(length))
        if len(ids) > room:
            raise ValueError(f"{example.where}: the prompt does not fit into max_source_length {room}; increase it.")
        return ids, whole

    def answer_ids(self, text: str) -> list[int]:
        """The token ids of an answer after its prompt, with the end token."""
        return self.tokenizer.chat.encode_answer(Message("assistant", text))

    def _ids_of(self, example: Example) -> list[int]:
        return self.tokenizer.chat.encode_prompt(Conversation([Message("user", example.prompt(self.task))]))
