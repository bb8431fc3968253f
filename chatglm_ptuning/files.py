"""Writes files atomically, and reads tensors and JSON without executing code."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

_LFS_POINTER = b"version https://git-lfs"
_DEEPEST = 4
"""Most dictionaries around a dictionary of tensors."""


@contextmanager
def write_atomically(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path` to write to; renames it to `path` if the block ends well.

    The temporary file is flushed to disk first, and removed if the block fails. The file may be read by whom any other
    new file may be read; safetensors alone would close it to all but its owner.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file by `write_atomically`."""
    with write_atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file by `write_atomically`, indented, with characters as they are."""
    write_text(path, json.dumps(content, ensure_ascii=False, indent=2) + "\n")


def check_output_folder(path: str | os.PathLike[str]) -> None:
    """Checks before the work that its results can be written to a folder, without making the folder.

    Raises:
        ValueError: if a file is in the way, or the folder is not writable.
    """
    there = Path(path).absolute()
    while not os.path.exists(there):  # noqa: PTH110  (Path.exists raises below a folder that may not be entered)
        there = there.parent
    if not there.is_dir():
        raise ValueError(f"Results cannot be written to {path}: {there} is a file. Name another folder.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"Results cannot be written to {path}: {there} is not writable. Name another folder.")


@contextmanager
def write_folder(path: Path, replaced: Sequence[str] = ()) -> Iterator[Path]:
    """Gives an empty folder inside `path` to write to; what is in it moves to `path` if the block ends well.

    If the block fails, everything that it wrote is removed, and `path` is as before. `config.json` moves last, so that
    a folder with one is complete.

    Args:
        path: made if missing.
        replaced: glob patterns of earlier files in `path` to remove when the new ones move there.

    Raises:
        ValueError: if nothing can be written there.
        OSError: if the disk is full.
    """
    check_output_folder(path)
    made = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(dir=path, prefix=".writing-"))
    try:
        yield place
        for old in {file for pattern in replaced for file in path.glob(pattern) if file.is_file()}:
            old.unlink()
        for new in sorted(place.iterdir(), key=lambda new: (new.name == "config.json", new.name)):
            if new.is_dir() and (path / new.name).is_dir():
                shutil.rmtree(path / new.name)
            new.replace(path / new.name)
    finally:
        shutil.rmtree(place, ignore_errors=True)
        if made and not any(path.iterdir()):
            path.rmdir()


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes a file of JSON lines by `write_atomically`, with characters as they are."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads a JSON file that holds one object.

    Raises:
        OSError: if the file is not there or cannot be opened.
        ValueError: naming the file, if it is not valid JSON (a byte order mark is not) or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if text.startswith("\ufeff"):
            raise ValueError(
                f"{path} begins with a byte order mark (BOM), which JSON does not have. Save it as UTF-8 without BOM."
            )
        content = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, it holds a {type(content).__name__}.")
    return content


def read_json_object_or_empty(path: Path) -> dict[str, Any]:
    """As `read_json_object`, but `{}` for a file that is missing, unreadable, or something else."""
    try:
        return read_json_object(path)
    except (OSError, ValueError):
        return {}


def read_weight_map(index: Path) -> dict[str, str]:
    """The file of every tensor by its name, from a `.index.json` beside shards.

    Raises:
        OSError, ValueError: as `read_json_object`, and if it has no weight_map.
    """
    shard_of = read_json_object(index).get("weight_map")
    if not isinstance(shard_of, dict):
        raise ValueError(f"{index} has no weight_map.")
    return shard_of


def check_json_files(folder: Path, *patterns: str) -> None:
    """Checks JSON files that transformers reads: it would ignore a damaged one, or not name it.

    Args:
        folder: may be a hub name, too; then nothing is checked.
        patterns: names of files, or glob patterns.

    Raises:
        ValueError: naming the first file that `read_json_object` cannot read.
    """
    for pattern in patterns:
        for path in sorted(folder.glob(pattern)):
            read_json_object(path)


def check_content(path: Path) -> None:
    """Checks that a file of weights or of a vocabulary was downloaded.

    Raises:
        OSError: if it cannot be opened.
        ValueError: naming the file, if it is empty, or a pointer of Git LFS.
    """
    with path.open("rb") as file:
        start = file.read(len(_LFS_POINTER))
    if not start:
        raise ValueError(f"{path} is empty (0 bytes): copy or download it again.")
    if start == _LFS_POINTER:
        raise ValueError(f"{path} is a git-lfs pointer, not the file itself. Run `git lfs pull` in its folder.")


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes tensors on the CPU as a `.safetensors` file, by `write_atomically`.

    Raises:
        OSError: if the disk is full or the folder cannot be written; an earlier file stays intact.
    """
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with write_atomically(path) as temporary:
        try:
            save_file(whole, temporary, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from error


def tensor_names(path: Path, *, nested: bool = False) -> list[str]:
    """The names of the tensors in a file, of which none is read; arguments and errors as for `read_tensors`."""
    names: list[str] = []
    read_tensors(path, lambda name: bool(names.append(name)), nested=nested)
    return names


def read_tensors(
    path: Path, wanted: Callable[[str], bool] = lambda name: True, *, nested: bool = False
) -> dict[str, torch.Tensor]:
    """Reads the wanted tensors of a `.safetensors` file or of a file written by `torch.save`, onto the CPU.

    Nothing in the file is executed, and only the requested part of a large file is read into memory.

    Args:
        wanted: takes the name of a tensor.
        nested: also reads tensors in dictionaries within the dictionary, under names such as `model.layer.weight`, and
            ignores whatever else is in them.

    Raises:
        OSError: if the file is not there or cannot be opened.
        ValueError: naming the file, if it is damaged, or if it holds anything but tensors by their names.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    check_content(path)
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys() if wanted(name)}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or not a safetensors file: {error}.") from error
    try:
        # Trainers save their arguments in one. Unpickling it sets attributes, and runs no code.
        with torch.serialization.safe_globals([Namespace] if nested else []):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path) or None)
    except Exception as error:  # the unpickler, given damaged bytes, raises whatever they lead it to
        raise ValueError(
            f"{path} is damaged, or holds more than tensors and is not opened for safety: {_reason(error)} Copy it "
            "again, or save the tensors alone, by their names."
        ) from error
    tensors = dict(_tensors_within(content)) if nested and isinstance(content, Mapping) else content
    if not isinstance(tensors, Mapping) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise ValueError(f"{path} does not hold a dictionary of tensors.")
    return {name: tensor.clone() for name, tensor in tensors.items() if wanted(name)}


def _reason(error: Exception) -> str:
    """What torch.load says of a file, without its advice to unpickle it."""
    text = str(error)
    if match := re.search(r"Unsupported global: GLOBAL (\S+)", text):
        return f"it holds an object of {match[1]}."
    first = (text.splitlines() or [type(error).__name__])[0]
    return "it is not a file of torch.save." if "eights only load failed" in first else f"{first.rstrip('.')}."


def _tensors_within(content: Mapping[Any, Any], depth: int = 0) -> Iterator[tuple[str, torch.Tensor]]:
    for key, value in content.items():
        if isinstance(value, torch.Tensor):
            yield str(key), value
        elif isinstance(value, Mapping) and depth < _DEEPEST:
            yield from ((f"{key}.{name}", tensor) for name, tensor in _tensors_within(value, depth + 1))
