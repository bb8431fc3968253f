"""Resolves the flags of an evaluation to a frozen configuration, before data or weights are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from chatglm_ptuning.data.dataset import Split
from chatglm_ptuning.data.tasks.arguments import TaskSetup, submission_variant
from chatglm_ptuning.data.tasks.heads import LINEAR_HEADS, head_of, heads_of
from chatglm_ptuning.data.tasks.registry import load_task
from chatglm_ptuning.evaluation.arguments import EvaluationArguments
from chatglm_ptuning.evaluation.chosen_prefix import choose_prefix, results_folder
from chatglm_ptuning.evaluation.recorded import TRAIN_SPLIT, recorded_details, recorded_head, recorded_reading
from chatglm_ptuning.tuning.record import read_record


@dataclass(frozen=True)
class EvaluationConfig:
    """All settings of an evaluation, without contradictions. `resolve` makes it.

    Attributes:
        args: base, batches and decoding.
        prefix: the checkpoint to evaluate; None for the plain base.
        setup: the task and the head that solves it.
        split: the rows to predict.
        output: folder of the results.
        variant: of the submission file, see `submission_variant`.
    """

    args: EvaluationArguments
    prefix: Path | None
    setup: TaskSetup
    split: Split
    output: Path
    variant: str | None = None

    @property
    def compares(self) -> bool:
        """Whether the plain base is scored beside the prefix."""
        return self.args.compare_base and self.prefix is not None


def resolve(args: EvaluationArguments) -> EvaluationConfig:
    """Decides what the flags leave open, by the checkpoint and the task that they name.

    Raises:
        FileNotFoundError, ValueError: if the checkpoint is not there, or its head or the plain base cannot solve the
            task.
    """
    prefix = choose_prefix(args.ptuning_checkpoint and args.find_prefix(args.ptuning_checkpoint))
    if args.compare_base and prefix is not None and (record := read_record(prefix)) and record.tuning == "full":
        raise ValueError(
            f"--compare_base: {prefix} holds all parameters of a tuned model, so score the base by itself."
        )
    details = {} if prefix is None else recorded_details(prefix, args)
    if args.task is None:
        split = Split(args.test_file, limit=args.max_predict_samples)
        output = Path(args.output_dir) if args.output_dir else results_folder(prefix)
        return EvaluationConfig(args, prefix, args.setup_of_files(args.test_file), split, output)
    task = load_task(args.task)
    split = args.split_of_task(task, "test", args.split, args.max_predict_samples)
    output = Path(args.output_dir) if args.output_dir else results_folder(prefix) / f"{task.name}-{split.name}"
    answering = [name for name in heads_of(task) if name not in LINEAR_HEADS]
    trained, variant = None, None
    if prefix is None:
        head = head_of(task, args.head or next(iter(answering), None))
    else:
        head = heads_of(task)[recorded_head(details, task, args.head, prefix)]
        trained = recorded_reading(details, task, prefix)
        if details.get("task") == task.name:
            variant = submission_variant(task, details.get("training", {}).get(TRAIN_SPLIT))
    if head.name in LINEAR_HEADS and (prefix is None or args.compare_base):
        raise ValueError(
            f"The plain base has no {head.name.replace('_', ' ')} head for {task.name}; it can be scored by "
            f"{' or '.join(answering) or 'no head at all'}."
        )
    return EvaluationConfig(args, prefix, args.setup_of_task(task, head, trained), split, output, variant)
