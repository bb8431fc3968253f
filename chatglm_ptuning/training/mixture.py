"""The Trainer for several tasks with one prefix: batches of one task, losses and scores of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from chatglm_ptuning.training.sampler import TASK_KEY, MixtureSampler, PaddedRows, row_lengths
from chatglm_ptuning.training.trainer import PrefixTrainer

logger = logging.get_logger(__name__)


class OneTaskCollator:
    """A collator for batches whose rows all belong to one task."""

    def __init__(self, collate: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]) -> None:
        self.collate = collate

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What the collator makes of the rows, and `task`.

        Raises:
            ValueError: if the rows belong to several tasks.
        """
        tasks = {example[TASK_KEY] for example in examples}
        if len(tasks) != 1:
            raise ValueError(f"a batch must be of one task, got rows of {', '.join(sorted(tasks))}")
        return self.collate(examples) | {TASK_KEY: tasks.pop()}


class MixtureTrainer(PrefixTrainer):
    """Trains one prefix on several tasks.

    Args:
        args, kwargs: as for `PrefixTrainer`; `train_dataset` has the rows of all tasks, those of a task together, and
            `eval_dataset` those of each task to compute its loss on, by its name.
        train_sizes: rows of each task in `train_dataset`, in their order.
        probabilities: of drawing each task.
        score: gives a task's scores and the name of the one that enters the mean.
    """

    def __init__(
        self,
        *args: Any,
        train_sizes: Mapping[str, int],
        probabilities: Sequence[float],
        score: Callable[[str], tuple[dict[str, float], str]],
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.train_sizes = dict(train_sizes)
        self.probabilities = probabilities
        at_once = self._rows_at_once(self.args.eval_batch_size)
        self.eval_dataset = {task: PaddedRows(rows, at_once) for task, rows in (self.eval_dataset or {}).items()}
        self.score = score
        self._losses = torch.zeros(2, len(self.train_sizes), dtype=torch.float64)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        lengths = row_lengths(self.train_dataset if train_dataset is None else train_dataset)
        of_task, start = [], 0
        for size in self.train_sizes.values():
            of_task.append(lengths[start : start + size])
            start += size
        args = self.args
        step = self._train_batch_size * args.world_size * args.gradient_accumulation_steps
        strategy = args.train_sampling_strategy
        self._epoch_sampler = MixtureSampler(of_task, self.probabilities, step, self._sampler_seed, strategy)
        return self._epoch_sampler

    # ---- losses ----

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As the PrefixTrainer's; warns about tasks that no step was drawn for."""
        result = super().train(*args, **kwargs)
        drawn = self._drawn()
        missed = [task for number, task in enumerate(self.train_sizes) if number not in drawn]
        if missed:
            logger.warning(f"No step trained {', '.join(missed)}: train for more steps, or raise the weight.")
        return result

    def _drawn(self) -> set[int]:
        """Indices of the tasks of all steps so far, with those before a resumption."""
        sampler, steps, drawn = self._epoch_sampler, self.state.global_step, set()
        for epoch in range(-(-steps // sampler.steps)):
            sampler.set_epoch(epoch)
            drawn |= set(sampler.tasks_of_steps()[: steps - epoch * sampler.steps])
        return drawn

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """As the PrefixTrainer's; sums the loss by task."""
        loss = super().training_step(model, inputs, *args, **kwargs)
        place = list(self.train_sizes).index(inputs[TASK_KEY])
        self._losses = self._losses.to(loss.device)
        self._losses[0, place] += loss
        self._losses[1, place] += 1 / self.args.gradient_accumulation_steps
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the Trainer's, with the mean training loss of each task since the last entry as `loss_TASK`."""
        if "loss" in logs:
            totals, steps = self.accelerator.reduce(self._losses.to(self.args.device, torch.float32), "mean").tolist()
            means = zip(self.train_sizes, totals, steps, strict=True)
            logs |= {f"loss_{task}": total / count for task, total, count in means if count}
            self._losses.zero_()
        super().log(logs, *args, **kwargs)

    # ---- evaluation ----

    def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
        """Loss and scores of every task, `eval_TASK_loss`, `eval_TASK_METRIC`, ...

        `eval_mean` is the mean of every task's own metric, and `eval_loss` that of the losses; each task counts alike.
        """
        metrics: dict[str, float] = {}
        losses, scores = [], []
        for task in self.eval_dataset:
            prefix = f"{metric_key_prefix}_{task}"
            # By name: the Trainer caches the data loaders of persistent workers by name.
            loop = self.evaluation_loop(
                self.get_eval_dataloader(task), task, prediction_loss_only=True, metric_key_prefix=prefix
            )
            of_task, own = self.score(task)
            losses.append(loop.metrics[f"{prefix}_loss"])
            scores.append(of_task[own])
            metrics[f"{prefix}_loss"] = losses[-1]
            metrics |= {f"{prefix}_{name}": value for name, value in of_task.items()}
        metrics[f"{metric_key_prefix}_loss"] = sum(losses) / len(losses)
        metrics[f"{metric_key_prefix}_mean"] = sum(scores) / len(scores)
        self._check_best_metric(metrics)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def prediction_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> tuple:
        """As the PrefixTrainer's, with the labels of the batch's task."""
        columns = inputs["rows"][0] if "rows" in inputs else inputs
        self.label_names = [name for name in ("labels", "start_positions", "end_positions") if name in columns]
        return super().prediction_step(model, inputs, *args, **kwargs)
