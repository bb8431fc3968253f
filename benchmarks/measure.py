"""Measures the wanted quantities on one base."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.memory import peak_memory
from benchmarks.peers import CheckpointedLora, Lora, PeftPrefix
from benchmarks.prefixes import load_prefixes, time_generation, time_switching
from benchmarks.quantities import QUANTITIES, Result
from benchmarks.shapes import Row, Shape, advertisements, as_steps, chats, grouped_by_length, make_model, tokens_of
from benchmarks.sides import BarePass, Kit, Official, Padded, Side
from benchmarks.timing import Sample, Timed, alternate

TRAINED = {"official": Official, "peft": PeftPrefix, "lora": CheckpointedLora, "plain_lora": Lora, "floor": BarePass}
"""The side that each quantity compares the kit with, on advertisements."""
USES_GPU_MEMORY = {"memory": Official, "peft_memory": PeftPrefix}
_MIB = 2**20
_MOST_ROUNDS_OF_CHATS = 3  # they take long
Advance = Callable[[str], None]


def measure(
    shape: Shape, wanted: Collection[str], device: torch.device, rounds: int | None, advance: Advance
) -> Iterator[Result]:
    """The results on one base: float32 on a CPU, bfloat16 on a GPU.

    Args:
        wanted: names of quantities; only those that have the shape among their goals are measured.
        rounds: instead of the shape's own number.
        advance: called with what is measured next.
    """
    names = [name for name in QUANTITIES if name in wanted and (device.type, shape.name) in QUANTITIES[name].goals]
    if not names:
        return
    rounds = rounds or shape.rounds
    if device.type == "cpu" and "memory" in names:  # before this process fills the memory
        yield _memory_on_cpu(shape, advance)
    advance("makes the base")
    model = make_model(shape, device, torch.float32 if device.type == "cpu" else torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        measured = [name for name in names if name in TRAINED or (device.type == "cuda" and name in USES_GPU_MEMORY)]
        if measured:
            yield from _training(model, shape, measured, rounds, device, advance, Path(folder))
        if "chats" in names:
            yield _long_chats(model, shape, rounds, device, advance, Path(folder))
    free(device)
    if "switching" in names or "mixed" in names:
        prefixes = load_prefixes(model, shape)
        if "switching" in names:
            advance("switching")
            switched, in_place = time_switching(model, prefixes, device)
            assert in_place, "switching the prefix has moved parameters of the base"
            yield QUANTITIES["switching"].row(device.type, shape.name, switched.times(1e3))
        if "mixed" in names:
            found = time_generation(model, prefixes, shape, rounds, device, advance)
            tokens = len(prefixes) * shape.generated
            speeds = [found[side].seconds.per(tokens) for side in ("mixed", "one")]
            yield QUANTITIES["mixed"].row(device.type, shape.name, *speeds)
    del model
    free(device)


def _training(
    model: Any,
    shape: Shape,
    names: list[str],
    rounds: int,
    device: torch.device,
    advance: Advance,
    folder: Path,
) -> Iterator[Result]:
    steps = as_steps(advertisements(shape, shape.steps * shape.batch), shape.batch)
    kinds = dict.fromkeys((TRAINED | USES_GPU_MEMORY)[name] for name in names)
    advance("prepares the sides")
    sides: dict[str, Side] = {Kit.name: Kit(model, steps, folder=folder)}
    sides |= {kind.name: kind(model, steps) for kind in kinds}
    timed = _alternate(sides, shape, rounds, len(steps), device, advance)
    examples, tokens = sum(map(len, steps)), tokens_of(steps)
    for name in names:
        ours, theirs = timed[Kit.name], timed[(TRAINED | USES_GPU_MEMORY)[name].name]
        if name in USES_GPU_MEMORY:
            pair = [side.memory.times(1 / _MIB) for side in (ours, theirs)]
        elif name == "floor":
            pair = [side.seconds.times(1e6 / tokens) for side in (ours, theirs)]
        else:
            pair = [side.seconds.per(examples) for side in (ours, theirs)]
        yield QUANTITIES[name].row(device.type, shape.name, *pair)


def _long_chats(model: Any, shape: Shape, rounds: int, device: torch.device, advance: Advance, folder: Path) -> Result:
    rows: list[Row] = grouped_by_length(chats(shape, shape.chats), shape.batch)
    steps = as_steps(rows, shape.batch)
    sides: dict[str, Side] = {
        Kit.name: Kit(model, steps, shape.chats_at_once, folder=folder),
        Padded.name: Padded(model, steps, shape.chats_at_once),
    }
    timed = _alternate(sides, shape, min(rounds, _MOST_ROUNDS_OF_CHATS), len(steps), device, advance)
    pair = [timed[name].seconds.per(len(rows)) for name in (Kit.name, Padded.name)]
    return QUANTITIES["chats"].row(device.type, shape.name, *pair)


def _alternate(
    sides: Mapping[str, Side], shape: Shape, rounds: int, steps: int, device: torch.device, advance: Advance
) -> dict[str, Timed]:
    def run(side: Side) -> None:
        for _ in range(steps):
            side.step()

    # On a GPU the first use of a shape loads kernels, and the second may still tune them.
    warm_ups = shape.warm_ups if device.type == "cpu" else 2
    calls = {name: partial(run, side) for name, side in sides.items()}
    return alternate(calls, rounds, device, advance, warm_ups)


def _memory_on_cpu(shape: Shape, advance: Advance) -> Result:
    peaks = []
    for side in (Kit.name, Official.name):
        advance(f"memory of {side}")
        peaks.append(Sample((peak_memory(shape, side) / _MIB,)))
    return QUANTITIES["memory"].row("cpu", shape.name, *peaks)


def free(device: torch.device) -> None:
    """Frees the memory of models that are no longer used."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
