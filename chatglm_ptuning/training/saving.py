"""transformers' Trainer that saves and loads what is trained and nothing else, atomically.

A comment at each private method of the Trainer says why no public one would do.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from safetensors import SafetensorError
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from transformers.utils import logging

from chatglm_ptuning.files import write_json
from chatglm_ptuning.model.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm_ptuning.model.zero3 import gathered, whole_shape
from chatglm_ptuning.prefix.checkpoint import PREFIX_KEY
from chatglm_ptuning.prefix.export import remove_export, write_export
from chatglm_ptuning.prefix.formats import read_prefix
from chatglm_ptuning.training import optimizer_state
from chatglm_ptuning.training.callbacks import UpdateCounter
from chatglm_ptuning.training.distributed import all_gather_objects
from chatglm_ptuning.training.failures import CheckpointNotWritten, folder_size, is_disk_full
from chatglm_ptuning.tuning.tuning import PrefixTuning, Tuning

logger = logging.get_logger(__name__)

STAGING_FOLDER = ".saving"
REPLACED_FOLDER = ".replaced"
ARGUMENTS_FILE = "training_arguments.json"
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


class SavingTrainer(Trainer):
    """A Trainer whose checkpoints hold the trained parameters, and the optimizer's state in one format.

    Args:
        model: with a frozen base, which may be quantised.
        tuning: the trained parameters of the model; by default its prefix.
        details: what every checkpoint records beside the weights: chat format, task, training.
        args, kwargs: as for transformers' Trainer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *args: Any,
        tuning: Tuning | None = None,
        details: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        with _as_trainable(model):
            super().__init__(model, *args, **kwargs)
        self.tuning = tuning or PrefixTuning(self.model)
        self.details = details or {}
        self._staging: Path | None = None
        self._optimizer_groups: list[dict[str, Any]] = []
        self._trained: list[torch.nn.Parameter] = []
        self._updates = UpdateCounter()
        self.add_callback(self._updates)

    @property
    def _prefix_model(self) -> ChatGLMForConditionalGeneration:
        return self.accelerator.unwrap_model(self.model)

    @property
    def _has_learned(self) -> bool:
        """Whether a step, or one before the checkpoint that the run resumed from, has changed a parameter."""
        return self._updates.count > 0 or self._initial_global_step > 0

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
        self.tuning.load(Path(self.state.best_model_checkpoint))
        if self.is_deepspeed_enabled:
            self._restore_full_precision(Path(self.state.best_model_checkpoint))
