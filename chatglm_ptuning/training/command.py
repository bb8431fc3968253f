"""What the training commands share: their failures as messages, and a training with its results."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, set_seed
from transformers.utils import logging

from chatglm_ptuning.command_line import fail
from chatglm_ptuning.training.failures import (
    SIGTERM_EXIT_CODE,
    Preempted,
    ProcessLost,
    TrainingStopped,
    is_lost_process,
    is_out_of_memory,
    what_is_kept,
)
from chatglm_ptuning.training.progress import failure_noted
from chatglm_ptuning.training.report import draw_loss_curve, peak_memory, trained_parameters
from chatglm_ptuning.training.trainer import PrefixTrainer

logger = logging.get_logger(__name__)


@contextmanager
def reported(args: TrainingArguments) -> Iterator[None]:
    """Sets seed and log levels, and ends the command if the block raises: with a message and exit code 1 for errors of
    the user, with 143 after SIGTERM.
    """
    set_seed(args.seed)
    level = logging.WARNING if args.should_save else logging.ERROR  # one process speaks for all
    logging.set_verbosity(level)
    logging.get_logger(__name__.partition(".")[0]).setLevel(level)
    try:
        with failure_noted(args):
            yield
    except Preempted as stop:
        print(stop, file=sys.stderr)
        raise SystemExit(SIGTERM_EXIT_CODE) from stop
    except (ValueError, OSError, ImportError, TrainingStopped) as error:
        fail(str(error))
    except Exception as error:
        if args.world_size > 1 and is_lost_process(error):
            fail(str(ProcessLost(error, args)))
        if is_out_of_memory(error):
            fail(
                f"Out of memory on {args.device}: {error} {what_is_kept(args)} Try smaller batches "
                "(--per_device_train_batch_size, --per_device_eval_batch_size), --gradient_checkpointing, or "
                "--quantization_bit 4."
            )
        raise
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    if args.should_save:
        print(f"Everything of this run is in {args.output_dir}.")


def train_and_save(trainer: PrefixTrainer, resume_from: Path | None, rows: int) -> None:
    """Trains, saves what was trained into the run's folder, and draws the loss; skips a finished run.

    Args:
        resume_from: the checkpoint of this run to resume from.
        rows: number of training rows.
    """
    args = trainer.args
    result = trainer.train(resume_from_checkpoint=resume_from and str(resume_from))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    trainer.save_model()
    if trainer.steps_done:
        metrics = dict(result.metrics, train_samples=rows) | trained_parameters(trainer.tuning.model) | peak_memory()
        if losses:
            metrics["final_loss"] = losses[-1]
        keep(trainer, "train", metrics)
    else:
        logger.warning(
            f"{resume_from} has all of the {trainer.state.max_steps} steps of this run: nothing was left to "
            "train. A larger --max_steps or --num_train_epochs trains longer, --overwrite_output_dir without "
            "--resume_from_checkpoint starts over."
        )
    trainer.save_state()
    if args.should_save:
        draw_loss_curve(trainer.state.log_history, Path(args.output_dir, "loss.png"))


def keep(trainer: PrefixTrainer, split: str, metrics: dict[str, Any]) -> None:
    """Logs metrics, and writes them into `SPLIT_results.json` and `all_results.json`."""
    if trainer.args.should_save:
        trainer.log_metrics(split, metrics)
        trainer.save_metrics(split, metrics)
