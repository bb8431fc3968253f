"""The definition of a task: the keys of its YAML file, their types and their checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic.dataclasses import dataclass

from chatglm_ptuning.data.formats.registry import Columns
from chatglm_ptuning.data.tasks.checked_yaml import FORBID, Count, Flag, PositiveNumber, Text, Texts
from chatglm_ptuning.model.hub import HubName


def placeholders(template: str) -> list[str]:
    """The names in braces of a template, in order.

    Raises:
        ValueError: if the template is malformed, or has anything but plain names in braces.
    """
    names = []
    for _, name, spec, conversion in Formatter().parse(template):
        if name is None:
            continue
        if not name.isidentifier() or spec or conversion:
            raise ValueError(f"'{{{name}}}' is not a plain name in braces (write a literal brace twice)")
        names.append(name)
    return names


def _path_part(name: str) -> str:
    if name in (".", "..") or "/" in name or "\\" in name:
        raise ValueError("must be a plain name of a file or folder, without / or \\")
    return name


def _file_of_split(name: str) -> str:
    unknown = [found for found in placeholders(name) if found != "subject"]
    if unknown:
        raise ValueError(f"the file name '{name}' contains {{{unknown[0]}}}; only {{subject}} is known there.")
    return name


def _alternatives(names: Any) -> Any:
    """The alternatives of a split, each a list of files that are read together (`a.json + b.json`)."""
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, Sequence):
        return names
    return [[part.strip() for part in name.split(" + ")] if isinstance(name, str) else name for name in names]


PathPart = Annotated[Text, AfterValidator(_path_part)]
Files = Annotated[
    tuple[tuple[Annotated[Text, AfterValidator(_file_of_split)], ...], ...], BeforeValidator(_alternatives)
]


class Subject(NamedTuple):
    """One subject of an examination.

    Attributes:
        title: the Chinese name, for the prompt.
        category: the benchmark's group of subjects.
    """

    title: Text
    category: Text


@dataclass(frozen=True, config=FORBID)
class HubSource:
    """Where a hub has the task.

    Attributes:
        id: `OWNER/NAME`.
        config: name of the subset; `{subject}` in it is replaced by each subject of an examination.
        splits: split of the task -> split on the hub, where they differ.
        fields: role -> column, where the columns differ from those of the files.
    """

    id: Text
    config: Text | None = None
    splits: Mapping[Text, Text] = field(default_factory=dict)
    fields: Mapping[Text, Text] = field(default_factory=dict)


@dataclass(frozen=True, config=FORBID)
class Submission:
    """The benchmark's submission file.

    Attributes:
        format: one of `submission.FORMATS`.
        file: split -> file name; `""` is for all other splits. A single name is for all splits.
    """

    format: str
    file: Annotated[
        Mapping[str, PathPart],
        Field(min_length=1),
        BeforeValidator(lambda value: {"": value} if isinstance(value, str) else value),
    ]

    def file_of(self, split: str) -> str:
        """The name of the file for the predictions on a split."""
        return self.file.get(split) or self.file.get("") or next(iter(self.file.values()))


@dataclass(frozen=True, config=FORBID)
class Task:
    """One task of the registry.

    Attributes:
        name: of the task; also names folders.
        title: one line, shown in lists.
        reader: a name in `readers.READERS`.
        head: the default head.
        prompt: template of the Chinese prompt; empty if the rows contain their own prompts.
        metric: one of its reader's.
        pre_seq_len, learning_rate: training defaults; `settings_from` says where they come from.
        files: split -> alternatives, each the names of the files that make up the split, relative to the folder.
        folders: names of subfolders in which the files are looked for, too.
        fields: role -> column of the files; a dot goes into an object.
        labels: label in the files -> Chinese verbaliser. For tags, entity type -> its Chinese name.
        drop_labels: rows with these labels are neither learned nor scored.
        multi_label: a text has any number of labels; its column is a list, or text.
        label_separator: between the labels of such a text.
        letters: the prompt lists the candidates as A, B, C, ..., and the letter is the answer.
        dataset_format: of instruction rows; None to detect it from the field names.
        ignored_columns: of instruction rows, left out although they hold text.
        source_prefix: text in front of every conversation.
        echo: whether a text to tag or to search is read twice by default; None for the head's default.
        subjects: of an examination, by their names in its files.
        groups: of an examination, further sets of subjects to report, across categories.
        hub: where hubs have the task.
        source: paper or page of the data set.
        aliases: other names.
        origin: the file that the task was read from.
    """

    name: PathPart
    title: Text
    reader: str
    metric: str
    pre_seq_len: Count
    learning_rate: PositiveNumber
    files: Mapping[Text, Files]
    head: str = ""
    prompt: str = ""
    settings_from: Text = "the task file's author"
    folders: Texts = ()
    fields: Mapping[Text, Text] = field(default_factory=dict)
    labels: Mapping[Annotated[str, Field(coerce_numbers_to_str=True)], Text] = field(default_factory=dict)
    drop_labels: Texts = ()
    multi_label: Flag = False
    label_separator: Annotated[str, Field(min_length=1)] = ","
    letters: Flag = False
    dataset_format: str | None = None
    ignored_columns: Texts = ()
    source_prefix: str = ""
    echo: Flag | None = None
    subjects: Mapping[Text, Subject] = field(default_factory=dict)
    groups: Mapping[Text, Texts] = field(default_factory=dict)
    hub: Mapping[
        HubName,
        Annotated[HubSource, BeforeValidator(lambda value: {"id": value} if isinstance(value, str) else value)],
    ] = field(default_factory=dict)
    submission: Submission | None = None
    source: Text = "-"
    aliases: Texts = ()
    origin: str = ""

    @property
    def tags(self) -> tuple[str, ...]:
        """The BIO tags of the labels, `O` first; for a task whose labels are types of entities."""
        return ("O", *(f"{side}-{entity}" for entity in self.labels for side in "BI"))

    @property
    def label_list(self) -> str:
        """The verbalisers, as `{labels}` in a prompt shows them."""
        return "、".join(self.labels.values())

    @classmethod
    def of_files(cls, files: Sequence[str], columns: Columns, source_prefix: str = "") -> Task:
        """The task of instruction files: to answer as their rows do. The files are given as places of its data."""
        fields = {"prompt": columns.prompt, "response": columns.response, "history": columns.history}
        return cls(
            name=Path(files[0]).stem,
            title=", ".join(files),
            reader="conversations",
            metric="rouge-l",
            pre_seq_len=128,
            learning_rate=1e-2,
            files={},
            head="generation",
            fields={role: column for role, column in fields.items() if column is not None},
            dataset_format=columns.dataset_format,
            ignored_columns=columns.ignored,
            source_prefix=source_prefix,
        )

    def meaning(self) -> dict[str, Any]:
        """What decides how its rows are read and prompted, ready for JSON."""
        return {name: getattr(self, name) for name in _MEANING}


_MEANING = (
    "reader", "prompt", "fields", "labels", "drop_labels", "multi_label", "label_separator", "letters", "subjects",
    "dataset_format", "ignored_columns", "source_prefix",
)  # fmt: skip
