"""Runs of an experiment as forks of this process, without the seconds that the imports of a new one take."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import IO

import torch

from chatglm_ptuning.experiments.run import Run
from chatglm_ptuning.training.run import main as train

Main = Callable[[Sequence[str]], None]


class ForkedRun:
    """As the `subprocess.Popen` of `experiments.runner`."""

    def __init__(self, main: Main, run: Run, log: IO[bytes], environment: Mapping[str, str]) -> None:
        words = run.command[run.command.index("train") + 1 :]
        context = multiprocessing.get_context("fork")
        self._process = context.Process(target=_run, args=(main, words, log, dict(environment)))
        self._process.start()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    poll = returncode.fget

    def wait(self, timeout: float | None = None) -> None:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("train", timeout or 0)

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()


def starting(main: Main = train) -> Callable[[Run, IO[bytes], Mapping[str, str]], ForkedRun]:
    """A replacement of `runner._process`: each run is a call of `main` with its arguments."""
    return lambda run, log, environment: ForkedRun(main, run, log, environment)


def _run(main: Main, words: Sequence[str], log: IO[bytes], environment: Mapping[str, str]) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for stream in (1, 2):
        os.dup2(log.fileno(), stream)
    with open(1, "w", closefd=False) as output:
        sys.stdout = sys.stderr = output
        os.environ.update(environment)
        torch.set_num_threads(1)  # the threads of OpenMP do not survive a fork
        main(words)
