"""Finding the checkpoints of a run."""

from __future__ import annotations

from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from chatglm_ptuning.tuning.record import is_complete


def is_whole(folder: str | Path) -> bool:
    """Whether a `checkpoint-N` has what a run needs to go on from it."""
    return (Path(folder) / TRAINER_STATE_NAME).exists() and is_complete(folder)


def last_checkpoint(run_folder: str | Path) -> Path | None:
    """The newest whole `checkpoint-N` of a run; None if there is none."""
    found = {}
    for folder in Path(run_folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = folder.name.rpartition("-")[2]
        if step.isdigit() and is_whole(folder):
            found[int(step)] = folder
    return found[max(found)] if found else None
