"""From a task and the place of its files to typed examples."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from transformers.utils import logging

from chatglm_ptuning.data.sources.rows import BadRows
from chatglm_ptuning.data.tasks.examples import Example, has_gold
from chatglm_ptuning.data.tasks.readers import reader_of
from chatglm_ptuning.data.tasks.source import SplitSource, needs_gold
from chatglm_ptuning.data.tasks.splits import chosen_subjects, split_sources, subject_of_file
from chatglm_ptuning.data.tasks.task import Task

logger = logging.get_logger(__name__)


def read_examples(
    task: Task,
    source: str | Path,
    split: str,
    *,
    subjects: Sequence[str] | None = None,
    bad_rows: BadRows | None = None,
    limit: int | None = None,
) -> list[Example]:
    """The examples of one split, in the order of the files.

    Args:
        source: the folder with the benchmark's published files, or one above the task's own; one file or a pattern,
            which is then the split; or a hub: `huggingface` or `modelscope` for the place that the registry knows, or
            `huggingface:OWNER/NAME`.
        split: one of `task.files`.
        subjects: of an examination, these alone, or all of a category or group; by default all.
        bad_rows: counts rows that cannot be understood; without it, the first ends the reading.
        limit: the first so many alone.

    Returns:
        Examples of the type that belongs to the task's reader. In splits whose name starts with `test` or `unlabel`
        labels may be missing, from all rows or from none. In other splits, rows with one of the task's `drop_labels`
        are left out.

    Raises:
        ValueError: naming the file, the line and the field of what is missing or unknown, or the hub that cannot be
            reached and why.
        ImportError: if the library for the hub is not installed.
    """
    found = split_parts(task, source, split, subjects, bad_rows or BadRows(), limit)
    read = (example for part in found for example in reader_of(task).read(part))
    examples = list(itertools.islice(that_count(task, split, read), limit))
    if not examples:
        raise ValueError(f"{source} holds no row of {task.name}, split {split}.")
    _check_all_or_none(task, split, examples)
    return examples


def split_parts(
    task: Task,
    source: str | Path,
    split: str,
    subjects: Sequence[str] | None,
    bad_rows: BadRows,
    limit: int | None = None,
) -> list[SplitSource]:
    """What the split is read from: of an examination a part for each subject, else one.

    Args, Raises: as `read_examples`.
    """
    chosen = chosen_subjects(task, subjects)
    if len(chosen) > 1 and split in task.files and Path(source).is_file():
        chosen = [subject_of_file(task, Path(source), split, chosen)]
    parts = []
    for subject in chosen:
        sources, fields = split_sources(task, source, split, subject, is_only_subject=len(chosen) == 1)
        parts.append(SplitSource(task, split, sources, fields, subject, bad_rows, limit))
    return parts


def that_count(task: Task, split: str, examples: Iterator[Example]) -> Iterator[Example]:
    """The examples, where labels are needed without those that are left out; the log says how many they are.

    Raises:
        ValueError: if labels are needed and all of the examples are left out.
    """
    seen, kept, left_out = 0, 0, []
    for example in examples:
        seen += 1
        left_out += [example.where] * example.left_out
        if example.left_out and needs_gold(split):
            continue
        kept += 1
        yield example
    if not left_out:
        return
    what = (
        f"{len(left_out)} of {seen} rows of {task.name}, split {split}, are labelled {' or '.join(task.drop_labels)} "
        f"(first: {left_out[0]})"
    )
    if not kept:
        raise ValueError(f"{what}, which does not count, and the split needs labels.")
    logger.warning(f"{what}: they are {'left out' if needs_gold(split) else 'predicted, but not scored'}.")


def _check_all_or_none(task: Task, split: str, examples: Sequence[Example]) -> None:
    without = [example for example in examples if example.gold is None and not example.left_out]
    if without and has_gold(examples):
        raise ValueError(
            f"{without[0].where}: there is no label or answer, but other rows of {task.name}, split {split}, have one "
            f"({len(without)} of {len(examples)} are without)."
        )
