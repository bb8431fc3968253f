"""The checkpoint that an evaluation scores: the one named, or the one trained last."""

from __future__ import annotations

from pathlib import Path

from chatglm_ptuning.evaluation.parallel import print_once
from chatglm_ptuning.model.arguments import PLAIN_BASE, is_plain_base
from chatglm_ptuning.model.modeling_chatglm import ChatGLMPreTrainedModel
from chatglm_ptuning.prefix.latest import find_latest_prefix, runs_folder
from chatglm_ptuning.tuning.load import load_tuned
from chatglm_ptuning.tuning.tuning import Tuning


def choose_prefix(named: str | None) -> Path | None:
    """The prefix to score, None for the plain base; prints which it is."""
    if named is None:
        newest = find_latest_prefix(runs_folder())
        shown = f"prefix that was trained last, in {newest}"
        if newest is None:
            shown = f"plain base: there is no trained prefix in {runs_folder()}"
        print_once(f"Scoring the {shown} (set by ptuning_checkpoint).")
        return newest
    if is_plain_base(named):
        print_once("Scoring the plain base, without a prefix.")
        return None
    print_once(f"Scoring the prefix in {named}.")
    return Path(named)


def results_folder(prefix: Path | None) -> Path:
    """The default folder for results about a prefix, named after its run and step."""
    if prefix is None:
        return runs_folder() / "evaluation" / "base"
    folder = (prefix.parent if prefix.is_file() else prefix).resolve()
    name = f"{folder.parent.name}-{folder.name}" if folder.name.startswith("checkpoint-") else folder.name
    return runs_folder() / "evaluation" / name


def load_chosen(model: ChatGLMPreTrainedModel, prefix: Path, chosen: bool, task: str | None = None) -> Tuning:
    """Loads a checkpoint onto the base, and selects it.

    Args:
        chosen: whether the user named it.
        task: whose head to load with a prefix that several tasks share.
    """
    try:
        return load_tuned(model, prefix, task)
    except ValueError as error:
        if chosen:
            raise
        raise ValueError(
            f"{error}\nIt was used because it was trained last. Set ptuning_checkpoint to another, or "
            f"model_name_or_path to its base, or score the plain base with ptuning_checkpoint {PLAIN_BASE}."
        ) from error
