"""What a run leaves for people: a loss curve and sample answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from chatglm_ptuning.figures import drawing


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
    """Prints a few questions with the wanted answer and those of every system."""
    console = Console()
    for place, (prompt, reference) in enumerate(zip(prompts, references, strict=True)):
        console.rule(f"sample {place + 1}")
        rows = {"source": prompt, "wanted": reference, **{name: texts[place] for name, texts in answers.items()}}
        for name, text in rows.items():
            console.print(Text(f"{name}: ", style="bold").append(text or "(empty)", style=""))
