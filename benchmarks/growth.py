"""`python -m benchmarks.growth`: how a step's time grows with length, batch, prefix and layers, with pictures."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import free
from benchmarks.peers import PeftPrefix
from benchmarks.report import described, environment
from benchmarks.shapes import Shape, make_model, random_base, rows_of_length
from benchmarks.sides import BarePass, Kit, Padded, Side
from benchmarks.timing import Sample, alternate
from chatglm_ptuning.command_line import parse_arguments
from chatglm_ptuning.figures import Mark, draw_lines
from chatglm_ptuning.files import write_json

JSON_FILE = "growth.json"


@dataclass(frozen=True)
class Setting:
    """A training step: rows of one length on a base of some layers."""

    length: int = 128
    batch: int = 8
    prefix: int = 128
    layers: int = 4


POINTS = {
    "length": ("tokens of a row", [32, 64, 128, 256, 512, 1024]),
    "batch": ("rows of a step", [1, 2, 4, 8, 16, 32]),
    "prefix": ("virtual tokens", [16, 32, 64, 128, 256, 512]),
    "layers": ("layers", [1, 2, 4, 8, 16]),
}
"""What grows, its name on the axis, and its values; everything else is as in `Setting()`."""
_SIZES = {
    "padded_vocab_size": 8032, "hidden_size": 256, "ffn_hidden_size": 704, "kv_channels": 32, "num_attention_heads": 8,
}  # fmt: skip


@dataclass
class GrowthArguments:
    """Flags of the program."""

    output: str = field(default="output/benchmark", metadata={"help": "folder of the results"})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda"})
    rounds: int = field(default=3, metadata={"help": "how often each side is timed"})
    points: int | None = field(default=None, metadata={"help": "only the first points of each line (default: all)"})


def seconds_of_step(setting: Setting, device: torch.device, rounds: int) -> dict[str, Sample]:
    """Seconds of a training step for every side."""
    shape = Shape("growth", random_base(num_layers=setting.layers, **_SIZES), prefix=setting.prefix)
    model = make_model(shape, device, torch.float32 if device.type == "cpu" else torch.bfloat16)
    steps = [rows_of_length(shape, setting.length, setting.batch)]
    with tempfile.TemporaryDirectory() as folder:
        sides: list[Side] = [Kit(model, steps, folder=Path(folder))]
        sides += [kind(model, steps) for kind in (Padded, PeftPrefix, BarePass)]
        calls: dict[str, Callable[[], Any]] = {side.name: side.step for side in sides}
        timed = alternate(calls, rounds, device)
    free(device)
    return {name: found.seconds for name, found in timed.items()}


def main(argv: Sequence[str]) -> None:
    """Measures, and writes growth.json and a picture for each line."""
    (args,) = parse_arguments(
        "python -m benchmarks.growth",
        "Measure how the time of a training step grows.",
        (GrowthArguments,),
        argv,
    )
    device, folder = torch.device(args.device), Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    facts, rows = environment(device), []
    print(described(facts))
    for name, (axis, values) in POINTS.items():
        lines: dict[str, list[Mark]] = {}
        for value in values[: args.points]:
            for side, seconds in seconds_of_step(replace(Setting(), **{name: value}), device, args.rounds).items():
                lines.setdefault(side, []).append(Mark(value, seconds.median))
                rows.append({"grows": name, "value": value, "side": side, "seconds": seconds.values})
        draw_lines(folder / f"growth_{name}.png", lines, axis, "seconds of a step", log_base=2)
        write_json(folder / JSON_FILE, facts | {"common": vars(Setting()), "sizes": _SIZES, "rows": rows})
        for side, marks in lines.items():
            print(f"{axis}, {side}: " + ", ".join(f"{mark.x:g}: {mark.y:.3f} s" for mark in marks))


if __name__ == "__main__":
    main(sys.argv[1:])
