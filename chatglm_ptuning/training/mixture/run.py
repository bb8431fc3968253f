"""`chatglm-ptuning train --task_mixture`: one prefix for several tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatglm_ptuning.data.collate import PaddingCollator
from chatglm_ptuning.data.dataset import Split
from chatglm_ptuning.data.tasks.arguments import TaskArguments, TrainedReading, usual_split
from chatglm_ptuning.data.tasks.examples import Example
from chatglm_ptuning.data.tasks.heads import ECHO_HEADS
from chatglm_ptuning.data.tasks.heads.head import Head
from chatglm_ptuning.data.tasks.mixture import MixedTask, read_mixture
from chatglm_ptuning.data.tasks.task import Task
from chatglm_ptuning.evaluation.inference import predict
from chatglm_ptuning.evaluation.recorded import record_of, recorded_details, recorded_reading
from chatglm_ptuning.evaluation.report import score_task
from chatglm_ptuning.model.modeling_chatglm import ChatGLMForConditionalGeneration, ChatGLMPreTrainedModel
from chatglm_ptuning.model.modeling_tasks import ChatGLMForMultipleTasks
from chatglm_ptuning.training.file_run import TrainingRun, inference_settings
from chatglm_ptuning.training.head_start import start_head
from chatglm_ptuning.training.mixture.trainer import MixtureTrainer, OneTaskCollator
from chatglm_ptuning.training.sampler import MixedRows
from chatglm_ptuning.training.task_run import check_attention
from chatglm_ptuning.training.trainer import PrefixTrainer

if TYPE_CHECKING:
    import datasets


class MixtureRun(TrainingRun):
    """One run on a mixture of tasks.

    Attributes:
        mixture: what the file says.
        heads: of every task, by its name.
        watched: examples of every task that the run is watched by.
        probabilities: of drawing each task, in their order.
    """

    def read_data(self) -> None:
        """As `TrainingRun.read_data`, from the files of every task."""
        flags, args = self.data_args, self.args
        if args.do_predict:
            raise ValueError(
                "--task_mixture does not go with --do_predict: score each task by `chatglm-ptuning evaluate --task "
                "NAME --task_data FOLDER --ptuning_checkpoint OUTPUT_DIR`."
            )
        if args.deepspeed and args.hf_deepspeed_config.is_zero3():
            raise ValueError(
                "--task_mixture does not work with ZeRO-3, which would take the heads apart: use ds_config/zero2.json, "
                "with --quantization_bit 4 or 8 if the base does not fit one GPU."
            )
        if args.tuning != "ptuning_v2":
            raise ValueError(f"--task_mixture trains a prefix: --tuning ptuning_v2, not {args.tuning}.")
        self.mixture = read_mixture(flags.task_mixture or "")
        if flags.echo and not any(entry.head in ECHO_HEADS for entry in self.mixture.tasks):
            raise ValueError(
                f"--echo true is for the heads {' and '.join(ECHO_HEADS)}, and no task in {flags.task_mixture} is "
                "solved by one. Leave --echo out."
            )
        if self._takes_length_from_tasks():
            self.model_args.pre_seq_len = max(entry.task.pre_seq_len for entry in self.mixture.tasks)
        self.heads: dict[str, Head] = {}
        self.watched: dict[str, Sequence[Example]] = {}
        training: dict[str, Any] = {}
        self.eval_rows: dict[str, MixedRows] = {}
        for entry in self.mixture.tasks:
            name = entry.task.name
            self.heads[name] = self._arguments(entry).make_head(
                entry.task,
                self.tokenizer,
                flags.max_source_length,
                flags.max_target_length,
                trained=self._trained_reading(entry.task),
            )
            if args.do_train:
                limit = entry.max_train_samples or flags.max_train_samples
                training[name] = self._rows_of(entry, "train", entry.train_split, limit)
            if args.do_eval:
                limit = entry.max_eval_samples or flags.max_eval_samples
                split = self._split_of(entry, "dev", entry.eval_split, limit)
                found = self.loader.read(entry.task, split)
                self.watched[name] = self.loader.make_ready(self.heads[name], found)[0]
                check_attention(self.model_args, self.heads[name], self.watched[name])
                self.eval_rows[name] = MixedRows({name: self._rows_of(entry, "dev", entry.eval_split, limit)})
        self.train_examples = MixedRows(training)
        self.train_sizes = self.train_examples.sizes
        self.probabilities = self.mixture.probabilities(list(self.train_sizes.values())) if args.do_train else []
        if args.should_save:
            self._show()

    def _trained_reading(self, task: Task) -> TrainedReading | None:
        args = self.model_args
        if args.ptuning_checkpoint is None:
            return None
        details = recorded_details(args.ptuning_checkpoint, args.model_name_or_path, args.hub, args.revision)
        return recorded_reading(details, task, args.ptuning_checkpoint)

    def _takes_length_from_tasks(self) -> bool:
        given = (self.model_args.pre_seq_len, self.model_args.ptuning_checkpoint, self.model_args.init_prefix)
        return self.args.do_train and given == (None, None, None)

    def _arguments(self, entry: MixedTask) -> TaskArguments:
        """The flags as they hold for one of the tasks."""
        flags = self.data_args
        echo = flags.echo if entry.head in ECHO_HEADS else None
        own = {"task": entry.task.name, "task_data": entry.task_data, "head": entry.head, "echo": echo}
        return replace(flags, task_mixture=None, **own)

    def _split_of(self, entry: MixedTask, kind: str, named: str | None, limit: int | None) -> Split:
        return self._arguments(entry).split_of(named or usual_split(entry.task, kind), limit)

    def _rows_of(self, entry: MixedTask, kind: str, named: str | None, limit: int | None) -> datasets.Dataset:
        found = self.loader.rows(self.heads[entry.task.name], self._split_of(entry, kind, named, limit))
        if self.args.should_save:
            print(f"{entry.task.name} ({entry.task.title}) in {entry.task_data}, {kind}\n{found.summary()}")
        return found.rows

    def _show(self) -> None:
        for number, entry in enumerate(self.mixture.tasks):
            name = entry.task.name
            shown = f"{name} ({entry.task.title}) in {entry.task_data}, head {entry.head}:"
            if self.train_sizes:
                shown += f" train {self.train_sizes[name]} rows, {self.probabilities[number]:.1%} of the steps;"
            if self.watched:
                shown += f" evaluate {len(self.watched[name])} examples"
            print(shown.rstrip(";"))

    def model_settings(self) -> dict[str, Any]:
        """The heads come after loading, in `make_model`."""
        return {}

    def make_model(self, loaded: ChatGLMForConditionalGeneration) -> ChatGLMPreTrainedModel:
        """The base with a head for each task that needs one."""
        heads = {name: head.model_settings(head.task) for name, head in self.heads.items()}
        return ChatGLMForMultipleTasks(loaded, heads)

    def trainer(self) -> PrefixTrainer:
        """The Trainer of this run."""
        return MixtureTrainer(
            model=self.model,
            args=self.args,
            train_dataset=self.train_examples or None,
            eval_dataset=self.eval_rows or None,
            data_collator=OneTaskCollator(PaddingCollator(self.tokenizer.pad_token_id, "right")),
            replay=self._replay(),
            tuning=self.tuning,
            details=self.details(),
            train_sizes=self.train_sizes,
            probabilities=self.probabilities,
            score=self._score,
        )

    def init_head(self, trainer: PrefixTrainer) -> None:
        """Gives every linear head that is still random the values that --head_init asks for."""
        for name, rows in self.train_examples.of_task.items():
            count = start_head(
                self.model.for_task(name),
                rows,
                trainer.data_collator.padding,
                head_init=self.args.head_init,
                batch_size=self.args.per_device_eval_batch_size,
                seed=self.args.seed,
            )
            if self.args.should_save and count:
                print(f"{name}: the head starts from a logistic regression on {count} states (--head_init probe).")
        self._let_heads_be_scored()

    def train(self, trainer: PrefixTrainer) -> None:
        """As `TrainingRun.train`."""
        if self.checkpoint is not None:
            self._let_heads_be_scored()
        super().train(trainer)

    def _let_heads_be_scored(self) -> None:
        """All of them, though some task may not have had its turn by an evaluation."""
        for head in self.model.heads.values():
            head.mark_set()

    def details(self) -> dict[str, Any]:
        """What the prefix checkpoint records of this run."""
        details = super().details()
        details["task"] = Path(self.data_args.task_mixture or "").stem
        details["training"] |= record_of(list(self.heads.values()))
        details["tasks"] = {
            name: {"head": head.name, "labels": head.outputs(head.task)} for name, head in self.heads.items()
        }
        return details

    def _score(self, name: str) -> tuple[dict[str, float], str]:
        head, examples = self.heads[name], self.watched[name]
        settings = inference_settings(self.data_args, self.args)
        predictions = predict(self.model.for_task(name), head, examples, settings, under_engine=self.under_engine)
        metrics = score_task(head.task, examples, predictions).metrics
        return metrics, head.task.metric
