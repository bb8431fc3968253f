"""What one task of the registry says of itself, and what its file may say in which form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, field
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic.dataclasses import dataclass

from chatglm_ptuning.data.formats.registry import Columns
from chatglm_ptuning.data.tasks.checked_yaml import (
    FORBID,
    QUOTE_HINT,
    Count,
    Flag,
    PositiveNumber,
    Text,
    Texts,
)


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


def _folder_name(name: str) -> str:
    if name in (".", "..") or "/" in name or "\\" in name:
        raise ValueError("also names folders, so that it must be without / and \\ and no dots alone")
    return name


def _file_name(name: str) -> str:
    if "/" in name:
        raise ValueError("must be the name of a file, without folders")
    return name


def _file_of_split(name: str) -> str:
    unknown = [found for found in placeholders(name) if found != "subject"]
    if unknown:
        raise ValueError(f"the file name '{name}' has {{{unknown[0]}}} in it; only {{subject}} may stand there.")
    return name


def _apart(names: Any) -> Any:
    """The alternatives of a split; of each the files that are read together, `a.json + b.json`."""
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, Sequence):
        return names
    return [[part.strip() for part in name.split(" + ")] if isinstance(name, str) else name for name in names]


def _text_keys(labels: Any) -> Any:
    """Labels as texts: files may have numbers."""
    if not isinstance(labels, Mapping):
        return labels
    wrong = [key for key in labels if isinstance(key, bool) or not isinstance(key, (str, int))]
    if wrong:
        raise ValueError(f"the label {wrong[0]!r} must be text or a number{QUOTE_HINT}.")
    return {str(key): verbaliser for key, verbaliser in labels.items()}


def _subject(value: Any) -> Any:
    if isinstance(value, list) and len(value) == 2:
        return Subject(*value)
    if isinstance(value, Subject):
        return value
    raise ValueError("must be [Chinese title, category]")


FileName = Annotated[Text, AfterValidator(_file_name)]
Files = Annotated[tuple[tuple[Annotated[Text, AfterValidator(_file_of_split)], ...], ...], BeforeValidator(_apart)]


@dataclass(frozen=True, config=FORBID)
class Subject:
    """One subject of an examination.

    Attributes:
        title: in Chinese, as the prompt says it.
        category: the benchmark's group of subjects.
    """

    title: Text
    category: Text


@dataclass(frozen=True, config=FORBID)
class HubSource:
    """Where a hub has the task.

    Attributes:
        id: `OWNER/NAME`.
        config: name of the subset; `{subject}` in it stands for each subject of an examination.
        splits: the task's split -> the hub's, where they differ.
        fields: role -> column, where the hub's columns differ from those of the files.
    """

    id: Text
    config: Text | None = None
    splits: Mapping[Text, Text] = field(default_factory=dict)
    fields: Mapping[Text, Text] = field(default_factory=dict)


@dataclass(frozen=True, config=FORBID)
class Submission:
    """The form of the benchmark's submission file.

    Attributes:
        format: one of the reader's.
        file: split -> name of the file; `""` holds for all other splits. One name holds for all.
    """

    format: str
    file: Annotated[
        Mapping[str, FileName],
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
        name: what `--task` takes.
        title: one line for people.
        reader: kind of files, one of `readers.READERS`.
        head: the usual one of those that can solve it.
        prompt: template of the Chinese prompt; empty where the rows ask for themselves.
        metric: one of its reader's.
        pre_seq_len, learning_rate: defaults for training, and `settings_from` says where they come from.
        files: split -> alternatives, each the names of the files that make up the split, relative to the folder.
        folders: names of subfolders in which the files are looked for, too.
        fields: role -> column of the files; a dot goes into an object.
        labels: key in the files -> Chinese verbaliser. For tags, entity type -> its Chinese name.
        drop_labels: rows with these are neither learned nor scored, as the benchmark says.
        multi_label: a text has any number of labels; its column is a list of them, or a text.
        label_separator: between the labels of such a text.
        letters: the prompt lists candidates as A, B, C, ..., and the letter is the answer.
        dataset_format: of instruction rows; None to detect it from the field names.
        source_prefix: text in front of every conversation.
        echo: whether the text that is tagged or searched is read twice, unless told otherwise; None for the head's own
            default.
        subjects: of an examination, by their names in its files.
        groups: of an examination, further sets of subjects that the benchmark reports, across its categories.
        hub: `huggingface` or `modelscope` -> where it is there.
        source: paper or page of the data set.
        aliases: other names.
        origin: the file that the task was read from.
    """

    name: Annotated[Text, AfterValidator(_folder_name)]
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
    labels: Annotated[Mapping[str, Text], BeforeValidator(_text_keys)] = field(default_factory=dict)
    drop_labels: Texts = ()
    multi_label: Flag = False
    label_separator: Annotated[str, Field(min_length=1)] = ","
    letters: Flag = False
    dataset_format: str | None = None
    source_prefix: str = ""
    echo: Flag | None = None
    subjects: Mapping[Text, Annotated[Subject, BeforeValidator(_subject)]] = field(default_factory=dict)
    groups: Mapping[Text, Texts] = field(default_factory=dict)
    hub: Mapping[
        Literal["huggingface", "modelscope"],
        Annotated[HubSource, BeforeValidator(lambda value: {"id": value} if isinstance(value, str) else value)],
    ] = field(default_factory=dict)
    submission: Submission | None = None
    source: Text = "-"
    aliases: Texts = ()
    origin: str = ""

    @property
    def tags(self) -> tuple[str, ...]:
        """The BIO tags of the labels, `O` first; of a task whose labels are types of entities."""
        return ("O", *(f"{side}-{entity}" for entity in self.labels for side in "BI"))

    @classmethod
    def of_files(cls, files: Sequence[str], columns: Columns, source_prefix: str = "") -> Task:
        """The task of instruction files, which is to answer as their rows do; a place of its data is the data."""
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
            source_prefix=source_prefix,
        )

    def meaning(self) -> dict[str, Any]:
        """What decides how its rows are read and asked, ready for JSON."""
        return {name: value for name, value in asdict(self).items() if name in _MEANING}


_MEANING = (
    "reader", "prompt", "fields", "labels", "drop_labels", "multi_label", "label_separator", "letters", "subjects",
    "dataset_format", "source_prefix",
)  # fmt: skip
