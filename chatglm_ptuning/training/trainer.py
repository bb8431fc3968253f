"""transformers' Trainer for a prefix or another tuning method; it saves the trained parameters only, atomically.

All methods of the Trainer that differ here are in this one class, so the module is long. A comment at each private
method says why no public one would do.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from safetensors import SafetensorError
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PreTrainedModel, Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, TrainOutput, rotate_checkpoints
from transformers.utils import logging

from chatglm_ptuning.data.collate import pack
from chatglm_ptuning.files import write_json
from chatglm_ptuning.model.losses import IGNORED_LABEL
from chatglm_ptuning.model.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm_ptuning.model.placement import batch_on_device, on_device
from chatglm_ptuning.model.zero3 import gathered, is_partitioned, most_of_processes, whole_shape
from chatglm_ptuning.prefix.checkpoint import PREFIX_KEY
from chatglm_ptuning.prefix.export import remove_export, write_export
from chatglm_ptuning.prefix.formats import read_prefix
from chatglm_ptuning.training import optimizer_state
from chatglm_ptuning.training.callbacks import (
    FiniteGuard,
    LogAtCheckpoints,
    StopOnSignal,
    UpdateCounter,
    ZeroLossGuard,
)
from chatglm_ptuning.training.distributed import all_gather_objects
from chatglm_ptuning.training.failures import (
    AllLabelsMasked,
    CheckpointNotWritten,
    NothingTrained,
    OutOfMemory,
    Preempted,
    TrainingDiverged,
    folder_size,
    is_disk_full,
    is_out_of_memory,
)
from chatglm_ptuning.training.preservation import Replay
from chatglm_ptuning.training.progress import ProgressFile
from chatglm_ptuning.training.sampler import EpochSampler, PaddedRows, masked_row_like, row_lengths
from chatglm_ptuning.tuning.tuning import PrefixTuning, Tuning

logger = logging.get_logger(__name__)

STAGING_FOLDER = ".saving"
REPLACED_FOLDER = ".replaced"
ARGUMENTS_FILE = "training_arguments.json"
PASSES = "passes"
"""Key of a batch: the packed batches that a step runs one after the other."""
TOKENS_PER_PASS = 2048
"""Enough to fill a GPU."""
_ROOM_FOR_SMALL_FILES = 2**20
"""Bytes of a checkpoint besides the numbers of prefix and optimizer: random states, metadata, log."""


@contextmanager
def _as_trainable(model: PreTrainedModel) -> Iterator[None]:
    """Lets the Trainer accept a quantised model without a PEFT adapter: what is quantised is frozen here."""
    quantised = getattr(model, "is_quantized", False)
    model.is_quantized = False
    try:
        yield
    finally:
        model.is_quantized = quantised


class PrefixTrainer(Trainer):
    """Trains the prefix of a ChatGLM model, or the parameters of another tuning method.

    Args:
        model: with a frozen base, which may be quantised.
        tuning: the trained parameters of the model; by default its prefix.
        details: what every checkpoint records beside the weights: chat format, task, training.
        generation_metrics: called after an evaluation, for metrics that need predictions.
        replay: the loss term that preserves the base on general rows.
        max_tokens_per_pass: of a forward and backward pass, if the `data_collator` is a PackingCollator.
        kwargs: as for transformers' Trainer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *args: Any,
        tuning: Tuning | None = None,
        details: dict[str, Any] | None = None,
        generation_metrics: Callable[[], dict[str, float]] | None = None,
        replay: Replay | None = None,
        max_tokens_per_pass: int = TOKENS_PER_PASS,
        **kwargs: Any,
    ) -> None:
        with _as_trainable(model):
            super().__init__(model, *args, **kwargs)
        # transformers' own does not shift the labels of this family; `compute_loss` passes the factor to the model.
        self.label_smoother = None
        self.tuning = tuning or PrefixTuning(self.model)
        self.details = details or {}
        self.generation_metrics = generation_metrics
        self.replay = replay
        self.max_tokens_per_pass = max_tokens_per_pass
        self._replayed_step, self._replayed_batches, self._replay_steps = -1, 0, 0
        self._replay_sum: torch.Tensor | None = None
        self._loss_of_step: torch.Tensor | None = None
        self._staging: Path | None = None
        self._optimizer_groups: list[dict[str, Any]] = []
        self._trained: list[torch.nn.Parameter] = []
        self._eval_sums: torch.Tensor | None = None
        self._evaluated: tuple[int, dict[str, float]] | None = None
        self._epoch_sampler: EpochSampler | None = None
        self._finite = FiniteGuard()
        self._signal = StopOnSignal()
        self._updates = UpdateCounter()
        for callback in (ZeroLossGuard(), LogAtCheckpoints(), ProgressFile(), self._signal, self._updates):
            self.add_callback(callback)

    @property
    def _prefix_model(self) -> ChatGLMForConditionalGeneration:
        return self.accelerator.unwrap_model(self.model)

    # ---- data ----

    # The Trainer drops the rows of an incomplete batch from evaluations, too, so that their loss would be another.
    def _get_dataloader(self, *args: Any, is_training: bool = False, **kwargs: Any) -> DataLoader:
        drop_last = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = drop_last and is_training
        try:
            return super()._get_dataloader(*args, is_training=is_training, **kwargs)
        finally:
            self.args.dataloader_drop_last = drop_last

    @property
    def _sampler_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def get_train_dataloader(self) -> DataLoader:
        """As the Trainer's; with several processes the last batches are filled with padding rows (`PaddedRows`)."""
        rows = self.train_dataset
        if rows is None:
            return super().get_train_dataloader()
        return self._get_dataloader(
            PaddedRows(rows, self._rows_at_once(self._train_batch_size)),
            description="Training",
            batch_size=self._train_batch_size,
            sampler_fn=lambda _: self._get_train_sampler(rows),
            is_training=True,
        )

    def _rows_at_once(self, batch_size: int) -> int:
        return batch_size * self.args.world_size if self.args.world_size > 1 else 1

    # The only way to give the Trainer an order of rows that does not depend on the number of processes.
    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        step = self._train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
        filled = self._rows_at_once(self._train_batch_size)
        lengths = row_lengths(dataset)
        self._epoch_sampler = EpochSampler(lengths, step, self._sampler_seed, self.args.train_sampling_strategy, filled)
        return self._epoch_sampler

    # When the Trainer resumes within an epoch on several processes, it does not call the sampler's `set_epoch`.
    def _run_epoch(self, *, epoch: int, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True  # the Trainer checks it only after a step
            return
        self._replayed_step = -1
        if self._epoch_sampler is not None:
            self._epoch_sampler.set_epoch(epoch)
        super()._run_epoch(epoch=epoch, **kwargs)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """As the Trainer's; with padding rows as in training, except for data sets that are given by name."""
        if isinstance(eval_dataset, str):
            return super().get_eval_dataloader(eval_dataset)
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        return super().get_eval_dataloader(PaddedRows(rows, self._rows_at_once(self.args.eval_batch_size)))

    # transformers' own sampler by length draws another order in every process.
    def _get_eval_sampler(self, eval_dataset: Dataset) -> Sampler | None:
        return EpochSampler(row_lengths(eval_dataset), self._rows_at_once(self.args.eval_batch_size), self.args.seed)

    # ---- steps ----

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As the Trainer's.

        Raises:
            TrainingStopped: with advice, if the training cannot continue; Preempted after SIGTERM, when all is saved;
                NothingTrained if no step has changed a parameter.
        """
        if self.args.auto_find_batch_size and self.args.world_size > 1:
            raise ValueError(
                "auto_find_batch_size works in one process only: when a batch does not fit on one GPU, the others "
                "wait for it. Find the size on one GPU, then set per_device_train_batch_size to it."
            )
        if self.train_dataset is not None and not len(self.get_train_dataloader()):
            raise self._nothing_trained(0)
        self._signal.install()
        try:
            result = super().train(*args, **kwargs)
        except Preempted:
            self._save_checkpoint(self.model, trial=None)
            self._signal.stopped = True
        finally:
            self._signal.remove()
        if self._signal.stopped:
            step = self.state.global_step
            if not self._has_learned:
                raise Preempted(
                    f"SIGTERM: stopped after step {step}, before any step had changed a parameter. There was nothing "
                    "to save; start the run again."
                )
            raise Preempted(
                f"SIGTERM: stopped after step {step}. Everything is saved in {self.args.output_dir}/"
                f"{PREFIX_CHECKPOINT_DIR}-{step}; resume with resume_from_checkpoint true."
            )
        if not self._has_learned:
            raise self._nothing_trained(self.state.global_step)
        return result

    def _nothing_trained(self, steps: int) -> NothingTrained:
        batch = self._train_batch_size * self.args.world_size
        return NothingTrained(steps, len(self.train_dataset), batch, self.args)

    @property
    def _has_learned(self) -> bool:
        """Whether a step, or one before the checkpoint that the run resumed from, has changed a parameter."""
        return self._updates.count > 0 or self._initial_global_step > 0

    @property
    def under_engine(self) -> bool:
        """Whether a DeepSpeed engine manages the model."""
        return self.deepspeed is not None

    @property
    def steps_done(self) -> int:
        """Steps that `train` has taken, without those before the checkpoint that it resumed from."""
        return self.state.global_step - self._initial_global_step

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """One forward and backward pass.

        Raises:
            AllLabelsMasked: if all labels of the step, on all processes, are masked.
            OutOfMemory: if the batch does not fit, unless a fitting size is being looked for.
        """
        if num_items_in_batch is not None and int(num_items_in_batch) == 0:
            raise AllLabelsMasked(self.state.global_step + 1)
        passes = inputs.get(PASSES, [inputs])
        batch, loss = (passes or [inputs])[0], torch.zeros((), device=self.args.device)
        try:
            if self.replay is not None and passes:
                loss += self._replay_step(model, self.current_gradient_accumulation_steps if PASSES in inputs else 1)
            for place, batch in enumerate(passes, 1):
                with nullcontext() if place == len(passes) else self._without_synchronisation(model):
                    loss += super().training_step(model, batch, num_items_in_batch)
        except Exception as error:
            if self.args.auto_find_batch_size or not is_out_of_memory(error):
                raise
            raise self._out_of_memory(batch) from error
        self._loss_of_step = loss if self._loss_of_step is None else self._loss_of_step + loss
        return loss

    def _out_of_memory(self, batch: dict[str, Any]) -> OutOfMemory:
        lengths = batch.get("sequence_lengths") or batch["attention_mask"].sum(-1).tolist()
        replayed = (self.replay.batch_size or self._train_batch_size) if self.replay else 0
        length = self._prefix_model.config.pre_seq_len or 0
        return OutOfMemory(lengths, batch["input_ids"].shape[1], length, self.args, replayed)

    @contextmanager
    def _without_synchronisation(self, model: torch.nn.Module) -> Iterator[None]:
        """For all passes of a step but the last: gradients are added up on every process by itself."""
        state = self.accelerator.gradient_state
        synchronises = state.sync_gradients
        state._set_sync_gradients(False)  # as the Trainer does between accumulated batches
        try:
            with nullcontext() if self.is_deepspeed_enabled else self.accelerator.no_sync(model):
                yield
        finally:
            state._set_sync_gradients(synchronises)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """As the Trainer's, without logits; in training with label smoothing."""
        inputs = {**inputs, "skip_logits": True}
        if model.training and self.args.label_smoothing_factor:
            inputs["smoothing"] = self.args.label_smoothing_factor
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _replay_step(self, model: torch.nn.Module, batches: int) -> torch.Tensor:
        """Forward and backward passes on the general rows that belong to some batches of the task; their loss."""
        step, world = self.state.global_step, self.args.world_size
        if step != self._replayed_step:
            self._replayed_step, self._replayed_batches = step, 0
            self._replay_steps += 1
        first, self._replayed_batches = self._replayed_batches, self._replayed_batches + batches
        divergences = self.replay.divergences(
            self._prefix_model,
            step,
            self._train_batch_size,
            own=[batch * world + self.args.process_index for batch in range(first, first + batches)],
            parts=self.current_gradient_accumulation_steps * world,
            whole_parts=self.args.gradient_accumulation_steps * world,
        )
        total = torch.zeros((), dtype=torch.float64, device=self.args.device)
        model.train()
        with self._without_synchronisation(model):
            for divergence in divergences:
                # Gradients are means over the processes, and the term is this process's part of a sum.
                loss = self.replay.weight * world * divergence
                self.accelerator.backward(loss, **({"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}))
                total += divergence.detach()
        self._replay_sum = total if self._replay_sum is None else self._replay_sum + total
        return (self.replay.weight * world * total).float()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the Trainer's; training entries also have the mean KL from the base since the previous entry."""
        if "loss" in logs and self._replay_sum is not None:
            total = self.accelerator.reduce(self._replay_sum, "sum").item()
            logs = {**logs, "preserve_kl": total / self._replay_steps}
            self._replay_sum, self._replay_steps = None, 0
        super().log(logs, *args, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[dict[str, Any]], Any]:
        """As the Trainer's. The rows of all batches of a step are packed into as few passes as `max_tokens_per_pass`
        allows, which the last batch holds; the others are then empty.
        """
        batches, items = super().get_batch_samples(*args, **kwargs)
        if not batches or "rows" not in batches[0]:
            return batches, items
        rows = [row for batch in batches for row in batch.pop("rows")]
        packed, common = pack(rows, self._tokens_per_pass()), batches[0]
        filling = most_of_processes(self._prefix_model, len(packed)) - len(packed)
        if filling:
            packed += pack(self.data_collator([masked_row_like(self.train_dataset[0])])["rows"], 1) * filling
        passes = [common | batch_on_device(own, self.args.device) for own in packed]
        return [common | {PASSES: []}] * (len(batches) - 1) + [common | {PASSES: passes}], items

    def _tokens_per_pass(self) -> int:
        """Fewer than set where `auto_find_batch_size` has made the batch smaller."""
        return self.max_tokens_per_pass * self._train_batch_size // self.args.train_batch_size

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As the Trainer's, of all passes."""
        of_pass = super().floating_point_ops
        return sum(map(of_pass, inputs.get(PASSES, [inputs])))

    # The only place where the tokens of a batch are counted.
    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        for own in inputs.get(PASSES, [inputs]):
            real = {} if "attention_mask" in own else {"attention_mask": torch.ones_like(own["input_ids"])}
            super()._track_num_input_tokens(own | real)

    # Spans have start positions instead of labels. Without a count, each process would take a mean of its own. The
    # labels of packed rows are counted before they are on a GPU, which then does not have to be waited for.
    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], *args: Any, **kwargs: Any) -> Any:
        if batch_samples and "rows" in batch_samples[0]:
            gold = (row.get("labels", row.get("start_positions")) for batch in batch_samples for row in batch["rows"])
            items = sum(int((labels != IGNORED_LABEL).sum()) for labels in gold)
            if self.args.world_size == 1:
                return items
            return self.accelerator.reduce(on_device(torch.tensor(items), self.args.device), "sum")
        counted = [
            {"labels": batch["start_positions"]} if "start_positions" in batch else batch for batch in batch_samples
        ]
        return super()._get_num_items_in_batch(counted, *args, **kwargs)

    # Nothing else is called between the backward pass and the optimizer step, where NaN must stop the run. Here, and
    # nowhere else in a step, a GPU is waited for.
    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        loss, self._loss_of_step = float(self._loss_of_step), None
        if not math.isfinite(loss):
            raise TrainingDiverged(f"The loss became {loss}", self.state.global_step + 1, self.args)
        if norm is None:  # without ZeRO, DeepSpeed does not give the norm
            finite = all(bool(torch.isfinite(parameter).all()) for parameter in self._trained)
        else:
            finite = math.isfinite(float(norm))
        # DeepSpeed has already done the step, or skipped it if the 16-bit gradients overflowed.
        skipped = self.is_deepspeed_enabled and bool(self.accelerator.optimizer_step_was_skipped)
        self._finite.check(finite and not skipped, self.state.global_step + 1, self.args)
        return norm

    # ---- evaluation ----

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """As the Trainer's, with the metrics of predictions if there are any."""
        metrics = super().evaluate(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.generation_metrics is not None:
            generated = {f"{metric_key_prefix}_{name}": value for name, value in self.generation_metrics().items()}
            self.log(generated)
            metrics |= generated
        self._check_best_metric(metrics)
        self._evaluated = self.state.global_step, metrics
        return metrics

    def _check_best_metric(self, metrics: dict[str, float]) -> None:
        """Refuses to choose checkpoints, or the learning rate, by a metric that the evaluation did not compute."""
        wanted = self.args.metric_for_best_model
        if not self.is_in_train or wanted is None:
            return
        known = [name.removeprefix("eval_") for name in metrics if name.startswith("eval_")]
        if wanted.removeprefix("eval_") not in known:
            raise ValueError(f"metric_for_best_model {wanted} is not among the scores: {', '.join(known)}.")

    def last_evaluation(self) -> dict[str, float]:
        """The metrics of the current model: those of the evaluation at the last step, or of a new one."""
        if self._evaluated is not None and self._evaluated[0] == self.state.global_step:
            return self._evaluated[1]
        return self.evaluate()

    def prediction_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> tuple:
        """As the Trainer's; sums loss and number of tokens for `evaluation_loop`."""
        if "rows" in inputs:
            rows = inputs["rows"]
            (packed,) = pack(rows, sum(len(row["input_ids"]) for row in rows))
            rest = {name: value for name, value in inputs.items() if name != "rows"}
            inputs = rest | batch_on_device(packed, self.args.device)
        result = super().prediction_step(model, inputs, *args, **kwargs)
        tokens = self._get_num_items_in_batch([inputs], self.args.device)
        if result[0] is not None and tokens is not None:
            # The Trainer has divided by the tokens of all processes and multiplied by the number of processes.
            together = self.args.world_size if self.args.average_tokens_across_devices else 1
            sums = torch.stack((result[0] * tokens, torch.as_tensor(tokens).to(result[0]))).double() / together
            self._eval_sums = sums if self._eval_sums is None else self._eval_sums + sums
        return result

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """As the Trainer's, but the loss is the mean over all tokens, independent of the batches."""
        self._eval_sums = None
        with self._without_needless_deepspeed():
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self._eval_sums is not None:
            total, tokens = self.accelerator.reduce(self._eval_sums, "sum").tolist()
            output.metrics[f"{metric_key_prefix}_loss"] = total / max(tokens, 1)
        return output

    @contextmanager
    def _without_needless_deepspeed(self) -> Iterator[None]:
        """Turns DeepSpeed off for an evaluation without training: transformers refuses it there without ZeRO-3."""
        needless = self.is_deepspeed_enabled and self.deepspeed is None and not is_partitioned(self.model.parameters())
        if needless:
            self.is_deepspeed_enabled = False
        try:
            yield
        finally:
            if needless:
                self.is_deepspeed_enabled = True

    # ---- saving ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the trained parameters only. Must be called on every rank; the first one writes."""
        folder = Path(output_dir or self.args.output_dir)
        model = self._prefix_model
        model.base_fingerprint()  # a collective operation if the base is partitioned
        with self._in_full_precision(model):
            if self.args.should_save:
                remove_export(folder)
                self.tuning.save(folder, self.details)
                if getattr(self.args, "save_official_prefix", False):
                    write_export(folder)
                write_json(folder / ARGUMENTS_FILE, self.args.to_sanitized_dict())

    @contextmanager
    def _in_full_precision(self, model: torch.nn.Module) -> Iterator[None]:
        """Gathers the trained parameters, in float32 where DeepSpeed's optimizer keeps float32 copies of them."""
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        rounded = [parameter for parameter in trained if parameter.dtype != torch.float32]
        full = {}
        if rounded and self.is_deepspeed_enabled and self.deepspeed is not None:
            from deepspeed.utils import safe_get_full_fp32_param

            full = {parameter: safe_get_full_fp32_param(parameter) for parameter in rounded}
        with gathered(trained):
            before = {parameter: parameter.data for parameter in full}
            for parameter, value in full.items():
                if value is not None:
                    parameter.data = value
            try:
                yield
            finally:
                for parameter, value in before.items():
                    parameter.data = value

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """As the Trainer's; keeps the trained parameters in the order of the saved state."""
        optimizer = super().create_optimizer(model)
        if not isinstance(optimizer, AcceleratedOptimizer):
            self._set_head_learning_rate(optimizer)
            # DeepSpeed drops empty groups (a table has no biases). Without them the schedule's state is the same.
            optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
            self._trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            self._optimizer_groups = optimizer.state_dict()["param_groups"]
        return optimizer

    def _set_head_learning_rate(self, optimizer: torch.optim.Optimizer) -> None:
        """Moves the parameters of the linear head into groups of their own, after the others."""
        rate = getattr(self.args, "head_learning_rate", None)
        if rate is None:
            return
        head = {id(parameter) for parameter in self.tuning.heads().values()}
        for group in list(optimizer.param_groups):
            of_head = [parameter for parameter in group["params"] if id(parameter) in head]
            if of_head:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in head]
                optimizer.add_param_group({**group, "params": of_head, "lr": rate})

    # DeepSpeed's own format depends on stage and number of processes; this one is read by any run.
    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_deepspeed_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)
        state = optimizer_state.collect(self.deepspeed, self._trained, self._optimizer_groups)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    # Only the first process writes to the run's folder: the others may not see it.
    def _save_rng_state(self, output_dir: str) -> None:
        if self.args.world_size == 1:
            return super()._save_rng_state(output_dir)
        with TemporaryDirectory() as own:
            super()._save_rng_state(own)
            (file,) = Path(own).iterdir()
            states = all_gather_objects((file.name, file.read_bytes()))
        if self.args.should_save:
            for name, content in states:
                (Path(output_dir) / name).write_bytes(content)

    # Lets the Trainer write a checkpoint into the staging folder.
    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging is not None else super()._get_output_dir(trial)

    # Writes into a staging folder first, so that a killed process or a full disk leaves no incomplete checkpoint.
    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        if not self._has_learned:
            logger.warning(f"Step {self.state.global_step} has no checkpoint: no step has changed a parameter so far.")
            return
        run = Path(super()._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self._staging = run / STAGING_FOLDER
        try:
            if self.args.should_save:
                shutil.rmtree(self._staging, ignore_errors=True)
                self._check_room(run, name)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            moved = self._point_to_best(run / name)
            if self.args.should_save:
                if moved:
                    self.state.save_to_json(str(self._staging / name / TRAINER_STATE_NAME))
                self._publish(self._staging / name, run / name)
        except (OSError, RuntimeError, SafetensorError) as error:
            if not is_disk_full(error):
                raise
            raise CheckpointNotWritten(
                name, self._bytes_needed(run), shutil.disk_usage(run).free, str(error), self.args
            ) from error
        finally:
            self._staging = None
            if self.args.should_save:
                shutil.rmtree(run / STAGING_FOLDER, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _bytes_needed(self, run: Path) -> int:
        """Size of the next checkpoint: that of the largest one so far, at least that of prefix and AdamW's state."""
        numbers = sum(whole_shape(parameter).numel() for parameter in self._trained)
        earlier = [folder_size(folder) for folder in run.glob(f"{PREFIX_CHECKPOINT_DIR}-*")]
        return max([3 * 4 * numbers + _ROOM_FOR_SMALL_FILES, *earlier])

    def _check_room(self, run: Path, name: str) -> None:
        run.mkdir(parents=True, exist_ok=True)
        needed, free = self._bytes_needed(run), shutil.disk_usage(run).free
        if free < needed:
            raise CheckpointNotWritten(name, needed, free, "the disk is full", self.args)

    def _point_to_best(self, final: Path) -> bool:
        """Sets the path of the best checkpoint to its final place; returns whether that changed it."""
        before = self.state.best_model_checkpoint
        if self.state.best_global_step:
            kept = final.parent / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            if kept == final or kept.exists():
                self.state.best_model_checkpoint = str(kept)
        return self.state.best_model_checkpoint != before

    def _publish(self, staged: Path, final: Path) -> None:
        replaced = final.parent / REPLACED_FOLDER
        shutil.rmtree(replaced, ignore_errors=True)
        if final.exists():
            final.rename(replaced)
        staged.rename(final)
        shutil.rmtree(replaced, ignore_errors=True)
        # Older checkpoints are removed only when the new one is complete.
        rotate_checkpoints(
            output_dir=str(final.parent),
            save_total_limit=self.args.save_total_limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
            use_mtime=True,
        )

    # ---- loading ----

    # DeepSpeed copies the trained parameters when it is prepared, so that a checkpoint must be loaded before. It is not
    # given the checkpoint, which is not in its own format.
    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None
    ) -> tuple[torch.nn.Module, DataLoader]:
        if resume_from_checkpoint is None or not self.is_deepspeed_enabled:
            prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        else:
            self._load_from_checkpoint(resume_from_checkpoint)
            prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
            self._restore_deepspeed(Path(resume_from_checkpoint))
        if resume_from_checkpoint is not None:
            self._warn_of_learning_rate(resume_from_checkpoint)
        return prepared

    def _restore_deepspeed(self, checkpoint: Path) -> None:
        saved = torch.load(checkpoint / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
        optimizer_state.restore(self.deepspeed, self._trained, saved)
        self.lr_scheduler.load_state_dict(torch.load(checkpoint / SCHEDULER_NAME, weights_only=True))
        self._restore_full_precision(checkpoint)

    def _restore_full_precision(self, checkpoint: Path) -> None:
        model = self._prefix_model
        trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
        if all(value.dtype == torch.float32 for value in trained.values()):
            return
        read = read_prefix(checkpoint, model.config.prefix_shape)
        values = {PREFIX_KEY + name: value for name, value in read.parameters.items()} | read.heads
        optimizer_state.restore_full_precision(trained, values)

    def _warn_of_learning_rate(self, checkpoint: str) -> None:
        used = (getattr(self.lr_scheduler, "base_lrs", None) or [self.args.learning_rate])[0]
        if self.tuning.method == "head_only":
            return
        if not math.isclose(used, self.args.learning_rate, rel_tol=1e-6):
            logger.warning(
                f"learning_rate {self.args.learning_rate:g} is not used: the run resumes from {checkpoint} with its "
                f"own learning rate of {used:g}. To train with another one, start a new run from that prefix: "
                f"ptuning_checkpoint {checkpoint} and another output_dir."
            )

    # The checkpoint holds the trained parameters, not the model.
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        self.tuning.load(Path(resume_from_checkpoint))

    # As above.
    def _load_best_model(self) -> None:
        self._evaluated = None
        self.tuning.load(Path(self.state.best_model_checkpoint))
        if self.is_deepspeed_enabled:
            self._restore_full_precision(Path(self.state.best_model_checkpoint))
