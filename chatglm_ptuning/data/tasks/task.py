"""What one task of the registry says of itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from string import Formatter
from typing import Any

from chatglm_ptuning.data.formats.registry import Columns


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
        format: one of the reader's.
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
        reader: kind of files, one of `readers.READERS`.
        head: the usual one of those that can solve it.
        prompt: template of the Chinese prompt.
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
        echo: whether the text that is tagged or searched is read twice, unless told otherwise.
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
    prompt: str = ""
    metric: str = "rouge-l"
    pre_seq_len: int = 128
    learning_rate: float = 1e-2
    settings_from: str = ""
    files: Mapping[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict)
    folders: tuple[str, ...] = ()
    fields: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    drop_labels: tuple[str, ...] = ()
    multi_label: bool = False
    label_separator: str = ","
    letters: bool = False
    dataset_format: str | None = None
    source_prefix: str = ""
    echo: bool = False
    subjects: Mapping[str, Subject] = field(default_factory=dict)
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    hub: Mapping[str, HubSource] = field(default_factory=dict)
    submission: Submission | None = None
    source: str = ""
    aliases: tuple[str, ...] = ()
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
            Path(files[0]).stem,
            ", ".join(files),
            "conversations",
            "generation",
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
