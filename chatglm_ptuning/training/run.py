"""`chatglm-ptuning train`: from files to a prefix, or what else is tuned, its scores and its report."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from chatglm_ptuning.command_line import fail, parse_arguments
from chatglm_ptuning.training.arguments import (
    RETIRED_FLAGS,
    DataArguments,
    ModelArguments,
    PrefixTrainingArguments,
)
from chatglm_ptuning.training.checkpoints import is_whole, last_checkpoint
from chatglm_ptuning.training.distributed import from_first_process
from chatglm_ptuning.training.failures import (
    SIGTERM_EXIT_CODE,
    Preempted,
    ProcessLost,
    TrainingStopped,
    is_lost_process,
    is_out_of_memory,
    what_is_kept,
)
from chatglm_ptuning.training.file_run import TrainingRun
from chatglm_ptuning.training.mixture.run import MixtureRun
from chatglm_ptuning.training.preservation import PreservationArguments
from chatglm_ptuning.training.progress import failure_noted
from chatglm_ptuning.training.task_run import TaskRun

logger = logging.get_logger(__name__)

TRAIN_FLAGS = (ModelArguments, DataArguments, PrefixTrainingArguments, PreservationArguments)
"""Everything that the command's flags fill."""


def prepare_output(args: PrefixTrainingArguments) -> Path | None:
    """Decides what an output folder with an earlier run in it means; returns the checkpoint to go on from.

    As the official script does, a run goes on from its last checkpoint unless --overwrite_output_dir is given. A job
    that torchrun or Slurm has started again goes on in any case. The first process decides for all.

    Raises:
        ValueError: if there is nothing to resume from though it was asked for, or not on this machine.
    """
    fault, chosen = None, None
    if args.process_index == 0:
        try:
            chosen = _choose_checkpoint(args)
        except ValueError as error:
            fault = str(error)
    fault, chosen = from_first_process((fault, chosen))
    if fault is not None:
        raise ValueError(fault)
    if chosen is not None and not is_whole(chosen):
        raise ValueError(
            f"The first process goes on from {chosen}, which process {args.process_index} does not see: --output_dir "
            "must be on storage that all machines share."
        )
    return chosen


def _choose_checkpoint(args: PrefixTrainingArguments) -> Path | None:
    output = Path(args.output_dir)
    newest = last_checkpoint(output)
    if _was_restarted():
        logger.warning(f"The job was started again; going on from {newest or 'the beginning'}.")
        return newest if args.do_train else None
    if args.resume_from_checkpoint:
        wanted = args.resume_from_checkpoint
        if str(wanted).lower() in ("true", "1"):
            if newest is None:
                raise ValueError(f"--resume_from_checkpoint: {output} holds no whole checkpoint.")
            return newest
        if not is_whole(wanted):
            raise ValueError(f"--resume_from_checkpoint: {wanted} is not a whole checkpoint of a run.")
        return Path(wanted)
    if not args.do_train or newest is None:
        return None
    if args.overwrite_output_dir:
        for folder in output.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
            shutil.rmtree(folder)
        return None
    logger.warning(f"Going on from {newest}; give --overwrite_output_dir to start anew.")
    return newest


def _was_restarted() -> bool:
    """Whether torchrun (`--max-restarts`) or Slurm (requeueing) has started the same command again."""
    return any(int(os.environ.get(name) or 0) > 0 for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


def main(argv: Sequence[str]) -> None:
    """Entry of the command; errors that users can mend end it with a message and exit code 1, SIGTERM with 143."""
    model_args, data_args, args, preserve_args = parse_arguments(
        "chatglm-ptuning train",
        "Train a P-Tuning v2 prefix, or by another --tuning; evaluate it, and generate with it.",
        TRAIN_FLAGS,
        argv,
        RETIRED_FLAGS,
    )
    if not (args.do_train or args.do_eval or args.do_predict):
        fail("nothing to do: give --do_train, --do_eval or --do_predict.")
    set_seed(args.seed)
    level = logging.WARNING if args.should_save else logging.ERROR  # one process speaks for all
    logging.set_verbosity(level)
    logging.get_logger(__name__.partition(".")[0]).setLevel(level)
    try:
        with failure_noted(args):
            output = _run(model_args, data_args, args, preserve_args)
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
        print(f"Everything of this run is in {output}.")


def _run(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: PrefixTrainingArguments,
    preserve_args: PreservationArguments,
) -> Path:
    checkpoint = prepare_output(args)
    kind = MixtureRun if data_args.task_mixture else TaskRun if data_args.task else TrainingRun
    run = kind(model_args, data_args, args, preserve_args, checkpoint)
    trainer = run.trainer()
    if args.do_train:
        run.train(trainer)
    if args.do_eval:
        run.evaluate(trainer)
    if args.do_predict:
        run.predict(trainer)
    if run.general.held_out is not None:
        run.measure_drift(trainer)
    return run.output
