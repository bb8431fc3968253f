"""`python -m benchmarks.serving`: loads a server, measures the engine, and writes serving.json, serving.md and .png."""

from __future__ import annotations

import os
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from transformers.utils import logging

from benchmarks.measure import free
from benchmarks.quantities import Result
from benchmarks.report import described, environment
from benchmarks.serving import engine, results
from benchmarks.serving.clients import load
from benchmarks.serving.mixed import send_mixed
from benchmarks.serving.requests import ADVERTISEMENTS, SHORT, Generator, make_prefixes, make_questions
from benchmarks.serving.server import Server, running
from benchmarks.shapes import SHAPES
from benchmarks.timing import Sample, alternate
from chatglm_ptuning.command_line import fail, parse_arguments
from chatglm_ptuning.model.arguments import BaseArguments

_QUESTIONS = 4096
_REFERENCES = 256
_ROUNDS = 3
_SLOT_TOKENS = 512
_BODY_LIMIT_KB = 64
_SECONDS_TO_SETTLE = 10


@dataclass
class LoadArguments(BaseArguments):
    """Flags of the program."""

    device: Literal["cpu", "cuda"] = field(default="cpu", metadata={"help": "where to measure"})
    seconds: float = field(default=120, metadata={"help": "how long the clients ask; 0 for no load"})
    alone: float = field(default=15, metadata={"help": "how long one client asks alone"})
    clients: int = field(default=64, metadata={"help": "clients at the same time"})
    prefixes: int = field(default=16, metadata={"help": "prefixes that they ask"})
    mixed: int = field(
        default=0, metadata={"help": "then so many requests that are cancelled, too large, malformed or slow, too"}
    )
    engine: list[str] | None = field(
        default=None,
        metadata={
            "help": "bases of random weights on which to measure the engine itself: S or M on a CPU, G (ChatGLM3-6B's "
            "sizes) or S on a GPU (default: G on a GPU, none on a CPU)"
        },
    )
    output: str = field(default="output/benchmark", metadata={"help": "folder of the results"})

    def __post_init__(self) -> None:
        if self.engine is None:
            self.engine = ["G"] if self.device == "cuda" else []
        unknown = [name for name in self.engine if name not in SHAPES]
        if unknown:
            raise ValueError(f"--engine must be among {', '.join(SHAPES)}, got {' '.join(unknown)}")
        for name, least in (("seconds", 0), ("alone", 0), ("clients", 1), ("prefixes", 1), ("mixed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be at least {least}, got {getattr(self, name)}")
        if not (self.seconds or self.mixed or self.engine):
            raise ValueError("--seconds 0 needs --mixed or --engine: there is nothing to do")


def main(argv: Sequence[str]) -> None:
    """Runs the load test; ends with exit code 1 if a request fails, or an answer is wrong."""
    (args,) = parse_arguments(
        "python -m benchmarks.serving",
        "Load the server with clients of many prefixes, and measure its engine.",
        (LoadArguments,),
        argv,
    )
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: torch finds no GPU.")
    try:
        found = run(args)
    except (OSError, RuntimeError, ValueError) as error:
        fail(str(error))
    wrong = [result for result in found if result.quantity in results.FAULTS and result.holds is False]
    if wrong:
        fail(f"The server fails: {', '.join(result.quantity.what for result in wrong)}; see the table.")


def run(args: LoadArguments) -> list[Result]:
    """Measures, and writes the files."""
    facts, console, started = environment(torch.device(args.device)), Console(), time.monotonic()
    console.print(described(facts), highlight=False)
    found: list[Result] = []
    timeline = None
    for name in args.engine:
        found += engine.measure(SHAPES[name], torch.device(args.device))
        free(torch.device(args.device))
    if args.seconds or args.mixed:
        rows, timeline = _served(args, console)
        found += rows
    results.write(Path(args.output), found, timeline, facts | {"seconds": round(time.monotonic() - started, 1)})
    results.table(found).show()
    return found


def _served(args: LoadArguments, console: Console) -> tuple[list[Result], results.Timeline | None]:
    found: list[Result] = []
    timeline = None
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        names = make_prefixes(args, folder, args.prefixes)
        flags = {"model_name_or_path": args.model_name_or_path, "prefix_dir": folder, "slot_tokens": _SLOT_TOKENS}
        if args.seconds:
            rows, timeline = _load(args, flags, names)
            found += rows
        if args.mixed:
            found += _mixed(args, flags, names, console)
    return found, timeline


def _load(args: LoadArguments, flags: dict, names: Sequence[str]) -> tuple[list[Result], results.Timeline]:
    generator = Generator(args, flags["prefix_dir"], names)
    questions = make_questions(generator.chat_format, names, _QUESTIONS, ADVERTISEMENTS, seed=0)
    others = make_questions(generator.chat_format, names, _QUESTIONS, ADVERTISEMENTS, seed=1)
    batch = questions[: args.clients]
    useful, computed = generator.tokens_of(batch)
    sides = {"batch": partial(generator.generate, batch)}
    before = alternate(sides, _ROUNDS, generator.model.device, warm_ups=0)["batch"].seconds
    with running(flags | {"slots": args.clients}) as server:
        load(server.url, others, len(names), 1.0)  # loads the prefixes
        alone = load(server.url, others[len(others) // 2 :], 1, args.alone)
        with server.watched() as moments:
            seen = load(server.url, questions, args.clients, args.seconds)
        lost = _unsettled(server)
    # Again, as the speed of a machine that others use, too, changes.
    after = alternate(sides, _ROUNDS, generator.model.device, warm_ups=0)["batch"].seconds
    seconds = Sample(before.values + after.values)
    clients = results.Load(args.clients)
    rows = clients.results(seen, alone, moments, seconds.per(useful), seconds.per(computed), args.seconds, lost)
    return rows, results.Timeline(seen, moments)


def _mixed(args: LoadArguments, flags: dict, names: Sequence[str], console: Console) -> list[Result]:
    generator = Generator(args, flags["prefix_dir"], names)
    questions = make_questions(generator.chat_format, names, _REFERENCES, SHORT, seed=2)
    references = [generator.single_run(question) for question in questions]
    del generator
    with running(flags | {"max_request_kb": _BODY_LIMIT_KB}, is_fragile=True) as server:
        outcome = send_mixed(server, questions, references, args.mixed, _BODY_LIMIT_KB * 1024)
        lost = _unsettled(server)
        slots = round(server.metric("chatglm_engine_slots"))
        after = load(server.url, questions, slots, 0.5)
    for kind, counts in outcome.counts.items():
        console.print(f"{kind}: " + ", ".join(f"{count} {what}" for what, count in counts.items()), highlight=False)
    for problem in outcome.problems:
        console.print(f"problem: {problem}", highlight=False, markup=False)
    return results.of_mixed(outcome, lost, after, args.mixed)


def _unsettled(server: Server) -> float:
    """Requests that still have a slot, or wait for one, when nobody asks any more."""
    deadline = time.monotonic() + _SECONDS_TO_SETTLE
    while True:
        left = server.metric("chatglm_engine_running") + server.metric("chatglm_engine_waiting")
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.1)


if __name__ == "__main__":
    if not sys.stdout.isatty():
        os.environ.setdefault("COLUMNS", "150")  # as wide as the table
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with suppress(KeyboardInterrupt):
        main(sys.argv[1:])
