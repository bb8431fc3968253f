"""The server as a process. As a program it is the real one, whose worker fails once for every SIGUSR1."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.memory import kib_of

_SECONDS_TO_START = 120
_SECONDS_TO_END = 30


class Moment(NamedTuple):
    """The server at a time, by `time.monotonic()`; memory is resident, in MiB."""

    time: float
    memory: float
    generated: float


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        url: of the API, with `/v1`.
    """

    pid: int
    url: str

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        with urllib.request.urlopen(f"{self.url.removesuffix('/v1')}/metrics") as response:
            lines = response.read().decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if re.split(r"[{ ]", line)[0] == name)

    @contextmanager
    def watched(self) -> Iterator[list[Moment]]:
        """Notes memory and tokens every second."""
        moments: list[Moment] = []
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(1.0):
                generated = self.metric("chatglm_engine_generated_tokens_total")
                moments.append(Moment(time.monotonic(), kib_of(self.pid, "VmRSS") / 1024, generated))

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield moments
        finally:
            ended.set()
            thread.join()


@contextmanager
def running(flags: dict[str, Any], is_fragile: bool = False) -> Iterator[Server]:
    """Starts a server with these flags of `serve`, on a free port.

    Args:
        is_fragile: with SIGUSR1, see above.

    Raises:
        RuntimeError: with its log, if it does not start.
    """
    program = ["-m", __name__] if is_fragile else ["-m", "chatglm_ptuning", "serve"]
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(Path.cwd()), *sys.path)))}
    with tempfile.NamedTemporaryFile("rb") as log:
        with Path(log.name).open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, *program, *words, "--port", "0"], stdout=output, stderr=output, env=environment
            )
        try:
            deadline = time.monotonic() + _SECONDS_TO_START
            while (url := _address(Path(log.name).read_text("utf-8", "replace"))) is None or not _is_up(url):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"The server did not start:\n{Path(log.name).read_text('utf-8', 'replace')}")
                time.sleep(0.1)
            yield Server(process.pid, url)
        finally:
            process.terminate()
            try:
                process.wait(_SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _address(log: str) -> str | None:
    found = re.search(r"^API: (http\S+)", log, re.MULTILINE)
    return found[1] if found else None


def _is_up(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url.removesuffix('/v1')}/health") as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False


def main(argv: Sequence[str]) -> None:
    """Runs the server; SIGUSR1 ends the engine's worker in its next step."""
    from chatglm_ptuning.serving.api import command
    from chatglm_ptuning.serving.engine.scheduler import Scheduler

    killed = threading.Event()
    signal.signal(signal.SIGUSR1, lambda *_: killed.set())
    step = Scheduler.step

    def fragile_step(scheduler: Scheduler) -> None:
        if killed.is_set():
            killed.clear()
            raise SystemExit("ended by a signal")
        step(scheduler)

    Scheduler.step = fragile_step
    command.main(argv)


if __name__ == "__main__":
    main(sys.argv[1:])
