"""Which files, or which data set on a hub, hold a split of a task."""

from __future__ import annotations

import difflib
import glob
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from chatglm_ptuning.data.sources.files import DataFile, DataSource, find_sources
from chatglm_ptuning.data.sources.hub import HUBS, HubDataset, first_line, is_on_hub
from chatglm_ptuning.data.tasks.task import HubSource, Task


def split_sources(
    task: Task, place: str | Path, split: str, subject: str | None = None, *, is_only_subject: bool = True
) -> tuple[list[DataSource], Mapping[str, str]]:
    """The sources of a split, and which column each role has in them.

    Args:
        place: the folder with the published files, or one above the task's own; one file or a pattern, which is then
            the split; or a hub, with or without the name of a data set.
        is_only_subject: otherwise a data set on a hub must have a configuration for each subject.

    Raises:
        ValueError: if the task has no such split, or a file is missing, naming both and what is there instead; if the
            hub does not have it.
        ImportError: if the hub's client is not installed.
    """
    if is_on_hub(str(place)):
        dataset, fields = _dataset_on_hub(task, HubDataset.parse(str(place)), split, subject, is_only_subject)
        return [dataset], {**task.fields, **fields}
    if not task.files:
        return find_sources(place), task.fields
    if split not in task.files:
        near = difflib.get_close_matches(split, task.files, n=1, cutoff=0.4)
        hint = f" (did you mean '{near[0]}'?)" if near else ""
        raise ValueError(f"The task {task.name} has no split '{split}'{hint}; it has {', '.join(task.files)}.")
    path = Path(place)
    if path.is_file() or (not path.exists() and glob.has_magic(str(place))):
        return find_sources(place), task.fields
    return [DataFile(found) for found in _files_in_folder(task, path, split, subject)], task.fields


def _files_in_folder(task: Task, folder: Path, split: str, subject: str | None) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(
            f"{folder} does not exist. Name the folder with the files of {task.name}; or, online, its place on a hub: "
            f"{', '.join(HUBS)}, {' or '.join(f'{hub}:OWNER/NAME' for hub in HUBS)}."
        )
    bases = [folder, *(folder / name for name in (*task.folders, task.name) if (folder / name).is_dir())]
    wanted = [tuple(name.format(subject=subject) for name in names) for names in task.files[split]]
    for base in bases:
        for names in wanted:
            found = [next((path for path in spellings(base / name) if path.is_file()), None) for name in names]
            if all(found):
                return [path for path in found if path is not None]
            if any(found):
                missing = [name for name, path in zip(names, found, strict=True) if path is None]
                raise ValueError(
                    f"{base} has only a part of {task.name}, split {split}: {', '.join(missing)} is missing."
                )
    there = sorted(child.name for child in folder.iterdir())
    is_of_a_hub = any(any(folder.glob(pattern)) for pattern in ("*.parquet", "*/*.parquet"))
    raise ValueError(
        f"{folder} has no file of {task.name}, split {split}: looked for {' or '.join(' + '.join(n) for n in wanted)}"
        f" in {', '.join(dict.fromkeys(str(base) for base in bases))}; the folder holds "
        f"{', '.join(there[:12]) + (', ...' if len(there) > 12 else '') or 'nothing'}."
        + (f" A copy of a hub's repository is read by huggingface:{folder}." if is_of_a_hub else "")
    )


def spellings(path: Path) -> tuple[Path, Path]:
    """A file, and the same gzipped."""
    return path, path.with_name(f"{path.name}.gz")


def _dataset_on_hub(
    task: Task, named: HubDataset, split: str, subject: str | None, is_only_subject: bool
) -> tuple[HubDataset, Mapping[str, str]]:
    """The first data set that can be had, and the columns that are called otherwise there."""
    places = _places_on_hub(task, named, split)
    if not is_only_subject:
        places = [place for place in places if place.config is not None and "{subject}" in place.config]
        if not places:
            raise ValueError(f"{task.name} is read from {named.hub} by subject: name one by --subjects.")
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
    of_one = "" if is_only_subject else "If all of its rows are of one subject, name that by --subjects. "
    raise ValueError(
        f"{task.name}, split {split}, could not be read from {named.hub}:{places[-1].id}{offline}: "
        f"{' / '.join(errors)} {of_one}Without a network, fetch the published files elsewhere and name their folder."
    ) from next(iter(errors.values()))


def _places_on_hub(task: Task, named: HubDataset, split: str) -> list[HubSource]:
    """What a name may stand for, the likeliest first."""
    known = task.hub.get(named.hub)
    if known is not None and named.repository in ("", known.id):
        return [known]
    if not named.repository:
        raise ValueError(
            f"The registry knows no place of {task.name} on {named.hub}; name one, {named.hub}:OWNER/NAME, or a folder "
            "of its files."
        )
    places = [HubSource(named.repository)]
    if split == ("val" if "val" in task.files else "dev"):  # what the hub calls files named val and dev
        places.append(HubSource(named.repository, splits={split: "validation"}))
    if known is not None:
        # Another name may be a copy of the known data set, or one that is laid out in its own way.
        copy = replace(known, id=named.repository)
        places = [copy, replace(copy, config=None), *places]
    return places


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


def subject_of_file(task: Task, path: Path, split: str, chosen: Sequence[str | None]) -> str:
    """The one of the chosen subjects of an examination that a file by this name holds.

    Raises:
        ValueError: if it is none of them.
    """
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
