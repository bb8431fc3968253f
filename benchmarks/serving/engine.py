"""Measures the engine itself, without a server: one request, and many under many prefixes or one."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence

import torch

from benchmarks.prefixes import PREFIXES, load_prefixes
from benchmarks.quantities import Quantity, Result
from benchmarks.shapes import Shape, make_model
from benchmarks.timing import alternate
from chatglm_ptuning.serving.engine.engine import Engine
from chatglm_ptuning.serving.engine.prefixes import RowPrefix
from chatglm_ptuning.serving.engine.request import SamplingSettings

REQUESTS = 64
_PROMPT_TOKENS = 32
_SLOT_TOKENS = 512
_STEPS_OF_ANSWER = 4
"""Times the tokens of `Shape.generated`."""
ALONE = Quantity("engine", "engine, one request", "", "tokens/s", {("cuda", "G"): 120})
MANY = Quantity(
    "engine", f"engine, {REQUESTS} requests under {PREFIXES} prefixes", "", "tokens/s", {("cuda", "G"): 3000}, digits=0
)
MIXED = Quantity(
    "engine", MANY.what, "under one prefix", "tokens/s",
    {("cuda", "G"): 0.95, ("cpu", "S"): 0.95, ("cpu", "M"): 0.95}, digits=0,
)  # fmt: skip


def measure(shape: Shape, device: torch.device, rounds: int | None = None) -> Iterator[Result]:
    """The results on one base: float32 on a CPU, bfloat16 on a GPU.

    Prompts are random, so that none begins like another, and answers have no stop token: all have the same length. The
    time of a round is from the first request to the last token, prompts included.

    Args:
        rounds: instead of the shape's own number.
    """
    model = make_model(shape, device, torch.float32 if device.type == "cpu" else torch.bfloat16)
    prefixes = [RowPrefix.of(model.prefix_batch(name)) for name in load_prefixes(model, shape)]
    draw, answer = random.Random(0), _STEPS_OF_ANSWER * shape.generated
    settings = SamplingSettings(answer)

    def ask(engine: Engine, chosen: Sequence[RowPrefix]) -> Callable[[], None]:
        def run() -> None:
            prompts = [draw.choices(range(3, model.config.padded_vocab_size), k=_PROMPT_TOKENS) for _ in chosen]
            running = [engine.submit(prompt, settings, prefix) for prompt, prefix in zip(prompts, chosen, strict=True)]
            assert sum(1 for generation in running for _ in generation) == answer * len(chosen)

        return run

    many = list(itertools.islice(itertools.cycle(prefixes), REQUESTS))
    with Engine(model, slots=REQUESTS, slot_tokens=_SLOT_TOKENS) as engine:
        sides = {
            "alone": ask(engine, prefixes[:1]),
            "many": ask(engine, many),
            "one": ask(engine, [prefixes[0]] * REQUESTS),
        }
        # A size of a step is called the first time, recorded the second time, and replayed then.
        warm_ups = 1 if device.type == "cpu" else 3
        timed = alternate(sides, rounds or shape.rounds, device, warm_ups=warm_ups)
    alone, mixed, same = (
        timed[name].seconds.per(answer * count) for name, count in (("alone", 1), ("many", REQUESTS), ("one", REQUESTS))
    )
    yield ALONE.row(device.type, shape.name, alone)
    yield MANY.row(device.type, shape.name, mixed)
    yield MIXED.row(device.type, shape.name, mixed, same)
