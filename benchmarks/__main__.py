"""`python -m benchmarks`: measures, prints the table, and writes benchmark.json, benchmark.md and benchmark.png."""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from transformers.utils import logging

from benchmarks.golden import Check, check_golden
from benchmarks.measure import measure
from benchmarks.quantities import QUANTITIES, Result
from benchmarks.report import JSON_FILE, described, environment, table, write
from benchmarks.shapes import SHAPES
from chatglm_ptuning.command_line import fail, parse_arguments

_SHAPES_OF = {"cpu": ["S", "M", "W"], "cuda": ["S", "G"]}

_BUSY = 0.5
"""Load average from which on other programs disturb the threads of a measurement."""


@dataclass
class BenchmarkArguments:
    """Flags of the program."""

    device: Literal["cpu", "cuda"] = field(default="cpu", metadata={"help": "where to measure"})
    shapes: list[str] | None = field(
        default=None, metadata={"help": "bases: S, M and W on a CPU, S and G on a GPU (default: all of these)"}
    )
    quantities: list[str] | None = field(
        default=None, metadata={"help": f"what to measure: {', '.join(QUANTITIES)} (default: all)"}
    )
    rounds: int | None = field(
        default=None, metadata={"help": "how often each side is timed (default: by the size of the base)"}
    )
    output: str = field(default="output/benchmark", metadata={"help": "folder of the results"})

    def __post_init__(self) -> None:
        self.shapes = self.shapes or _SHAPES_OF[self.device]
        self.quantities = self.quantities or list(QUANTITIES)
        for flag, given, known in (("shapes", self.shapes, SHAPES), ("quantities", self.quantities, QUANTITIES)):
            unknown = [name for name in given if name not in known]
            if unknown:
                raise ValueError(f"--{flag} must be among {', '.join(known)}, got {' '.join(unknown)}")
        if self.rounds is not None and self.rounds < 1:
            raise ValueError(f"--rounds must be at least 1, got {self.rounds}")


def main(argv: Sequence[str]) -> None:
    """Runs the benchmark; ends with exit code 1 if the device or a package is missing, or a check fails."""
    (args,) = parse_arguments(
        "python -m benchmarks",
        "Compare the kit's speed and memory with other ways to tune the same base.",
        (BenchmarkArguments,),
        argv,
    )
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: torch finds no GPU.")
    try:
        results, checks = run(args)
    except (ImportError, RuntimeError) as error:
        fail(str(error))
    if not all(check.holds for check in checks):
        fail("The model does not compute what the original code computes on this device; see the checks above.")
    if not results:
        fail("None of these quantities has a goal on these shapes and this device.")


def run(args: BenchmarkArguments) -> tuple[list[Result], list[Check]]:
    """Checks, then measures shape after shape; the files always hold what is known so far."""
    device, folder, console = torch.device(args.device), Path(args.output), Console()
    facts, started, results = environment(device), time.monotonic(), []
    console.print(described(facts), highlight=False)
    if facts["load_average_before"] > _BUSY:
        console.print(f"The machine is busy (load average {facts['load_average_before']:.1f}): times will be wrong.")
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        shown = progress.add_task("golden cases", total=len(args.shapes) + 1)
        checks = list(check_golden(device))
        progress.advance(shown)
        _show(console, checks)
        for name in args.shapes:
            advance = _advance(progress, shown, name)
            for result in measure(SHAPES[name], args.quantities, device, args.rounds, advance):
                results.append(result)
                write(folder, results, checks, facts | {"seconds": round(time.monotonic() - started, 1)})
            progress.advance(shown)
    table(results, "This kit beside others: medians (smallest to largest)").show()
    _summarise(console, results)
    console.print(f"{time.monotonic() - started:.0f} s; {folder / JSON_FILE}", highlight=False)
    return results, checks


def _advance(progress: Progress, task: TaskID, shape: str) -> Callable[[str], None]:
    return lambda what: progress.update(task, description=f"{shape}: {what}")


def _show(console: Console, checks: Sequence[Check]) -> None:
    for check in checks:
        value = check.error or f"{check.value:.1e}, allowed {check.allowed:g}"
        console.print(
            f"{'holds' if check.holds else 'FAILS'}: {check.attention}, {check.what}: {value}", highlight=False
        )


def _summarise(console: Console, results: Sequence[Result]) -> None:
    decided = [result for result in results if result.holds is not None]
    compared = [result for result in results if result.winner]
    won = [result for result in compared if result.winner == "this kit"]
    console.print(
        f"This kit is better in {len(won)} of {len(compared)} comparisons; "
        f"{sum(map(bool, (result.holds for result in decided)))} of {len(decided)} goals hold.",
        highlight=False,
    )


if __name__ == "__main__":
    if not sys.stdout.isatty():
        os.environ.setdefault("COLUMNS", "170")  # as wide as the table
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.get_logger("chatglm_ptuning").setLevel(logging.ERROR)
    logging.disable_progress_bar()
    main(sys.argv[1:])
