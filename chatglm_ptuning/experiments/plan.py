"""What a comparison runs: the strict reading of its plan, and the cells that it is made of."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, NoReturn

from pydantic import AfterValidator, BeforeValidator, Field, InstanceOf
from pydantic.dataclasses import dataclass

from chatglm_ptuning.command_line import FlagChecker
from chatglm_ptuning.data.tasks.arguments import usual_split
from chatglm_ptuning.data.tasks.checked_yaml import FORBID, Text, YamlFile, nearest, read_yaml
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
_EXAMPLE = "docs/compare.md has an example"


def _distinct(values: Sequence[Any]) -> Any:
    twice = sorted({str(value) for value in values if list(values).count(value) > 1})
    if twice:
        raise ValueError(f"names {', '.join(twice)} twice")
    return values


def _by_name(value: Any) -> Any:
    """Name -> flags, or None where there are none; also of a list of names."""
    if isinstance(value, list):
        value = dict.fromkeys(_distinct(value))
    return {str(name): flags for name, flags in value.items()} if isinstance(value, Mapping) else value


Flags = Mapping[str, Any]
Named = Annotated[Mapping[str, Flags | None], BeforeValidator(_by_name), Field(min_length=1, description=_EXAMPLE)]
Seeds = Annotated[
    tuple[Annotated[int, Field(strict=True, ge=0)], ...],
    BeforeValidator(lambda value: [value] if isinstance(value, int) else value),
    Field(min_length=1),
    AfterValidator(_distinct),
]


@dataclass(frozen=True, config=FORBID)
class Plan:
    """What a comparison is to run.

    Attributes:
        base: what every run tunes.
        tasks: name in the table -> flags of its runs; `task` is the name itself where it is not given, and under
            `methods` are flags of its cells, or None for a cell that is not run.
        methods: name in the table -> flags of its runs; None stands for a way of tuning of that name.
        seeds: of every task and method.
        common: flags of every run.
        reference: the method that all others are compared with.
        last: flags that override all others.
        file: that the plan was read from; None if it is of flags.
    """

    base: Annotated[Text, Field(description=_EXAMPLE)]
    tasks: Named
    methods: Named
    seeds: Seeds = DEFAULT_SEEDS
    common: Flags = field(default_factory=dict)
    reference: str | None = None
    last: Flags = field(default_factory=dict)
    file: InstanceOf[YamlFile] | None = None

    def refuse(self, place: Sequence[str], text: str) -> NoReturn:
        """Refuses what stands at a place in the plan; the message names the file and the line, if there is a file."""
        raise ValueError(text) if self.file is None else self.file.error(tuple(place), text)

    def cells_of(self, task: str) -> Mapping[str, Flags | None]:
        """Method -> flags of its cell of a task, or None if that is not run."""
        return (self.tasks[task] or {}).get("methods") or {}

    def flags_of(self, task: str, method: str) -> dict[str, Any] | None:
        """All flags of a cell's runs but those in `OWN_FLAGS`; None if it is not run.

        What is more particular overrides what is more general: common flags, the task's, the method's, the cell's.
        """
        own = self.cells_of(task).get(method, {})
        if own is None:
            return None
        of_method = self.methods[method]
        flags = {**RUN_DEFAULTS, **self.common, "task": task, **(self.tasks[task] or {}),
                 **({"tuning": method} if of_method is None else of_method), **own, **self.last}  # fmt: skip
        return {name: value for name, value in flags.items() if value is not None and name != "methods"}


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
        ValueError: naming the file, the line and the key that is unknown, missing or malformed.
    """
    file = read_yaml(path, "plan")
    plan = file.read(Plan, file=file, last={})
    for task in plan.tasks:
        cells = plan.cells_of(task)
        place = ("tasks", task, "methods")
        if not isinstance(cells, Mapping):
            file.fail(place, f"tasks.{task}.methods must be a mapping of methods to flags, found {cells!r}.")
        for method in cells:
            file.one_of((*place, method), method, plan.methods, f"method in tasks.{task}.methods")
    return plan


def _known(names: Iterable[str], known: Iterable[str], what: str) -> None:
    known = list(known)
    for name in names:
        if name not in known:
            raise ValueError(f"unknown {what} {name!r}{nearest(name, known)}; known are {', '.join(known)}.")


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
        folders = {folder_name(name): name for name in reversed(names)}
        for name in names:
            if (other := folders[folder_name(name)]) != name:
                text = f"the {what} {other!r} and {name!r} would share the folder {folder_name(name)}."
                plan.refuse((what, name), text)
    checker = FlagChecker(TRAIN_FLAGS)
    _check_flag_names(plan, checker)
    rows = _Rows()
    cells, left_out, majority = [], {}, {}
    for task in tasks:
        for method in methods:
            flags = plan.flags_of(task, method)
            try:
                cell = "the plan says so" if flags is None else _check_cell(plan, task, method, flags, checker, rows)
            except ValueError as error:
                plan.refuse(("tasks", task), f"{task} by {method}: {error}")
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


def _check_flag_names(plan: Plan, checker: FlagChecker) -> None:
    places: dict[tuple[str, ...], Flags | None] = {("common",): plan.common, ("the flags behind --",): plan.last}
    places |= {("methods", name): flags for name, flags in plan.methods.items()}
    for task, flags in plan.tasks.items():
        places["tasks", task] = {name: value for name, value in (flags or {}).items() if name != "methods"}
        places |= {("tasks", task, "methods", name): flags for name, flags in plan.cells_of(task).items()}
    for place, flags in places.items():
        try:
            checker.check_names(flags or {})
        except ValueError as error:
            plan.refuse(place, f"{'.'.join(place)}: {error}")
        for name in OWN_FLAGS:
            if name in (flags or {}):
                plan.refuse(
                    (*place, name), f"{'.'.join(place)}: --{name} is set by the comparison itself; leave it out."
                )


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
    data.echo_of(definition, head_of(definition, head))
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
