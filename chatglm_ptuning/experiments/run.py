"""One run of an experiment: flags for `train`, a folder, and what the folder says of how far the run has come."""

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
"""The flags that a run was started with; only a folder that has it is ever emptied."""
ENDING_FILE = "ending.json"
LOG_FILE = "log.txt"
RESULTS_FILE = "all_results.json"
RUN_DEFAULTS = {"save_strategy": "no", "disable_tqdm": True}
"""Flags of every run unless something says otherwise: a run that is cut off starts anew, and needs no checkpoints."""
_LINES_SHOWN = 15


class Evaluation(NamedTuple):
    """One evaluation of a run: after which step, the score, and the loss in nats per label."""

    step: int
    score: float
    loss: float


@dataclass(frozen=True)
class Ending:
    """How a run ended without its results.

    Attributes:
        error: why it failed; None if the experiment gave it up.
        kind: of failure, see `training.progress`.
        code: exit code of its process, negative if a signal ended it.
        log: the last lines that it printed.
        rung: of the halving that it was given up at, after so many `evaluations`.
    """

    error: str | None = None
    kind: str = OTHER
    code: int = 0
    log: str = ""
    rung: int = 0
    evaluations: int | None = None


@dataclass(frozen=True)
class Run:
    """A run, whether it was started or not.

    Attributes:
        name: for people.
        seed: which is among the arguments.
        arguments: of `train`, without --output_dir.
        folder: of the run.
        scored_by: the result that the experiment wants of it.
        files: that it wants, too, relative to the folder.
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
        """Is held by the process of the run, which inherits it, and by the one that has started that."""
        path = self.folder.with_name(f".{self.folder.name}.lock")
        return FileLock(path, on_acquired=lambda descriptor: os.set_inheritable(descriptor, True))

    def take(self) -> bool:
        """Takes its lock, unless another process or another `Run` of this folder holds it; returns whether it did."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.lock.acquire(blocking=False)
        except Timeout:
            return False
        return True

    def is_at_work(self) -> bool:
        """Whether a process has it at hand."""
        taken = self.take()
        if taken:
            self.lock.release()
        return not taken

    def results(self) -> dict[str, Any]:
        """What `train` has written of a finished run; nothing of one that has not finished, or had other flags."""
        results = read_json_object_or_empty(self.folder / RESULTS_FILE)
        whole = self.scored_by in results and all((self.folder / name).is_file() for name in self.files)
        return results if whole and self._was_started() else {}

    def is_pending(self) -> bool:
        """Whether it is still to be run: it was not, or with other flags, or it was cut off."""
        return not self.results() and self.ending() is None

    def ending(self) -> Ending | None:
        """How it ended without its results; None if it has them, or has not ended."""
        noted = read_json_object_or_empty(self.folder / ENDING_FILE)
        return Ending(**noted) if noted and self._was_started() else None

    def evaluations(self) -> list[Evaluation]:
        """Its evaluations in their order, also while it runs; those before it was given up."""
        found: dict[int, Evaluation] = {}
        loss = float("nan")
        for entry in read_progress(self.folder) if self._was_started() else []:
            loss = entry.get("eval_loss", loss)  # is logged before the scores of the task
            if self.scored_by in entry:
                found.setdefault(entry["step"], Evaluation(entry["step"], entry[self.scored_by], loss))
        ending = self.ending()
        return list(found.values())[: ending and ending.evaluations]

    def seconds(self) -> float:
        """From its start to the last that it said."""
        said = [path for name in (LOG_FILE, PROGRESS_FILE) if (path := self.folder / name).exists()]
        return max(path.stat().st_mtime for path in said) - (self.folder / RUN_FILE).stat().st_mtime

    def prepare(self) -> None:
        """Makes its folder an empty one that says what is run: an unfinished run starts anew.

        Raises:
            ValueError: if the folder holds what is no run of an experiment.
        """
        if self.folder.exists():
            if any(self.folder.iterdir()) and not (self.folder / RUN_FILE).is_file():
                raise ValueError(
                    f"{self.folder} holds files that are no run of an experiment; move them away, or name another "
                    "--output_dir."
                )
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True)
        (self.folder / PROGRESS_FILE).touch()  # where a run that is refused says so
        write_json(self.folder / RUN_FILE, {"arguments": list(self.arguments)})

    def end(self, ending: Ending) -> None:
        """Notes how it ended without its results, so that it is not pending any longer."""
        write_json(self.folder / ENDING_FILE, asdict(ending))

    def fail(self, code: int) -> None:
        """Notes that its process has ended with an exit code and without its results, and what it said of that."""
        text = (self.folder / LOG_FILE).read_text(encoding="utf-8", errors="replace")
        lines = [line.rpartition("\r")[2] for line in text.splitlines() if line.strip()]
        log = "\n".join(lines[-_LINES_SHOWN:])
        last = (read_progress(self.folder) or [{}])[-1]
        error = last.get(REASON) or (f"killed by signal {-code}; out of memory?" if code < 0 else f"exit code {code}")
        self.end(Ending(error, last.get(FAILED, OTHER), code, log))

    def try_again(self) -> None:
        """Makes it pending although it has ended."""
        (self.folder / ENDING_FILE).unlink(missing_ok=True)

    def drop_weights(self) -> None:
        """Removes what it has trained, all but the files that are read here."""
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in (RUN_FILE, ENDING_FILE, LOG_FILE, RESULTS_FILE, PROGRESS_FILE):
                path.unlink()

    def _was_started(self) -> bool:
        return read_json_object_or_empty(self.folder / RUN_FILE).get("arguments") == list(self.arguments)
