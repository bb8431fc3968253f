"""From a task and the place of its data to typed examples: the files or hub dataset of a split, and their rows."""

from __future__ import annotations

import glob
import itertools
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers.utils import logging

from chatglm_ptuning.data.sources.files import DataFile, DataSource, find_sources
from chatglm_ptuning.data.sources.hub import HubDataset, first_line, is_on_hub
from chatglm_ptuning.data.sources.rows import BadRows
from chatglm_ptuning.data.tasks.checked_yaml import nearest
from chatglm_ptuning.data.tasks.examples import Example, has_gold
from chatglm_ptuning.data.tasks.readers import reader_of
from chatglm_ptuning.data.tasks.source import SplitSource, needs_gold, spellings
from chatglm_ptuning.data.tasks.task import HubSource, Task
from chatglm_ptuning.model.hub import HUBS

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
            which is then the split; or a hub: `huggingface` or `modelscope` for the dataset that the task names, or
            `huggingface:OWNER/NAME`.
        split: one of `task.files`.
        subjects: of an examination: names of subjects, categories or groups; None for all subjects.
        bad_rows: counts rows that cannot be read; without it, the first of them raises.
        limit: maximum number of examples to read.

    Returns:
        Examples of the class that belongs to the task's reader. In splits whose name starts with `test` or `unlabel`,
        labels can be missing, either in all rows or in none. In other splits, rows with one of the task's
        `drop_labels` are left out.

    Raises:
        ValueError: naming the file, the line and the field that is missing or unknown, or the hub that cannot be
            reached and why.
        ImportError: if the client of the hub is not installed.
    """
    parts = split_parts(task, source, split, subjects, bad_rows or BadRows(), limit)
    read = (example for part in parts for example in reader_of(task).read(part))
    examples = list(itertools.islice(that_count(task, split, read), limit))
    if not examples:
        raise ValueError(f"{source} holds no row of {task.name}, split {split}.")
    without = [example for example in examples if example.gold is None and not example.left_out]
    if without and has_gold(examples):
        raise ValueError(
            f"{without[0].where}: there is no label or answer, but other rows of {task.name}, split {split}, have one "
            f"({len(without)} of {len(examples)} are without)."
        )
    return examples


def split_parts(
    task: Task,
    source: str | Path,
    split: str,
    subjects: Sequence[str] | None,
    bad_rows: BadRows,
    limit: int | None = None,
) -> list[SplitSource]:
    """What a split is read from: one part, or one for each subject of an examination.

    Args, Raises: as `read_examples`.
    """
    chosen = chosen_subjects(task, subjects)
    if len(chosen) > 1 and split in task.files and Path(source).is_file():
        chosen = [_subject_of_file(task, Path(source), split, chosen)]
    parts = []
    for subject in chosen:
        sources, fields = _sources(task, source, split, subject, is_only_subject=len(chosen) == 1)
        parts.append(SplitSource(task, split, sources, fields, subject, bad_rows, limit))
    return parts


def that_count(
    task: Task, split: str, examples: Iterator[Example], warn: Callable[[str], Any] = logger.warning
) -> Generator[Example, None, None]:
    """The examples, without those that are left out if the split needs labels.

    Args:
        warn: gets a sentence on how many are left out, at the end or when the generator is closed.

    Raises:
        ValueError: if the split needs labels and all examples are left out.
    """
    seen, kept, left_out, fate = 0, 0, [], "left out" if needs_gold(split) else "predicted, but not scored"

    def described() -> str:
        labels = " or ".join(task.drop_labels)
        rows = f"{len(left_out)} of {seen} rows of {task.name}, split {split}"
        return f"{rows}, are labelled {labels} (first: {left_out[0]})"

    try:
        for example in examples:
            seen += 1
            left_out += [example.where] * example.left_out
            if example.left_out and needs_gold(split):
                continue
            kept += 1
            yield example
    finally:  # also if the caller needs no more of them
        if left_out and kept:
            warn(f"{described()}: they are {fate}.")
    if left_out and not kept:
        raise ValueError(f"{described()}: the split needs labels, and these do not count.")


def chosen_subjects(task: Task, chosen: Sequence[str] | None) -> list[str | None]:
    """The subjects of an examination that names of subjects, categories and groups choose.

    Args:
        chosen: None for all subjects.

    Returns:
        The names of subjects; `[None]` for a task without subjects.

    Raises:
        ValueError: if a name is unknown, or the task has no subjects.
    """
    if not task.subjects:
        if chosen:
            raise ValueError(f"The task {task.name} has no subjects.")
        return [None]
    if chosen is None:
        return list(task.subjects)
    categories = {subject.category for subject in task.subjects.values()}
    unknown = [name for name in chosen if name not in {*task.subjects, *categories, *task.groups}]
    if unknown:
        raise ValueError(
            f"{task.name} has no subject or category {', '.join(unknown)}; its categories are "
            f"{', '.join([*sorted(categories), *task.groups])}, its subjects {', '.join(task.subjects)}."
        )
    named = {*chosen, *(member for name in chosen for member in task.groups.get(name, ()))}
    return [name for name, subject in task.subjects.items() if name in named or subject.category in named]


def _subject_of_file(task: Task, path: Path, split: str, chosen: Sequence[str | None]) -> str:
    of_name = {
        Path(name.format(subject=subject)).name: subject
        for subject in chosen
        for names in task.files[split]
        for name in names
        if subject and "{subject}" in name
    }
    name = path.name.removesuffix(".gz")
    if name not in of_name:
        known = f", or name the file as in its split {split} ({next(iter(of_name))})" if of_name else ""
        raise ValueError(f"{path} is one file, but {task.name} has one for each subject: choose a subject{known}.")
    return of_name[name]


def _sources(
    task: Task, place: str | Path, split: str, subject: str | None, *, is_only_subject: bool
) -> tuple[list[DataSource], Mapping[str, str]]:
    """The sources of a split, and role -> column in them."""
    if is_on_hub(str(place)):
        dataset, fields = _dataset_on_hub(task, HubDataset.parse(str(place)), split, subject, is_only_subject)
        return [dataset], {**task.fields, **fields}
    if not task.files:
        return find_sources(place), task.fields
    if split not in task.files:
        known = list(task.files)
        raise ValueError(f"{task.name} has no split '{split}'{nearest(split, known)}; it has {', '.join(known)}.")
    path = Path(place)
    if path.is_file() or (not path.exists() and glob.has_magic(str(place))):
        return find_sources(place), task.fields
    return [DataFile(found) for found in _files_in_folder(task, path, split, subject)], task.fields


def _files_in_folder(task: Task, folder: Path, split: str, subject: str | None) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(
            f"{folder} does not exist. Name the folder with the files of {task.name}, or a hub: {', '.join(HUBS)}, "
            f"{' or '.join(f'{hub}:OWNER/NAME' for hub in HUBS)}."
        )
    bases = [folder, *(folder / name for name in (*task.folders, task.name) if (folder / name).is_dir())]
    wanted = [tuple(name.format(subject=subject) for name in names) for names in task.files[split]]
    for base, names in itertools.product(bases, wanted):
        found = {name: path for name in names for path in reversed(spellings(base / name)) if path.is_file()}
        missing = [name for name in names if name not in found]
        if not missing:
            return list(found.values())
        if found:
            raise ValueError(f"{base} has only a part of {task.name}, split {split}: {', '.join(missing)} is missing.")
    there = sorted(child.name for child in folder.iterdir())
    is_of_a_hub = any(any(folder.glob(pattern)) for pattern in ("*.parquet", "*/*.parquet"))
    raise ValueError(
        f"{folder} has no file of {task.name}, split {split}: looked for {' or '.join(map(' + '.join, wanted))}"
        f" in {', '.join(dict.fromkeys(map(str, bases)))}; the folder holds "
        f"{', '.join(there[:12]) + (', ...' if len(there) > 12 else '') or 'nothing'}."
        + (f" Read a copy of a hub's repository by huggingface:{folder}." if is_of_a_hub else "")
    )


def _dataset_on_hub(
    task: Task, named: HubDataset, split: str, subject: str | None, is_only_subject: bool
) -> tuple[HubDataset, Mapping[str, str]]:
    """The first dataset that can be fetched, and role -> column where columns have other names than in the files."""
    places = _places_on_hub(task, named, split)
    if not is_only_subject:
        places = [place for place in places if place.config is not None and "{subject}" in place.config]
        if not places:
            raise ValueError(f"{task.name} is read from {named.hub} by subject: choose one subject.")
    errors: dict[str, Exception] = {}
    for place in places:
        config = None if place.config is None else place.config.format(subject=subject)
        dataset = replace(
            named,
            repository=place.id,
            config=named.config or config,
            split=named.split or place.splits.get(split, split),
        )
        try:
            columns = dataset.content.features
        except ValueError as error:
            errors.setdefault(first_line(error), error)
            continue
        return dataset, {role: column for role, column in place.fields.items() if column.split(".")[0] in columns}
    offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") == "1" else ""
    of_one = "" if is_only_subject else "If all of its rows are of one subject, choose it. "
    raise ValueError(
        f"{task.name}, split {split}, could not be read from {named.hub}:{places[-1].id}{offline}: "
        f"{' / '.join(errors)} {of_one}Without a network, fetch the published files elsewhere and name their folder."
    ) from next(iter(errors.values()))


def _places_on_hub(task: Task, named: HubDataset, split: str) -> list[HubSource]:
    """The datasets that a name can mean, the likeliest first."""
    known = task.hub.get(named.hub)
    if known is not None and named.repository in ("", known.id):
        return [known]
    if not named.repository:
        raise ValueError(
            f"{task.name} names no dataset on {named.hub}; give one, {named.hub}:OWNER/NAME, or a folder of its files."
        )
    places = [HubSource(named.repository)]
    if split == ("val" if "val" in task.files else "dev"):  # hubs call it validation
        places.append(HubSource(named.repository, splits={split: "validation"}))
    if known is not None:
        # Another name can be a copy of the known dataset, or one with a layout of its own.
        copy = replace(known, id=named.repository)
        places = [copy, replace(copy, config=None), *places]
    return places
