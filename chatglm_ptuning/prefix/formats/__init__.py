"""The formats of prefix checkpoints, and detecting the format of a path.

A format is a module with `FILES` (its files, for messages), `holds(path) -> bool` and
`read(path, shape) -> PrefixCheckpoint`; this kit's own format also has `write`.
"""

from __future__ import annotations

import re
from os import PathLike
from pathlib import Path

from chatglm_ptuning.prefix.checkpoint import PrefixCheckpoint
from chatglm_ptuning.prefix.formats import kit, official, peft
from chatglm_ptuning.prefix.shape import PrefixShape

FORMATS = {"kit": kit, "PEFT": peft, "official": official}
"""In the order of detection: prompt tuning writes the first two into one folder, the last accepts any file."""
_CHECKPOINT_FOLDER = re.compile(r"checkpoint-(\d+)")


def detect_format(path: str | PathLike[str]) -> tuple[str, Path]:
    """The format of a prefix, a key of FORMATS, and the path of the prefix.

    Args:
        path: a folder or file in one of the formats; or a folder with `checkpoint-N` folders, of which the last is
            used.

    Raises:
        FileNotFoundError: if there is no prefix at `path`.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"No prefix at {path}: there is no such file or folder.")
    children = path.iterdir() if path.is_dir() else ()
    checkpoints = [(int(match[1]), child) for child in children if (match := _CHECKPOINT_FOLDER.fullmatch(child.name))]
    for place in (path, *(child for _, child in sorted(checkpoints, reverse=True))):
        for name, module in FORMATS.items():
            if module.holds(place):
                return name, place
    expected = " or ".join(f"{module.FILES} ({name})" for name, module in FORMATS.items())
    raise FileNotFoundError(f"No prefix in {path}: expected {expected}.")


def read_prefix(path: str | PathLike[str], shape: PrefixShape) -> PrefixCheckpoint:
    """Reads a prefix in any of the formats.

    Args:
        path: as for `detect_format`.
        shape: sizes of the base. Formats that do not record layers, groups and channels are checked against it.

    Raises:
        FileNotFoundError: if there is no prefix at `path`, or a file of it is missing.
        ValueError: naming the file, if one is damaged or incomplete.
    """
    name, place = detect_format(path)
    return FORMATS[name].read(place, shape)
