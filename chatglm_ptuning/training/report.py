"""The report of a run: its cost, a loss curve and sample answers."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from chatglm_ptuning.figures import drawing
from chatglm_ptuning.model.zero3 import is_partitioned, whole_shape
from chatglm_ptuning.training.distributed import all_gather_objects


def draw_loss_curve(log_history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws training loss, evaluation loss and learning rate over the steps as a PNG."""
    training = [(entry["step"], entry["loss"]) for entry in log_history if "loss" in entry]
    evaluation = [(entry["step"], entry["eval_loss"]) for entry in log_history if "eval_loss" in entry]
    rates = [(entry["step"], entry["learning_rate"]) for entry in log_history if "learning_rate" in entry]
    with drawing(path, 8, 4.5) as axis:
        if training:
            axis.plot(*zip(*training, strict=True), label="training loss", color="tab:blue")
        if evaluation:
            axis.plot(*zip(*evaluation, strict=True), "o-", label="evaluation loss", color="tab:orange")
        axis.set(xlabel="step", ylabel="loss (nats per token, or per label of a linear head)")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        if training or evaluation:
            axis.legend(loc="upper right")
        if rates:
            right = axis.twinx()
            right.plot(*zip(*rates, strict=True), color="tab:gray", linestyle=":", label="learning rate")
            right.set_ylabel("learning rate")
            right.set_ylim(bottom=0)


def print_samples(prompts: Sequence[str], references: Sequence[str], answers: Mapping[str, Sequence[str]]) -> None:
    """Prints questions with the reference and the answer of every model."""
    console = Console()
    for place, (prompt, reference) in enumerate(zip(prompts, references, strict=True)):
        console.rule(f"sample {place + 1}")
        rows = {"source": prompt, "wanted": reference, **{name: texts[place] for name, texts in answers.items()}}
        for name, text in rows.items():
            console.print(Text(f"{name}: ", style="bold").append(text or "(empty)", style=""))


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
