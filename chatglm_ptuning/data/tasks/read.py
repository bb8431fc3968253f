"""From a task and the place of its files to typed examples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from chatglm_ptuning.data.tasks.examples import AnyExample, gold_of, has_gold
from chatglm_ptuning.data.tasks.hub import HUBS, read_hub
from chatglm_ptuning.data.tasks.readers import reader_of
from chatglm_ptuning.data.tasks.source import SplitSource, find_files
from chatglm_ptuning.data.tasks.task import Task


def read_examples(
    task: Task, source: str | Path, split: str, *, subjects: Sequence[str] | None = None
) -> list[AnyExample]:
    """All examples of one split, in the order of the files.

    Args:
        source: the folder with the benchmark's published files, or one above the task's own; one file, which is then
            the split; or a hub: `huggingface` or `modelscope` for the place that the registry knows, or
            `huggingface:OWNER/NAME`.
        split: one of `task.files`.
        subjects: of an examination, these alone, or all of a category or group; by default all.

    Returns:
        Examples of the type that belongs to the task's reader. In splits whose name starts with `test` or `unlabel`
        labels may be missing, from all rows or from none.

    Raises:
        ValueError: naming the file, the line and the field of what is missing or unknown, or the hub that cannot be
            reached and why.
        ImportError: if the library for the hub is not installed.
    """
    hub, _, hub_id = str(source).partition(":")
    examples: list[AnyExample] = []
    chosen = chosen_subjects(task, subjects)
    if len(chosen) > 1 and split in task.files and Path(source).is_file():
        chosen = [_subject_of_file(task, Path(source), split, chosen)]
    for subject in chosen:
        if hub in HUBS:
            rows, fields = read_hub(task, hub, hub_id, split, subject, is_only_subject=len(chosen) == 1)
            found = SplitSource(task, split, hub_rows=rows, fields={**task.fields, **fields}, subject=subject)
        else:
            paths = find_files(task, Path(source), split, subject)
            found = SplitSource(task, split, paths, fields=task.fields, subject=subject)
        examples += reader_of(task).read(found)
    if not examples:
        raise ValueError(f"{source} holds no row of {task.name}, split {split}.")
    _check_all_or_none(task, split, examples)
    return examples


def chosen_subjects(task: Task, chosen: Sequence[str] | None) -> list[str | None]:
    """The subjects of an examination that names of subjects, categories and groups choose; None for all of them.

    Raises:
        ValueError: if a name is unknown, or the task has no subjects: without a choice that is `[None]`.
    """
    if not task.subjects:
        if chosen:
            raise ValueError(f"The task {task.name} is not divided into subjects.")
        return [None]
    if chosen is None:
        return list(task.subjects)
    categories = {subject.category for subject in task.subjects.values()}
    known = {*task.subjects, *categories, *task.groups}
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise ValueError(
            f"{task.name} has no subject or category {', '.join(unknown)}; its categories are "
            f"{', '.join([*sorted(categories), *task.groups])}, its subjects {', '.join(task.subjects)}."
        )
    named = {*chosen, *(member for name in chosen for member in task.groups.get(name, ()))}
    return [name for name, subject in task.subjects.items() if name in named or subject.category in named]


def _subject_of_file(task: Task, path: Path, split: str, chosen: Sequence[str | None]) -> str:
    """The one of the chosen subjects of an examination that a file by this name holds."""
    of_name = {
        Path(name.format(subject=subject)).name: subject
        for subject in chosen
        for names in task.files[split]
        for name in names
        if subject and "{subject}" in name
    }
    name = path.name.removesuffix(".gz")
    if name not in of_name:
        known = f", or name the file as its split {split} does ({next(iter(of_name))})" if of_name else ""
        raise ValueError(
            f"{path} is one file, and {task.name} has a file for each subject: name one by --subjects{known}."
        )
    return of_name[name]


def _check_all_or_none(task: Task, split: str, examples: Sequence[AnyExample]) -> None:
    without = [example for example in examples if gold_of(example) is None and not example.left_out]
    if without and has_gold(examples):
        raise ValueError(
            f"{without[0].where}: there is no label or answer, but other rows of {task.name}, split {split}, have one "
            f"({len(without)} of {len(examples)} are without)."
        )
