"""`chatglm-ptuning train --task`: a run whose rows, head and scores are those of a task of the registry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from chatglm_ptuning.data.tasks.arguments import usual_split
from chatglm_ptuning.data.tasks.encode import ANSWERING_HEADS, TaskEncoder, head_of, label_names
from chatglm_ptuning.data.tasks.examples import AnyExample, gold_of
from chatglm_ptuning.evaluation.table import print_scores
from chatglm_ptuning.evaluation.task_model import model_settings, recorded_head, recorded_metadata
from chatglm_ptuning.evaluation.task_predictions import Prediction, PredictionSettings, predict_together
from chatglm_ptuning.evaluation.task_report import TaskScores, score_task, write_results
from chatglm_ptuning.model.modeling_chatglm import ChatGLMPreTrainedModel
from chatglm_ptuning.training.arguments import DataArguments, PrefixTrainingArguments
from chatglm_ptuning.training.file_run import TrainingRun
from chatglm_ptuning.training.initialisation import init_from_checkpoint
from chatglm_ptuning.training.trainer import PrefixTrainer


class TaskRun(TrainingRun):
    """One run on a task.

    Attributes:
        task: what --task names.
        encoder: makes its examples model inputs, for the head that is used.
    """

    def read_data(self) -> None:
        """As `TrainingRun.read_data`, from the task's own files."""
        flags, args = self.data_args, self.args
        self.task = flags.chosen_task()
        self._use_defaults_of_task()
        self.encoder: TaskEncoder = flags.encoder(
            self.task, self.tokenizer, flags.max_source_length, flags.max_target_length, self._head()
        )
        training = self._split("train", flags.train_split, flags.max_train_samples) if args.do_train else []
        self.watched = self._split("dev", flags.eval_split, flags.max_eval_samples) if args.do_eval else []
        self.tested = self._split("test", flags.predict_split, flags.max_predict_samples) if args.do_predict else []
        self.train_examples = self.encoder.training_rows(training)
        self.eval_examples = self.encoder.training_rows(self.watched)
        if args.should_save:
            counts = {"train": training, "evaluate": self.watched, "predict": self.tested}
            shown = ", ".join(f"{name} {len(examples)}" for name, examples in counts.items() if examples)
            print(f"{self.task.name} ({self.task.title}) in {flags.task_data}, head {self.encoder.head}: {shown}")

    def _use_defaults_of_task(self) -> None:
        given = (self.model_args.pre_seq_len, self.model_args.ptuning_checkpoint, self.model_args.init_prefix)
        if given == (None, None, None) and self.args.do_train:
            self.model_args.pre_seq_len = self.task.pre_seq_len

    def _head(self) -> str:
        checkpoint = self.model_args.ptuning_checkpoint
        if checkpoint is None:
            return head_of(self.task, self.data_args.head)
        model_args = self.model_args
        metadata = recorded_metadata(checkpoint, model_args.model_name_or_path, model_args.hub, model_args.revision)
        return recorded_head(metadata, self.task, self.data_args.head, checkpoint)

    def _split(self, kind: str, named: str | None, limit: int | None) -> Sequence[AnyExample]:
        return self.data_args.examples(self.task, named or usual_split(self.task, kind), limit)

    def model_settings(self) -> dict[str, Any]:
        """Class and outputs of the task's head."""
        return model_settings(self.task, self.encoder.head)

    def load_checkpoint(self, model: ChatGLMPreTrainedModel) -> None:
        """As `TrainingRun.load_checkpoint`; of a prefix that several tasks share, with the head of this one."""
        model.load_prefix(self.model_args.ptuning_checkpoint, task=self.task.name)

    def start_from(self, model: ChatGLMPreTrainedModel, prefix: str) -> None:
        """As `TrainingRun.start_from`, with the head if it was trained for this task."""
        names = label_names(self.task, self.encoder.head)
        with_head = init_from_checkpoint(model, prefix, self.task.name, self.encoder.head, names)
        if self.args.should_save:
            print(f"The prefix{' and the head start' if with_head else ' starts'} from {prefix}.")

    def details(self) -> dict[str, Any]:
        """What the prefix checkpoint records of this run."""
        names = label_names(self.task, self.encoder.head)
        recorded = {"task": self.task.name, "head": self.encoder.head, "labels": None if names is None else list(names)}
        return super().details() | recorded

    def score_of_evaluation(self) -> Callable[[], dict[str, float]] | None:
        """The task's scores on the examples that the run is watched by."""
        return (lambda: self._score(self.watched).metrics) if self.watched else None

    def _score(self, examples: Sequence[AnyExample]) -> TaskScores:
        values = [prediction.value for prediction in self._predict(examples)]
        return score_task(self.task, examples, values)

    def _predict(self, examples: Sequence[AnyExample]) -> list[Prediction]:
        settings = prediction_settings(self.data_args, self.args)
        return predict_together(self.model, self.encoder, examples, settings, under_engine=self.under_engine)

    def predict(self, trainer: PrefixTrainer) -> None:
        """Predicts the split, and writes report and submission into the run's folder `predict`."""
        flags = self.data_args
        split = flags.predict_split or usual_split(self.task, "test")
        predictions = self._predict(self.tested)
        columns: dict[str, dict[str, float]] = {}
        metrics: dict[str, Any] = {"predict_samples": len(self.tested)}
        labelled = gold_of(self.tested[0]) is not None
        if labelled and flags.compare_base and self.model.selected_prefix is not None:
            columns["base"] = self._score_base()
            metrics |= {f"base_{name}": value for name, value in columns["base"].items()}
        if labelled:
            scores = score_task(self.task, self.tested, [prediction.value for prediction in predictions])
            columns["with prefix"] = scores.metrics
            metrics |= {f"predict_{name}": value for name, value in scores.metrics.items()}
        self.keep("predict", metrics, trainer)
        if not self.args.should_save:
            return
        write_results(
            self.output / "predict",
            self.task,
            self.tested,
            predictions,
            split,
            may_submit=flags.max_predict_samples is None,
        )
        if columns:
            print_scores(columns)
        print(f"The predictions on {split} are in {self.output / 'predict'}.")

    def _score_base(self) -> dict[str, float]:
        if self.encoder.head not in ANSWERING_HEADS:
            raise ValueError(
                f"--compare_base: the base has no {self.encoder.head.replace('_', ' ')} head; compare it by "
                "--head generation."
            )
        selected = self.model.selected_prefix
        self.model.set_prefix(None)
        try:
            return self._score(self.tested).metrics
        finally:
            self.model.set_prefix(selected)


def prediction_settings(flags: DataArguments, args: PrefixTrainingArguments) -> PredictionSettings:
    """How the flags want predictions to be made."""
    return PredictionSettings(
        batch_size=args.per_device_eval_batch_size,
        max_new_tokens=flags.val_max_target_length or flags.max_target_length,
        num_beams=flags.num_beams or args.generation_num_beams or 1,
        candidate_scores=flags.candidate_scores,
        max_answer_length=flags.max_answer_length,
    )
