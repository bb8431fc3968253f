"""One run of an experiment: flags for `train`, and a folder that records the state of the run."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from chatglm_ptuning.files import read_json_object_or_empty, write_json
from chatglm_ptuning.training.progress import FAILED, OTHER, PROGRESS_FILE, REASON, read_progress

RUN_FILE = "run.json"
"""The flags that a run was started with; only a folder that has this file is ever emptied."""
ENDING_FILE = "ending.json"
LOG_FILE = "log.txt"
RESULTS_FILE = "all_results.json"
RUN_DEFAULTS = {"save_strategy": "no", "disable_tqdm": True}
"""Default flags of every run. An interrupted run starts over, so it needs no checkpoints."""
_LINES_SHOWN = 15


class Evaluation(NamedTuple):
    """One evaluation of a run: the step, the score, and the loss in nats per label."""

    step: int
    score: float
    loss: float


@dataclass(frozen=True)
class Ending:
    """How a run ended without its results.

    Attributes:
        error: why it failed; None if it was pruned.
        kind: of failure, see `training.progress`.
        code: exit code of its process, negative if a signal ended it.
        log: the last lines that it printed.
        rung: of the halving that pruned it.
        evaluations: number of evaluations before it was pruned.
    """

    error: str | None = None
    kind: str = OTHER
    code: int = 0
    log: str = ""
    rung: int = 0
    evaluations: int | None = None


@dataclass(frozen=True)
class Run:
    """A run, started or not.

    Attributes:
        name: shown to the user.
        seed: which is among the arguments.
        arguments: of `train`, without --output_dir.
        folder: of the run.
        scored_by: the key of the results that a finished run must have.
        files: that a finished run must have, relative to the folder.
    """

    name: str
    seed: int
    arguments: Sequence[str]
    folder: Path
    scored_by: str
    files: Sequence[str] = ()

    @property
    def command(self) -> list[str]:
        """The command line of its process."""
        words = [*self.arguments, "--output_dir", str(self.folder)]
        return [sys.executable, "-m", "chatglm_ptuning", "train", *words]

    @cached_property
    def lock(self) -> FileLock:
        """Held by the process that started the run, and by the run's own process, which inherits it."""
        path = self.folder.with_name(f".{self.folder.name}.lock")
        return FileLock(path, on_acquired=lambda descriptor: os.set_inheritable(descriptor, True))

    def take(self) -> bool:
        """Acquires the lock if it is free; returns whether it did."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.lock.acquire(blocking=False)
        except Timeout:
            return False
        return True

    def is_running(self) -> bool:
        """Whether a process is running it."""
        taken = self.take()
        if taken:
            self.lock.release()
        return not taken

    def results(self) -> dict[str, Any]:
        """The results of a finished run; empty if it has not finished, or was started with other flags."""
        results = read_json_object_or_empty(self.folder / RESULTS_FILE)
        whole = self.scored_by in results and all((self.folder / name).is_file() for name in self.files)
        return results if whole and self._was_started() else {}

    def is_pending(self) -> bool:
        """Whether it has yet to run: it never ran, was interrupted, or ran with other flags."""
        return not self.results() and self.ending() is None

    def ending(self) -> Ending | None:
        """How it ended without its results; None if it has them, or has not ended."""
        noted = read_json_object_or_empty(self.folder / ENDING_FILE)
        return Ending(**noted) if noted and self._was_started() else None

    def evaluations(self) -> list[Evaluation]:
        """Its evaluations so far, in order; of a pruned run those before that."""
        found: dict[int, Evaluation] = {}
        loss = float("nan")
        for entry in read_progress(self.folder) if self._was_started() else []:
            loss = entry.get("eval_loss", loss)  # is logged before the scores of the task
            if self.scored_by in entry:
                found.setdefault(entry["step"], Evaluation(entry["step"], entry[self.scored_by], loss))
        ending = self.ending()
        return list(found.values())[: ending and ending.evaluations]

    def seconds(self) -> float:
        """From its start to its last output."""
        written = [path for name in (LOG_FILE, PROGRESS_FILE) if (path := self.folder / name).exists()]
        return max(path.stat().st_mtime for path in written) - (self.folder / RUN_FILE).stat().st_mtime

    def prepare(self) -> None:
        """Makes its folder empty but for its flags: an unfinished run starts over.

        Raises:
            ValueError: if the folder holds anything but a run of an experiment.
        """
        if self.folder.exists():
            if any(self.folder.iterdir()) and not (self.folder / RUN_FILE).is_file():
                raise ValueError(
                    f"{self.folder} holds files that are no run of an experiment; move them away, or give another "
                    "--output_dir."
                )
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True)
        (self.folder / PROGRESS_FILE).touch()  # so that a run with refused flags notes its failure there
        write_json(self.folder / RUN_FILE, {"arguments": list(self.arguments)})

    def end(self, ending: Ending) -> None:
        """Records how it ended without its results; it is no longer pending."""
        write_json(self.folder / ENDING_FILE, asdict(ending))

    def fail(self, code: int) -> None:
        """Records that its process ended without its results, with the error and the end of the log."""
        text = (self.folder / LOG_FILE).read_text(encoding="utf-8", errors="replace")
        lines = [line.rpartition("\r")[2] for line in text.splitlines() if line.strip()]
        last = (read_progress(self.folder) or [{}])[-1]
        error = last.get(REASON) or (f"killed by signal {-code}; out of memory?" if code < 0 else f"exit code {code}")
        self.end(Ending(error, last.get(FAILED, OTHER), code, "\n".join(lines[-_LINES_SHOWN:])))

    def try_again(self) -> None:
        """Makes it pending although it has ended."""
        (self.folder / ENDING_FILE).unlink(missing_ok=True)

    def drop_weights(self) -> None:
        """Removes all its files except those that this module reads."""
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in (RUN_FILE, ENDING_FILE, LOG_FILE, RESULTS_FILE, PROGRESS_FILE):
                path.unlink()

    def _was_started(self) -> bool:
        return read_json_object_or_empty(self.folder / RUN_FILE).get("arguments") == list(self.arguments)
