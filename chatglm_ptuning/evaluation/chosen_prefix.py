"""Which prefix an evaluation is about: the one named, or the one that was trained last."""

from __future__ import annotations

from pathlib import Path

from chatglm_ptuning.evaluation.parallel import print_once
from chatglm_ptuning.model.modeling_chatglm import ChatGLMPreTrainedModel
from chatglm_ptuning.prefix.bank import PrefixSelection
from chatglm_ptuning.prefix.latest import find_latest_prefix, runs_folder

PLAIN_BASE = "none"
"""As --ptuning_checkpoint: no prefix."""


def choose_prefix(named: str | None) -> Path | None:
    """The prefix to score, None for the plain base; says which it is."""
    if named is not None and named.lower() == PLAIN_BASE:
        print_once("Scoring the plain base, without a prefix.")
        return None
    if named is not None:
        print_once(f"Scoring the prefix in {named}.")
        return Path(named)
    newest = find_latest_prefix(runs_folder())
    if newest is None:
        print_once(f"Scoring the plain base: there is no trained prefix in {runs_folder()} (see --ptuning_checkpoint).")
    else:
        print_once(f"Scoring the prefix that was trained last, in {newest} (see --ptuning_checkpoint).")
    return newest


def short_name(prefix: Path | None) -> str:
    """The name of a folder for results about a prefix: that of its run, and of the step."""
    if prefix is None:
        return "base"
    folder = (prefix.parent if prefix.is_file() else prefix).resolve()
    return f"{folder.parent.name}-{folder.name}" if folder.name.startswith("checkpoint-") else folder.name


def load_chosen_prefix(
    model: ChatGLMPreTrainedModel, prefix: Path, chosen: bool, task: str | None = None
) -> PrefixSelection:
    """Loads the prefix, with the head of the task where several share it, and returns the name to select it by."""
    try:
        model.load_prefix(prefix, task=task)
    except ValueError as error:
        if chosen:
            raise
        raise ValueError(
            f"{error}\nIt was taken for being the one trained last. Name another by --ptuning_checkpoint, its base by "
            f"--model_name_or_path, or score the plain base by --ptuning_checkpoint {PLAIN_BASE}."
        ) from error
    return model.selected_prefix
