"""Finds the newest trained prefix."""

from __future__ import annotations

import os
from os import PathLike
from pathlib import Path

from chatglm_ptuning.prefix.formats.kit import METADATA_FILE, WEIGHTS_FILE

RUNS_FOLDER_VARIABLE = "CHATGLM_PTUNING_OUTPUT"


def runs_folder() -> Path:
    """The folder of training runs: $CHATGLM_PTUNING_OUTPUT (set by the scripts), or `output`."""
    return Path(os.environ.get(RUNS_FOLDER_VARIABLE) or "output")


def find_latest_prefix(root: str | PathLike[str] = "output") -> Path | None:
    """The folder of the newest complete prefix in a folder of runs; None if there is none.

    A prefix is searched in every `root/RUN`, and if there is none, in every `root/RUN/FOLDER` (its checkpoints). The
    newest is the one with the newest `prefix_config.json`, which is written last.
    """
    found: list[tuple[int, Path]] = []
    for run in _folders(Path(root)):
        candidates = [run] if _written(run) is not None else _folders(run)
        found += [(time, folder) for folder in candidates if (time := _written(folder)) is not None]
    return max(found)[1] if found else None


def _folders(parent: Path) -> list[Path]:
    return [child for child in parent.iterdir() if child.is_dir()] if parent.is_dir() else []


def _written(folder: Path) -> int | None:
    """Modification time of the prefix in a folder, in nanoseconds; None if there is no complete one."""
    try:
        weights, metadata = (folder / WEIGHTS_FILE).stat(), (folder / METADATA_FILE).stat()
    except OSError:  # missing, or removed by a running training
        return None
    return metadata.st_mtime_ns if weights.st_size and metadata.st_size else None
