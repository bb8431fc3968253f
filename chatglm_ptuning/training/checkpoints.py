"""The checkpoints of a run, and the one to resume from."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from transformers.trainer import OPTIMIZER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.training_args import TrainingArguments
from transformers.utils import logging

from chatglm_ptuning.training.distributed import broadcast_object
from chatglm_ptuning.tuning.record import is_complete

logger = logging.get_logger(__name__)


def is_resumable(folder: str | Path) -> bool:
    """Whether a `checkpoint-N` has all files that a run needs to resume from it."""
    return (Path(folder) / TRAINER_STATE_NAME).exists() and is_complete(folder)


def last_checkpoint(run_folder: str | Path) -> Path | None:
    """The newest complete `checkpoint-N` of a run; None if there is none."""
    found = {}
    for folder in Path(run_folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = folder.name.rpartition("-")[2]
        if step.isdigit() and is_resumable(folder):
            found[int(step)] = folder
    return found[max(found)] if found else None


def remove_checkpoints(run_folder: str | Path) -> None:
    """Removes all checkpoints of an earlier run."""
    for folder in Path(run_folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        shutil.rmtree(folder)


def choose_checkpoint(args: TrainingArguments) -> Path | None:
    """The checkpoint that a run resumes from; None to start over.

    As in the official script, a run resumes from its last checkpoint unless `overwrite_output_dir` is set. A job that
    torchrun or Slurm has restarted always resumes. The first process decides for all.

    Raises:
        ValueError: if there is no checkpoint to resume from though one was requested, or not every machine sees it.
    """
    fault, chosen = None, None
    if args.process_index == 0:
        try:
            chosen = _choose(args)
        except ValueError as error:
            fault = str(error)
    fault, chosen = broadcast_object((fault, chosen))
    if fault is not None:
        raise ValueError(fault)
    if chosen is not None and is_resumable(chosen) and not (chosen / OPTIMIZER_NAME).exists():
        raise ValueError(
            f"{chosen} has no {OPTIMIZER_NAME}, as with save_only_model, so no run can resume from it. Start over by "
            "overwrite_output_dir without resume_from_checkpoint, or start another run from its weights: "
            f"ptuning_checkpoint {chosen} and another output_dir."
        )
    if chosen is not None and not is_resumable(chosen):
        raise ValueError(
            f"The first process resumes from {chosen}, which process {args.process_index} does not see: output_dir "
            "must be on storage that all machines share."
        )
    return chosen


def _choose(args: TrainingArguments) -> Path | None:
    newest = last_checkpoint(args.output_dir)
    if _was_restarted():
        logger.warning(f"The job was restarted; resuming from {newest or 'the beginning'}.")
        return newest if args.do_train else None
    wanted = args.resume_from_checkpoint
    if str(wanted).lower() in ("false", "0"):
        if args.do_train and newest is not None and not args.overwrite_output_dir:
            raise ValueError(
                f"resume_from_checkpoint: {wanted}, but {newest} is there. Set overwrite_output_dir to start over, or "
                "name another output_dir."
            )
        return None
    if wanted:
        if str(wanted).lower() in ("true", "1"):
            if newest is None:
                raise ValueError(f"resume_from_checkpoint: {args.output_dir} holds no complete checkpoint.")
            return newest
        if not is_resumable(wanted):
            raise ValueError(f"resume_from_checkpoint: {wanted} is not a complete checkpoint of a run.")
        return Path(wanted)
    if not args.do_train or newest is None or args.overwrite_output_dir:
        return None
    logger.warning(f"Resuming from {newest}; set overwrite_output_dir to start over.")
    return newest


def _was_restarted() -> bool:
    """Whether torchrun (`--max-restarts`) or Slurm (requeueing) has restarted the same command."""
    return any(int(os.environ.get(name) or 0) > 0 for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
