"""One function to prepare a base for training, and one to restore whatever was trained onto it."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from chatglm_ptuning.model.loading import load_model
from chatglm_ptuning.prefix.formats.peft import adapter_type
from chatglm_ptuning.tuning.methods import PREFIX_METHODS, TUNING_METHODS, LoraSettings, PromptSettings
from chatglm_ptuning.tuning.record import read_record
from chatglm_ptuning.tuning.tuning import FullTuning, HeadTuning, NoTuning, PrefixTuning, Tuning

logger = logging.get_logger(__name__)


def prepare_tuning(
    model: PreTrainedModel,
    method: str,
    *,
    lora: LoraSettings | None = None,
    prompt: PromptSettings | None = None,
    first_ids: torch.Tensor | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Tuning:
    """Prepares a base for training by one of TUNING_METHODS; only what is to be trained requires gradients then.

    Args:
        model: any of the four classes. For `ptuning_v2` loaded with `pre_seq_len`, for the others without.
        lora, prompt: settings of those methods; by default the published ones.
        first_ids: see `PromptTuning`.
        tokenizer: see `FullTuning`.

    Raises:
        ValueError: if the method is unknown or cannot be used on this model.
        ImportError: if PEFT is needed and not installed.
    """
    if method == "ptuning_v2":
        return PrefixTuning(model)
    if method == "none":
        return NoTuning(model)
    if method == "head_only":
        return HeadTuning(model)
    if method == "full":
        return FullTuning(model, tokenizer)
    if method not in TUNING_METHODS:
        raise ValueError(f"--tuning must be one of {', '.join(TUNING_METHODS)}, got {method!r}")
    _require_peft(method)
    from chatglm_ptuning.tuning.adapters import LoraTuning, PromptTuning

    if method == "lora":
        return LoraTuning(model, lora or LoraSettings())
    return PromptTuning(model, method, prompt or PromptSettings(), first_ids)


def load_tuned(
    model: PreTrainedModel | str | PathLike[str], checkpoint: str | PathLike[str], task: str | None = None
) -> Tuning:
    """Restores what any method has trained onto its base, for evaluation; the tuned model is `.model` of the result.

    Args:
        model: the base, of the class it was trained with; or the base's folder, for a language model.
        checkpoint: a run's folder or a `checkpoint-N` of any method; any form of prefix that `load_prefix` reads; or a
            LoRA adapter of PEFT's.
        task: whose head to load with a prefix that several tasks share.

    Raises:
        FileNotFoundError: if nothing is there.
        ValueError: if it is damaged, or was trained on another base or with another head; the message names both.
        ImportError: if PEFT is needed and not installed.
    """
    if not isinstance(model, PreTrainedModel):
        model = load_model(str(model))
    folder = Path(checkpoint)
    record = read_record(folder) if folder.is_dir() else None
    method = "ptuning_v2" if record is None else record.tuning
    if method == "lora" or (record is None and adapter_type(folder) == "LORA"):
        tuning = _load_lora(model, folder, known=record is not None)
    elif method in PREFIX_METHODS:  # a prompt's checkpoint is a prefix, and used as one
        model.load_prefix(folder, task=task)
        tuning = PrefixTuning(model)
    else:
        tuning = prepare_tuning(model, method)
        tuning.load(folder)
    model.requires_grad_(False)
    return tuning


def _load_lora(model: PreTrainedModel, folder: Path, known: bool) -> Tuning:
    _require_peft("lora")
    from peft import PeftConfig

    from chatglm_ptuning.tuning.adapters import LoraTuning

    config = PeftConfig.from_pretrained(folder)
    config.inference_mode = False
    tuning = LoraTuning(model, config)
    if known:
        tuning.load(folder)
    else:
        logger.warning(f"{folder} does not say which base it was trained on: only its sizes could be checked.")
        tuning.load_adapter(folder)
    model.eval()
    return tuning


def _require_peft(method: str) -> None:
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ImportError(f"--tuning {method} needs PEFT: pip install peft.") from error
