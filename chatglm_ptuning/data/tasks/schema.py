"""What a task file may say, and the strict check of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from chatglm_ptuning.data.formats.registry import ALIASES, FORMATS
from chatglm_ptuning.data.tasks.checked_yaml import FieldChecker, nearest, quote_hint
from chatglm_ptuning.data.tasks.heads import heads_of
from chatglm_ptuning.data.tasks.readers import READERS, Reader
from chatglm_ptuning.data.tasks.task import HubSource, Subject, Submission, Task, placeholders

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


def parse_task(content: Any, origin: str) -> Task:
    """A task from what its YAML file holds.

    Raises:
        ValueError: naming the file, the key and the way out, for anything that is missing, unknown or does not fit.
    """
    return _Checker(origin).task(content)


class _Checker(FieldChecker):
    """Takes a task file apart; every complaint names the file."""

    def task(self, content: Any) -> Task:
        content = self.mapping(content, "the task file")
        known = [entry.name for entry in fields(Task) if entry.name != "origin"]
        self.known_keys(content, known, "key")
        for name in ("name", "title", "reader", "metric", "pre_seq_len", "learning_rate", "files"):
            if name not in content:
                self.fail(f"there is no key '{name}'; docs/tasks.md has an example.")
        reader = READERS[self.one_of(content["reader"], READERS, "reader")]
        if bool(reader.placeholders) != ("prompt" in content):
            asks = "needs a 'prompt'" if reader.placeholders else "has no 'prompt': its rows ask for themselves"
            self.fail(f"the reader '{reader.name}' {asks}; docs/tasks.md has an example.")
        task = Task(
            name=self.name(content["name"]),
            title=self.text(content["title"], "title"),
            reader=reader.name,
            head="",
            prompt=self.text(content["prompt"], "prompt") if reader.placeholders else "",
            metric=self.text(content["metric"], "metric"),
            pre_seq_len=self.positive_int(content["pre_seq_len"], "pre_seq_len"),
            learning_rate=self.positive_float(content["learning_rate"], "learning_rate"),
            settings_from=self.text(content.get("settings_from", "the task file's author"), "settings_from"),
            files=self.files(content["files"]),
            folders=self.texts(content.get("folders", ()), "folders"),
            fields=self.fields(content.get("fields", {}), reader),
            labels=self.labels(content.get("labels", {})),
            drop_labels=self.texts(content.get("drop_labels", ()), "drop_labels"),
            multi_label=self.flag(content.get("multi_label", False), "multi_label"),
            label_separator=self.separator(content),
            letters=self.flag(content.get("letters", False), "letters"),
            echo=self.flag(content.get("echo", False), "echo"),
            dataset_format=self.dataset_format(content),
            source_prefix=self.text(content["source_prefix"], "source_prefix") if "source_prefix" in content else "",
            subjects=self.subjects(content.get("subjects", {})),
            groups=self.groups(content.get("groups", {}), content.get("subjects", {})),
            hub=self.hub(content.get("hub", {})),
            submission=self.submission(content.get("submission"), reader),
            source=self.text(content.get("source", "-"), "source"),
            aliases=self.texts(content.get("aliases", ()), "aliases"),
            origin=self.origin,
        )
        self.options(content, reader)
        if reader.placeholders:
            self.prompt(task, reader)
        if task.multi_label and task.drop_labels:
            self.fail("'drop_labels' leaves out rows of one label; with 'multi_label' take them out of the files.")
        return self.head_and_metric(task, content.get("head"), reader)

    def options(self, content: Mapping[str, Any], reader: Reader) -> None:
        for key, form in _OPTIONS.items():
            if content.get(key) and key not in (*reader.needs, *reader.options):
                takers = ", ".join(other.name for other in READERS.values() if key in (*other.needs, *other.options))
                self.fail(f"'{key}' belongs to the readers {takers}, not to '{reader.name}'; leave it out.")
            if key in reader.needs and not content.get(key):
                self.fail(f"the reader '{reader.name}' needs '{key}': {form}.")

    def name(self, value: Any) -> str:
        name = self.text(value, "name")
        if name in (".", "..") or "/" in name or "\\" in name:
            self.fail(
                f"'name' also names folders, so that it must be without / and \\ and no dots alone, found {name!r}."
            )
        return name

    def separator(self, content: Mapping[str, Any]) -> str:
        value = content.get("label_separator", Task.label_separator)
        if not isinstance(value, str) or not value:
            self.fail(f"'label_separator' must be text, found {value!r}.")
        if "label_separator" in content and content.get("multi_label") is not True:
            self.fail("'label_separator' belongs to 'multi_label: true'.")
        return value

    def dataset_format(self, content: Mapping[str, Any]) -> str | None:
        if "dataset_format" not in content:
            return None
        return self.one_of(content["dataset_format"], [*FORMATS, *ALIASES], "dataset_format")

    def head_and_metric(self, task: Task, head: Any, reader: Reader) -> Task:
        whose = f"(of the reader '{reader.name}'{' with multi_label' if task.multi_label else ''})"
        heads, metrics = heads_of(task), reader.metrics_of(task)
        if task.metric not in metrics and task.metric in reader.metrics_of(replace(task, multi_label=True)):
            self.fail(f"the metric '{task.metric}' belongs to 'multi_label: true'.")
        self.one_of(task.metric, metrics, f"metric {whose}")
        return replace(task, head=next(iter(heads)) if head is None else self.one_of(head, heads, f"head {whose}"))

    def files(self, value: Any) -> dict[str, tuple[tuple[str, ...], ...]]:
        splits = {}
        for split, alternatives in self.mapping(value, "'files'").items():
            names = self.texts(alternatives, f"files.{split}")
            splits[self.text(split, "files")] = tuple(
                tuple(part.strip() for part in name.split(" + ")) for name in names
            )
        for name in (name for names in splits.values() for parts in names for name in parts):
            try:
                unknown = [found for found in placeholders(name) if found != "subject"]
            except ValueError as error:
                self.fail(f"the file name '{name}' is malformed: {error}.")
            if unknown:
                self.fail(f"the file name '{name}' has {{{unknown[0]}}} in it; only {{subject}} may stand there.")
        if not splits:
            self.fail("'files' names no split; write for example `files: {train: train.json}`.")
        return splits

    def fields(self, value: Any, reader: Reader) -> dict[str, str]:
        named = self.text_mapping(value, "fields")
        if not reader.takes_extra_fields:
            known = [*reader.fields, *reader.optional_fields]
            self.known_keys(named, known, f"field (of the reader '{reader.name}')")
        for role in reader.fields:
            if role not in named:
                self.fail(f"'fields' does not say which column is '{role}', which the reader '{reader.name}' needs.")
        return named

    def labels(self, value: Any) -> dict[str, str]:
        labels: dict[str, str] = {}
        for key, verbaliser in self.mapping(value, "'labels'").items():
            if isinstance(key, bool) or not isinstance(key, (str, int)):
                self.fail(f"the label {key!r} must be text or a number{quote_hint(key)}.")
            if not isinstance(verbaliser, str) or not verbaliser.strip():
                self.fail(
                    f"the label '{key}' has no verbaliser (found {verbaliser!r}); write its Chinese name behind it"
                    f"{quote_hint(verbaliser)}."
                )
            twin = next((other for other, text in labels.items() if text == verbaliser), None)
            if twin is not None:
                self.fail(f"the labels '{twin}' and '{key}' share the verbaliser {verbaliser}; they must differ.")
            labels[str(key)] = verbaliser
        return labels

    def subjects(self, value: Any) -> dict[str, Subject]:
        subjects = {}
        for name, entry in self.mapping(value, "'subjects'").items():
            if not isinstance(entry, Sequence) or isinstance(entry, str) or len(entry) != 2:
                self.fail(f"the subject '{name}' must be [Chinese title, category], found {entry!r}.")
            subjects[self.text(name, "subjects")] = Subject(*(self.text(part, f"subjects.{name}") for part in entry))
        return subjects

    def groups(self, value: Any, subjects: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
        taken = {*subjects, *(category for _, category in subjects.values())}
        groups = {}
        for name, members in self.mapping(value, "'groups'").items():
            groups[self.text(name, "groups")] = self.texts(members, f"groups.{name}")
            if name in taken:
                self.fail(f"the group '{name}' has the name of a subject or category.")
            for member in groups[name]:
                self.one_of(member, subjects, f"subject in groups.{name}")
        return groups

    def hub(self, value: Any) -> dict[str, HubSource]:
        sources = {}
        for hub, entry in self.mapping(value, "'hub'").items():
            self.one_of(hub, ("huggingface", "modelscope"), "hub")
            entry = {"id": entry} if isinstance(entry, str) else self.mapping(entry, f"'hub.{hub}'")
            self.known_keys(entry, [part.name for part in fields(HubSource)], f"key of hub.{hub}")
            config = entry.get("config")
            sources[hub] = HubSource(
                self.text(entry.get("id"), f"hub.{hub}.id"),
                None if config is None else self.text(config, f"hub.{hub}.config"),
                self.text_mapping(entry.get("splits", {}), f"hub.{hub}.splits"),
                self.text_mapping(entry.get("fields", {}), f"hub.{hub}.fields"),
            )
        return sources

    def submission(self, value: Any, reader: Reader) -> Submission | None:
        if value is None:
            return None
        entry = self.mapping(value, "'submission'")
        self.known_keys(entry, ("format", "file"), "key of submission")
        what = f"submission format (of the reader '{reader.name}')"
        form = self.one_of(entry.get("format"), reader.submissions, what)
        names = entry.get("file")
        files = {"": names} if isinstance(names, str) else names
        return Submission(form, self.file_names(files))

    def file_names(self, value: Any) -> dict[str, str]:
        names = {}
        for split, name in self.mapping(value, "'submission.file'").items():
            if not isinstance(name, str) or "/" in name or not name.strip():
                self.fail(f"submission.file.{split} must be the name of a file, found {name!r}.")
            names[str(split)] = name
        return names or self.fail("'submission.file' names no file.")

    def prompt(self, task: Task, reader: Reader) -> None:
        try:
            names = placeholders(task.prompt)
        except ValueError as error:
            self.fail(f"the prompt is malformed: {error}.")
        known = [name for name in reader.placeholders if name != "text_pair" or "text_pair" in task.fields]
        known += [*reader.extra_fields(task), *(["labels"] if task.labels else [])]
        for name in names:
            if name not in known:
                shown = ", ".join(f"{{{entry}}}" for entry in known)
                self.fail(f"the prompt names {{{name}}}{nearest(name, known)}; it may name {shown}.")
        if not set(names) - {"labels"}:
            self.fail("the prompt names nothing of the row; write for example {text} where it belongs.")
        if task.letters and "options" not in names:
            self.fail("with 'letters' the prompt must show the candidates: write {options} where they belong.")
