"""Rows of a task from the Hugging Face hub or ModelScope, when there is a network."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from chatglm_ptuning.data.files import Row
from chatglm_ptuning.data.tasks.task import HubSource, Task

HUBS = ("huggingface", "modelscope")


def read_hub(
    task: Task, hub: str, hub_id: str, split: str, subject: str | None, *, is_only_subject: bool = True
) -> tuple[tuple[Row, ...], Mapping[str, str]]:
    """The rows of a split, with class numbers as the labels' names, and the columns that are called otherwise there.

    Args:
        hub: one of `HUBS`.
        hub_id: `OWNER/NAME`, or a folder that `datasets.load_dataset` reads; "" for the place in the registry.
        is_only_subject: otherwise the data set must have a configuration for each subject.

    Raises:
        ValueError: if the registry knows no place there, or the data set cannot be loaded.
        ImportError: if `datasets`, or for ModelScope `modelscope`, is not installed.
    """
    known = task.hub.get(hub)
    if not hub_id and known is None:
        raise ValueError(
            f"The registry knows no place of {task.name} on {hub}; name one, {hub}:OWNER/NAME, or a folder of "
            "its files."
        )
    places = [HubSource(hub_id)]
    if split == ("val" if "val" in task.files else "dev"):  # what the hub calls files named val and dev
        places.append(HubSource(hub_id, splits={split: "validation"}))
    if known is not None:
        # Another name may be a copy of the known data set, or one that is laid out in its own way.
        copies = [replace(known, id=hub_id), replace(known, id=hub_id, config=None)]
        places = [known] if hub_id in ("", known.id) else [*copies, *places]
    if not is_only_subject:
        places = [place for place in places if place.config is not None and "{subject}" in place.config]
        if not places:
            raise ValueError(f"{task.name} is read from {hub} by subject: name one by --subjects.")
    errors: dict[str, Exception] = {}
    for place in places:
        config = None if place.config is None else place.config.format(subject=subject)
        try:
            data = _LOAD[hub](place.id, config, place.splits.get(split, split))
            break
        except ImportError as error:
            raise ImportError(
                f"{error}; install the package with its extra: pip install 'chatglm-ptuning[modelscope]'."
            ) from error
        except Exception as error:  # the hubs' clients raise whatever the network leads them to
            errors.setdefault(_first_line(error), error)
    else:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") == "1" else ""
        of_one = "" if is_only_subject else "If all of its rows are of one subject, name that by --subjects. "
        raise ValueError(
            f"{task.name}, split {split}, could not be read from {hub}:{place.id}{offline}: {' / '.join(errors)} "
            f"{of_one}Without a network, fetch the published files elsewhere and name their folder."
        ) from next(iter(errors.values()))
    origin = f"{hub}:{place.id}"
    rows = tuple(
        Row(_decoded(row, data.features), origin, index, has_lines=False) for index, row in enumerate(data, start=1)
    )
    return rows, {role: column for role, column in place.fields.items() if column.split(".")[0] in data.features}


def _load_huggingface(name: str, config: str | None, split: str) -> Any:
    from datasets import load_dataset

    return load_dataset(name, config, split=split)


def _load_modelscope(name: str, config: str | None, split: str) -> Any:
    from modelscope.msdatasets import MsDataset

    data = MsDataset.load(name, subset_name=config or "default", split=split)
    return data if hasattr(data, "features") else data.to_hf_dataset()


_LOAD = {"huggingface": _load_huggingface, "modelscope": _load_modelscope}


def _decoded(row: Mapping[str, Any], features: Mapping[str, Any]) -> dict[str, Any]:
    """The row with class numbers as names; -1, which stands for no label, as None."""
    decoded = dict(row)
    for name, feature in features.items():
        inner = getattr(feature, "feature", feature)
        if not hasattr(inner, "int2str"):
            continue
        value = row[name]
        if isinstance(value, list):
            decoded[name] = [inner.int2str(entry) for entry in value]
        else:
            decoded[name] = None if value is None or value < 0 else inner.int2str(value)
    return decoded


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
