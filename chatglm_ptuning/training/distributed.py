"""Several processes: their setup, and collective operations on Python objects."""

from __future__ import annotations

import os
import socket
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed
from transformers.utils import logging

if TYPE_CHECKING:
    from transformers import TrainingArguments

logger = logging.get_logger(__name__)

RISKY_FP16_LEARNING_RATE = 2e-2
"""The official learning rate, with which losses of 0 and NaN were reported most often."""


def prepare_processes(args: TrainingArguments) -> None:
    """Prepares this process for its distributed job. Must be called before TrainingArguments sets itself up.

    - `deepspeed` without a launcher is a job of one process.
    - Without a GPU the processes talk through gloo. transformers counts a machine without a GPU as one process
      otherwise, however many were launched.
    """
    if args.deepspeed and "LOCAL_RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(_free_port()))
    # DeepSpeed calls deprecated functions of torch at every step.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if torch.accelerator.is_available() and not args.use_cpu:
        return
    if args.use_cpu and args.deepspeed and torch.accelerator.is_available():
        raise ValueError(
            "use_cpu and deepspeed: set the environment variable CUDA_VISIBLE_DEVICES= to hide the GPUs instead."
        )
    if not args.deepspeed:
        args.use_cpu = args.use_cpu or "LOCAL_RANK" in os.environ
        return
    from accelerate import PartialState
    from accelerate.state import AcceleratorState

    # Read by DeepSpeed when it is first imported.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    AcceleratorState._reset_state(reset_partial_state=True)
    import deepspeed.ops

    # Gloo notices when a process dies. DeepSpeed's shared-memory operator must be compiled first, and waits for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # With `use_cpu`, accelerate turns DeepSpeed off; there is only the CPU anyway.
    args.use_cpu = False
    PartialState(backend="gloo")
    args.accelerator_config = {**_as_dict(args.accelerator_config), "use_configured_state": True}


def _as_dict(config: Any) -> dict[str, Any]:
    return dict(config) if isinstance(config, dict) else {}


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def several() -> bool:
    """Whether this process is one of several."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is true on at least one process. Must be called on every rank."""
    if not several():
        return flag
    value = torch.tensor(float(flag), device=device)
    distributed.all_reduce(value, op=distributed.ReduceOp.MAX)
    return bool(value.item())


def broadcast_object(value: Any) -> Any:
    """Broadcasts the `value` of process 0. Must be called on every rank."""
    if not several():
        return value
    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def all_gather_objects(value: Any) -> list[Any]:
    """All-gathers the `value` of every process, in the order of the ranks. Must be called on every rank."""
    if not several():
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def match_precision(args: TrainingArguments, chosen: torch.dtype, quantization_bit: int | None) -> None:
    """Sets DeepSpeed's 16-bit mode as base and prefix need it; warns about float16 with a high learning rate.

    The prefix is trained in float32 beside a base of any type. Only where ZeRO-3 partitions the base does DeepSpeed
    have to know that it has 16 bits; its optimizer then works on float32 copies of the prefix. Elsewhere its bfloat16
    mode would round the prefix without a benefit, and is off.

    Args:
        chosen: dtype of the base.

    Raises:
        ValueError: for what DeepSpeed cannot do with the kit: ZeRO-3 on a quantised base, an own optimizer.
    """
    if (args.fp16 or chosen == torch.float16) and args.do_train and args.learning_rate >= RISKY_FP16_LEARNING_RATE:
        logger.warning(
            f"float16 with a learning rate of {args.learning_rate:g} often ends in a loss of 0 or NaN: numbers beyond "
            "65504 overflow. Use bfloat16 (bf16, dtype bfloat16) or a lower learning_rate (5e-3)."
        )
    if not args.deepspeed:
        return
    config = args.hf_deepspeed_config
    own = [name for name in ("optimizer", "scheduler") if config.get_value(name) is not None]
    if own:
        raise ValueError(
            f"The DeepSpeed configuration has its own {' and '.join(own)}: leave that out, and set optim, "
            "learning_rate, lr_scheduler_type and warmup_steps instead."
        )
    if config.is_zero3() and quantization_bit:
        raise ValueError(
            "ZeRO-3 cannot partition a quantised base: use quantization_bit with ds_config/zero1.json (every GPU has "
            "the small base), or ZeRO-3 without quantization_bit."
        )
    if not config.is_zero3():
        bf16, fp16 = False, args.fp16
    else:
        bf16 = args.bf16 or (chosen == torch.bfloat16 and not args.fp16)
        fp16 = args.fp16 or (chosen == torch.float16 and not args.bf16)
    _rebuild_deepspeed_config(args, bf16, fp16)


def _rebuild_deepspeed_config(args: TrainingArguments, bf16: bool, fp16: bool) -> None:
    """Rebuilds the configuration as the Trainer does after its arguments changed."""
    from accelerate.utils import DeepSpeedPlugin
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    if (args.bf16, args.fp16) == (bf16, fp16):
        return
    args.bf16, args.fp16 = bf16, fp16
    args.hf_deepspeed_config = HfTrainerDeepSpeedConfig(args.deepspeed)
    args.hf_deepspeed_config.trainer_config_process(args)
    args.deepspeed_plugin = DeepSpeedPlugin(hf_ds_config=args.hf_deepspeed_config)
