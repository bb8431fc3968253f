"""transformers' Trainer for a prefix: only the prefix is saved, a checkpoint appears whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from chatglm_ptuning.data.prepared import lengths_of
from chatglm_ptuning.prefix.files import write_atomically
from chatglm_ptuning.training.callbacks import FiniteGuard, LogAtCheckpoints, TrainingDiverged
from chatglm_ptuning.training.sampler import LengthGroupedEpochSampler

STAGING_FOLDER = ".saving"
ARGUMENTS_FILE = "training_arguments.json"


class PrefixTrainer(Trainer):
    """Trains the prefix of a ChatGLM model.

    Args:
        details: what every prefix checkpoint records beside the weights: chat format, task, training.
        generation_metrics: called after an evaluation, for metrics that need generated answers.
        kwargs: as for transformers' Trainer.
    """

    def __init__(
        self,
        *args: Any,
        details: dict[str, Any] | None = None,
        generation_metrics: Callable[[], dict[str, float]] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.details = details or {}
        self.generation_metrics = generation_metrics
        self._staging: Path | None = None
        self.add_callback(FiniteGuard())
        self.add_callback(LogAtCheckpoints())

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        return LengthGroupedEpochSampler(lengths_of(dataset), self.args.train_batch_size, self.args.seed)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One forward and backward pass; raises TrainingDiverged if the loss is not finite."""
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise TrainingDiverged(f"The loss became {loss.item()}", self.state.global_step + 1, self.args)
        return loss

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """As the Trainer's, with the metrics of generated answers when they were asked for."""
        metrics = super().evaluate(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.generation_metrics is not None:
            generated = {f"{metric_key_prefix}_{name}": value for name, value in self.generation_metrics().items()}
            self.log(generated)
            metrics |= generated
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the prefix, never the base."""
        folder = Path(output_dir or self.args.output_dir)
        model = self.accelerator.unwrap_model(self.model)
        if self.args.should_save:
            model.save_prefix(folder, **self.details)
            with write_atomically(folder / ARGUMENTS_FILE) as temporary:
                temporary.write_text(
                    json.dumps(self.args.to_sanitized_dict(), indent=2, ensure_ascii=False) + "\n", "utf-8"
                )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        self.accelerator.unwrap_model(model or self.model).load_prefix(resume_from_checkpoint)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Writes into a staging folder first: a killed process or a full disk leaves no half checkpoint behind."""
        run = Path(super()._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self._staging = run / STAGING_FOLDER
        try:
            if self.args.should_save:
                shutil.rmtree(self._staging, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self._publish(self._staging / name, run / name)
        finally:
            self._staging = None
            if self.args.should_save:
                shutil.rmtree(run / STAGING_FOLDER, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _publish(self, staged: Path, final: Path) -> None:
        best = self.state.best_model_checkpoint
        if self.state.best_global_step:
            kept = final.parent / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            if kept == final or kept.exists():
                self.state.best_model_checkpoint = str(kept)
        if self.state.best_model_checkpoint != best:
            self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
        if final.exists():
            shutil.rmtree(final)
        staged.rename(final)
        rotate_checkpoints(
            output_dir=str(final.parent),
            save_total_limit=self.args.save_total_limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
            use_mtime=True,
        )

    def _load_best_model(self) -> None:
        self.accelerator.unwrap_model(self.model).load_prefix(self.state.best_model_checkpoint)
