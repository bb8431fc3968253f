"""The training command in several processes, as a launcher starts it, without the seconds that imports take.

The processes are forked from a server that has imported everything once. They talk through gloo, like those of a real
launcher on a machine without GPUs.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "deepspeed",
        "deepspeed.runtime.zero.stage3",
        "chatglm_ptuning.training.run",
        "matplotlib.backends.backend_agg",
        "matplotlib.pyplot",
        "peft",
    ]
)


@dataclass
class Ended:
    """How a process ended: its exit code (negative: by that signal), and all that it printed."""

    code: int | None
    output: str


class Job:
    """Running processes of one job."""

    def __init__(self, task: tuple[Callable[..., Any], tuple], count: int, folder: Path, env: dict[str, str]) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        self.logs = [folder / f"rank{rank}-{port}.log" for rank in range(count)]
        self.processes = []
        for rank in range(count):
            shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count),
                      "LOCAL_WORLD_SIZE": str(count), "RANK": str(rank), "LOCAL_RANK": str(rank)}  # fmt: skip
            settings = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"} | (shared if count > 1 else {}) | env
            process = _CONTEXT.Process(target=_rank, args=(*task, settings, str(self.logs[rank])))
            process.start()
            self.processes.append(process)

    def wait(self, seconds: float = 600) -> list[Ended]:
        """Waits for all to end; after `seconds`, kills those that still run, and their code is None."""
        deadline = time.monotonic() + seconds
        ended = []
        for process, log in zip(self.processes, self.logs, strict=True):
            process.join(max(0.0, deadline - time.monotonic()))
            code = process.exitcode
            if code is None:
                process.kill()
                process.join()
            ended.append(Ended(code, log.read_text("utf-8")))
        return ended


def start(argv: list[str], count: int, folder: Path, **env: str) -> Job:
    """Starts `chatglm-ptuning train` with these flags in `count` processes, which log into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    return Job((_train, ([str(word) for word in argv],)), count, folder, env)


def run(argv: list[str], count: int, folder: Path, seconds: float = 600, **env: str) -> list[Ended]:
    """As `start`, and waits; all must have ended well."""
    ended = start(argv, count, folder, **env).wait(seconds)
    for rank, process in enumerate(ended):
        assert process.code == 0, f"process {rank} ended with {process.code}:\n{process.output[-4000:]}"
    return ended


def call(function: Callable[..., str], arguments: tuple, count: int, folder: Path, seconds: float = 600) -> list[str]:
    """Calls a function in `count` processes of one job; returns the line that each returns."""
    ended = Job((function, arguments), count, folder, {}).wait(seconds)
    for rank, process in enumerate(ended):
        assert process.code == 0, f"process {rank} ended with {process.code}:\n{process.output[-4000:]}"
    return [process.output.splitlines()[-1] for process in ended]


def _train(argv: list[str]) -> None:
    from chatglm_ptuning.training.run import main

    main(argv)


def _rank(function: Callable[..., Any], arguments: tuple, env: dict[str, str], log: str) -> None:
    with Path(log).open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)
    os.environ.update(env)
    if "LIMIT_MEMORY_MB" in env:
        _limit_memory(int(env["LIMIT_MEMORY_MB"]))
    result = function(*arguments)
    if result is not None:
        print(result)


def _limit_memory(megabytes: int) -> None:
    """Lets this process allocate so much more than it has now."""
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
