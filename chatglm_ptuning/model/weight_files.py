"""What is wrong with a base that does not load, in words that name the file."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from chatglm_ptuning.files import read_tensors

_WEIGHT_FILE = re.compile(r"(pytorch_model|model)(-\d+-of-\d+)?\.(bin|safetensors)")
_NAMES_SHOWN = 5


def describe_damage(folder: Path) -> str | None:
    """Says which weight file of a folder cannot be opened, and why; None if all of them can.

    A pickle that holds more than tensors counts as one that cannot be opened: it could run any code.
    """
    if not folder.is_dir():
        return None
    for path in sorted(folder.iterdir()):
        if _WEIGHT_FILE.fullmatch(path.name):
            try:
                read_tensors(path, lambda name: False)
            except ValueError as error:
                return str(error)
    return None


def describe_missing(source: str, missing: Collection[str]) -> str:
    """Says which parameters of the base the files at `source` lack."""
    shown = ", ".join(sorted(missing)[:_NAMES_SHOWN])
    more = f" and {len(missing) - _NAMES_SHOWN} more" if len(missing) > _NAMES_SHOWN else ""
    return (
        f"{source} is not a whole base: its weight files lack {shown}{more}. If it holds a prefix only, load the base "
        "and then the prefix by load_prefix."
    )
