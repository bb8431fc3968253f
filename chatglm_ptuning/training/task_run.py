"""`chatglm-ptuning train --task`: a run whose rows, head and scores are those of a task of the registry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from chatglm_ptuning.data.dataset import Split
from chatglm_ptuning.data.tasks.arguments import TrainedReading, submission_variant, usual_split
from chatglm_ptuning.data.tasks.examples import Example
from chatglm_ptuning.data.tasks.heads import LINEAR_HEADS, head_of
from chatglm_ptuning.data.tasks.heads.head import Head, Prediction
from chatglm_ptuning.data.tasks.submission import can_submit, write_submission
from chatglm_ptuning.evaluation.candidates import CANDIDATE_ATTENTIONS
from chatglm_ptuning.evaluation.recorded import (
    TRAIN_SPLIT,
    record_of,
    recorded_details,
    recorded_head,
    recorded_reading,
)
from chatglm_ptuning.evaluation.report import head_settings, write_report
from chatglm_ptuning.training.arguments import ModelArguments
from chatglm_ptuning.training.file_run import TrainingRun, inference_settings
from chatglm_ptuning.tuning.methods import PREFIX_METHODS


class TaskRun(TrainingRun):
    """One run on a task.

    Attributes:
        task: what --task names.
        head: that solves it.
        may_submit: whether the predictions on the test split make a submission.
    """

    def make_head(self) -> Head:
        """As `TrainingRun.make_head`, as --head or a checkpoint say."""
        flags = self.data_args
        self.task = flags.chosen_task()
        self._use_defaults_of_task()
        name, trained = self._head_and_reading()
        if flags.compare_base and self.args.do_predict and name in LINEAR_HEADS:
            raise ValueError(
                f"--compare_base: the base has no {name.replace('_', ' ')} head; compare it by --head generation."
            )
        return flags.make_head(
            self.task, self.tokenizer, flags.max_source_length, flags.max_target_length, name, trained
        )

    def split(self, kind: str) -> Split:
        """As `TrainingRun.split`, from the task's own files."""
        flags = self.data_args
        named, limit = {
            "train": (flags.train_split, flags.max_train_samples),
            "dev": (flags.eval_split, flags.max_eval_samples),
            "test": (flags.predict_split, flags.max_predict_samples),
        }[kind]
        return flags.split_of(named or usual_split(self.task, kind), limit)

    def described(self, split: Split) -> str:
        """As `TrainingRun.described`."""
        return f"{self.task.name} ({self.task.title}), {split.name} in {split.places[0]}, head {self.head.name}"

    def read_examples(self) -> None:
        """As `TrainingRun.read_examples`; of an evaluation those whose loss it computes."""
        flags, args = self.data_args, self.args
        self.watched = self._ready("dev") if args.do_eval else []
        self.tested, self.may_submit = [], False
        if args.do_predict:
            found = self.loader.read(self.task, self.split("test"))
            whole = flags.max_predict_samples is None and flags.subjects is None and not found.bad_rows.count
            self.may_submit = whole and can_submit(self.task, found.examples)
            self.tested = self.loader.make_ready(self.head, found)[0]
        for examples in (self.watched, self.tested):
            check_attention(self.model_args, self.head, examples)

    def _use_defaults_of_task(self) -> None:
        model_args, args = self.model_args, self.args
        start = model_args.ptuning_checkpoint or model_args.init_prefix
        if args.do_train and args.tuning in PREFIX_METHODS and start is None:
            model_args.pre_seq_len = model_args.pre_seq_len or self.task.pre_seq_len
        if args.tuning == "ptuning_v2" and args.learning_rate_is_default:
            args.learning_rate = self.task.learning_rate

    def _head_and_reading(self) -> tuple[str, TrainedReading | None]:
        checkpoint = self.model_args.ptuning_checkpoint
        if checkpoint is None:
            head = head_of(self.task, self.data_args.head)
            head.check(self.task)
            return head.name, None
        model_args = self.model_args
        details = recorded_details(checkpoint, model_args.model_name_or_path, model_args.hub, model_args.revision)
        head = recorded_head(details, self.task, self.data_args.head, checkpoint)
        return head, recorded_reading(details, self.task, checkpoint)

    def details(self) -> dict[str, Any]:
        """What the prefix checkpoint records of this run."""
        details = super().details()
        if self.args.do_train:
            details["training"][TRAIN_SPLIT] = self.split("train").name
        details["training"] |= record_of([self.head])
        return details | {"task": self.task.name, "head": self.head.name, "labels": self.head.outputs(self.task)}

    def write_predictions(self, predictions: Mapping[str, Sequence[Prediction]]) -> None:
        """Writes report and submission into the run's folder `predict`."""
        flags, folder, own = self.data_args, self.output / "predict", list(predictions.values())[-1]
        split = self.split("test").name
        settings = {
            **asdict(flags),
            **asdict(inference_settings(flags, self.args)),
            **asdict(self.model_args),
            "output_dir": str(self.output),
            "split": split,
            **head_settings(self.head),
        }
        write_report(folder, self.task, self.tested, own, settings)
        if self.may_submit:
            variant = submission_variant(self.task, flags.train_split) if self.args.do_train else None
            write_submission(self.task, self.tested, own, folder, split, variant)
        print(f"The predictions on {split} are in {folder}.")


def check_attention(model_args: ModelArguments, head: Head, examples: Sequence[Example]) -> None:
    """Before the base is loaded: whether its attention will do for predictions on these examples.

    Raises:
        ValueError: naming the flag, if it will not.
    """
    implementation = model_args.attn_implementation
    if implementation in (None, *CANDIDATE_ATTENTIONS) or not (head.masks_candidates and examples):
        return
    raise ValueError(
        f"--attn_implementation {implementation} does not go with {head.task.name} and the head {head.name}: its "
        f"candidate answers are scored with a mask that only {' and '.join(CANDIDATE_ATTENTIONS)} take. Give one of "
        "these, or leave --do_eval and --do_predict out."
    )
