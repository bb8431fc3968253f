"""The cost of a training: number of trained parameters, and peak memory."""

from __future__ import annotations

import resource
import sys

import torch

from chatglm_ptuning.model.zero3 import is_partitioned, whole_shape
from chatglm_ptuning.training.distributed import all_gather_objects


def trained_parameters(model: torch.nn.Module) -> dict[str, float]:
    """`train_trainable_parameters`, and their share of all parameters, `train_trainable_share` (0 to 1)."""
    if is_partitioned(model.parameters()):
        sizes = [(whole_shape(value).numel(), value.requires_grad) for value in model.parameters()]
        trained, total = sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)
    else:
        trained, total = model.num_parameters(only_trainable=True), model.num_parameters()
    return {"train_trainable_parameters": trained, "train_trainable_share": trained / total}


def peak_memory() -> dict[str, int | str]:
    """`train_peak_memory_bytes`, the maximum over the processes, and `train_peak_memory_of`: what was counted.

    On a GPU it is what torch had allocated there at once. On the CPU it is the resident set of the process, since it
    started, so with Python, libraries and the loading of the base. Must be called on every rank.
    """
    if torch.cuda.is_available():
        peak, kind = torch.cuda.max_memory_allocated(), "GPU memory allocated by torch"
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        peak, kind = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "resident set of the process"
    return {"train_peak_memory_bytes": max(all_gather_objects(peak)), "train_peak_memory_of": kind}
