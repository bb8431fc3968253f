"""What a task file says, and the strict check of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from string import Formatter
from typing import Any

from chatglm_ptuning.data.tasks.checked_yaml import FieldChecker, nearest, quote_hint

HEADS = ("generation", "sequence_classification", "token_classification", "question_answering", "multiple_choice")
"""How a task is solved: by writing or scoring an answer, by a linear head, or by choosing among a row's candidates."""
ECHO_HEADS = ("token_classification", "question_answering")
"""Heads that may read their text twice (`TaskEncoder.echo`)."""


@dataclass(frozen=True)
class ReaderKind:
    """What a kind of files demands of its task file.

    Attributes:
        fields: roles that need the name of a column.
        optional: roles that may have one.
        extra_fields: whether further columns may be named, for the prompt.
        labels: whether the task has a label set.
        heads: that can solve the task, the usual one first.
        in_prompt: names that the prompt may use besides `labels` and extra fields.
    """

    fields: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    extra_fields: bool = False
    labels: bool = False
    heads: tuple[str, ...] = ()
    in_prompt: tuple[str, ...] = ()


_CHOICE = {"heads": ("multiple_choice", "generation"), "in_prompt": ("context", "question", "options")}
_QUESTION = {"heads": ("question_answering", "generation"), "in_prompt": ("context", "question")}
_CLASSIFIED = ("sequence_classification", "generation")
READERS = {
    "rows": ReaderKind(("text",), ("text_pair", "label", "id"), True, True, _CLASSIFIED, ("text", "text_pair")),
    "winograd": ReaderKind(
        ("text", "span1_text", "span1_index", "span2_text", "span2_index"), ("label", "id"), False, True, _CLASSIFIED,
        ("text", "span1", "span2"),
    ),
    "pairs": ReaderKind(("text", "target"), ("id",), True, False, ("generation",), ("text",)),
    "lcsts": ReaderKind(("text", "target"), ("id",), False, False, ("generation",), ("text",)),
    "bio": ReaderKind((), ("tokens", "tags", "id"), False, True, ("token_classification",), ("text",)),
    "cluener": ReaderKind((), (), False, True, ("token_classification",), ("text",)),
    "squad": ReaderKind(**_QUESTION),
    "chid": ReaderKind(**_CHOICE),
    "c3": ReaderKind(**_CHOICE),
    "choices": ReaderKind(("candidates",), ("context", "question", "answer", "id"), **_CHOICE),
    "exam": ReaderKind(
        heads=_CHOICE["heads"], in_prompt=("context", "question", "options", "subject", "category")
    ),
}  # fmt: skip
"""Kinds of files by the name that a task file gives as `reader`; docs/tasks.md describes each."""

METRICS = {
    "accuracy": ("rows", "winograd", "chid", "c3", "choices", "exam"),
    "macro_f1": ("rows", "winograd"),
    "micro_f1": ("rows",),
    "subset_accuracy": ("rows",),
    "entity_f1": ("bio", "cluener"),
    "cluener_f1": ("cluener",),
    "cmrc_f1": ("squad",),
    "cmrc_em": ("squad",),
    "rouge-l": ("pairs", "lcsts"),
    "bleu-4": ("pairs", "lcsts"),
}
"""Metric -> the readers whose tasks it can score."""

MULTI_LABEL_METRICS = ("micro_f1", "macro_f1", "subset_accuracy")
"""Metrics of tasks whose texts have any number of labels."""
_MULTI_LABEL_ONLY = ("micro_f1", "subset_accuracy")

SUBMISSIONS = {
    "label_lines": ("rows", "winograd"),
    "answer_lines": ("chid", "choices"),
    "choice_lines": ("c3",),
    "idiom_map": ("chid",),
    "answer_map": ("squad",),
    "entity_lines": ("cluener",),
    "exam_map": ("exam",),
}
"""Form of a submission file -> the readers whose tasks have it."""


@dataclass(frozen=True)
class Subject:
    """One subject of an examination.

    Attributes:
        title: in Chinese, as the prompt says it.
        category: the benchmark's group of subjects.
    """

    title: str
    category: str


@dataclass(frozen=True)
class HubSource:
    """Where a hub has the task.

    Attributes:
        id: `OWNER/NAME`.
        config: name of the subset; `{subject}` in it stands for each subject of an examination.
        splits: the task's split -> the hub's, where they differ.
        fields: role -> column, where the hub's columns differ from those of the files.
    """

    id: str
    config: str | None = None
    splits: Mapping[str, str] = field(default_factory=dict)
    fields: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Submission:
    """The form of the benchmark's submission file.

    Attributes:
        format: one of `SUBMISSIONS`.
        files: split -> name of the file; `""` holds for all other splits.
    """

    format: str
    files: Mapping[str, str]

    def file_of(self, split: str) -> str:
        """The name of the file for the predictions on a split."""
        return self.files.get(split) or self.files.get("") or next(iter(self.files.values()))


@dataclass(frozen=True)
class Task:
    """One task of the registry.

    Attributes:
        name: what `--task` takes.
        title: one line for people.
        reader: kind of files, one of `READERS`.
        head: the usual one of `heads`.
        prompt: template of the Chinese prompt.
        metric: one of `METRICS`.
        pre_seq_len, learning_rate: defaults for training, and `settings_from` says where they come from.
        files: split -> alternatives, each the names of the files that make up the split, relative to the folder.
        folders: names of subfolders in which the files are looked for, too.
        fields: role -> column of the files; a dot goes into an object.
        labels: key in the files -> Chinese verbaliser. For tags, entity type -> its Chinese name.
        drop_labels: rows with these are neither learned nor scored, as the benchmark says.
        multi_label: a text has any number of labels; its column is a list of them, or a text.
        label_separator: between the labels of such a text.
        letters: the prompt lists candidates as A, B, C, ..., and the letter is the answer.
        echo: whether the heads of `ECHO_HEADS` read the text twice unless told otherwise.
        subjects: of an examination, by their names in its files.
        groups: of an examination, further sets of subjects that the benchmark reports, across its categories.
        hub: `huggingface` or `modelscope` -> where it is there.
        source: paper or page of the data set.
        aliases: other names.
        origin: the file that the task was read from.
    """

    name: str
    title: str
    reader: str
    head: str
    prompt: str
    metric: str
    pre_seq_len: int
    learning_rate: float
    settings_from: str
    files: Mapping[str, tuple[tuple[str, ...], ...]]
    folders: tuple[str, ...] = ()
    fields: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    drop_labels: tuple[str, ...] = ()
    multi_label: bool = False
    label_separator: str = ","
    letters: bool = False
    echo: bool = False
    subjects: Mapping[str, Subject] = field(default_factory=dict)
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    hub: Mapping[str, HubSource] = field(default_factory=dict)
    submission: Submission | None = None
    source: str = ""
    aliases: tuple[str, ...] = ()
    origin: str = ""

    @property
    def kind(self) -> ReaderKind:
        """What its reader demands."""
        return READERS[self.reader]

    @property
    def heads(self) -> tuple[str, ...]:
        """Every head that can solve it."""
        return ("sequence_classification",) if self.multi_label else self.kind.heads

    @property
    def tags(self) -> tuple[str, ...]:
        """The BIO tags of a token classification, `O` first; empty for other tasks."""
        if "token_classification" not in self.heads:
            return ()
        return ("O", *(f"{side}-{entity}" for entity in self.labels for side in "BI"))

    @property
    def extra_fields(self) -> dict[str, str]:
        """Columns that only the prompt uses."""
        if not self.kind.extra_fields:
            return {}
        known = {*self.kind.fields, *self.kind.optional}
        return {role: column for role, column in self.fields.items() if role not in known}


def metrics_of(task: Task) -> list[str]:
    """The metrics that can score a task."""
    fitting = [name for name, readers in METRICS.items() if task.reader in readers]
    if task.multi_label:
        return [name for name in fitting if name in MULTI_LABEL_METRICS]
    return [name for name in fitting if name not in _MULTI_LABEL_ONLY]


def parse_task(content: Any, origin: str) -> Task:
    """A task from what its YAML file holds.

    Raises:
        ValueError: naming the file, the key and the way out, for anything that is missing, unknown or does not fit.
    """
    return _Checker(origin).task(content)


def placeholders(template: str) -> list[str]:
    """The names in braces, in their order.

    Raises:
        ValueError: if the template is malformed, or has anything but plain names in braces.
    """
    names = []
    for _, name, spec, conversion in Formatter().parse(template):
        if name is None:
            continue
        if not name.isidentifier() or spec or conversion:
            raise ValueError(f"'{{{name}}}' is not a plain name in braces (a literal brace is written twice)")
        names.append(name)
    return names


class _Checker(FieldChecker):
    """Takes a task file apart; every complaint names the file."""

    def task(self, content: Any) -> Task:
        content = self.mapping(content, "the task file")
        known = [entry.name for entry in fields(Task) if entry.name != "origin"]
        self.known_keys(content, known, "key")
        for name in ("name", "title", "reader", "prompt", "metric", "pre_seq_len", "learning_rate", "files"):
            if name not in content:
                self.fail(f"there is no key '{name}'; docs/tasks.md has an example.")
        reader = self.one_of(content["reader"], READERS, "reader")
        kind = READERS[reader]
        task = Task(
            name=self.name(content["name"]),
            title=self.text(content["title"], "title"),
            reader=reader,
            head=self.one_of(content.get("head", kind.heads[0]), kind.heads, f"head (of the reader '{reader}')"),
            prompt=self.text(content["prompt"], "prompt"),
            metric=self.text(content["metric"], "metric"),
            pre_seq_len=self.positive_int(content["pre_seq_len"], "pre_seq_len"),
            learning_rate=self.positive_float(content["learning_rate"], "learning_rate"),
            settings_from=self.text(content.get("settings_from", "the task file's author"), "settings_from"),
            files=self.files(content["files"]),
            folders=self.texts(content.get("folders", ()), "folders"),
            fields=self.fields(content.get("fields", {}), kind, reader),
            labels=self.labels(content.get("labels", {}), kind, reader),
            drop_labels=self.texts(content.get("drop_labels", ()), "drop_labels"),
            multi_label=self.flag(content.get("multi_label", False), "multi_label"),
            label_separator=self.separator(content),
            letters=self.flag(content.get("letters", False), "letters"),
            echo=self.echo(content.get("echo", False), kind, reader),
            subjects=self.subjects(content.get("subjects", {}), reader),
            groups=self.groups(content.get("groups", {}), content.get("subjects", {})),
            hub=self.hub(content.get("hub", {})),
            submission=self.submission(content.get("submission"), reader),
            source=self.text(content.get("source", "-"), "source"),
            aliases=self.texts(content.get("aliases", ()), "aliases"),
            origin=self.origin,
        )
        self.prompt(task)
        self.label_rules(task)
        self.metric(task)
        return task

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

    def echo(self, value: Any, kind: ReaderKind, reader: str) -> bool:
        if self.flag(value, "echo") and not set(kind.heads) & set(ECHO_HEADS):
            self.fail(f"'echo' is for the heads {' and '.join(ECHO_HEADS)}; the reader '{reader}' has neither.")
        return value

    def label_rules(self, task: Task) -> None:
        if task.drop_labels and task.reader not in ("rows", "winograd"):
            self.fail(f"'drop_labels' belongs to the readers 'rows' and 'winograd', not to '{task.reader}'.")
        if task.multi_label and task.reader != "rows":
            self.fail(f"'multi_label' belongs to the reader 'rows', not to '{task.reader}'.")
        if task.head not in task.heads:
            self.fail(f"with 'multi_label' the head must be {' or '.join(task.heads)}, found '{task.head}'.")
        if task.multi_label and task.drop_labels:
            self.fail("'drop_labels' leaves out rows of one label; with 'multi_label' take them out of the files.")

    def metric(self, task: Task) -> None:
        if task.metric in _MULTI_LABEL_ONLY and not task.multi_label:
            self.fail(f"the metric '{task.metric}' belongs to 'multi_label: true'.")
        kind = " with 'multi_label'" if task.multi_label else ""
        self.one_of(task.metric, metrics_of(task), f"metric (of the reader '{task.reader}'{kind})")

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

    def fields(self, value: Any, kind: ReaderKind, reader: str) -> dict[str, str]:
        named = self.text_mapping(value, "fields")
        known = [*kind.fields, *kind.optional]
        if not kind.extra_fields:
            self.known_keys(named, known, f"field (of the reader '{reader}')")
        for role in kind.fields:
            if role not in named:
                self.fail(f"'fields' does not say which column is '{role}', which the reader '{reader}' needs.")
        return named

    def labels(self, value: Any, kind: ReaderKind, reader: str) -> dict[str, str]:
        given = self.mapping(value, "'labels'")
        if bool(given) != kind.labels:
            self.fail(
                f"the reader '{reader}' {'needs' if kind.labels else 'has no'} 'labels'"
                + (": the label of the files -> its Chinese verbaliser." if kind.labels else "; leave them out.")
            )
        labels: dict[str, str] = {}
        for key, verbaliser in given.items():
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

    def subjects(self, value: Any, reader: str) -> dict[str, Subject]:
        given = self.mapping(value, "'subjects'")
        if bool(given) != (reader == "exam"):
            self.fail("'subjects' belong to the reader 'exam', which needs them: NAME: [Chinese title, category].")
        subjects = {}
        for name, entry in given.items():
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

    def submission(self, value: Any, reader: str) -> Submission | None:
        if value is None:
            return None
        entry = self.mapping(value, "'submission'")
        self.known_keys(entry, ("format", "file"), "key of submission")
        fitting = [name for name, readers in SUBMISSIONS.items() if reader in readers]
        form = self.one_of(entry.get("format"), fitting, f"submission format (of the reader '{reader}')")
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

    def prompt(self, task: Task) -> None:
        try:
            names = placeholders(task.prompt)
        except ValueError as error:
            self.fail(f"the prompt is malformed: {error}.")
        known = [name for name in task.kind.in_prompt if name != "text_pair" or "text_pair" in task.fields]
        known += [*task.extra_fields, *(["labels"] if task.labels else [])]
        for name in names:
            if name not in known:
                shown = ", ".join(f"{{{entry}}}" for entry in known)
                self.fail(f"the prompt names {{{name}}}{nearest(name, known)}; it may name {shown}.")
        if not set(names) - {"labels"}:
            self.fail("the prompt names nothing of the row; write for example {text} where it belongs.")
        if task.letters and "options" not in names:
            self.fail("with 'letters' the prompt must show the candidates: write {options} where they belong.")
