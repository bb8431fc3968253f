"""Prepares a base for training by any tuning method, and restores a checkpoint of any method onto it."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from chatglm_ptuning.model.loading import load_model
from chatglm_ptuning.prefix.formats import adapter_type
from chatglm_ptuning.tuning.adapters import LoraTuning, PromptTuning
from chatglm_ptuning.tuning.methods import (
    PREFIX_METHODS,
    PROMPT_METHODS,
    TUNING_METHODS,
    LoraSettings,
    PromptSettings,
)
from chatglm_ptuning.tuning.record import read_record
from chatglm_ptuning.tuning.tuning import FullTuning, HeadTuning, NoTuning, PrefixTuning, Tuning


def prepare_tuning(
    model: PreTrainedModel,
    method: str,
    *,
    lora: LoraSettings | None = None,
    prompt: PromptSettings | None = None,
    first_ids: torch.Tensor | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Tuning:
    """Prepares a base for training by one of TUNING_METHODS; afterwards only the trained parameters require gradients.

    Args:
        model: of any class with a head. For `ptuning_v2` loaded with `pre_seq_len`, for the others without.
        lora, prompt: settings of these methods; by default the published ones.
        first_ids: see `PromptTuning`.
        tokenizer: see `FullTuning`.

    Raises:
        ValueError: if the method is unknown or cannot be used on this model.
        ImportError: if PEFT is needed and not installed.
    """
    if method not in TUNING_METHODS:
        raise ValueError(f"tuning must be one of {', '.join(TUNING_METHODS)}, got {method!r}")
    if method == "full":
        return FullTuning(model, tokenizer)
    if method == "lora":
        return LoraTuning(model, lora or LoraSettings())
    if method in PROMPT_METHODS:
        return PromptTuning(model, method, prompt or PromptSettings(), first_ids)
    return {kind.method: kind for kind in (PrefixTuning, HeadTuning, NoTuning)}[method](model)


def load_tuned(
    model: PreTrainedModel | str | PathLike[str], checkpoint: str | PathLike[str], task: str | None = None
) -> Tuning:
    """Restores a checkpoint of any method onto its base, for evaluation; the tuned model is `.model` of the result.

    Args:
        model: the base, of the class it was trained with; or the base's folder, for a language model.
        checkpoint: a run's folder or a `checkpoint-N` of any method, any prefix that `load_prefix` reads, or a LoRA
            adapter of PEFT.
        task: whose head to load with a prefix that several tasks share.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: if it is damaged, or was trained on another base or with another head; the message names both.
        ImportError: if PEFT is needed and not installed.
    """
    if not isinstance(model, PreTrainedModel):
        model = load_model(str(model))
    folder = Path(checkpoint)
    record = read_record(folder) if folder.is_dir() else None
    method = "ptuning_v2" if record is None else record.tuning
    if method == "lora" or (record is None and adapter_type(folder) == "LORA"):
        tuning = LoraTuning.of_adapter(model, folder)
    elif method in PREFIX_METHODS:  # the checkpoint of a prompt is a prefix, too
        model.load_prefix(folder, task=task)
        tuning = PrefixTuning(model)
    else:
        tuning = prepare_tuning(model, method)
        tuning.load(folder)
    model.requires_grad_(False)
    return tuning
