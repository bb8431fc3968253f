"""One training run of a search: in this process, and watched at each evaluation."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import (
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from chatglm_ptuning.command_line import parse_arguments
from chatglm_ptuning.training.searching.arguments import TRAIN_ARGUMENTS, Setting
from chatglm_ptuning.training.task_run import TaskRun

WHILE_SEARCHING = ("--save_strategy", "no", "--disable_tqdm", "true", "--report_to", "none")
"""Flags of every run of a search; nothing that is learned depends on them."""


@dataclass
class Course:
    """What the evaluations of one run have shown.

    Attributes:
        points: (training step, score by the search's metric, loss in nats per label), in their order.
        seconds: that the run took, from loading the base on.
    """

    points: list[tuple[int, float, float]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def score(self) -> float:
        """By the last evaluation."""
        return self.points[-1][1]


def run_flags(
    common: Sequence[str],
    setting: Setting,
    init_prefix_text: str | None,
    seed: int,
    max_steps: int,
    eval_steps: int,
) -> list[str]:
    """The flags of `train`, but for --output_dir, that train a setting as a search does.

    Args:
        common: flags that all trials share.
    """
    return [
        "--do_train", "true", "--do_eval", "true", *common, *setting.flags(init_prefix_text),
        "--max_steps", str(max_steps), "--eval_strategy", "steps", "--eval_steps", str(eval_steps),
        "--seed", str(seed),
    ]  # fmt: skip


class _Watcher(TrainerCallback):
    """Notes each evaluation, and tells it to whom it may concern."""

    def __init__(self, metric: str, course: Course, tell: Callable[[int, float], None]) -> None:
        self.metric, self.course, self.tell = metric, course, tell
        self.loss = float("nan")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: object,
    ) -> None:
        """The loss of an evaluation is logged first, the scores of the task after it."""
        logs = logs or {}
        self.loss = logs.get("eval_loss", self.loss)
        score = logs.get(f"eval_{self.metric}")
        if score is not None and not (self.course.points and self.course.points[-1][0] == state.global_step):
            self.course.points.append((state.global_step, float(score), float(self.loss)))
            self.tell(state.global_step, float(score))


def train_once(flags: Sequence[str], metric: str, course: Course, tell: Callable[[int, float], None]) -> None:
    """Runs what `chatglm-ptuning train FLAGS` runs, but saves nothing.

    Args:
        flags: of `train`.
        metric: of the task, or loss.
        course: is filled as the evaluations come.
        tell: is called with step and score after each; what it raises ends the run.

    Raises:
        ValueError, OSError, ImportError: as `train` reports them; ValueError also if no evaluation has the metric.
        TrainingStopped: if the run cannot go on.
    """
    began = time.monotonic()
    model_args, data_args, args, preserve_args = parse_arguments(
        "chatglm-ptuning search", "", TRAIN_ARGUMENTS, [*flags, *WHILE_SEARCHING]
    )
    set_seed(args.seed)
    try:
        run = TaskRun(model_args, data_args, args, preserve_args)
        trainer = run.trainer()
        for printing in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(printing)
        trainer.add_callback(_Watcher(metric, course, tell))
        run.init_head(trainer)
        trainer.train()
        if not course.points or course.points[-1][0] != trainer.state.global_step:
            trainer.evaluate()
        if not course.points:
            raise ValueError(f"no evaluation has shown eval_{metric}, which the search goes by; name another --metric.")
    finally:
        course.seconds = time.monotonic() - began
