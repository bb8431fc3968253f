"""The tasks that a checkpoint was trained on, as it records them, and whether it suits the task to evaluate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers.utils import logging

from chatglm_ptuning.data.tasks.arguments import TaskSetup, TrainedReading
from chatglm_ptuning.data.tasks.heads import ECHO_HEADS, LINEAR_HEADS, heads_of
from chatglm_ptuning.data.tasks.task import Task
from chatglm_ptuning.model.arguments import BaseArguments
from chatglm_ptuning.prefix.formats import adapter_type, read_prefix
from chatglm_ptuning.tuning.record import read_record

logger = logging.get_logger(__name__)

TOKEN_UNIT = "token_unit"
"""Key of `PrefixMetadata.training`: the unit of tags (`Head.token_unit`), of a prefix for tags."""
ECHO = "echo"
"""Key of `PrefixMetadata.training`: whether the text was read twice (`Head.echo`), by task."""
TRAIN_SPLIT = "split"
"""Key of `PrefixMetadata.training`: the split of the task that it was trained on."""
PROMPTS = "prompts"
"""Key of `PrefixMetadata.training`: the prompt of each task, by its name."""


def recorded_details(checkpoint: str | Path, base: BaseArguments) -> dict[str, Any]:
    """The task, head and labels that a checkpoint of any tuning method records; needs no weights of the base.

    An adapter of PEFT's own records nothing.

    Raises:
        FileNotFoundError, ValueError: as `read_prefix`, `read_record` and `find_base`.
    """
    record = read_record(checkpoint)
    if record is not None:
        return record.details
    if adapter_type(Path(checkpoint)) == "LORA":
        return {}
    metadata = read_prefix(checkpoint, base.load_config().prefix_shape).metadata
    return {"task": metadata.task, "head": metadata.head, "labels": metadata.labels,
            "tasks": metadata.tasks, "training": metadata.training}  # fmt: skip


def record_of(setups: Iterable[TaskSetup]) -> dict[str, Any]:
    """The records of `PrefixMetadata.training` about the tasks of a run."""
    setups = list(setups)
    record: dict[str, Any] = {PROMPTS: {setup.task.name: _filled_prompt(setup.task) for setup in setups}}
    echo = {setup.task.name: setup.settings["echo"] for setup in setups if setup.head.echoes}
    units = [setup.settings["token_unit"] for setup in setups if setup.head.splits_tokens]
    return record | ({ECHO: echo} if echo else {}) | ({TOKEN_UNIT: units[0]} if units else {})


def tasks_of(details: Mapping[str, Any]) -> dict[str, tuple[str, list[str] | None, bool]]:
    """Head, labels and echo by task of a checkpoint or a run; nothing if it learns rows of files."""
    tasks = details.get("tasks") or ({details["task"]: details} if details.get("head") else {})
    echo = details.get("training", {}).get(ECHO, {})
    return {
        name: (one["head"], None if one.get("labels") is None else list(one["labels"]), echo.get(name, False))
        for name, one in tasks.items()
    }


def described_tasks(tasks: Mapping[str, tuple[str, list[str] | None, bool]]) -> str:
    """The result of `tasks_of` as text."""
    each = []
    for name, (head, labels, echo) in tasks.items():
        shown = [f"head {head}", *([] if labels is None else [f"labels {_listed(labels)}"])]
        shown += [f"echo {str(echo).lower()}"] if head in ECHO_HEADS else []
        each.append(f"{name} ({', '.join(shown)})")
    return "the task " + ", ".join(each) if each else "rows of files"


def recorded_head(details: Mapping[str, Any], task: Task, asked: str | None, source: str | Path) -> str:
    """The head to use with a prefix: the one that was trained beside it, or the language model.

    Raises:
        ValueError: if another one is requested, if it cannot solve the task, or if its labels are not the task's; the
            message names both sides.
    """
    shared = details.get("tasks") or {}
    if task.name in shared:
        details = {**details, **shared[task.name], "task": task.name}
    recorded, labels = details.get("head"), details.get("labels")
    known = heads_of(task)
    if recorded not in LINEAR_HEADS:
        answering = [head for head in known if head not in LINEAR_HEADS]
        own = [head for head in (recorded, task.head) if head in answering]
        head = asked or (own or answering or [task.head])[0]
    else:
        head = recorded
    if asked is not None and asked != head:
        raise ValueError(f"The checkpoint {source} was trained with the head {head}, not with {asked}.")
    if head not in known:
        raise ValueError(
            f"The checkpoint {source} was trained with the head {head}, for "
            f"{details.get('task') or 'an unnamed task'}; {task.name} takes {' or '.join(known)}."
        )
    before = details.get("task")
    if details.get("head") is not None and before not in (None, task.name):
        logger.warning(f"The checkpoint {source} was trained for the task {before}, and is used for {task.name}.")
    prompt = details.get("training", {}).get(PROMPTS, {}).get(task.name)
    if prompt not in (None, _filled_prompt(task)):
        logger.warning(
            f"The checkpoint {source} was trained with the prompt {prompt!r}; now it is {_filled_prompt(task)!r}."
        )
    names = known[head].outputs(task)
    if names is not None and labels is None:
        raise ValueError(
            f"The prefix in {source} has no linear head for {task.name}{_of_tasks(shared)}, and the head {head} "
            f"needs one: train a prefix for {task.name} with the head {head}, or score this one with the head "
            "generation, if the task takes it."
        )
    if names is not None and list(names) != list(labels or ()):
        raise ValueError(
            f"The head in {source} was trained for the labels {_listed(labels or ())} (task {details.get('task')}); "
            f"{task.name} has {_listed(names)}."
        )
    return head


def recorded_reading(details: Mapping[str, Any], task: Task, source: str | Path) -> TrainedReading:
    """How the head of `recorded_head` read its texts when it was trained."""
    training = details.get("training", {})
    name = task.name if task.name in (details.get("tasks") or {}) else details.get("task")
    return TrainedReading(str(source), training.get(TOKEN_UNIT), training.get(ECHO, {}).get(name, False))


def _filled_prompt(task: Task) -> str:
    """The prompt with the verbalisers of the labels filled in."""
    return task.prompt.replace("{labels}", "、".join(task.labels.values()))


def _of_tasks(shared: Mapping[str, Any]) -> str:
    return f" (it is shared by {', '.join(shared)})" if shared else ""


def _listed(names: Any) -> str:
    shown = list(names)
    return ", ".join(shown[:12]) + (f", ... ({len(shown)} in all)" if len(shown) > 12 else "")
