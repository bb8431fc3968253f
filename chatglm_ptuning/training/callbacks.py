"""Callbacks and guards of the Trainer: values that are not finite, log entries, signals."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from chatglm_ptuning.training.distributed import any_process
from chatglm_ptuning.training.failures import Preempted, TrainingDiverged

_SKIPPED_STEPS_ALLOWED = 20
"""With fp16 the loss scale is found by trial, so that this many steps with infinite gradients in a row are normal."""
_ZERO_STEPS_ALLOWED = 10
"""Steps in a row with a loss of exactly 0, which no real batch has."""


class FiniteGuard:
    """Stops the training at the first gradient that is not finite (with fp16, after too many in a row)."""

    def __init__(self) -> None:
        self.infinite_in_a_row = 0

    def check(self, finite: bool, step: int, args: TrainingArguments) -> None:
        """Counts steps whose gradients were not finite.

        Args:
            step: counted from 1.

        Raises:
            TrainingDiverged: if they have not been for too long.
        """
        self.infinite_in_a_row = 0 if finite else self.infinite_in_a_row + 1
        if self.infinite_in_a_row > (_SKIPPED_STEPS_ALLOWED if args.fp16 else 0):
            raise TrainingDiverged("The gradients became NaN or infinite", step, args)


class UpdateCounter(TrainerCallback):
    """Counts the optimizer steps that change parameters: not those skipped, nor those with a learning rate of 0."""

    def __init__(self) -> None:
        self.count = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Starts counting at 0."""
        self.count = 0

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: object,
    ) -> None:
        """Counts a step."""
        skipped = getattr(optimizer, "step_was_skipped", False)
        if not skipped and any(float(group["lr"]) > 0 for group in optimizer.param_groups):
            self.count += 1


class ZeroLossGuard(TrainerCallback):
    """Stops the training when the logged loss stays at exactly 0, as it does when 16-bit numbers overflow."""

    def __init__(self) -> None:
        self.zero_steps = 0
        self.logged_step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Starts counting at the step of a resumed run."""
        self.zero_steps, self.logged_step = 0, state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: object,
    ) -> None:
        """Counts steps with a mean loss of 0; raises TrainingDiverged if there are too many."""
        if not logs or "loss" not in logs:
            return
        steps, self.logged_step = state.global_step - self.logged_step, state.global_step
        self.zero_steps = self.zero_steps + steps if float(logs["loss"]) == 0 else 0
        if self.zero_steps >= _ZERO_STEPS_ALLOWED:
            raise TrainingDiverged(
                f"The loss has been exactly 0 for {self.zero_steps} steps, so that nothing is learned. This "
                "happens when 16-bit numbers overflow. Stopped",
                state.global_step,
                args,
            )


class LogAtCheckpoints(TrainerCallback):
    """Ends a logging interval at every checkpoint.

    A logged loss is a mean since the entry before. A resumed run knows nothing of the steps before its checkpoint, so
    an interval that reached across one would have another loss after resuming.
    """

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> TrainerControl:
        """Requests a log entry if this step is saved."""
        control.should_log = control.should_log or control.should_save
        return control


class StopOnSignal(TrainerCallback):
    """On SIGTERM to any process, all processes save after the current step and stop.

    Slurm sends it before it preempts a job or ends its time, launchers when another process has failed. In use from
    `install` to `remove`; before and after, the signal ends the process as usual.
    """

    def __init__(self) -> None:
        self.received = False
        self.stopped = False
        self._before: Any = None

    def install(self) -> None:
        """Installs the handler; only the main thread can."""
        try:
            self._before = signal.signal(signal.SIGTERM, self._note)
        except ValueError:
            self._before = None

    def remove(self) -> None:
        """Restores the previous handler."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> TrainerControl:
        """Requests log, checkpoint and stop, without an evaluation, if any process got the signal."""
        if any_process(self.received, args.device):
            self.stopped = True
            control.should_log = control.should_save = control.should_training_stop = True
            control.should_evaluate = False
        return control

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Interrupts an evaluation; the Trainer saves the step before it."""
        if any_process(self.received, args.device):
            raise Preempted("SIGTERM")
