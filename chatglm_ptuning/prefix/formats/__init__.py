"""The formats of prefix checkpoints, and detecting the format of a path.

A format is a module with `FILES` (its files, for messages), `holds(path) -> bool` (by the names of files),
`has_prefix(path) -> bool` (by their content), `read(path, shape) -> PrefixCheckpoint` and `write`. DeepSpeed's
checkpoints are only read.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from os import PathLike
from pathlib import Path

from chatglm_ptuning.prefix.checkpoint import PrefixCheckpoint
from chatglm_ptuning.prefix.formats import deepspeed, kit, official, peft, vllm
from chatglm_ptuning.prefix.shape import PrefixShape

FORMATS = {"kit": kit, "PEFT": peft, "vLLM": vllm, "official": official, "DeepSpeed": deepspeed}
"""In the order of detection. Prompt tuning writes the first two into one folder, the Trainer the last two, of which
the first may be in full precision. A single file of any name may be the official one."""
KEY_VALUE_WRITERS: dict[str, Callable[[Path, PrefixCheckpoint, PrefixShape], None]] = {
    "peft": peft.write,
    "peft-cartridge": partial(peft.write, peft_type=peft.CARTRIDGE),
}
"""The formats of keys and values alone, by their names in `export` and `import`: `write(folder, checkpoint, shape)`,
of a checkpoint without projection, for a base of that shape."""
_CHECKPOINT_FOLDER = re.compile(r"checkpoint-(\d+)")


def detect_format(path: str | PathLike[str]) -> tuple[str, Path]:
    """The format of a prefix, a key of FORMATS, and the path of the prefix.

    A folder may have files of several formats, such as an official prefix with a file of PEFT's. The first format with
    a prefix in its files counts.

    Args:
        path: a folder or file in one of the formats; or a folder with `checkpoint-N` folders, of which the last is
            used.

    Raises:
        FileNotFoundError: if there is no prefix at `path`.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"No prefix at {path}: there is no such file or folder.")
    faulty: list[tuple[str, Path]] = []
    for place in (path, *_checkpoints(path)):
        held = [name for name, module in FORMATS.items() if module.holds(place)]
        with_prefix = next((name for name in held if FORMATS[name].has_prefix(place)), None)
        if with_prefix is not None:
            return with_prefix, place
        faulty += [(name, place) for name in held]
        if held and place != path:
            break  # an earlier checkpoint must not stand in for the last
    if faulty:
        return faulty[0]  # reading it says what is wrong
    expected = " or ".join(f"{module.FILES} ({name})" for name, module in FORMATS.items())
    raise FileNotFoundError(f"No prefix in {path}: expected {expected}. {_other_places(path)}")


def _other_places(folder: Path) -> str:
    """Where a prefix may be that is not found in a folder."""
    below = [child for child in sorted(folder.iterdir()) if child.is_dir()]
    found = [child.name for child in below if any(module.holds(child) for module in FORMATS.values())]
    found += [f"{run.name}/{child.name}" for run in below for child in _checkpoints(run)]
    if found:
        return f"Name one of the folders in it, such as {found[0]}."
    return "A file with another name must be named itself."


def _checkpoints(folder: Path) -> list[Path]:
    """The `checkpoint-N` folders in a folder, the last first."""
    children = folder.iterdir() if folder.is_dir() else ()
    found = [(int(match[1]), child) for child in children if (match := _CHECKPOINT_FOLDER.fullmatch(child.name))]
    return [child for _, child in sorted(found, reverse=True)]


def exchange_format(path: str | PathLike[str]) -> tuple[str, Path]:
    """As `detect_format`, with the format's name in `export` and `import`."""
    name, place = detect_format(path)
    cartridge = name == "PEFT" and peft.type_of(place) == peft.CARTRIDGE
    return "peft-cartridge" if cartridge else name.lower(), place


def adapter_type(path: str | PathLike[str]) -> str | None:
    """The type of the PEFT adapter at a path (`PREFIX_TUNING`, `LORA`, ...); None for everything else.

    Raises:
        ValueError: naming the file, if it is damaged.
    """
    if not peft.holds(Path(path)):
        return None
    name, place = detect_format(path)
    return peft.type_of(place) if name == "PEFT" else None


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
