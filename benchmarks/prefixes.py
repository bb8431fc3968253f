"""What several loaded prefixes cost: switching among them, and a batch whose rows have different ones."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.shapes import Shape
from benchmarks.timing import Sample, Timed, alternate, wait_for
from chatglm_ptuning.prefix.bank import LoadedPrefix

PREFIXES = 16
_PROMPT_TOKENS = 32
_SWITCHES = 160
NO_END = -1
"""An id that no token has, so that every row has the same number of new tokens."""


def load_prefixes(model: Any, shape: Shape) -> list[str]:
    """Loads prefixes of random values; returns their names."""
    generator = torch.Generator().manual_seed(0)
    size = (shape.prefix, *model.transformer.prefix_encoder.kv_shape)
    names = [f"prefix {number}" for number in range(PREFIXES)]
    for name in names:
        # From a file it would take longer, but give the same prefix.
        model.transformer.prefixes.add(name, LoadedPrefix(torch.randn(size, generator=generator), {}))
    return names


@torch.no_grad()
def time_switching(model: Any, names: list[str], device: torch.device) -> tuple[Sample, bool]:
    """Seconds from one selected prefix to the argument of the next forward pass with another one.

    This is all that a forward pass does differently; it makes the same argument without a switch, too, so that the
    real cost is below this one. Every prefix is used once before: then it is copied to the device, and kept there.

    Returns:
        Seconds of each switch, and whether the parameters of the base are still where they were.
    """
    before = [parameter.data_ptr() for parameter in model.parameters()]
    seconds = []
    for number in range(len(names) + _SWITCHES):
        wait_for(device)
        start = time.perf_counter()
        model.set_prefix(names[number % len(names)])
        model.resolve_prefix()
        wait_for(device)
        if number >= len(names):
            seconds.append(time.perf_counter() - start)
    return Sample(tuple(seconds)), before == [parameter.data_ptr() for parameter in model.parameters()]


def time_generation(
    model: Any, names: list[str], shape: Shape, rounds: int, device: torch.device, advance: Callable[[str], None]
) -> dict[str, Timed]:
    """Seconds of generation for one row per prefix: `mixed`, each with its own, and `one`, all with the first."""
    generator = torch.Generator().manual_seed(0)
    size = (len(names), _PROMPT_TOKENS)
    ids = torch.randint(3, model.config.padded_vocab_size, size, generator=generator).to(device)

    def generate(prefix: str | list[str]) -> None:
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            prefix=prefix,
            max_new_tokens=shape.generated,
            min_new_tokens=shape.generated,
            do_sample=False,
            eos_token_id=NO_END,
        )

    model.eval()
    return alternate({"mixed": lambda: generate(names), "one": lambda: generate(names[0])}, rounds, device, advance)
