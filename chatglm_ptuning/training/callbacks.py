"""What a run watches while it trains."""

from __future__ import annotations

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from chatglm_ptuning.training.checkpoints import last_checkpoint

_SKIPPED_STEPS_ALLOWED = 20
"""With fp16 the loss scale is found by trial: so many steps with infinite gradients in a row are no sign of trouble."""


class TrainingDiverged(RuntimeError):
    """Losses or gradients are no longer finite. The message says what is safe and what to change.

    Args:
        what: what was seen, e.g. "The loss became nan".
        step: where, counted from 1.
    """

    def __init__(self, what: str, step: int, arguments: TrainingArguments) -> None:
        advice = [f"a lower --learning_rate (it is {arguments.learning_rate:g}; try a tenth)"]
        if arguments.fp16:
            advice.insert(0, "--bf16 instead of --fp16, or --dtype float32")
        checkpoint = last_checkpoint(arguments.output_dir)
        kept = f"The last good checkpoint is {checkpoint}." if checkpoint else "No checkpoint was written yet."
        super().__init__(f"{what} at step {step}; training has stopped. {kept} Try {' and '.join(advice)}.")


class FiniteGuard(TrainerCallback):
    """Stops at the first gradient that is not finite (with fp16, at too many in a row)."""

    def __init__(self) -> None:
        self.infinite_in_a_row = 0

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Looks at the gradients of everything that is trained, which is a few MB."""
        gradients = [parameter.grad for parameter in kwargs["model"].parameters() if parameter.grad is not None]
        finite = all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
        self.infinite_in_a_row = 0 if finite else self.infinite_in_a_row + 1
        if self.infinite_in_a_row > (_SKIPPED_STEPS_ALLOWED if args.fp16 else 0):
            raise TrainingDiverged("The gradients became NaN or infinite", state.global_step + 1, args)


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
