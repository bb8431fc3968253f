"""`chatglm-ptuning search`: which prompt length, learning rate and first values suit a task on a base."""

from __future__ import annotations

import dataclasses
import gc
import math
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock, Timeout
from transformers.utils import logging

from chatglm_ptuning.command_line import fail, parse_arguments
from chatglm_ptuning.data.tasks.encode import head_of
from chatglm_ptuning.data.tasks.readers import reader_of
from chatglm_ptuning.data.tasks.task import Task
from chatglm_ptuning.training.arguments import RETIRED_FLAGS
from chatglm_ptuning.training.failures import SIGTERM_EXIT_CODE, Preempted, TrainingDiverged
from chatglm_ptuning.training.initialisation import PREFIX_INITS
from chatglm_ptuning.training.searching.arguments import (
    TRAIN_ARGUMENTS,
    SearchArguments,
    Setting,
    flags_of,
    passed_arguments,
)
from chatglm_ptuning.training.searching.report import describe, print_report, trials_that_count, write_report
from chatglm_ptuning.training.searching.trial import Course, run_flags, train_once

if TYPE_CHECKING:
    import optuna

STUDY_FILE = "study.db"
_LOCKS = ".workers"
_TIMES_TAKEN_OVER = 2
"""A trial whose worker has been killed more often than this is what kills it."""
_SQLITE_TIMEOUT = 120.0
"""Seconds to wait for another worker's write."""
_ENDINGS = ("put_back", "error", "diverged")
"""What is noted of a trial that ends without a result."""


class SearchEnded(Exception):
    """What makes every trial of this process fail; the message is for the user."""


class Search:
    """A study on disk, and the work of this process on it.

    Settings are handed out under a lock in the folder, so that workers never try one twice. A worker holds a lock of
    its trial, too, which the system frees if it is killed: then another worker takes the trial over.

    Attributes:
        study: optuna's, in `study.db` of the folder.
        common: flags of `train` that all trials share.
    """

    def __init__(self, args: SearchArguments, common: list[str], metric: str) -> None:
        self.args, self.common, self.metric = args, common, metric
        self.steps = (args.max_steps, args.eval_steps or 1)
        self.folder = Path(args.output_dir or "")
        (self.folder / _LOCKS).mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(self.folder / _LOCKS / "study.lock")
        with self.lock:
            self.study = self._open()
            self._check_settings()
            self._retry_failed()
            if args.is_grid:
                known = [trial.user_attrs["setting"] for trial in self._trials()]
                for setting in map(dataclasses.asdict, args.grid()):
                    if setting not in known:
                        self._enqueue(setting)

    def _open(self) -> optuna.Study:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.storage = optuna.storages.RDBStorage(
            f"sqlite:///{self.folder.resolve() / STUDY_FILE}",
            engine_kwargs={"connect_args": {"timeout": _SQLITE_TIMEOUT}},
        )
        args = self.args
        pruners: dict[str, optuna.pruners.BasePruner] = {
            "halving": optuna.pruners.SuccessiveHalvingPruner(
                min_resource=args.min_resource, reduction_factor=args.reduction_factor
            ),
            "none": optuna.pruners.NopPruner(),
        }
        return optuna.create_study(
            storage=self.storage,
            study_name="search",
            direction="minimize" if self.metric == "loss" else "maximize",
            pruner=pruners[args.pruner],
            load_if_exists=True,
        )

    def _check_settings(self) -> None:
        args = self.args
        now: dict[str, Any] = {name: getattr(args, name) for name in ("seeds", "max_steps", "eval_steps", "pruner",
                               "min_resource", "reduction_factor", "init_prefix_text")}  # fmt: skip
        now |= {"metric": self.metric, "flags of train": " ".join(self.common)}
        if not args.is_grid:
            now["space"] = [args.learning_rate_scale, args.learning_rate, args.pre_seq_len, args.prefix_projection,
                            args.prefix_init, args.search_seed]  # fmt: skip
        before = self.study.user_attrs.get("settings")
        if before is None:
            self.study.set_user_attr("settings", now)
        elif before != now:
            other = [f"{name}: {before.get(name)} there, {now.get(name)} here" for name in sorted(before | now)
                     if before.get(name) != now.get(name)]  # fmt: skip
            raise ValueError(
                f"{self.folder / STUDY_FILE} is of a search with other settings ({'; '.join(other)}). Give the same "
                "ones to go on with it, or another --output_dir."
            )

    def _retry_failed(self) -> None:
        """Queues again what failed by more than its setting: the memory of a GPU may have been another program's."""
        for trial in self._trials():
            if trial.state.name == "FAIL" and "diverged" not in trial.user_attrs:
                self._enqueue(**_finished_part(trial) | {"retry_of": trial.number, "workers_lost": 0})

    def _trials(self) -> list[optuna.trial.FrozenTrial]:
        return trials_that_count(self.study)

    def _waiting(self) -> bool:
        return any(trial.state.name == "WAITING" for trial in self._trials())

    def _enqueue(self, setting: dict[str, Any], **attributes: Any) -> None:
        self.study.enqueue_trial(setting, user_attrs={"setting": setting} | attributes)

    # ---- handing out ----

    def next_trial(self) -> tuple[optuna.Trial, Setting, FileLock] | None:
        """What this process is to do next, with the lock that says that it does; None if there is nothing left."""
        with self.lock:
            self._take_over()
            if not self._waiting() and (self.args.is_grid or len(self._trials()) >= (self.args.trials or 0)):
                return None
            if not self.args.is_grid:
                self.study.sampler = self._sampler()
            trial = self.study.ask()
            own = FileLock(self._lock_of(trial.number))
            own.acquire()
            setting = self._setting(trial)
            return trial, setting, own

    def _sampler(self) -> optuna.samplers.BaseSampler:
        """TPE with random numbers of its own for every trial: workers differ, and a resumed search repeats itself."""
        import optuna

        seed = self.args.search_seed + 1000 * len(self.study.get_trials(deepcopy=False))
        return optuna.samplers.TPESampler(seed=seed, constant_liar=True)

    def _setting(self, trial: optuna.Trial) -> Setting:
        queued = trial.user_attrs.get("setting")
        if not self.args.is_grid:
            setting = self.args.suggest(trial)
            trial.set_user_attr("setting", dataclasses.asdict(setting))
            return setting
        setting = Setting(**queued)
        # For whoever looks into the study with optuna's own tools.
        trial.suggest_int("pre_seq_len", 1, 2**31)
        trial.suggest_float("learning_rate", 0.0, 1e300)
        trial.suggest_categorical("prefix_projection", (False, True))
        trial.suggest_categorical("prefix_init", PREFIX_INITS)
        return setting

    def _lock_of(self, number: int) -> Path:
        return self.folder / _LOCKS / f"trial-{number}.lock"

    def _take_over(self) -> None:
        """Puts trials back whose worker is gone; those that have lost several workers count as failed."""
        for trial in self.study.get_trials(deepcopy=False):
            if trial.state.name != "RUNNING":
                continue
            lock = FileLock(self._lock_of(trial.number))
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            lock.release()
            lost = trial.user_attrs.get("workers_lost", 0) + 1
            if lost > _TIMES_TAKEN_OVER:
                self.end(trial.number, error=f"its worker was killed {lost} times; out of memory?")
            else:
                self._put_back(trial.number, workers_lost=lost)

    # ---- taking back ----

    def put_back(self, number: int) -> None:
        """Ends a trial without a result, and queues its setting again, with the seeds that were finished."""
        with self.lock:
            self._put_back(number)

    def _put_back(self, number: int, **attributes: Any) -> None:
        trial = self.study.get_trials(deepcopy=False)[number]
        if trial.state.is_finished():
            return
        kept = _finished_part(trial)
        self.end(number, put_back=True)
        if "setting" in kept:
            self._enqueue(**kept | attributes)

    def end(self, number: int, **why: Any) -> None:
        """Ends a trial, also another worker's, as failed, and notes why, by the names in `_ENDINGS`."""
        import optuna

        study_id = self.storage.get_study_id_from_name(self.study.study_name)
        trial_id = self.storage.get_trial_id_from_study_id_trial_number(study_id, number)
        for name, value in why.items():
            self.storage.set_trial_user_attr(trial_id, name, value)
        self.study.tell(number, state=optuna.trial.TrialState.FAIL)

    # ---- working ----

    def work(self) -> None:
        """Tries settings until none are left.

        Raises:
            SearchEnded: if the very first trial fails by what is wrong with flags, files or base, or any by an error
                of CUDA that leaves this process no GPU.
            Preempted: on SIGTERM; as with Ctrl-C, the setting at hand goes back into the queue.
        """
        while (given := self.next_trial()) is not None:
            trial, setting, own = given
            try:
                self._try(trial, setting)
            except BaseException:
                self.put_back(trial.number)
                raise
            finally:
                own.release()
            with self.lock:
                write_report(self.study, self.folder, self.common, self.args.init_prefix_text)
            print(f"trial {trial.number}: {describe(self.study.get_trials(deepcopy=False)[trial.number])}", flush=True)

    def _try(self, trial: optuna.Trial, setting: Setting) -> None:
        import optuna

        scores = []
        for seed in self.args.seeds:
            name = f"seed {seed}"
            if name not in trial.user_attrs:  # else a killed worker has finished it
                ending = self._run(trial, setting, seed)
                gc.collect()  # Trainer and model refer to each other in circles; the next base needs their room
                if ending is None:
                    return
                trial.set_user_attr(name, ending)
            scores.append(trial.user_attrs[name]["score"])
        if math.isfinite(mean := fmean(scores)):
            self.study.tell(trial, mean, state=optuna.trial.TrialState.COMPLETE)
        else:
            self.end(trial.number, error=f"its {self.metric} is {mean}", diverged=True)

    def _run(self, trial: optuna.Trial, setting: Setting, seed: int) -> dict[str, Any] | None:
        """What the run with one seed has shown; None if that has ended the trial."""
        import optuna

        course = Course()
        watched = seed == self.args.seeds[0]

        def tell(step: int, score: float) -> None:
            if watched:
                trial.report(score, step)
                if step < self.args.max_steps and trial.should_prune():
                    raise optuna.TrialPruned

        scratch = self.folder / _LOCKS / f"trial-{trial.number}"
        flags = run_flags(self.common, setting, self.args.init_prefix_text, seed, *self.steps)
        try:
            train_once([*flags, "--output_dir", str(scratch)], self.metric, course, tell)
        except optuna.TrialPruned:
            trial.set_user_attr(f"seed {seed}", dataclasses.asdict(course))
            self.study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            return None
        except Preempted:
            raise
        except (RuntimeError, MemoryError, ValueError, OSError, ImportError) as error:
            if isinstance(error, (ValueError, OSError, ImportError)) and not self._has_results():
                raise SearchEnded(str(error)) from error
            if _has_lost_gpu(error):
                raise SearchEnded(
                    f"{error}\nThis process cannot use its GPU any more. Its setting is in the queue again: give the "
                    "same command to go on."
                ) from error
            diverged = {"diverged": True} if isinstance(error, TrainingDiverged) else {}
            self.end(trial.number, error=f"seed {seed}: {str(error) or type(error).__name__}", **diverged)
            return None
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return dataclasses.asdict(course) | {"score": course.score}

    def _has_results(self) -> bool:
        return any(trial.state.name in ("COMPLETE", "PRUNED") for trial in self._trials())


def _finished_part(trial: optuna.trial.FrozenTrial) -> dict[str, Any]:
    """What a trial that is queued again takes along: its setting, and the results of the seeds that were finished."""
    return {name: value for name, value in trial.user_attrs.items() if name not in _ENDINGS}


def _has_lost_gpu(error: Exception) -> bool:
    """Whether CUDA has failed by more than memory: whatever the process asks of its GPU fails from then on."""
    return not isinstance(error, torch.OutOfMemoryError) and (
        isinstance(error, torch.AcceleratorError) or (isinstance(error, RuntimeError) and "CUDA error" in str(error))
    )


def _metric_of(args: SearchArguments, task: Task) -> str:
    known = [*reader_of(task).metrics_of(task), "loss"]
    metric = args.metric or task.metric
    if metric not in known:
        raise ValueError(f"--metric of {task.name} must be one of {', '.join(known)}, got {metric!r}")
    return metric


def _parse(argv: Sequence[str]) -> tuple[SearchArguments, list[str], str]:
    types = passed_arguments()
    args, *passed = parse_arguments(
        "chatglm-ptuning search",
        "Search the length of a prefix, its learning rate and its first values for a task, on its dev split. All flags "
        "of train that are not searched hold for every trial.",
        (SearchArguments, *types),
        argv,
        RETIRED_FLAGS,
    )
    common = flags_of(passed, parse_arguments("chatglm-ptuning search", "", types, []))
    data_flags = next(holder for holder in passed if hasattr(holder, "task"))
    if data_flags.task is None:
        fail("--task is needed: the task whose dev split the search goes by.")
    if (data_flags.eval_split or "").startswith("test"):
        fail(f"--eval_split {data_flags.eval_split}: a search never looks at a test split; name a dev split.")
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        fail("a search runs in single processes: start the same command several times instead of a launcher.")
    # Wrong values of flags show here, not in the first trial.
    first = run_flags(
        common, args.grid()[0], args.init_prefix_text, args.seeds[0], args.max_steps, args.eval_steps or 1
    )
    _, data_args, *_ = parse_arguments("chatglm-ptuning search", "", TRAIN_ARGUMENTS, first)
    try:
        task = data_args.chosen_task()
        data_args.echo_of(task, head_of(task, data_args.head))
        return args, common, _metric_of(args, task)
    except ValueError as error:
        fail(str(error))


def main(argv: Sequence[str]) -> None:
    """Entry of the command; what users can mend ends it with exit code 1, SIGTERM with 143, Ctrl-C with 130."""
    args, common, metric = _parse(argv)
    try:
        import optuna  # noqa: F401
    except ImportError:
        fail("search needs optuna: pip install 'chatglm-ptuning[search]', or pip install optuna.")
    logging.set_verbosity_error()
    try:
        search = Search(args, common, metric)
        search.work()
    except Preempted as stop:
        print("SIGTERM: the study is safe; the same command goes on with it.", file=sys.stderr)
        raise SystemExit(SIGTERM_EXIT_CODE) from stop
    except KeyboardInterrupt as stop:
        print("Interrupted: the study is safe; the same command goes on with it.", file=sys.stderr)
        raise SystemExit(130) from stop
    except (ValueError, OSError, SearchEnded) as error:
        fail(str(error))
    with search.lock:
        report = write_report(search.study, search.folder, common, args.init_prefix_text)
    print_report(report, search.folder)
    if not report["best"]:
        fail(f"no trial has come to its end; {search.folder / 'search.json'} says why.")
