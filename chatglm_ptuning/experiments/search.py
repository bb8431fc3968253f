"""`chatglm-ptuning search`: finds the prefix length, learning rate and initial values that suit a task on a base."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock
from transformers.utils import logging

from chatglm_ptuning.command_line import FlagChecker, fail, flag_words, parse_arguments
from chatglm_ptuning.data.tasks.heads import head_of
from chatglm_ptuning.data.tasks.readers import reader_of
from chatglm_ptuning.experiments.proposals import lost_rung, propose, write_study
from chatglm_ptuning.experiments.run import RUN_DEFAULTS, Ending, Run
from chatglm_ptuning.experiments.runner import interruptible, run_all
from chatglm_ptuning.experiments.search_arguments import SearchArguments, Setting, passed_flags, words_of
from chatglm_ptuning.experiments.search_report import REPORT_FILE, print_report, write_report
from chatglm_ptuning.files import read_json_object
from chatglm_ptuning.metrics.intervals import mean_and_deviation
from chatglm_ptuning.training.arguments import RETIRED_FLAGS, DataArguments, GivenTrainingArguments, ModelArguments
from chatglm_ptuning.training.progress import DEVICE, DIVERGED, REFUSED
from chatglm_ptuning.training.run import TRAIN_FLAGS

_GRID_LISTS = {
    "pre_seq_len",
    "learning_rate",
    "prefix_projection",
    "prefix_init",
    "learning_rate_scale",
    "search_seed",
}


class SearchEnded(Exception):
    """An error that would end every run of this process; the message is for the user."""


@dataclass(frozen=True)
class Trial:
    """A setting and its runs, one for each seed."""

    number: int
    setting: Setting
    runs: Sequence[Run]

    def to_run(self) -> list[Run]:
        """The runs that can start now: the first seed alone, then the others unless a run failed or was pruned."""
        pending = [run for run in self.runs if run.is_pending()]
        if any(run.ending() for run in self.runs):
            return []
        return pending[:1] if self.runs[0] in pending else pending

    def row(self) -> dict[str, Any]:
        """Its entry in the report: `state`, the evaluations of each seed, and the mean score or the error."""
        endings = {run.seed: ending for run in self.runs if (ending := run.ending())}
        errors = [f"seed {seed}: {ending.error}" for seed, ending in endings.items() if ending.error is not None]
        seeds: dict[int, dict[str, Any]] = {}
        for run in self.runs:
            results = run.results()
            pruned = run.seed in endings and endings[run.seed].error is None
            if pruned or (results and run.seed not in endings):
                seeds[run.seed] = {"points": run.evaluations(), "seconds": round(run.seconds(), 1)}
                seeds[run.seed] |= {} if pruned else {"score": results[run.scored_by]}
        seconds = round(sum(course["seconds"] for course in seeds.values()), 1)
        row = {"number": self.number, "setting": self.setting, "seeds": seeds, "seconds": seconds}
        if endings:
            return row | ({"state": "failed", "error": errors[0]} if errors else {"state": "pruned"})
        if len(seeds) < len(self.runs):
            return row | {"state": "running" if any(run.is_running() for run in self.runs) else "waiting"}
        mean, deviation = mean_and_deviation(course["score"] for course in seeds.values())
        if not math.isfinite(mean):
            return row | {"state": "failed", "error": f"its {self.runs[0].scored_by} is {mean}"}
        return row | {"state": "complete", "mean": mean, "deviation": deviation}


class Search:
    """The trials in a folder, and the work of this process on them.

    The folder's report lists the trials. They are added under a lock, so that no two workers try the same one.

    Args:
        common: flags of `train` that all trials share.
    """

    def __init__(self, args: SearchArguments, common: Sequence[str], metric: str) -> None:
        self.args, self.common, self.metric = args, list(common), metric
        self.lower_is_better = metric == "loss"
        self.folder = Path(args.output_dir or "")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(self.folder / ".lock")
        self._judged: dict[Path, int] = {}
        """The number of evaluations of a run that did not prune it."""
        with self.lock:
            self._check_settings()
            trials = self.trials()
            # A failure other than divergence may not be the setting's: another program may have used the GPU's memory.
            for run in (run for trial in trials for run in trial.runs):
                if (ending := run.ending()) and ending.error is not None and ending.kind != DIVERGED:
                    run.try_again()
            if args.is_grid:
                known = [trial.setting for trial in trials]
                trials += self._new(len(trials), [setting for setting in args.grid() if setting not in known])
            self._report(trials)

    def _check_settings(self) -> None:
        # The lists of a grid may grow; the lists that TPE samples from may not.
        free = {"output_dir", "trials", "metric"} | (_GRID_LISTS if self.args.is_grid else set())
        now = {name: value for name, value in asdict(self.args).items() if name not in free}
        now |= {"metric": self.metric, "flags of train": " ".join(self.common)}
        self.settings = now
        before = self._report_so_far().get("settings", now)
        if before != now:
            other = [f"{name}: {before.get(name)} there, {now.get(name)} here" for name in sorted(before | now)
                     if before.get(name) != now.get(name)]  # fmt: skip
            raise ValueError(
                f"{self.folder / REPORT_FILE} belongs to a search with other settings ({'; '.join(other)}). Give the "
                "same settings to resume it, or another --output_dir."
            )

    def _report_so_far(self) -> dict[str, Any]:
        path = self.folder / REPORT_FILE
        return read_json_object(path) if path.exists() else {}

    def trials(self) -> list[Trial]:
        """All trials so far, in order."""
        return self._new(0, [row["setting"] for row in self._report_so_far().get("trials", [])])

    def _new(self, number: int, settings: Iterable[Setting]) -> list[Trial]:
        trials = []
        for place, setting in enumerate(settings, number):
            shown = ", ".join(f"{name} {value}" for name, value in setting.items())
            runs = [
                Run(
                    f"trial {place}, seed {seed} ({shown})",
                    seed,
                    self.args.train_arguments(self.common, setting, seed) + flag_words(RUN_DEFAULTS),
                    self.folder / "runs" / f"trial-{place}" / f"seed-{seed}",
                    f"eval_{self.metric}",
                )
                for seed in self.args.seeds
            ]
            trials.append(Trial(place, setting, runs))
        return trials

    def _report(self, trials: Iterable[Trial]) -> dict[str, Any]:
        return write_report(self.folder, self.settings, [trial.row() for trial in trials], self.args, self.common)

    def pending(self) -> Iterator[Run]:
        """The runs that can start now, in the order of the trials; if all are taken, TPE proposes one more trial."""
        for trial in self.trials():
            yield from trial.to_run()
        while not self.args.is_grid:
            with self.lock:
                trials = self.trials()
                if len(trials) >= self.args.trials:
                    return
                setting = propose(self.args, [trial.row() for trial in trials], self.lower_is_better)
                trials += self._new(len(trials), [setting])
                self._report(trials)
            yield from trials[-1].to_run()

    def prune(self, run: Run) -> Ending | None:
        """The ending of a run that successive halving prunes; the first seed of a trial decides for all."""
        if self.args.pruner == "none" or run.seed != self.args.seeds[0]:
            return None
        points = run.evaluations()
        while (count := self._judged.get(run.folder, 0) + 1) <= len(points):
            self._judged[run.folder] = count
            others = [trial.runs[0] for trial in self.trials() if trial.runs[0].folder != run.folder]
            rung = lost_rung(points[:count], others, self.args, self.lower_is_better)
            if rung is not None and points[count - 1].step < self.args.max_steps:
                return Ending(rung=rung, evaluations=count)
        return None

    def ended(self, run: Run) -> None:
        """Updates the report after a run, and deletes its weights.

        Raises:
            SearchEnded: if flags, files or base are refused before any run has a score, or if the GPU fails.
        """
        self._judged.pop(run.folder, None)
        ending = run.ending()
        if ending is not None and ending.error is not None:
            if ending.code == 0:
                error = f"no evaluation has {run.scored_by}, the metric of this search; name another --metric."
                ending = replace(ending, kind=REFUSED, error=error)
            has_scores = any(trial.row()["state"] in ("complete", "pruned") for trial in self.trials())
            if ending.kind == DEVICE or (ending.kind == REFUSED and not has_scores):
                run.try_again()
                raise SearchEnded(f"{ending.error}\nThe trial is pending again: repeat the command to resume.")
            run.end(ending)
        run.drop_weights()
        with self.lock:
            self._report(self.trials())

    def work(self) -> dict[str, Any]:
        """Runs trials until this process finds none left; returns the report."""
        run_all(self.pending, ended=self.ended, prune=self.prune)
        with self.lock:
            report = self._report(self.trials())
            write_study(self.folder, self.args, report["trials"], self.lower_is_better)
        return report


def _parse(argv: Sequence[str]) -> tuple[SearchArguments, list[str], str]:
    passed_type = passed_flags()
    args, passed = parse_arguments(
        "chatglm-ptuning search",
        "Search the prefix length, the learning rate and the initial values for a task, scored on its dev split, or "
        "for instruction files, scored on --validation_file. Other flags of train apply to every trial.",
        (SearchArguments, passed_type),
        argv,
        RETIRED_FLAGS,
    )
    common = words_of(passed, *parse_arguments("chatglm-ptuning search", "", (passed_type,), []))
    if passed.task is None and not (passed.train_file and passed.validation_file):
        fail("give --task, whose dev split the trials are scored on, or --train_file and --validation_file.")
    if (passed.eval_split or "").startswith("test"):
        fail(f"--eval_split {passed.eval_split}: a search never uses a test split; name a dev split.")
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        fail("search starts its own processes: run the same command several times instead of using a launcher.")
    # Refuses wrong values of flags before the first run.
    first = args.train_arguments(common, args.grid()[0], args.seeds[0])
    try:
        # Not the Trainer's arguments: they would prepare this process for DeepSpeed, and the runs inherit that.
        _, data_args, _ = FlagChecker(TRAIN_FLAGS).parsed(
            first, (ModelArguments, DataArguments, GivenTrainingArguments)
        )
        task = data_args.chosen_task()
        if data_args.task is not None:
            data_args.setup_of_task(task, head_of(task, data_args.head))
    except ValueError as error:
        fail(str(error))
    metric, known = args.metric or task.metric, [*reader_of(task).metrics_of(task), "loss"]
    if metric not in known:
        fail(f"--metric of {task.name} must be one of {', '.join(known)}, got {metric!r}")
    if data_args.task is None and metric != "loss":
        common += flag_words({"predict_with_generate": True})
    return args, common, metric


def main(argv: Sequence[str]) -> None:
    """Entry of the command; user errors end it with exit code 1, SIGTERM with 143, Ctrl-C with 130."""
    args, common, metric = _parse(argv)
    try:
        import optuna
    except ImportError:
        fail("search needs optuna: pip install 'chatglm-ptuning[search]', or pip install optuna.")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.set_verbosity_error()
    try:
        with interruptible():
            report = Search(args, common, metric).work()
    except (ValueError, OSError, SearchEnded) as error:
        fail(str(error))
    print_report(report, Path(args.output_dir))
    if not report["best"]:
        fail(f"no trial has finished; {Path(args.output_dir, REPORT_FILE)} lists the errors.")
