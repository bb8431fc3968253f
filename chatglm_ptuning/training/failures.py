"""Errors that end a run early. Each message names the fault, the saved checkpoint, and the way out."""

from __future__ import annotations

import errno
from pathlib import Path

import torch
from accelerate.utils.memory import should_reduce_batch_size
from transformers import TrainingArguments

from chatglm_ptuning.training.checkpoints import last_checkpoint

SIGTERM_EXIT_CODE = 143
"""128 + SIGTERM, as shells and Slurm count."""
_PEER_WORDS = (
    "Connection closed by peer",
    "Connection reset",
    "Broken pipe",
    "NCCL",
    "ncclRemoteError",
    "gloo",
    "Timed out",
)


class TrainingStopped(RuntimeError):
    """The run cannot continue; the message is for the user."""


class TrainingDiverged(TrainingStopped):
    """Losses or gradients are not finite or not usable. The message names the saved checkpoint and what to change.

    Args:
        what: the fault, e.g. "The loss became nan".
        step: where, counted from 1.
    """

    def __init__(self, what: str, step: int, arguments: TrainingArguments) -> None:
        advice = [f"a lower --learning_rate (it is {arguments.learning_rate:g}; try a tenth)"]
        if arguments.fp16:
            advice.insert(0, "--bf16 instead of --fp16, or --dtype float32")
        super().__init__(
            f"{what} at step {step}; training has stopped. {what_is_kept(arguments)} Try {' and '.join(advice)}."
        )


class AllLabelsMasked(TrainingStopped):
    """A step has no label that is not masked, so that its mean loss is undefined."""

    def __init__(self, step: int) -> None:
        super().__init__(
            f"Every label of step {step} is masked, so that nothing can be learned; training has stopped. Look at "
            'the rows (every answer "loss": false?), and at --max_source_length and --max_target_length, which may cut '
            "the answers away."
        )


class NothingTrained(TrainingStopped):
    """No step has changed a parameter, so there is nothing to save.

    Args:
        steps: number of steps taken.
        rows: number of training rows.
        batch: rows of one batch on all processes.
    """

    def __init__(self, steps: int, rows: int, batch: int, arguments: TrainingArguments) -> None:
        if steps:
            skipped = ", or they were skipped because float16 gradients overflowed" if arguments.fp16 else ""
            reason = (
                f"none of the {steps} steps changed a parameter: their learning rate was 0 (--learning_rate "
                f"{arguments.learning_rate:g}, --warmup_steps {arguments.warmup_steps:g}, --lr_scheduler_type "
                f"{arguments.lr_scheduler_type.value}){skipped}. Train for more steps, or with fewer --warmup_steps"
            )
        elif arguments.dataloader_drop_last and rows < batch:
            reason = (
                f"no step was taken: {rows} training rows do not fill a batch of {batch}, and --dataloader_drop_last "
                f"drops what does not. Leave it out, or set --per_device_train_batch_size to {rows} or less"
            )
        else:
            reason = (
                f"no step was taken on {rows} training rows (--max_steps {arguments.max_steps}, --num_train_epochs "
                f"{arguments.num_train_epochs:g})"
            )
        super().__init__(f"Nothing was trained, and nothing is saved: {reason}.")


class OutOfMemory(TrainingStopped):
    """A forward and backward pass did not fit into memory.

    Args:
        lengths: number of tokens of every row of the pass, without padding.
        padded: number of tokens of a row with padding; without meaning for packed rows.
        general_rows: general rows (`--preserve_base`) in the same step.
    """

    def __init__(
        self,
        lengths: list[int],
        padded: int,
        pre_seq_len: int,
        arguments: TrainingArguments,
        general_rows: int = 0,
    ) -> None:
        batch, accumulation = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
        smaller = max(1, batch // 2)
        ways = []
        if general_rows > 1:
            ways.append(f"--preserve_batch_size {general_rows // 2} (fewer general rows a step)")
        same = "" if general_rows else "the same training, "
        if arguments.packing and len(lengths) > 1:
            ways.append(f"--max_tokens_per_pass {max(max(lengths), sum(lengths) // 2)} (the same training)")
        elif batch > 1 and not arguments.packing:
            ways.append(
                f"--per_device_train_batch_size {smaller} --gradient_accumulation_steps "
                f"{-(-batch * accumulation // smaller)} ({same}a little slower; or --auto_find_batch_size)"
            )
        else:
            ways.append("a smaller --max_source_length or --max_target_length (it is one row already)")
        if not arguments.activation_checkpointing and not getattr(arguments, "gradient_checkpointing", False):
            ways.append("--gradient_checkpointing (about a third slower)")
        ways.append("--quantization_bit 8 or 4 (a smaller base)")
        if arguments.world_size > 1:
            ways.append("DS_CONFIG=ds_config/zero3.json (the base is shared among the GPUs)")
        numbered = "".join(f"\n  {place}. {way}" for place, way in enumerate(ways, 1))
        super().__init__(
            f"Out of memory on {arguments.device} (process {arguments.process_index}): a pass of {len(lengths)} rows "
            f"of {', '.join(map(str, lengths))} tokens{'' if arguments.packing else f', padded to {padded}'}, with "
            f"{pre_seq_len} of the prefix"
            f"{f', and {general_rows} general rows of --preserve_base' if general_rows else ''}, did not fit. "
            f"{what_is_kept(arguments)} Cheapest first:{numbered}"
        )


class CheckpointNotWritten(TrainingStopped):
    """A checkpoint could not be written, usually because the disk is full."""

    def __init__(self, name: str, needed: int, free: int, reason: str, arguments: TrainingArguments) -> None:
        super().__init__(
            f"{name} could not be written: {reason}. It needs about {_size(needed)}, and {_size(free)} are free at "
            f"{arguments.output_dir}. {what_is_kept(arguments)} Make room (a lower --save_total_limit, another "
            "--output_dir), then resume with --resume_from_checkpoint true."
        )


class Preempted(TrainingStopped):
    """SIGTERM ended the run after its state was saved."""


class ProcessLost(TrainingStopped):
    """Another process of the job ended, so that this one cannot continue."""

    def __init__(self, error: BaseException, arguments: TrainingArguments) -> None:
        reason = str(error).strip().splitlines()
        super().__init__(
            f"Process {arguments.process_index} of {arguments.world_size} has lost another process of the job, which "
            "was killed or has failed: see what it and the launcher say (a killed one says nothing; often the system "
            f"ran out of memory, see `dmesg`). {what_is_kept(arguments)} Resume with --resume_from_checkpoint true. "
            f"({reason[0] if reason else type(error).__name__})"
        )


def what_is_kept(arguments: TrainingArguments) -> str:
    """One sentence on the last checkpoint."""
    checkpoint = last_checkpoint(arguments.output_dir)
    return f"The last good checkpoint is {checkpoint}." if checkpoint else "No checkpoint was written yet."


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of any type means that a device or the system is out of memory."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, Exception) and should_reduce_batch_size(error)
    )


def is_lost_process(error: BaseException) -> bool:
    """Whether an exception means that another process ended."""
    if isinstance(error, torch.distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _PEER_WORDS)


def is_disk_full(error: BaseException) -> bool:
    """Whether an exception from writing a file means that the disk is full."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    # torch.save and safetensors give only a text.
    return any(
        word in str(error) for word in ("file write failed", "No space left", "File too large", "unexpected pos")
    )


def _size(number: int) -> str:
    return f"{number / 2**30:.1f} GB" if number >= 2**30 else f"{number / 2**20:.1f} MB"


def folder_size(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
