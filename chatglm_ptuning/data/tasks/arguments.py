"""Flags about instruction files and about tasks, for every command that reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from chatglm_ptuning.data.dataset import Split
from chatglm_ptuning.data.formats.registry import FORMATS, Columns
from chatglm_ptuning.data.sources.rows import BadRows
from chatglm_ptuning.data.tasks.examples import Example
from chatglm_ptuning.data.tasks.heads import ECHO_HEADS, HEAD_NAMES, head_of
from chatglm_ptuning.data.tasks.heads.conversations import ConversationAnswers
from chatglm_ptuning.data.tasks.heads.head import CANDIDATE_SCORES, DEFAULT_TOKEN_UNIT, TOKEN_UNITS, Head
from chatglm_ptuning.data.tasks.read import read_examples
from chatglm_ptuning.data.tasks.registry import load_task
from chatglm_ptuning.data.tasks.task import Task
from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer


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
    source_prefix: str = field(default="", metadata={"help": "text in front of every source"})
    max_source_length: int = field(default=1024, metadata={"help": "tokens of the source at most"})
    max_target_length: int = field(default=128, metadata={"help": "tokens of the answer at most"})

    def __post_init__(self) -> None:
        self.columns()

    def columns(self) -> Columns:
        """What the flags say about the rows.

        Raises:
            ValueError: if --dataset_format is unknown.
        """
        return Columns(self.prompt_column, self.response_column, self.history_column, self.dataset_format)

    def task_of(self, files: Sequence[str]) -> Task:
        """What is to be learned from instruction files."""
        return Task.of_files(files, self.columns(), self.source_prefix)

    def conversation_head(self, task: Task, tokenizer: ChatGLMTokenizer) -> ConversationAnswers:
        """The head that answers as instruction files do.

        Raises:
            ValueError: if --max_source_length is too small for the chat format.
        """
        return ConversationAnswers(task, tokenizer, self.max_source_length, self.max_target_length)


@dataclass(frozen=True)
class TrainedReading:
    """How what is in a checkpoint read the texts that it was trained on.

    Attributes:
        source: the checkpoint, for messages.
        token_unit, echo: as of `Head`; `token_unit` is None if the checkpoint does not say.
    """

    source: str
    token_unit: str | None
    echo: bool


@dataclass
class TaskArguments:
    """Which task, where its files are, and how it is solved."""

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
        default=None, metadata={"help": "of an examination, these subjects or categories alone"}
    )
    token_unit: str | None = field(
        default=None,
        metadata={"help": "what a tag stands on: pieces of the tokenizer, or characters (exact at every boundary) "
                  f"(default: as the prefix was trained, else {DEFAULT_TOKEN_UNIT})"},
    )  # fmt: skip
    echo: bool | None = field(
        default=None,
        metadata={"help": f"of the heads {' and '.join(ECHO_HEADS)}: put the text into the prompt twice, and read tags "
                  "and spans off the second copy, which has seen all of it (default: as the prefix was trained, else "
                  "as the task's file says, else the head's own)"},
    )  # fmt: skip
    candidate_scores: str = field(
        default="sum",
        metadata={"help": "how candidate answers are ranked: sum (log-likelihood), mean (per token), or calibrated "
                  "(what the text adds to it)"},
    )  # fmt: skip
    max_answer_length: int = field(default=50, metadata={"help": "characters of an extracted answer at most"})
    doc_stride: int = field(default=64, metadata={"help": "tokens by which the windows of a long text overlap"})
    skip_bad_rows: int = field(default=0, metadata={"help": "leave out so many rows that cannot be understood"})

    def __post_init__(self) -> None:
        if self.token_unit is not None and self.token_unit not in TOKEN_UNITS:
            raise ValueError(f"--token_unit must be {' or '.join(TOKEN_UNITS)}, got {self.token_unit!r}")
        if self.candidate_scores not in CANDIDATE_SCORES:
            raise ValueError(
                f"--candidate_scores must be one of {', '.join(CANDIDATE_SCORES)}, got {self.candidate_scores!r}"
            )
        if self.max_answer_length < 1:
            raise ValueError(f"--max_answer_length must be at least 1, got {self.max_answer_length}")
        if self.doc_stride < 0:
            raise ValueError(f"--doc_stride must not be negative, got {self.doc_stride}")
        if self.skip_bad_rows < 0:
            raise ValueError(f"--skip_bad_rows must not be negative, got {self.skip_bad_rows}")
        if self.task is not None and self.task_data is None:
            raise ValueError("--task needs --task_data: the folder with its files, or huggingface or modelscope")
        if self.task is None and (self.task_data or self.head or self.subjects):
            raise ValueError("--task_data, --head and --subjects belong to a --task")

    def chosen_task(self) -> Task:
        """The task that --task names.

        Raises:
            ValueError: if there is none of that name, or its file is wrong.
        """
        return load_task(self.task or "")

    def make_head(
        self,
        task: Task,
        tokenizer: ChatGLMTokenizer,
        max_source_length: int,
        max_target_length: int,
        name: str | None = None,
        trained: TrainedReading | None = None,
    ) -> Head:
        """The head that solves the task.

        Args:
            name: instead of the one that the flags name.
            trained: of the checkpoint that is used.

        Raises:
            ValueError: if the head cannot solve the task, or as `echo_of`.
        """
        chosen = head_of(task, name or self.head)
        recorded = None if trained is None else trained.token_unit
        return chosen(
            task,
            tokenizer,
            max_source_length,
            max_target_length,
            self.doc_stride,
            self.token_unit or recorded or DEFAULT_TOKEN_UNIT,
            self.echo_of(task, chosen, trained),
            self.candidate_scores,
            self.max_answer_length,
        )

    def echo_of(self, task: Task, head: type[Head], trained: TrainedReading | None = None) -> bool:
        """Whether the text is read twice: as the checkpoint was trained, else by --echo, the task's file, the head.

        Raises:
            ValueError: if --echo contradicts the checkpoint, or is true and the head does not read a text twice.
        """
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
                f"--echo is {str(self.echo).lower()}, but what is in {trained.source} was trained with "
                f"{str(trained.echo).lower()}. Leave --echo out: it is read from the checkpoint."
            )
        return trained.echo

    def examples(self, task: Task, split: str, limit: int | None = None) -> Sequence[Example]:
        """The first `limit` examples of a split, or all.

        Raises:
            ValueError: naming what is missing or wrong, see `read_examples`.
        """
        skipped = BadRows(self.skip_bad_rows)
        return read_examples(task, self.task_data or "", split, subjects=self.subjects, bad_rows=skipped, limit=limit)

    def split_of(self, name: str, limit: int | None = None) -> Split:
        """A split of the task, where the flags say that it is."""
        return Split([self.task_data or ""], name, self.subjects, limit)


def submission_variant(task: Task, train_split: str | None) -> str | None:
    """What FewCLUE adds to a submission's name: `0` for a model that was trained on `train_0`, `all` for one that was
    trained on `train_few_all`. None elsewhere.
    """
    variant = (train_split or "").removeprefix("train_")
    if f"train_{variant}" != train_split or f"dev_{variant}" not in task.files:
        return None
    return variant.removeprefix("few_")


def usual_split(task: Task, kind: str) -> str:
    """The split that a task trains on, is watched by, or is tested on, where none is named.

    Args:
        kind: train, dev or test. Few-shot benchmarks have several of each: the whole (`train_few_all`) is meant then.
            Where a task has no test split, the dev split is tested on.

    Raises:
        ValueError: if the task has none of the kind.
    """
    others = {"dev": ("val", "trial"), "test": ("dev", "dev_few_all", "val")}.get(kind, ())
    for name in (kind, f"{kind}_few_all", f"{kind}_public", f"{kind}_0", *others):
        if name in task.files:
            return name
    raise ValueError(f"The task {task.name} has no {kind} split; name one of {', '.join(task.files)}.")
