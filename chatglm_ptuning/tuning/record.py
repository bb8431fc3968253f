"""`tuning.json`: the metadata of a checkpoint of any tuning method except P-Tuning v2."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from chatglm_ptuning.files import write_json
from chatglm_ptuning.prefix.formats.kit import METADATA_FILE, WEIGHTS_FILE
from chatglm_ptuning.tuning.methods import TUNING_METHODS
from chatglm_ptuning.version import kit_version

RECORD_FILE = "tuning.json"


@dataclass(frozen=True)
class TuningRecord:
    """The content of `tuning.json`.

    Attributes:
        tuning: one of TUNING_METHODS.
        base_fingerprint: of the base before tuning, see `fingerprint_of`.
        files: names of the checkpoint's other files.
        settings: of the method.
        details: chat format, task and training, as in a prefix checkpoint.
    """

    tuning: str
    base_model_name: str | None
    base_fingerprint: dict[str, Any]
    files: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    kit_version: str | None = None


def read_record(folder: str | PathLike[str]) -> TuningRecord | None:
    """The record of a checkpoint; None if it has none, such as a P-Tuning v2 prefix.

    Raises:
        ValueError: naming the file, if it is damaged.
    """
    path = Path(folder) / RECORD_FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text("utf-8"))
        record = TuningRecord(**{**content, "files": tuple(content["files"])})
        if record.tuning not in TUNING_METHODS or not {"shape", "sample"} <= record.base_fingerprint.keys():
            raise KeyError(record.tuning)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is damaged, or was not written by this kit: {error}.") from error
    return record


def is_complete(folder: str | PathLike[str]) -> bool:
    """Whether a folder holds all files of a checkpoint."""
    folder = Path(folder)
    try:
        record = read_record(folder)
    except ValueError:
        return False
    files = (METADATA_FILE, WEIGHTS_FILE) if record is None else record.files
    return all((folder / name).exists() for name in files)


@contextmanager
def write_together(folder: Path, record: TuningRecord) -> Iterator[Path]:
    """Gives an empty folder to write a checkpoint's files into; they and their record then replace the old checkpoint.

    The record is removed first and written last, so a folder that mixes old and new files never counts as complete.
    Files of an earlier checkpoint in the same folder are removed; other files are kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as place:
        temporary = Path(place)
        yield temporary
        files = sorted(path.name for path in temporary.iterdir())
        clear(folder)
        for name in files:
            (temporary / name).replace(folder / name)
    write_json(folder / RECORD_FILE, {**asdict(record), "files": files, "kit_version": kit_version()})


def clear(folder: Path) -> None:
    """Removes the record, the files that it names, and a prefix."""
    try:
        record = read_record(folder)
    except ValueError:
        record = None
    (folder / RECORD_FILE).unlink(missing_ok=True)
    for name in (METADATA_FILE, WEIGHTS_FILE, *(() if record is None else record.files)):
        if Path(name).name == name:
            (folder / name).unlink(missing_ok=True)
