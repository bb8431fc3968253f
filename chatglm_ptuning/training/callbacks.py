"""What a run watches while it trains."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from chatglm_ptuning.training.distributed import any_process
from chatglm_ptuning.training.failures import Preempted, TrainingDiverged

_SKIPPED_STEPS_ALLOWED = 20
"""With fp16 the loss scale is found by trial: so many steps with infinite gradients in a row are no sign of trouble."""
_ZERO_STEPS_ALLOWED = 10
"""Steps in a row with a loss of exactly 0, which no real batch has."""


class FiniteGuard:
    """Stops at the first gradient that is not finite (with fp16, at too many in a row)."""

    def __init__(self) -> None:
        self.infinite_in_a_row = 0

    def check(self, finite: bool, step: int, args: TrainingArguments) -> None:
        """Notes whether the gradients of a step were finite.

        Args:
            step: counted from 1.

        Raises:
            TrainingDiverged: if they have not been for too long.
        """
        self.infinite_in_a_row = 0 if finite else self.infinite_in_a_row + 1
        if self.infinite_in_a_row > (_SKIPPED_STEPS_ALLOWED if args.fp16 else 0):
            raise TrainingDiverged("The gradients became NaN or infinite", step, args)


class ZeroLossGuard(TrainerCallback):
    """Stops when the logged loss stays at exactly 0: as when 16-bit numbers overflow."""

    def __init__(self) -> None:
        self.zero_steps = 0
        self.logged_step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Starts counting where a resumed run goes on."""
        self.zero_steps, self.logged_step = 0, state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: object,
    ) -> None:
        """Counts the steps of a logging interval whose mean loss is 0; raises TrainingDiverged if they are too many."""
        if not logs or "loss" not in logs:
            return
        steps, self.logged_step = state.global_step - self.logged_step, state.global_step
        self.zero_steps = self.zero_steps + steps if float(logs["loss"]) == 0 else 0
        if self.zero_steps >= _ZERO_STEPS_ALLOWED:
            raise TrainingDiverged(
                f"The loss has been exactly 0 for {self.zero_steps} steps, so that nothing is learned, as happens when "
                "16-bit numbers overflow. Stopped",
                state.global_step,
                args,
            )


class LogAtCheckpoints(TrainerCallback):
    """Ends a logging interval wherever a checkpoint is written.

    A logged loss is a mean since the entry before. A resumed run knows nothing of the steps before its checkpoint, so
    an interval that reached across one would have another loss after resuming.
    """

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> TrainerControl:
        """Asks for a log entry if this step is going to be saved."""
        control.should_log = control.should_log or control.should_save
        return control


class StopOnSignal(TrainerCallback):
    """On SIGTERM, to any of the processes, all of them save after the step at hand and stop.

    Slurm sends it before it preempts a job or ends its time, launchers when another process has failed. In use from
    `install` to `remove`; before and after, the signal ends the process as usual.
    """

    def __init__(self) -> None:
        self.received = False
        self.stopped = False
        self._before: Any = None

    def install(self) -> None:
        """Takes the signal over (in the main thread; elsewhere nothing can)."""
        try:
            self._before = signal.signal(signal.SIGTERM, self._note)
        except ValueError:
            self._before = None

    def remove(self) -> None:
        """Gives the signal back."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> TrainerControl:
        """Asks to log, save and stop, without evaluating, if any process was told to end."""
        if any_process(self.received, args.device):
            self.stopped = True
            control.should_log = control.should_save = control.should_training_stop = True
            control.should_evaluate = False
        return control

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Ends an evaluation in the middle; the Trainer saves the step before it."""
        if any_process(self.received, args.device):
            raise Preempted("SIGTERM")
