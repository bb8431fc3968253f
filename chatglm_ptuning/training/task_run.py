"""`chatglm-ptuning train --task`: a run whose rows, head and scores are those of a task of the registry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from chatglm_ptuning.data.sources.rows import BadRows
from chatglm_ptuning.data.tasks.arguments import TrainedReading, submission_variant, usual_split
from chatglm_ptuning.data.tasks.encode import (
    ANSWERING_HEADS,
    ECHO_HEADS,
    TaskEncoder,
    check_order,
    head_of,
    label_names,
)
from chatglm_ptuning.data.tasks.examples import AnyExample, has_gold
from chatglm_ptuning.data.tasks.submission import can_submit
from chatglm_ptuning.evaluation.candidates import CANDIDATE_ATTENTIONS
from chatglm_ptuning.evaluation.table import print_scores
from chatglm_ptuning.evaluation.task_model import (
    ECHO,
    PROMPTS,
    TOKEN_UNIT,
    TRAIN_SPLIT,
    asked_of,
    model_settings,
    recorded_details,
    recorded_head,
    recorded_reading,
)
from chatglm_ptuning.evaluation.task_predictions import (
    Prediction,
    PredictionSettings,
    chooses_candidates,
    predict_together,
)
from chatglm_ptuning.evaluation.task_report import TaskScores, score_task, write_results
from chatglm_ptuning.prefix.batch import PrefixArgument
from chatglm_ptuning.training.arguments import DataArguments, ModelArguments, PrefixTrainingArguments
from chatglm_ptuning.training.file_run import TrainingRun
from chatglm_ptuning.training.head_start import start_head
from chatglm_ptuning.training.trainer import PrefixTrainer
from chatglm_ptuning.tuning.methods import PREFIX_METHODS
from chatglm_ptuning.version import kit_version


class TaskRun(TrainingRun):
    """One run on a task.

    Attributes:
        task: what --task names.
        encoder: makes its examples model inputs, for the head that is used.
        may_submit: whether the predictions on the test split make a submission.
    """

    def read_data(self) -> None:
        """As `TrainingRun.read_data`, from the task's own files."""
        flags, args = self.data_args, self.args
        self.task = flags.chosen_task()
        self._use_defaults_of_task()
        head, trained = self._head_and_reading()
        self.encoder: TaskEncoder = flags.encoder(
            self.task, self.tokenizer, flags.max_source_length, flags.max_target_length, head, trained
        )
        if flags.compare_base and args.do_predict and head not in ANSWERING_HEADS:
            raise ValueError(
                f"--compare_base: the base has no {head.replace('_', ' ')} head; compare it by --head generation."
            )
        training = self._split("train", flags.train_split, flags.max_train_samples) if args.do_train else []
        self.watched = self._split("dev", flags.eval_split, flags.max_eval_samples) if args.do_eval else []
        skipped = BadRows(flags.skip_bad_rows)
        self.tested = (
            self._split("test", flags.predict_split, flags.max_predict_samples, skipped) if args.do_predict else []
        )
        whole = flags.max_predict_samples is None and flags.subjects is None and not skipped.count
        self.may_submit = whole and bool(self.tested) and can_submit(self.task, self.tested)
        for examples in (self.watched, self.tested):
            check_attention(self.model_args, self.encoder, examples)
        self.train_examples = self.encoder.training_rows(training)
        self.eval_examples = self.encoder.training_rows(self.watched)
        if args.should_save:
            counts = {"train": training, "evaluate": self.watched, "predict": self.tested}
            shown = ", ".join(f"{name} {len(examples)}" for name, examples in counts.items() if examples)
            print(f"{self.task.name} ({self.task.title}) in {flags.task_data}, head {self.encoder.head}: {shown}")

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
            check_order(self.task, head)
            return head, None
        model_args = self.model_args
        details = recorded_details(checkpoint, model_args.model_name_or_path, model_args.hub, model_args.revision)
        head = recorded_head(details, self.task, self.data_args.head, checkpoint)
        return head, recorded_reading(details, self.task, checkpoint)

    def _split(
        self, kind: str, named: str | None, limit: int | None, bad_rows: BadRows | None = None
    ) -> Sequence[AnyExample]:
        return self.data_args.examples(self.task, self._split_name(kind, named), limit, bad_rows)

    def _split_name(self, kind: str, named: str | None) -> str:
        return named or usual_split(self.task, kind)

    def model_settings(self) -> dict[str, Any]:
        """Class and outputs of the task's head."""
        return model_settings(self.task, self.encoder.head)

    def details(self) -> dict[str, Any]:
        """What the prefix checkpoint records of this run."""
        names = label_names(self.task, self.encoder.head)
        details = super().details()
        if self.args.do_train:
            details["training"][TRAIN_SPLIT] = self._split_name("train", self.data_args.train_split)
        details["training"][PROMPTS] = {self.task.name: asked_of(self.task)}
        if self.encoder.head == "token_classification":
            details["training"][TOKEN_UNIT] = self.encoder.token_unit
        if self.encoder.head in ECHO_HEADS:
            details["training"][ECHO] = {self.task.name: self.encoder.echo}
        recorded = {"task": self.task.name, "head": self.encoder.head, "labels": None if names is None else list(names)}
        return details | recorded

    def score_of_evaluation(self) -> Callable[[], dict[str, float]] | None:
        """The task's scores on the examples that the run is watched by."""
        return (lambda: self._score(self.watched).metrics) if self.watched else None

    def _score(self, examples: Sequence[AnyExample], prefix: PrefixArgument = None) -> TaskScores:
        values = [prediction.value for prediction in self._predict(examples, prefix)]
        return score_task(self.task, examples, values)

    def _predict(self, examples: Sequence[AnyExample], prefix: PrefixArgument = None) -> list[Prediction]:
        settings = prediction_settings(self.data_args, self.args)
        return predict_together(self.model, self.encoder, examples, settings, prefix, under_engine=self.under_engine)

    def init_head(self, trainer: PrefixTrainer) -> None:
        """Gives a linear head that is still random the values that --head_init asks for."""
        count = start_head(
            self.model,
            self.train_examples,
            trainer.data_collator,
            head_init=self.args.head_init,
            batch_size=self.args.per_device_eval_batch_size,
            seed=self.args.seed,
        )
        if self.args.should_save and count:
            print(f"The linear head starts from a logistic regression on {count} states (--head_init probe).")

    def predict(self, trainer: PrefixTrainer) -> None:
        """Predicts the split, and writes report and submission into the run's folder `predict`."""
        flags = self.data_args
        split = self._split_name("test", flags.predict_split)
        predictions = self._predict(self.tested)
        columns: dict[str, dict[str, float]] = {}
        metrics: dict[str, Any] = {"predict_samples": len(self.tested)}
        labelled = has_gold(self.tested)
        if labelled and flags.compare_base and self.tuning.method != "none":
            columns["base"] = self._score_base()
            metrics |= {f"base_{name}": value for name, value in columns["base"].items()}
        if labelled:
            scores = score_task(self.task, self.tested, [prediction.value for prediction in predictions])
            columns[self.tuning.described] = scores.metrics
            metrics |= {f"predict_{name}": value for name, value in scores.metrics.items()}
        if not self.args.should_save:
            return
        write_results(
            self.output / "predict",
            self.task,
            self.tested,
            predictions,
            split,
            submission_variant(self.task, flags.train_split) if self.args.do_train else None,
            may_submit=self.may_submit,
            settings={
                **asdict(flags),
                **asdict(prediction_settings(self.data_args, self.args)),
                **asdict(self.model_args),
                "output_dir": str(self.output),
                "split": split,
                "head": self.encoder.head,
                "token_unit": self.encoder.token_unit,
                "echo": self.encoder.echo,
                "chat_format": self.tokenizer.chat_format,
                "kit_version": kit_version(),
            },
        )
        # Last: whoever finds the scores counts on the files about them.
        self.keep("predict", metrics, trainer)
        if columns:
            print_scores(columns)
        print(f"The predictions on {split} are in {self.output / 'predict'}.")

    def _score_base(self) -> dict[str, float]:
        with self.tuning.plain_base() as prefix:
            return self._score(self.tested, prefix).metrics


def check_attention(model_args: ModelArguments, encoder: TaskEncoder, examples: Sequence[AnyExample]) -> None:
    """Before the base is loaded: whether its attention will do for predictions on these examples.

    Raises:
        ValueError: naming the flag, if it will not.
    """
    implementation = model_args.attn_implementation
    if implementation in (None, *CANDIDATE_ATTENTIONS) or not chooses_candidates(encoder.head, examples):
        return
    raise ValueError(
        f"--attn_implementation {implementation} does not go with {encoder.task.name} and the head {encoder.head}: its "
        f"candidate answers are scored with a mask that only {' and '.join(CANDIDATE_ATTENTIONS)} take. Give one of "
        "these, or leave --do_eval and --do_predict out."
    )


def prediction_settings(flags: DataArguments, args: PrefixTrainingArguments) -> PredictionSettings:
    """How the flags want predictions to be made."""
    return PredictionSettings(
        batch_size=args.per_device_eval_batch_size,
        max_new_tokens=flags.val_max_target_length or flags.max_target_length,
        num_beams=flags.num_beams or args.generation_num_beams or 1,
        candidate_scores=flags.candidate_scores,
        max_answer_length=flags.max_answer_length,
    )
