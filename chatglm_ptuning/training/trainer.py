"""The Trainer of a prefix or another tuning method: its batches, the passes of a step, losses and evaluation.

A comment at each private method of transformers' Trainer says why no public one would do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, TrainOutput
from transformers.utils import logging

from chatglm_ptuning.data.collate import pack
from chatglm_ptuning.model.losses import IGNORED_LABEL
from chatglm_ptuning.model.placement import batch_on_device, on_device
from chatglm_ptuning.model.zero3 import is_partitioned, most_of_processes
from chatglm_ptuning.training.arguments import PrefixTrainingArguments
from chatglm_ptuning.training.callbacks import (
    FiniteGuard,
    LogAtCheckpoints,
    StopOnSignal,
    ZeroLossGuard,
)
from chatglm_ptuning.training.failures import (
    AllLabelsMasked,
    NothingTrained,
    OutOfMemory,
    Preempted,
    TrainingDiverged,
    is_out_of_memory,
)
from chatglm_ptuning.training.preservation import Replay
from chatglm_ptuning.training.progress import ProgressFile
from chatglm_ptuning.training.sampler import EpochSampler, PaddedRows, masked_row_like, row_lengths
from chatglm_ptuning.training.saving import SavingTrainer

logger = logging.get_logger(__name__)

PASSES = "passes"
"""Key of a batch: the packed batches that a step runs one after the other."""
TOKENS_PER_PASS = 2048
"""Enough to fill a GPU."""


def tokens_per_pass(args: PrefixTrainingArguments, rows: Any) -> int:
    """Tokens of a pass on packed rows: no more than a batch of padded rows could have, but enough to fill a GPU."""
    longest = max(row_lengths(rows), default=1) if rows else 1
    return args.max_tokens_per_pass or max(args.per_device_train_batch_size * longest, TOKENS_PER_PASS)


class PrefixTrainer(SavingTrainer):
    """Trains the prefix of a ChatGLM model, or the parameters of another tuning method.

    Args:
        args, kwargs: as for `SavingTrainer`.
        generation_metrics: called after an evaluation, for metrics that need predictions.
        replay: the loss term that preserves the base on general rows.
        max_tokens_per_pass: of a forward and backward pass, if the `data_collator` is a PackingCollator.
    """

    def __init__(
        self,
        *args: Any,
        generation_metrics: Callable[[], dict[str, float]] | None = None,
        replay: Replay | None = None,
        max_tokens_per_pass: int = TOKENS_PER_PASS,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        # transformers' own does not shift the labels of this family; `compute_loss` passes the factor to the model.
        self.label_smoother = None
        self.generation_metrics = generation_metrics
        self.replay = replay
        self.max_tokens_per_pass = max_tokens_per_pass
        self._replayed_step, self._replayed_batches, self._replay_steps = -1, 0, 0
        self._replay_sum: torch.Tensor | None = None
        self._loss_of_step: torch.Tensor | None = None
        self._eval_sums: torch.Tensor | None = None
        self._evaluated: tuple[int, dict[str, float]] | None = None
        self._epoch_sampler: EpochSampler | None = None
        self._finite = FiniteGuard()
        self._signal = StopOnSignal()
        for callback in (ZeroLossGuard(), LogAtCheckpoints(), ProgressFile(), self._signal):
            self.add_callback(callback)

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

    # ---- loading ----

    # The evaluation at the last step was of other values.
    def _load_best_model(self) -> None:
        self._evaluated = None
        super()._load_best_model()
