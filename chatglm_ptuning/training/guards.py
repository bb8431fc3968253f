"""Stopping a run that has gone wrong, with what to change."""

from __future__ import annotations

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_SKIPPED_STEPS_ALLOWED = 20
"""With fp16 the loss scale is found by trial: so many steps with infinite gradients in a row are no sign of trouble."""


class TrainingDiverged(RuntimeError):
    """Losses or gradients are no longer finite."""


def divergence_message(what: str, step: int, arguments: TrainingArguments, last_checkpoint: str | None) -> str:
    """What happened, what is safe, and what to change."""
    advice = [f"a lower --learning_rate (it is {arguments.learning_rate:g}; try a tenth)"]
    if arguments.fp16:
        advice.insert(0, "--bf16 instead of --fp16, or --dtype float32")
    kept = f"The last good checkpoint is {last_checkpoint}." if last_checkpoint else "No checkpoint was written yet."
    return f"{what} at step {step}; training has stopped. {kept} Try {' and '.join(advice)}."


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
            raise TrainingDiverged(
                divergence_message("The gradients became NaN or infinite", state.global_step + 1, args, None)
            )
