"""Flags about instruction files and about tasks, for every command that reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from chatglm_ptuning.data.dataset import Split
from chatglm_ptuning.data.formats.registry import FORMATS, Columns
from chatglm_ptuning.data.tasks.heads import ECHO_HEADS, HEAD_NAMES
from chatglm_ptuning.data.tasks.heads.conversations import ConversationAnswers
from chatglm_ptuning.data.tasks.heads.head import DEFAULT_TOKEN_UNIT, CandidateScores, Head, TokenUnit
from chatglm_ptuning.data.tasks.task import Task
from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer


@dataclass(frozen=True)
class TaskSetup:
    """A task, the head that solves it, and the head's settings: all that a `Head` needs but the tokenizer.

    Attributes:
        settings: keyword arguments of `Head`.
    """

    task: Task
    head: type[Head]
    settings: Mapping[str, Any]

    def make_head(self, tokenizer: ChatGLMTokenizer) -> Head:
        """The head.

        Raises:
            ValueError: if `max_source_length` is too small for the chat format.
        """
        return self.head(self.task, tokenizer, **self.settings)


@dataclass(frozen=True)
class TrainedReading:
    """How the head in a checkpoint read its texts in training.

    Attributes:
        source: the checkpoint, for messages.
        token_unit, echo: see `Head`; `token_unit` is None if the checkpoint does not say.
    """

    source: str
    token_unit: str | None
    echo: bool


@dataclass
class InstructionArguments:
    """How rows of instruction files are read, and how long they may be."""

    dataset_format: str | None = field(
        default=None, metadata={"help": f"{', '.join(FORMATS)} (default: detected from the field names)"}
    )
    prompt_column: str | None = field(
        default=None, metadata={"help": "column of the source text (default: detected from the field names)"}
    )
    response_column: str | None = field(
        default=None, metadata={"help": "column of the answer (default: detected from the field names)"}
    )
    history_column: str | None = field(default=None, metadata={"help": "column of earlier turns"})
    ignored_columns: list[str] = field(
        default_factory=list, metadata={"help": "columns that are left out, although they hold text"}
    )
    source_prefix: str = field(default="", metadata={"help": "text in front of every source"})
    max_source_length: int = field(default=1024, metadata={"help": "maximum number of tokens of the source"})
    max_target_length: int = field(default=128, metadata={"help": "maximum number of tokens of the answer"})

    def __post_init__(self) -> None:
        self.columns()

    def columns(self) -> Columns:
        """What the flags say about the rows.

        Raises:
            ValueError: if --dataset_format is unknown.
        """
        named = (self.prompt_column, self.response_column, self.history_column)
        return Columns(*named, self.dataset_format, tuple(self.ignored_columns))

    def setup_of_files(self, files: Sequence[str]) -> TaskSetup:
        """The task of answering as the rows of instruction files do."""
        task = Task.of_files(files, self.columns(), self.source_prefix)
        return TaskSetup(task, ConversationAnswers, self.lengths())

    def lengths(self) -> dict[str, int]:
        """The settings of `Head` that limit the number of tokens."""
        return {"max_source_length": self.max_source_length, "max_target_length": self.max_target_length}


@dataclass
class TaskArguments(InstructionArguments):
    """Instruction files; or a task, where its files are, and how it is solved."""

    task: str | None = field(
        default=None, metadata={"help": "a task of the registry, or the YAML file of your own (chatglm-ptuning tasks)"}
    )
    task_data: str | None = field(
        default=None,
        metadata={"help": "folder with the task's published files; or huggingface, modelscope, huggingface:OWNER/NAME"},
    )
    head: str | None = field(
        default=None, metadata={"help": f"how the task is solved: {', '.join(HEAD_NAMES)} (default: the task's own)"}
    )
    subjects: list[str] | None = field(
        default=None, metadata={"help": "examinations: use only these subjects or categories"}
    )
    token_unit: TokenUnit | None = field(
        default=None,
        metadata={"help": "what a tag labels: pieces of the tokenizer, or characters (exact at every boundary) "
                  f"(default: as the prefix was trained, else {DEFAULT_TOKEN_UNIT})"},
    )  # fmt: skip
    echo: bool | None = field(
        default=None,
        metadata={"help": f"heads {' and '.join(ECHO_HEADS)}: put the text into the prompt twice, and read tags and "
                  "spans off the second copy, which has seen the whole text (default: as the prefix was trained, else "
                  "as the task file says, else the head's default)"},
    )  # fmt: skip
    candidate_scores: CandidateScores = field(
        default="sum",
        metadata={"help": "how candidate answers are ranked: sum (log-likelihood), mean (per token), or calibrated "
                  "(what the text adds to it)"},
    )  # fmt: skip
    max_answer_length: int = field(default=50, metadata={"help": "maximum number of characters of an extracted answer"})
    doc_stride: int = field(default=64, metadata={"help": "tokens by which the windows of a long text overlap"})
    skip_bad_rows: int = field(default=0, metadata={"help": "skip up to this many rows that cannot be read"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_answer_length < 1:
            raise ValueError(f"--max_answer_length must be at least 1, got {self.max_answer_length}")
        for name in ("doc_stride", "skip_bad_rows"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} must not be negative, got {getattr(self, name)}")
        if self.task is not None and self.task_data is None:
            raise ValueError("--task needs --task_data: the folder with its files, or huggingface or modelscope")
        if self.task is None and (self.task_data or self.head or self.subjects):
            raise ValueError("--task_data, --head and --subjects need a --task")

    def setup_of_task(self, task: Task, head: type[Head], trained: TrainedReading | None = None) -> TaskSetup:
        """A task with its head, as the flags, the task and what was trained say.

        Args:
            trained: of the checkpoint that is used.

        Raises:
            ValueError: if --echo contradicts the checkpoint, or is true and the head does not read a text twice.
        """
        recorded = None if trained is None else trained.token_unit
        settings = {
            **self.lengths(),
            "doc_stride": self.doc_stride,
            "token_unit": self.token_unit or recorded or DEFAULT_TOKEN_UNIT,
            "echo": self._echo(task, head, trained),
            "candidate_scores": self.candidate_scores,
            "max_answer_length": self.max_answer_length,
        }
        return TaskSetup(task, head, settings)

    def _echo(self, task: Task, head: type[Head], trained: TrainedReading | None) -> bool:
        if not head.echoes:
            if self.echo:
                raise ValueError(
                    f"--echo true is for the heads {' and '.join(ECHO_HEADS)}; {task.name} is solved by {head.name} "
                    "here. Leave --echo out."
                )
            return False
        if trained is None:
            return next(echo for echo in (self.echo, task.echo, head.echo) if echo is not None)
        if self.echo not in (None, trained.echo):
            raise ValueError(
                f"--echo is {str(self.echo).lower()}, but {trained.source} was trained with "
                f"{str(trained.echo).lower()}. Leave --echo out: it is read from the checkpoint."
            )
        return trained.echo

    def split_of_task(self, task: Task, kind: str, named: str | None, limit: int | None) -> Split:
        """A split of the task, in the files that the flags name.

        Args:
            kind: train, dev or test, for `usual_split`.
            named: the split, if the flags name one.
        """
        return Split([self.task_data or ""], named or usual_split(task, kind), self.subjects, limit)


def submission_variant(task: Task, train_split: str | None) -> str | None:
    """What FewCLUE adds to a submission's name: `0` for a model that was trained on `train_0`, `all` for one that was
    trained on `train_few_all`. None elsewhere.
    """
    variant = (train_split or "").removeprefix("train_")
    if f"train_{variant}" != train_split or f"dev_{variant}" not in task.files:
        return None
    return variant.removeprefix("few_")


def usual_split(task: Task, kind: str) -> str:
    """The split for training, evaluation during training, or testing, where none is named.

    Args:
        kind: train, dev or test. Few-shot benchmarks have several of each: the whole (`train_few_all`) is used then.
            Where a task has no test split, the dev split is used.

    Raises:
        ValueError: if the task has none of the kind.
    """
    others = {"dev": ("val", "trial"), "test": ("dev", "dev_few_all", "val")}.get(kind, ())
    for name in (kind, f"{kind}_few_all", f"{kind}_public", f"{kind}_0", *others):
        if name in task.files:
            return name
    raise ValueError(f"The task {task.name} has no {kind} split; name one of {', '.join(task.files)}.")
