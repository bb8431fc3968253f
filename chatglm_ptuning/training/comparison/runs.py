"""The runs of a comparison: each a process of `chatglm-ptuning train` in a folder of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from chatglm_ptuning.command_line import flag_words
from chatglm_ptuning.files import write_atomically
from chatglm_ptuning.training.comparison.plan import Cell

RUN_FILE = "compare_run.json"
"""What a run was started with; only a folder that has it is ever emptied."""
LOG_FILE = "log.txt"
_LINES_SHOWN = 15
_POLL_SECONDS = 0.1
_STOP_SECONDS = 30


@dataclass(frozen=True)
class Run:
    """One seed of a cell.

    Attributes:
        folder: of the run.
        flags: all that `train` is given but the folder.
    """

    cell: Cell
    seed: int
    folder: Path
    flags: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Its name for people."""
        return f"{self.cell.task} / {self.cell.method} / seed {self.seed}"

    @property
    def command(self) -> list[str]:
        """The command line of its process."""
        words = flag_words({**self.flags, "output_dir": str(self.folder)})
        return [sys.executable, "-m", "chatglm_ptuning", "train", *words]

    @property
    def predictions(self) -> Path:
        """The file with each example's score."""
        return self.folder / "predict" / "predictions.jsonl"

    def results(self) -> dict[str, Any] | None:
        """The results of the run if it has finished, by the same flags; else None."""
        started, results = _read(self.folder / RUN_FILE), _read(self.folder / "all_results.json")
        if started is None or results is None or started.get("flags") != flag_words(self.flags):
            return None
        if not self.predictions.is_file():
            return None
        return results if f"predict_{self.cell.definition.metric}" in results else None

    def prepare(self) -> None:
        """Makes its folder an empty one that says what is run.

        An unfinished or different run is not gone on with: its time and its memory would not be those of one run.

        Raises:
            ValueError: if the folder holds what is no run of a comparison.
        """
        if self.folder.exists():
            if any(self.folder.iterdir()) and not (self.folder / RUN_FILE).is_file():
                raise ValueError(
                    f"{self.folder} holds files that are no run of a comparison; move them away, or name another "
                    "--output_dir."
                )
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True)
        with write_atomically(self.folder / RUN_FILE) as temporary:
            content = {"flags": flag_words(self.flags)}
            temporary.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")

    def end_of_log(self) -> str:
        """The last lines that it printed."""
        text = (self.folder / LOG_FILE).read_text(encoding="utf-8", errors="replace")
        lines = [line.rpartition("\r")[2] for line in text.splitlines() if line.strip()]
        return "\n".join(lines[-_LINES_SHOWN:])


@dataclass(frozen=True)
class Failure:
    """A run that ended without a score.

    Attributes:
        code: exit code of its process, negative if a signal ended it.
        log: the last lines that it printed.
    """

    run: Run
    code: int
    log: str


def runs_of(cells: Sequence[Cell], seeds: Sequence[int], base: str, output: Path) -> list[Run]:
    """All runs: seed by seed, so that a comparison that is stopped has all methods on the first seeds."""
    runs = []
    for seed in seeds:
        for cell in cells:
            trains = cell.flags.get("tuning") != "none"
            flags = {"model_name_or_path": base, **cell.flags, "do_predict": True, "seed": seed}
            if trains:
                flags["do_train"] = True
            runs.append(Run(cell, seed, output / cell.folder / f"seed-{seed}", flags))
    return runs


def run_all(
    runs: Sequence[Run],
    workers: int,
    started: Callable[[Run], None] = lambda run: None,
    ended: Callable[[Run, Failure | None, float], None] = lambda run, failure, seconds: None,
    inherited: Sequence[int] = (),
) -> None:
    """Runs all, `workers` at a time; with GPUs, each on one of them, in turn.

    However it ends, no process is left behind.

    Args:
        started, ended: are told of each run; `ended` also how it failed, and the seconds that its process took.
        inherited: descriptors that the processes get, too: with a lock's, it lasts as long as any of them, also where
            this process is killed and leaves them behind.
    """
    gpus = _gpus()
    free = list(range(workers))
    waiting = iter(runs)
    running: dict[int, tuple[Run, subprocess.Popen, IO[bytes], float]] = {}
    try:
        while True:
            for slot in list(free):
                run = next(waiting, None)
                if run is None:
                    break
                gpu = gpus[slot % len(gpus)] if gpus else None
                running[slot] = (run, *_start(run, gpu, inherited), time.monotonic())
                free.remove(slot)
                started(run)
            if not running:
                return
            time.sleep(_POLL_SECONDS)
            for slot, (run, process, log, since) in list(_ended(running)):
                del running[slot]
                free.append(slot)
                log.close()
                failure = None
                if process.returncode != 0 or run.results() is None:
                    failure = Failure(run, process.returncode, run.end_of_log())
                ended(run, failure, time.monotonic() - since)
    finally:
        _stop(running)


def _start(run: Run, gpu: str | None, inherited: Sequence[int]) -> tuple[subprocess.Popen, IO[bytes]]:
    run.prepare()
    environment = dict(os.environ)
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    log = (run.folder / LOG_FILE).open("wb")
    process = subprocess.Popen(
        run.command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment,
        pass_fds=inherited,
    )
    return process, log


def _ended(running: Mapping[int, tuple[Run, subprocess.Popen, IO[bytes], float]]) -> Iterator[tuple[int, Any]]:
    for slot, entry in running.items():
        if entry[1].poll() is not None:
            yield slot, entry


def _stop(running: Mapping[int, tuple[Run, subprocess.Popen, IO[bytes], float]]) -> None:
    for _, process, _, _ in running.values():
        process.terminate()
    for _, process, log, _ in running.values():
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        log.close()


def _gpus() -> list[str]:
    """The GPUs that this process sees, as CUDA_VISIBLE_DEVICES names them."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = named.split(",") if named else [str(index) for index in range(count)]
    return names[:count]


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
