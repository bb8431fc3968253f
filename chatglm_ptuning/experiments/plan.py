"""What a comparison runs: the strict reading of its plan, and the cells that it is made of."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from chatglm_ptuning.command_line import FlagChecker
from chatglm_ptuning.data.tasks.arguments import usual_split
from chatglm_ptuning.data.tasks.checked_yaml import read_yaml
from chatglm_ptuning.data.tasks.examples import Example, has_gold
from chatglm_ptuning.data.tasks.heads import LINEAR_HEADS, head_of, heads_of
from chatglm_ptuning.data.tasks.heads.head import Prediction
from chatglm_ptuning.data.tasks.registry import load_task
from chatglm_ptuning.data.tasks.task import Task
from chatglm_ptuning.evaluation.report import score_task
from chatglm_ptuning.experiments.run import RUN_DEFAULTS
from chatglm_ptuning.training.arguments import DataArguments, ModelArguments
from chatglm_ptuning.training.run import TRAIN_FLAGS
from chatglm_ptuning.training.tuning_arguments import TuningArguments

DEFAULT_SEEDS = (1, 2, 3)
OWN_FLAGS = (
    "model_name_or_path", "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "seed", "do_train",
    "do_predict", "config",
)  # fmt: skip
"""Flags that the comparison itself gives to every run."""
HEAD_WORDS = ("linear", "verbaliser")
"""What `head` may be besides a head's name: the task's linear head, or its head that scores answers."""

_KEYS = ("base", "seeds", "common", "tasks", "methods", "reference")


@dataclass(frozen=True)
class Plan:
    """What a comparison is to run.

    Attributes:
        base: what every run tunes.
        seeds: of every task and method.
        common: flags of every run.
        tasks: name in the table -> flags of its runs; `task` is the name itself where it is not given.
        methods: name in the table -> flags of its runs.
        overrides: (task, method) -> flags of that cell, or None for a cell that is not run.
        last: flags that override all others.
        reference: the method that all others are compared with.
        origin: the file that the plan was read from; empty if it is of flags.
    """

    base: str
    seeds: tuple[int, ...]
    common: Mapping[str, Any]
    tasks: Mapping[str, Mapping[str, Any]]
    methods: Mapping[str, Mapping[str, Any]]
    overrides: Mapping[tuple[str, str], Mapping[str, Any] | None] = field(default_factory=dict)
    last: Mapping[str, Any] = field(default_factory=dict)
    reference: str | None = None
    origin: str = ""

    def place(self, words: str) -> str:
        """A place in the plan, for a message: with the file, if there is one."""
        return f"{self.origin}: {words}" if self.origin else words

    def flags_of(self, task: str, method: str) -> dict[str, Any] | None:
        """All flags of a cell's runs but those in `OWN_FLAGS`; None if it is not run.

        What is more particular overrides what is more general: common flags, the task's, the method's, the cell's.
        """
        own = self.overrides.get((task, method), {})
        if own is None:
            return None
        flags = {**RUN_DEFAULTS, **self.common, "task": task, **self.tasks[task], **self.methods[method], **own,
                 **self.last}  # fmt: skip
        return {name: value for name, value in flags.items() if value is not None}


@dataclass(frozen=True)
class Cell:
    """One task by one method, for all seeds.

    Attributes:
        task, method: their names in the table.
        definition: of the task.
        head: that solves it.
        predict_split: that is scored.
        flags: of its runs, without the seed and the folder.
    """

    task: str
    method: str
    definition: Task
    head: str
    predict_split: str
    flags: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        """Where its runs are, relative to the folder of the comparison."""
        return Path("runs", folder_name(self.task), folder_name(self.method))


@dataclass(frozen=True)
class CheckedPlan:
    """A plan of which everything is known to fit, as far as that can be known without the base.

    Attributes:
        cells: in the order of tasks, then methods.
        left_out: (task, method) -> why it is not run.
        majority: task -> (split, metrics in percent) of always answering the label that is the most frequent one in
            the training split.
    """

    cells: tuple[Cell, ...]
    left_out: Mapping[tuple[str, str], str]
    majority: Mapping[str, tuple[str, Mapping[str, float]]]


def folder_name(name: str) -> str:
    """A name of the table as the name of a folder."""
    return re.sub(r"[^\w.]+", "-", name).strip("-.") or "_"


def read_plan(path: Path) -> Plan:
    """The plan in a YAML file.

    Raises:
        ValueError: naming the file and the key that is unknown, missing or malformed.
    """
    content = read_yaml(path, "plan")
    try:
        return replace(_parse(content), origin=str(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _parse(content: Any) -> Plan:
    content = _mapping(content, "the plan")
    _known(content, _KEYS, "key")
    for key in ("base", "tasks", "methods"):
        if not content.get(key):
            raise ValueError(f"there is no key '{key}'; docs/compare.md has an example.")
    if not isinstance(content["base"], str):
        raise ValueError(f"'base' must be a folder or a name, found {content['base']!r}.")
    methods = _named(content["methods"], "methods", lambda name: {"tuning": name})
    tasks = {name: dict(flags) for name, flags in _named(content["tasks"], "tasks", lambda name: {}).items()}
    overrides: dict[tuple[str, str], Mapping[str, Any] | None] = {}
    for task, flags in tasks.items():
        own = _mapping(flags.pop("methods", None) or {}, f"tasks.{task}.methods")
        _known(own, methods, f"method in tasks.{task}.methods")
        for method, values in own.items():
            place = f"tasks.{task}.methods.{method}"
            overrides[task, method] = None if values is None else _mapping(values, place)
    return Plan(
        base=content["base"],
        seeds=_seeds(content.get("seeds", list(DEFAULT_SEEDS))),
        common=_mapping(content.get("common") or {}, "'common'"),
        tasks=tasks,
        methods=methods,
        overrides=overrides,
        reference=content.get("reference"),
    )


def _named(value: Any, key: str, default: Any) -> dict[str, Mapping[str, Any]]:
    """Name -> flags, of a mapping, or of a list of names."""
    if isinstance(value, list):
        repeated = {name for name in map(str, value) if list(map(str, value)).count(name) > 1}
        if repeated:
            raise ValueError(f"'{key}' names {', '.join(sorted(repeated))} twice.")
        value = dict.fromkeys(map(str, value))
    entries = _mapping(value, f"'{key}'")
    return {
        str(name): default(str(name)) if flags is None else _mapping(flags, f"{key}.{name}")
        for name, flags in entries.items()
    }


def _seeds(value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    if not values or any(isinstance(seed, bool) or not isinstance(seed, int) or seed < 0 for seed in values):
        raise ValueError(f"'seeds' must be a list of whole numbers from 0, found {value!r}.")
    if len(set(values)) < len(values):
        raise ValueError(f"'seeds' has a number twice: {value!r}.")
    return tuple(values)


def _mapping(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{what} must be a mapping of keys to values, found {value!r}.")
    return value


def _known(names: Iterable[Any], known: Iterable[str], what: str) -> None:
    known = list(known)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
            hint = f" (did you mean '{near[0]}'?)" if near else ""
            raise ValueError(f"unknown {what} {name!r}{hint}; known are {', '.join(known)}.")


def select(plan: Plan, tasks: Sequence[str] | None, methods: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """The tasks and methods of a plan that the command line names, in the plan's order; all where it names none.

    Raises:
        ValueError: naming one that the plan does not have.
    """
    _known(tasks or (), plan.tasks, "task")
    _known(methods or (), plan.methods, "method")
    return (
        [task for task in plan.tasks if tasks is None or task in tasks],
        [method for method in plan.methods if methods is None or method in methods],
    )


def check_plan(plan: Plan, tasks: Sequence[str], methods: Sequence[str]) -> CheckedPlan:
    """Reads every task's rows and every run's flags, so that what is wrong shows before the first run.

    Raises:
        ValueError: naming the place in the plan, the value and the way out.
    """
    if plan.reference is not None:
        _known([plan.reference], plan.methods, "reference")
    for what, names in (("tasks", plan.tasks), ("methods", plan.methods)):
        _refuse_same_folder(what, names)
    checker = FlagChecker(TRAIN_FLAGS)
    _check_flag_names(plan, checker)
    rows = _Rows()
    cells, left_out, majority = [], {}, {}
    for task in tasks:
        for method in methods:
            flags = plan.flags_of(task, method)
            if flags is None:
                left_out[task, method] = "the plan says so"
                continue
            try:
                cell = _check_cell(plan, task, method, flags, checker, rows)
            except ValueError as error:
                raise ValueError(f"{plan.place(f'{task} by {method}')}: {error}") from error
            if isinstance(cell, str):
                left_out[task, method] = cell
            else:
                cells.append(cell)
        always = rows.majority(task)
        if always is not None:
            majority[task] = always
    if not cells:
        raise ValueError("the plan leaves nothing to run: " + "; ".join(sorted(set(left_out.values()))) + ".")
    return CheckedPlan(tuple(cells), left_out, majority)


def _refuse_same_folder(what: str, names: Iterable[str]) -> None:
    folders: dict[str, str] = {}
    for name in names:
        other = folders.setdefault(folder_name(name), name)
        if other != name:
            raise ValueError(f"the {what} {other!r} and {name!r} would share the folder {folder_name(name)}.")


def _check_flag_names(plan: Plan, checker: FlagChecker) -> None:
    places: dict[str, Mapping[str, Any]] = {"common": plan.common}
    places |= {f"tasks.{name}": flags for name, flags in plan.tasks.items()}
    places |= {f"methods.{name}": flags for name, flags in plan.methods.items()}
    places |= {f"tasks.{task}.methods.{name}": flags or {} for (task, name), flags in plan.overrides.items()}
    places = {plan.place(name): flags for name, flags in places.items()} | {"the flags behind --": plan.last}
    for place, flags in places.items():
        try:
            checker.check_names(flags)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        for name in OWN_FLAGS:
            if name in flags:
                raise ValueError(f"{place}: --{name} is set by the comparison itself; leave it out.")


def _check_cell(
    plan: Plan, task: str, method: str, flags: dict[str, Any], checker: FlagChecker, rows: _Rows
) -> Cell | str:
    """The cell, or why it cannot be run."""
    definition = load_task(str(flags["task"]))
    tuning = flags.get("tuning", "ptuning_v2")
    head = _head(definition, flags.get("head"), tuning != "none")
    if tuning == "none" and head in LINEAR_HEADS:
        return f"the plain base has no {head.replace('_', ' ')} head"
    if tuning == "head_only" and head not in LINEAR_HEADS:
        return f"{head} has no head to train alone"
    flags = {**flags, "head": head}
    kinds = (ModelArguments, DataArguments, TuningArguments)
    _, data, _ = checker.values({**flags, "model_name_or_path": plan.base}, kinds)
    data.echo_of(definition, head)
    predict_split = rows.read(task, definition, data, tuning != "none")
    return Cell(task, method, definition, head, predict_split, flags)


def _head(task: Task, asked: Any, trains: bool) -> str:
    """The head's name, of what a plan calls it."""
    linear = [head for head in heads_of(task) if head in LINEAR_HEADS]
    answering = [head for head in heads_of(task) if head not in LINEAR_HEADS]
    if asked in HEAD_WORDS:
        heads = linear if asked == "linear" else answering
        if not heads:
            raise ValueError(f"{task.name} has no {asked} head, only {' or '.join(heads_of(task))}.")
        return heads[0]
    if asked is None and not trains and answering:
        return task.head if task.head in answering else answering[0]
    return head_of(task, asked).name


class _Rows:
    """The rows of every task that is compared, each split read once."""

    def __init__(self) -> None:
        self._splits: dict[tuple[Any, ...], Sequence[Example]] = {}
        self._trained: dict[str, tuple[Task, DataArguments]] = {}

    def read(self, name: str, task: Task, data: DataArguments, trains: bool) -> str:
        """Reads the splits that a cell needs; returns which one is scored.

        Raises:
            ValueError: as `read_examples`, or if what is to be scored has no labels.
        """
        split = self._split_of(task, data, "test")
        tested = self._examples(task, data, split, data.max_predict_samples)
        if not has_gold(tested):
            raise ValueError(
                f"the split {split} has no labels to score against; name another one of {', '.join(task.files)} by "
                "predict_split."
            )
        if trains:
            self._examples(task, data, self._split_of(task, data, "train"), data.max_train_samples)
            self._trained.setdefault(name, (task, data))
        return split

    def majority(self, name: str) -> tuple[str, Mapping[str, float]] | None:
        """See `CheckedPlan.majority`; None for a task without labels, with sets of them, or without training rows."""
        if name not in self._trained:
            return None
        task, data = self._trained[name]
        split = self._split_of(task, data, "test")
        tested = self._examples(task, data, split, data.max_predict_samples)
        if all(example.gold not in list(task.labels) for example in tested):
            return None
        training = self._examples(task, data, self._split_of(task, data, "train"), data.max_train_samples)
        counts = Counter(example.gold for example in training if not example.left_out)
        most = max(task.labels, key=counts.__getitem__)
        return split, score_task(task, tested, [Prediction(most)] * len(tested)).metrics

    def _split_of(self, task: Task, data: DataArguments, kind: str) -> str:
        return (data.predict_split if kind == "test" else data.train_split) or usual_split(task, kind)

    def _examples(self, task: Task, data: DataArguments, split: str, limit: int | None) -> Sequence[Example]:
        key = (task.origin, data.task_data, split, tuple(data.subjects or ()))
        if key not in self._splits:
            self._splits[key] = data.examples(task, split)
        return self._splits[key][:limit]
