"""Starts the runs of an experiment, each a process of `chatglm-ptuning train`, several at a time, none twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, NoReturn

import torch
from tqdm import tqdm

from chatglm_ptuning.experiments.run import LOG_FILE, Ending, Run
from chatglm_ptuning.training.failures import SIGTERM_EXIT_CODE

_POLL_SECONDS = 0.1
_STOP_SECONDS = 30
_INTERRUPTED_EXIT_CODE = 130


@dataclass(frozen=True)
class _Started:
    run: Run
    process: subprocess.Popen
    log: IO[bytes]

    def close(self) -> None:
        self.log.close()
        self.run.lock.release()


def run_all(
    pending: Callable[[], Iterable[Run]],
    *,
    workers: int = 1,
    total: int | None = None,
    prune: Callable[[Run], Ending | None] = lambda run: None,
    ended: Callable[[Run], None] = lambda run: None,
) -> None:
    """Starts pending runs, `workers` at a time; with GPUs, each run gets one of them in turn. Prints every outcome.

    A run that another process holds is left to that process. No process is left behind, also after an exception; a
    run that is stopped that way is pending again.

    Args:
        pending: the runs to start, in order; called whenever a worker is free.
        total: number of runs, for the progress bar.
        prune: called repeatedly while a run is at work; the ending of a run that is to be stopped.
        ended: called after each run.
    """
    gpus = _gpus()
    free, running = list(range(workers)), {}
    try:
        with tqdm(total=total, unit="run", disable=None, leave=False) as bar:
            while True:
                while free and (run := _take(pending())) is not None:
                    slot = free.pop(0)
                    running[slot] = _start(run, gpus[slot % len(gpus)] if gpus else None)
                if not running:
                    return
                bar.set_description(", ".join(entry.run.name for entry in running.values()))
                for slot in _wait(running, prune):
                    run = running[slot].run
                    bar.write(_outcome(run))
                    try:
                        ended(run)
                    finally:
                        running.pop(slot).close()
                    free.append(slot)
                    bar.update()
    finally:
        _stop(running.values())


def _take(pending: Iterable[Run]) -> Run | None:
    """The first run that no other process holds, with its lock acquired."""
    for run in pending:
        if run.take():
            if run.is_pending():
                return run
            run.lock.release()
    return None


def _start(run: Run, gpu: str | None) -> _Started:
    try:
        run.prepare()
        log = (run.folder / LOG_FILE).open("wb")
        environment = os.environ if gpu is None else {**os.environ, "CUDA_VISIBLE_DEVICES": gpu}
        return _Started(run, _process(run, log, environment), log)
    except BaseException:
        run.lock.release()
        raise


def _process(run: Run, log: IO[bytes], environment: Mapping[str, str]) -> subprocess.Popen:
    # The process inherits the lock, so it stays locked even if this process is killed.
    return subprocess.Popen(
        run.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment, close_fds=False
    )


def _wait(running: Mapping[int, _Started], prune: Callable[[Run], Ending | None]) -> list[int]:
    """Waits until some runs have ended; returns their slots."""
    while True:
        over = []
        for slot, entry in running.items():
            code = entry.process.poll()
            ending = prune(entry.run)
            if ending is not None:
                entry.process.kill()
                entry.process.wait()
                entry.run.end(ending)
            elif code is not None and (code or entry.run.is_pending()):
                entry.run.fail(code)
            if ending is not None or code is not None:
                over.append(slot)
        if over:
            return over
        time.sleep(_POLL_SECONDS)


def _outcome(run: Run) -> str:
    ending = run.ending()
    if ending is None:
        return f"{run.name}: {run.scored_by} {run.results()[run.scored_by]:.4g} after {run.seconds():.0f} s"
    if ending.error is None:
        step, score, _ = run.evaluations()[-1]
        return f"{run.name}: pruned at step {step} with {run.scored_by} {score:.4g}"
    return f"{run.name}: exit code {ending.code}\n{ending.log}"


def _stop(running: Iterable[_Started]) -> None:
    for entry in running:
        entry.process.terminate()
    for entry in running:
        try:
            entry.process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            entry.process.kill()
            entry.process.wait()
        entry.close()


def _gpus() -> list[str]:
    """The GPUs that this process sees, as CUDA_VISIBLE_DEVICES names them."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = named.split(",") if named else [str(index) for index in range(count)]
    return names[:count]


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside, SIGTERM stops the work as Ctrl-C does; both end the command with a message and an exit code."""

    def interrupt(number: int, frame: Any) -> NoReturn:
        raise KeyboardInterrupt("SIGTERM")

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt as stop:
        print("Interrupted. The same command resumes with the remaining runs.", file=sys.stderr)
        raise SystemExit(SIGTERM_EXIT_CODE if stop.args else _INTERRUPTED_EXIT_CODE) from stop
    finally:
        signal.signal(signal.SIGTERM, before)
