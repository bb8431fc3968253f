"""The reading of a task file, and what it must say for its reader."""

from __future__ import annotations

from dataclasses import replace

from chatglm_ptuning.data.formats.registry import ALIASES, FORMATS
from chatglm_ptuning.data.tasks.checked_yaml import YamlFile, nearest
from chatglm_ptuning.data.tasks.heads import heads_of
from chatglm_ptuning.data.tasks.readers import READERS, Reader
from chatglm_ptuning.data.tasks.task import Task, placeholders

_OPTIONS = {
    "labels": "the label of the files -> its Chinese verbaliser",
    "drop_labels": "labels of rows that do not count",
    "multi_label": "true or false",
    "label_separator": "text between labels",
    "letters": "true or false",
    "echo": "true or false",
    "dataset_format": "the format of instruction rows",
    "source_prefix": "text in front of every conversation",
    "subjects": "NAME: [Chinese title, category]",
    "groups": "NAME: [subject, ...]",
}
"""Keys that only some readers take, and what stands behind them."""


def parse_task(file: YamlFile) -> Task:
    """The task that a file describes.

    Raises:
        ValueError: naming the file, the line, the key and the way out, for anything that is missing, unknown or does
            not fit.
    """
    task = file.read(Task, origin=str(file.path))
    file.one_of(("reader",), task.reader, READERS, "reader")
    reader = READERS[task.reader]
    task = replace(task, head=task.head or next(iter(heads_of(task))))
    if not task.files:
        file.fail(("files",), "'files' names no split; write for example `files: {train: train.json}`.")
    _check_keys_of_reader(file, reader)
    _check_fields(file, task, reader)
    _check_prompt(file, task, reader)
    _check_groups(file, task)
    _check_labels_and_head(file, task, reader)
    if task.submission is not None:
        what = f"submission format (of the reader '{reader.name}')"
        file.one_of(("submission", "format"), task.submission.format, reader.submissions, what)
    return task


def _check_keys_of_reader(file: YamlFile, reader: Reader) -> None:
    for key, form in _OPTIONS.items():
        if file.content.get(key) and key not in (*reader.needs, *reader.options):
            takers = ", ".join(other.name for other in READERS.values() if key in (*other.needs, *other.options))
            file.fail((key,), f"'{key}' belongs to the readers {takers}, not to '{reader.name}'; leave it out.")
        if key in reader.needs and not file.content.get(key):
            file.fail((), f"the reader '{reader.name}' needs '{key}': {form}.")


def _check_fields(file: YamlFile, task: Task, reader: Reader) -> None:
    for role in () if reader.takes_extra_fields else task.fields:
        known = [*reader.fields, *reader.optional_fields]
        file.one_of(("fields", role), role, known, f"field (of the reader '{reader.name}')")
    for role in reader.fields:
        if role not in task.fields:
            text = f"'fields' does not say which column is '{role}', which the reader '{reader.name}' needs."
            file.fail(("fields",), text)


def _check_prompt(file: YamlFile, task: Task, reader: Reader) -> None:
    place = ("prompt",)
    if bool(reader.placeholders) != bool(task.prompt):
        asks = "needs a 'prompt'" if reader.placeholders else "has no 'prompt': its rows ask for themselves"
        file.fail(place, f"the reader '{reader.name}' {asks}; docs/tasks.md has an example.")
    if not reader.placeholders:
        return
    try:
        names = placeholders(task.prompt)
    except ValueError as error:
        raise file.error(place, f"the prompt is malformed: {error}.") from error
    known = [name for name in reader.placeholders if name != "text_pair" or "text_pair" in task.fields]
    known += [*reader.extra_fields(task), *(["labels"] if task.labels else [])]
    for name in names:
        if name not in known:
            shown = ", ".join(f"{{{entry}}}" for entry in known)
            file.fail(place, f"the prompt names {{{name}}}{nearest(name, known)}; it may name {shown}.")
    if not set(names) - {"labels"}:
        file.fail(place, "the prompt names nothing of the row; write for example {text} where it belongs.")
    if task.letters and "options" not in names:
        file.fail(place, "with 'letters' the prompt must show the candidates: write {options} where they belong.")


def _check_groups(file: YamlFile, task: Task) -> None:
    taken = {*task.subjects, *(subject.category for subject in task.subjects.values())}
    for name, members in task.groups.items():
        if name in taken:
            file.fail(("groups", name), f"the group '{name}' has the name of a subject or category.")
        for member in members:
            file.one_of(("groups", name), member, task.subjects, f"subject in groups.{name}")


def _check_labels_and_head(file: YamlFile, task: Task, reader: Reader) -> None:
    owners: dict[str, str] = {}
    for label, verbaliser in task.labels.items():
        other = owners.setdefault(verbaliser, label)
        if other != label:
            text = f"the labels '{other}' and '{label}' share the verbaliser {verbaliser}; they must differ."
            file.fail(("labels", label), text)
    if task.dataset_format is not None:
        file.one_of(("dataset_format",), task.dataset_format, [*FORMATS, *ALIASES], "dataset_format")
    if "label_separator" in file.content and not task.multi_label:
        file.fail(("label_separator",), "'label_separator' belongs to 'multi_label: true'.")
    if task.multi_label and task.drop_labels:
        text = "'drop_labels' leaves out rows of one label; with 'multi_label' take them out of the files."
        file.fail(("drop_labels",), text)
    whose = f"(of the reader '{reader.name}'{' with multi_label' if task.multi_label else ''})"
    metrics = reader.metrics_of(task)
    if task.metric not in metrics and task.metric in reader.metrics_of(replace(task, multi_label=True)):
        file.fail(("metric",), f"the metric '{task.metric}' belongs to 'multi_label: true'.")
    file.one_of(("metric",), task.metric, metrics, f"metric {whose}")
    file.one_of(("head",), task.head, heads_of(task), f"head {whose}")
