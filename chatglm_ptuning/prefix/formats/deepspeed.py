"""DeepSpeed's own checkpoints: `mp_rank_00_model_states.pt` in a folder such as `global_step500`, alone or in a run's.

ZeRO-3 partitions the parameters among files, which only DeepSpeed joins, and its program unpickles them. So they are
refused with the command to run.
"""

from __future__ import annotations

import re
from pathlib import Path

from chatglm_ptuning.prefix.checkpoint import PrefixCheckpoint
from chatglm_ptuning.prefix.formats.official import has_prefix as file_has_prefix
from chatglm_ptuning.prefix.formats.official import read_files
from chatglm_ptuning.prefix.shape import PrefixShape

WEIGHTS_FILE = "mp_rank_00_model_states.pt"
PARTITION_FILE = "zero_pp_rank_0_mp_rank_00_model_states.pt"
LATEST_FILE = "latest"
"""Has the name of the folder that was written last."""
FILES = WEIGHTS_FILE

_STEP_FOLDER = re.compile(r"global_step(\d+)")
_PARTITION = re.compile(r"zero_pp_rank_\d+_mp_rank_\d+_model_states\.pt")


def holds(path: Path) -> bool:
    """Whether a file is one of DeepSpeed's, or a folder has one or names one in `latest`."""
    return _weights(path) is not None


def has_prefix(path: Path) -> bool:
    """Whether there is a file that can be read and holds a prefix."""
    file = _weights(path)
    return file is not None and file.is_file() and not _is_partition(file) and file_has_prefix(file)


def read(path: Path, shape: PrefixShape) -> PrefixCheckpoint:
    """Reads the prefix from a file, from the folder of a step, or from the folder around it (the step in `latest`).

    Raises:
        FileNotFoundError: if the step that `latest` names is missing.
        ValueError: naming the file, if it is damaged, has no prefix, does not fit the base, or is partitioned.
    """
    file = _weights(path)
    if not file.is_file():
        raise FileNotFoundError(f"{path / LATEST_FILE} names {file.parent.name}, but there is no file {file}.")
    if _is_partition(file):
        folder, tag = file.parent.parent, file.parent.name
        raise ValueError(
            f"{file} has a part of the parameters, which ZeRO-3 has partitioned. Join them by `python -m "
            f"deepspeed.utils.zero_to_fp32 {folder} OUTPUT -t {tag}`, then load OUTPUT."
        )
    return read_files([file], file, shape)


def _weights(path: Path) -> Path | None:
    """The file of a checkpoint; None if there is none. The file that `latest` means may be missing."""
    if path.is_file():
        return path if path.name == WEIGHTS_FILE or _is_partition(path) else None
    if (found := _weights_in(path)) is not None:
        return found
    latest = path / LATEST_FILE
    if latest.is_file():
        tag = latest.read_text("utf-8", errors="replace").strip()
        if re.fullmatch(r"\w[\w.-]*", tag):
            return _weights_in(path / tag) or path / tag / WEIGHTS_FILE
    children = path.iterdir() if path.is_dir() else ()
    steps = [(int(match[1]), child) for child in children if (match := _STEP_FOLDER.fullmatch(child.name))]
    found = (_weights_in(child) for _, child in sorted(steps, reverse=True))
    return next(filter(None, found), None)


def _weights_in(folder: Path) -> Path | None:
    files = (folder / name for name in (WEIGHTS_FILE, PARTITION_FILE))
    return next((file for file in files if file.exists()), None)


def _is_partition(file: Path) -> bool:
    return _PARTITION.fullmatch(file.name) is not None
