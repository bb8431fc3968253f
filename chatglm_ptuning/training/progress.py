"""The progress of a run for the program that started it: `progress.jsonl` in the run's folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from chatglm_ptuning.training.failures import TrainingDiverged, TrainingStopped

PROGRESS_FILE = "progress.jsonl"
FAILED, REASON = "failed", "reason"
"""Keys of the last line of a failed run: the kind of failure, and the message."""
DIVERGED, STOPPED, REFUSED, DEVICE, OTHER = "diverged", "stopped", "refused", "device", "other"
"""Kinds of failure: losses or gradients not usable; the run cannot continue; wrong flags, files or base; the device
fails in every run; anything else."""


class ProgressFile(TrainerCallback):
    """Writes each log entry as one line immediately; `trainer_state.json` has them only at the end."""

    def __init__(self) -> None:
        self.path: Path | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Starts the file with the log entries of the checkpoint."""
        if state.is_world_process_zero:
            self.path = Path(args.output_dir, PROGRESS_FILE)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.unlink(missing_ok=True)
            _add(self.path, *state.log_history)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Adds the entry."""
        if self.path is not None:
            _add(self.path, state.log_history[-1])


@contextmanager
def failure_noted(args: TrainingArguments) -> Iterator[None]:
    """Adds a line to the progress in `args.output_dir` if the block raises, and lets the exception pass.

    Nothing is written where there is no progress: the folder may be of something else. Who wants to know of a run that
    is refused before its training begins puts an empty file there.
    """
    path = Path(args.output_dir, PROGRESS_FILE)
    try:
        yield
    except Exception as error:
        if args.should_save and path.exists():
            _add(path, {FAILED: kind_of_failure(error), REASON: str(error)})
        raise


def kind_of_failure(error: Exception) -> str:
    """One of the kinds above."""
    if isinstance(error, TrainingDiverged):
        return DIVERGED
    if isinstance(error, (TrainingStopped, torch.OutOfMemoryError)):
        return STOPPED
    if isinstance(error, torch.AcceleratorError) or (isinstance(error, RuntimeError) and "CUDA error" in str(error)):
        return DEVICE
    return REFUSED if isinstance(error, (ValueError, OSError, ImportError)) else OTHER


def read_progress(run: Path) -> list[dict[str, Any]]:
    """The entries of a run, also while it is running; empty if there is no progress yet."""
    try:
        text = (run / PROGRESS_FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    whole, _, _ = text.rpartition("\n")  # the last line may be incomplete
    return [json.loads(line) for line in whole.split("\n") if line]


def _add(path: Path, *entries: dict[str, Any]) -> None:
    # A full disk must not end the run here: saving a checkpoint reports it with the room needed.
    with suppress(OSError), path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
