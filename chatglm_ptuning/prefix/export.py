"""The official file beside a prefix of this kit, for programs that read only that one."""

from __future__ import annotations

from pathlib import Path

import torch

from chatglm_ptuning.files import read_tensors
from chatglm_ptuning.prefix.checkpoint import is_prefix_key, prefix_parameters
from chatglm_ptuning.prefix.formats import kit, official


def check_room_for_export(folder: Path) -> None:
    """Checks that the official file in a folder may be replaced by that of a prefix.

    Raises:
        ValueError: naming the file, if it holds anything but a prefix, such as a base.
    """
    file = folder / official.FILES
    if file.exists() and not official.holds_prefix_alone(file):
        raise ValueError(
            f"The official prefix would replace {file}, which holds more than a prefix: choose another output folder."
        )


def write_export(folder: Path) -> None:
    """Writes the prefix of this kit in a folder in the official format, too; without heads.

    Raises:
        FileNotFoundError, ValueError: if there is none, or its file is damaged.
        OSError: if the disk is full or the folder cannot be written.
    """
    official.write(folder, prefix_parameters(read_tensors(folder / kit.WEIGHTS_FILE)))


def remove_export(folder: Path) -> None:
    """Removes the file that `write_export` wrote, before the prefix in the folder changes: it would be of an older one.

    A file with other values is not an export, and is kept.
    """
    file = folder / official.FILES
    if not file.exists() or not official.holds_prefix_alone(file):
        return
    try:
        ours = read_tensors(folder / kit.WEIGHTS_FILE, is_prefix_key)
    except (OSError, ValueError):
        return
    theirs = read_tensors(file)
    if ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours):
        file.unlink()
