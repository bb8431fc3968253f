"""The plan of a comparison, read strictly, and the runs of its table."""

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
from chatglm_ptuning.data.cache import TokenCache
from chatglm_ptuning.data.dataset import Loader, Split
from chatglm_ptuning.data.tasks.checked_yaml import FORBID, Text, YamlFile, nearest, read_yaml
from chatglm_ptuning.data.tasks.examples import Example, has_gold
from chatglm_ptuning.data.tasks.heads import LINEAR_HEADS, head_of, heads_of
from chatglm_ptuning.data.tasks.heads.head import Prediction
from chatglm_ptuning.data.tasks.task import Task
from chatglm_ptuning.evaluation.report import score_task
from chatglm_ptuning.experiments.run import RUN_DEFAULTS
from chatglm_ptuning.training.arguments import DataArguments, GivenTrainingArguments, ModelArguments
from chatglm_ptuning.training.run import TRAIN_FLAGS

DEFAULT_SEEDS = (1, 2, 3)
OWN_FLAGS = (
    "model_name_or_path", "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "seed", "do_train",
    "do_predict", "config",
)  # fmt: skip
"""Flags that the comparison sets for every run."""
FILE_FLAGS = ("train_file", "validation_file", "test_file")
"""Flags of a task in the plan that is to learn instruction files."""
_TASK_FLAGS = ("task_data", "subjects", "train_split", "eval_split", "predict_split")
"""Flags that do not apply to instruction files, though the plan may have them for all tasks."""
HEAD_WORDS = ("linear", "verbaliser")
"""Values of `head` beside the names of heads: the task's linear head, or its head that scores answers."""
_EXAMPLE = "docs/compare.md has an example"


def _distinct(values: Sequence[Any]) -> Any:
    twice = sorted({str(value) for value in values if list(values).count(value) > 1})
    if twice:
        raise ValueError(f"names {', '.join(twice)} twice")
    return values


def _by_name(value: Any) -> Any:
    """Name -> flags, or None without flags; a list of names is accepted too."""
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
    """What a comparison runs.

    Attributes:
        base: the base model of every run.
        tasks: name in the table -> flags of its runs. `task` defaults to the name if no instruction files are named;
            `methods` holds flags of single cells, or None for a cell that is left out.
        methods: name in the table -> flags of its runs; None for the tuning method of that name.
        seeds: of every task and method.
        common: flags of every run.
        reference: the method that all others are compared with.
        last: flags that override all others.
        file: that the plan was read from; None for a plan made of flags.
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
        """Raises a ValueError about a place in the plan, with file and line if there is a file."""
        raise ValueError(text) if self.file is None else self.file.error(tuple(place), text)

    def cells_of(self, task: str) -> Mapping[str, Flags | None]:
        """Method -> flags of its cell of a task; None if the cell is left out."""
        return (self.tasks[task] or {}).get("methods") or {}

    def flags_of(self, task: str, method: str) -> dict[str, Any] | None:
        """All flags of a cell's runs except `OWN_FLAGS`; None if the cell is left out.

        Specific flags override general ones: common, the task's, the method's, the cell's, `last`.
        """
        own = self.cells_of(task).get(method, {})
        if own is None:
            return None
        of_method = self.methods[method]
        of_task = self.tasks[task] or {}
        name = {} if any(files in of_task for files in FILE_FLAGS) else {"task": task}
        flags = {**RUN_DEFAULTS, **self.common, **name, **of_task,
                 **({"tuning": method} if of_method is None else of_method), **own, **self.last}  # fmt: skip
        unused = {"methods", *(() if "task" in flags else _TASK_FLAGS)}
        return {name: value for name, value in flags.items() if value is not None and name not in unused}


@dataclass(frozen=True)
class Cell:
    """One task by one method, for all seeds.

    Attributes:
        task, method: their names in the table.
        definition: of the task.
        head: name of the head.
        predict_split: the split that is scored.
        flags: of its runs, without seed and folder.
    """

    task: str
    method: str
    definition: Task
    head: str
    predict_split: str
    flags: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        """The folder of its runs, relative to the comparison's."""
        return Path("runs", folder_name(self.task), folder_name(self.method))


@dataclass(frozen=True)
class CheckedPlan:
    """A plan that has passed all checks that need no base model.

    Attributes:
        cells: in the order of tasks, then methods.
        left_out: (task, method) -> the reason why it is left out.
        majority: task -> (split, metrics in percent) of a constant prediction, the most frequent label of the
            training split.
    """

    cells: tuple[Cell, ...]
    left_out: Mapping[tuple[str, str], str]
    majority: Mapping[str, tuple[str, Mapping[str, float]]]


def folder_name(name: str) -> str:
    """The folder for a name in the table."""
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
            raise file.error(place, f"tasks.{task}.methods must be a mapping of methods to flags, found {cells!r}.")
        for method in cells:
            file.one_of((*place, method), method, plan.methods, f"method in tasks.{task}.methods")
    return plan


def _chosen(names: Sequence[str] | None, known: Iterable[str], what: str) -> list[str]:
    """The known names that are chosen, in the plan's order; all if None."""
    known = list(known)
    for name in names or ():
        if name not in known:
            raise ValueError(f"unknown {what} {name!r}{nearest(name, known)}; known are {', '.join(known)}.")
    return [name for name in known if names is None or name in names]


def check_plan(plan: Plan, tasks: Sequence[str] | None = None, methods: Sequence[str] | None = None) -> CheckedPlan:
    """Reads every task's rows and checks every run's flags, so that errors show before the first run.

    Args:
        tasks, methods: the names to keep; None for all.

    Raises:
        ValueError: naming the place in the plan, the value and the way out.
    """
    tasks, methods = _chosen(tasks, plan.tasks, "task"), _chosen(methods, plan.methods, "method")
    _chosen(plan.reference and [plan.reference], plan.methods, "reference")
    for what, names in (("tasks", plan.tasks), ("methods", plan.methods)):
        folders = {folder_name(name): name for name in reversed(names)}
        for name in names:
            if (other := folders[folder_name(name)]) != name:
                text = f"the {what} {other!r} and {name!r} would share the folder {folder_name(name)}."
                plan.refuse((what, name), text)
    checker = FlagChecker(TRAIN_FLAGS)
    _check_flag_names(plan, checker)
    splits = _Splits()
    cells, left_out, majority = [], {}, {}
    for task in tasks:
        for method in methods:
            flags = plan.flags_of(task, method)
            try:
                cell = "the plan says so" if flags is None else _check_cell(plan, task, method, flags, checker, splits)
            except ValueError as error:
                plan.refuse(("tasks", task), f"{task} by {method}: {error}")
            if isinstance(cell, str):
                left_out[task, method] = cell
            else:
                cells.append(cell)
        if task in splits.trained and (always := splits.majority(*splits.trained[task])) is not None:
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
        for name in flags or {}:
            if name in OWN_FLAGS:
                text = f"{'.'.join(place)}: --{name} is set by the comparison itself; leave it out."
                plan.refuse((*place, name), text)


def _check_cell(
    plan: Plan, task: str, method: str, flags: dict[str, Any], checker: FlagChecker, splits: _Splits
) -> Cell | str:
    """The cell, or the reason why it cannot be run."""
    tuning, asked = flags.get("tuning", "ptuning_v2"), flags.pop("head", None)
    kinds = (ModelArguments, DataArguments, GivenTrainingArguments)
    _, data, _ = checker.values({**flags, "model_name_or_path": plan.base}, kinds)
    definition = data.chosen_task()
    head = _head(definition, asked, tuning != "none")
    if tuning == "none" and head in LINEAR_HEADS:
        return f"the plain base has no {head.replace('_', ' ')} head"
    if tuning == "head_only" and head not in LINEAR_HEADS:
        return f"{head} has no head to train alone"
    if data.task is not None:
        flags["head"] = head
        data.setup_of_task(definition, heads_of(definition)[head])
    split = data.split(definition, "test")
    if not has_gold(splits.read(definition, data, split)):
        raise ValueError(
            f"the split {split.name} has no labels to score against; name another one of "
            f"{', '.join(definition.files)} by predict_split."
        )
    if tuning != "none":
        splits.read(definition, data, data.split(definition, "train"))
        splits.trained.setdefault(task, (definition, data))
    return Cell(task, method, definition, head, _shown(data, split), flags)


def _shown(data: DataArguments, split: Split) -> str:
    """A split as the table names it: by its name, or by the instruction files."""
    return split.name if data.task is not None else ", ".join(Path(place).name for place in split.places)


def _head(task: Task, asked: Any, trains: bool) -> str:
    """The head that `head` in a plan selects."""
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


class _Splits:
    """The examples of the splits that are used, each read once.

    Attributes:
        trained: name in the table -> definition and data of its first cell that trains.
    """

    def __init__(self) -> None:
        self._examples: dict[tuple[Any, ...], Sequence[Example]] = {}
        self.trained: dict[str, tuple[Task, DataArguments]] = {}

    def majority(self, task: Task, data: DataArguments) -> tuple[str, Mapping[str, float]] | None:
        """See `CheckedPlan.majority`; None for a task without labels, or with several labels per text."""
        split = data.split(task, "test")
        tested = self.read(task, data, split)
        if all(example.gold not in list(task.labels) for example in tested):
            return None
        training = self.read(task, data, data.split(task, "train"))
        counts = Counter(example.gold for example in training if not example.left_out)
        most = max(task.labels, key=counts.__getitem__)
        return split.name, score_task(task, tested, [Prediction(most)] * len(tested)).metrics

    def read(self, task: Task, data: DataArguments, split: Split) -> Sequence[Example]:
        """The examples of a split."""
        key = (task.origin, *split.places, split.name, split.limit, *(split.subjects or ()))
        if key not in self._examples:
            self._examples[key] = Loader(TokenCache(), data.skip_bad_rows).read(task, split).examples
        return self._examples[key]
