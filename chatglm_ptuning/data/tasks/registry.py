"""The packaged tasks, and the tasks of users' own YAML files: how a file is read and checked."""

from __future__ import annotations

import difflib
from dataclasses import replace
from functools import cache
from pathlib import Path

from chatglm_ptuning.data.formats.registry import ALIASES, FORMATS
from chatglm_ptuning.data.tasks.checked_yaml import YamlFile, nearest, read_yaml
from chatglm_ptuning.data.tasks.heads import heads_of
from chatglm_ptuning.data.tasks.readers import READERS, Reader
from chatglm_ptuning.data.tasks.task import Task, placeholders

DEFINITIONS = Path(__file__).parent / "definitions"
"""One file per task, `NAME.yaml`."""


def task_names() -> list[str]:
    """The names of the packaged tasks, sorted."""
    return sorted(path.stem for path in DEFINITIONS.glob("*.yaml"))


def load_task(name_or_path: str | Path) -> Task:
    """A packaged task by its name or an alias, or the task of a YAML file.

    Raises:
        ValueError: if there is no such task or file, naming the nearest; or naming the file, line and key of what is
            missing, unknown or does not fit.
    """
    text = str(name_or_path)
    if text in _names():
        return _packaged(_names()[text])
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return _read(path)
    near = difflib.get_close_matches(text, _names(), n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else "`chatglm-ptuning tasks` lists them."
    raise ValueError(f"There is no task '{text}'; {hint} For a custom task, give its file, MY_TASK.yaml.")


@cache
def _packaged(name: str) -> Task:
    return _read(DEFINITIONS / f"{name}.yaml")


@cache
def _names() -> dict[str, str]:
    """Name or alias of a packaged task -> name of its file."""
    names = {name: name for name in task_names()}
    return names | {alias: name for name in names for alias in _packaged(name).aliases}


def _read(path: Path) -> Task:
    file = read_yaml(path, "task file")
    task = file.read(Task, origin=str(file.path))
    file.one_of(("reader",), task.reader, READERS, "reader")
    reader = READERS[task.reader]
    task = replace(task, head=task.head or next(iter(heads_of(task))))
    if not task.files:
        raise file.error(("files",), "'files' names no split; write for example `files: {train: train.json}`.")
    _check_keys(file, task, reader)
    _check_prompt(file, task, reader)
    _check_labels(file, task)
    _check_choices(file, task, reader)
    return task


def _check_keys(file: YamlFile, task: Task, reader: Reader) -> None:
    """Refuses keys and fields that the reader does not take, and misses those that it needs."""
    takers: dict[str, list[str]] = {}
    for other in READERS.values():
        for key in (*other.needs, *other.options):
            takers.setdefault(key, []).append(other.name)
    for key, names in takers.items():
        if file.content.get(key) and reader.name not in names:
            raise file.error(
                (key,), f"'{key}' is for the readers {', '.join(names)}, not for '{reader.name}'; remove it."
            )
    for key in reader.needs:
        if not file.content.get(key):
            raise file.error((), f"the reader '{reader.name}' needs the key '{key}'; see docs/tasks.md.")
    known = [*reader.fields, *reader.optional_fields]
    for role in () if reader.takes_extra_fields else task.fields:
        file.one_of(("fields", role), role, known, f"field (of the reader '{reader.name}')")
    for role in reader.fields:
        if role not in task.fields:
            raise file.error(
                ("fields",), f"'fields' does not name the column of '{role}', which '{reader.name}' needs."
            )


def _check_prompt(file: YamlFile, task: Task, reader: Reader) -> None:
    place = ("prompt",)
    if bool(reader.placeholders) != bool(task.prompt):
        need = "needs a 'prompt'" if reader.placeholders else "takes no 'prompt': its rows contain their prompts"
        raise file.error(place, f"the reader '{reader.name}' {need}; see docs/tasks.md.")
    if not task.prompt:
        return
    try:
        names = placeholders(task.prompt)
    except ValueError as error:
        raise file.error(place, f"the prompt is malformed: {error}.") from error
    known = [*reader.placeholders, *reader.extra_fields(task), *(["labels"] if task.labels else [])]
    for name in names:
        if name not in known:
            shown = ", ".join(f"{{{entry}}}" for entry in known)
            raise file.error(place, f"unknown {{{name}}} in the prompt{nearest(name, known)}; known are {shown}.")
    if not set(names) - {"labels"}:
        raise file.error(place, "the prompt shows nothing of the row; write for example {text} where it belongs.")
    if task.letters and "options" not in names:
        raise file.error(
            place, "with 'letters' the prompt must list the candidates: write {options} where they belong."
        )


def _check_labels(file: YamlFile, task: Task) -> None:
    owners: dict[str, str] = {}
    for label, verbaliser in task.labels.items():
        other = owners.setdefault(verbaliser, label)
        if other != label:
            raise file.error(
                ("labels", label), f"the labels '{other}' and '{label}' have the same verbaliser {verbaliser}."
            )
    if "label_separator" in file.content and not task.multi_label:
        raise file.error(("label_separator",), "'label_separator' needs 'multi_label: true'.")
    if task.multi_label and task.drop_labels:
        text = "'drop_labels' cannot be used with 'multi_label'; remove these rows from the files."
        raise file.error(("drop_labels",), text)


def _check_choices(file: YamlFile, task: Task, reader: Reader) -> None:
    """Checks every key whose value is one of a known set."""
    whose = f"(of the reader '{reader.name}'{' with multi_label' if task.multi_label else ''})"
    metrics = reader.metrics_of(task)
    if task.metric not in metrics and task.metric in reader.metrics_of(replace(task, multi_label=True)):
        raise file.error(("metric",), f"the metric '{task.metric}' needs 'multi_label: true'.")
    file.one_of(("metric",), task.metric, metrics, f"metric {whose}")
    file.one_of(("head",), task.head, heads_of(task), f"head {whose}")
    if task.dataset_format is not None:
        file.one_of(("dataset_format",), task.dataset_format, [*FORMATS, *ALIASES], "dataset_format")
    if task.submission is not None:
        known = reader.example_class(task).submissions
        file.one_of(("submission", "format"), task.submission.format, known, f"submission format {whose}")
    taken = {*task.subjects, *(subject.category for subject in task.subjects.values())}
    for name, members in task.groups.items():
        if name in taken:
            raise file.error(("groups", name), f"the group '{name}' has the name of a subject or category.")
        for member in members:
            file.one_of(("groups", name), member, task.subjects, f"subject in groups.{name}")
