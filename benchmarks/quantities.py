"""What is measured, and what is to be reached."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.timing import Sample


@dataclass(frozen=True)
class Quantity:
    """One comparison.

    Attributes:
        name: on the command line.
        what: is measured.
        theirs: the other side; "" for none.
        goals: for a kind of device and a shape of the base what the ratio of both sides must reach, or, without another
            side, the value itself. None: it is measured without a goal.
        less_is_better: whether it is to be at most the goal.
        digits: after the decimal point, in the tables.
    """

    name: str
    what: str
    theirs: str
    unit: str
    goals: Mapping[tuple[str, str], float | None]
    less_is_better: bool = False
    digits: int = 1

    def row(self, device: str, shape: str, ours: Sample, theirs: Sample | None = None) -> Result:
        """The result of measurements in the quantity's unit."""
        return Result(self, shape, self.goals.get((device, shape)), ours, theirs)


def _on_cpu(**goals: float) -> dict[tuple[str, str], float | None]:
    return {("cpu", shape): goal for shape, goal in goals.items()}


def _on_gpu(**goals: float | None) -> dict[tuple[str, str], float | None]:
    return {("cuda", shape): goal for shape, goal in goals.items()}


TRAINING, TIME, MEMORY = "training", "time of a useful token", "memory above the weights"
QUANTITIES = {
    quantity.name: quantity
    for quantity in (
        Quantity("official", TRAINING, "official recipe", "examples/s",
                 _on_cpu(S=2.3, M=2.8, W=2.5, tiny=1.0) | _on_gpu(S=None, G=2.5)),
        Quantity("peft", TRAINING, "PEFT prefix tuning", "examples/s",
                 _on_cpu(S=1.5, M=1.5, W=1.5, tiny=1.0) | _on_gpu(S=None, G=1.3)),
        Quantity("lora", TRAINING, "LoRA", "examples/s",
                 _on_cpu(S=1.8, M=1.8, W=1.8, tiny=1.0) | _on_gpu(S=None)),
        Quantity("plain_lora", TRAINING, "LoRA without checkpointing", "examples/s", _on_gpu(G=2.3)),
        Quantity("floor", TIME, "bare pass", "µs",
                 _on_cpu(S=1.1, M=1.1, W=1.1, tiny=1.1) | _on_gpu(S=None, G=1.1), less_is_better=True),
        Quantity("chats", "training on long chats", "dynamic padding", "examples/s",
                 _on_cpu(S=2.0, M=2.0, tiny=1.0) | _on_gpu(S=None), digits=2),
        Quantity("memory", MEMORY, "official recipe", "MiB",
                 _on_cpu(M=0.25, W=0.6, tiny=1.0) | _on_gpu(G=None), less_is_better=True, digits=0),
        Quantity("peft_memory", MEMORY, "PEFT prefix tuning", "MiB", _on_gpu(G=0.5), less_is_better=True, digits=0),
        Quantity("switching", "switching among 16 loaded prefixes", "", "ms",
                 _on_cpu(S=0.2, M=0.2, W=0.2, tiny=0.2) | _on_gpu(S=0.2, G=0.2), less_is_better=True, digits=3),
        Quantity("mixed", "generation with 16 prefixes", "one prefix", "tokens/s",
                 _on_cpu(S=0.95, M=0.95, tiny=0.95) | _on_gpu(S=0.95, G=0.95)),
    )
}  # fmt: skip
"""The goals are the only numbers here that are not measured."""


@dataclass(frozen=True)
class Result:
    """What was measured of a quantity on one base."""

    quantity: Quantity
    shape: str
    goal: float | None
    ours: Sample
    theirs: Sample | None

    @property
    def ratio(self) -> float | None:
        """Ours over theirs, of the medians."""
        return None if self.theirs is None else self.ours.median / self.theirs.median

    @property
    def holds(self) -> bool | None:
        """Whether the goal is reached; None without one."""
        if self.goal is None:
            return None
        value = self.ours.median if self.ratio is None else self.ratio
        return value <= self.goal if self.quantity.less_is_better else value >= self.goal

    @property
    def winner(self) -> str:
        """The better side; "" without another side."""
        if self.ratio is None:
            return ""
        return "this kit" if (self.ratio < 1) == self.quantity.less_is_better else self.quantity.theirs

    def as_json(self) -> dict[str, Any]:
        """A row of `benchmark.json`."""
        quantity = self.quantity
        return {
            "quantity": quantity.what,
            "compared_with": quantity.theirs or None,
            "shape": self.shape,
            "ours": self.ours.median,
            "theirs": None if self.theirs is None else self.theirs.median,
            "unit": quantity.unit,
            "ratio": self.ratio,
            "goal": self.goal,
            "goal_is": "at most" if quantity.less_is_better else "at least",
            "holds": self.holds,
            "winner": self.winner or None,
            "ours_spread": self.ours.spread,
            "theirs_spread": None if self.theirs is None else self.theirs.spread,
            "measurements": len(self.ours.values),
        }
