"""Times sides in alternation, so that what disturbs the machine disturbs all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sample:
    """Repeated measurements of one thing."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle value."""
        return statistics.median(self.values)

    @property
    def spread(self) -> tuple[float, float]:
        """The smallest and the largest value."""
        return min(self.values), max(self.values)

    def per(self, amount: float) -> Sample:
        """What is done in one unit of the values, if each of them is for `amount`: examples/s from seconds."""
        return Sample(tuple(amount / value for value in self.values))

    def times(self, factor: float) -> Sample:
        """The values in another unit."""
        return Sample(tuple(factor * value for value in self.values))


@dataclass(frozen=True)
class Timed:
    """Of one side: seconds of each round, and bytes of memory beyond those in use before it (GPU alone, else empty)."""

    seconds: Sample
    memory: Sample


def alternate(
    sides: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    advance: Callable[[str], None] = lambda name: None,
    warm_ups: int = 1,
) -> dict[str, Timed]:
    """Runs every side once in every round; every other round in reverse order.

    Args:
        sides: by their names; each does the same work in every call.
        advance: called with the name of a side before each of its calls, warm-ups included.
        warm_ups: calls of each side that are not timed; the first use of a shape loads kernels and takes memory.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    memory: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(-warm_ups, rounds):
        for name in list(sides)[:: -1 if number % 2 else 1]:
            advance(name)
            before = _allocated(device)
            start = time.perf_counter()
            sides[name]()
            wait_for(device)
            duration = time.perf_counter() - start
            if number < 0:
                continue
            seconds[name].append(duration)
            if device.type == "cuda":
                memory[name].append(torch.cuda.max_memory_allocated(device) - before)
    return {name: Timed(Sample(tuple(seconds[name])), Sample(tuple(memory[name]))) for name in sides}


def wait_for(device: torch.device) -> None:
    """Waits until the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _allocated(device: torch.device) -> int:
    wait_for(device)
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)
