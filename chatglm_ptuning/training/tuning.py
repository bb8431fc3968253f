"""Prepares the tuning method of a run on its base, with first values or those of a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer
from chatglm_ptuning.training.config import RunConfig
from chatglm_ptuning.training.initialisation import first_ids, init_from_checkpoint, init_prefix
from chatglm_ptuning.tuning.load import load_tuned, prepare_tuning
from chatglm_ptuning.tuning.tuning import NoTuning, PrefixTuning, Tuning, check_not_the_base


def start_tuning(
    model: PreTrainedModel, config: RunConfig, tokenizer: ChatGLMTokenizer, rows: Sequence[dict[str, Any]] = ()
) -> Tuning:
    """Prepares a base for the training of a run; without training, restores what its checkpoint holds.

    Args:
        model: loaded with the run's `pre_seq_len`.
        rows: training rows, for `prefix_init` data.

    Raises:
        FileNotFoundError, ValueError, ImportError: if the method cannot be used on this model, or the checkpoint does
            not fit.
    """
    base, args, checkpoint = config.base, config.schedule, config.base.ptuning_checkpoint
    details = config.details()
    head = details.get("head")
    task = None if head is None else details["task"]
    if not args.do_train:
        return NoTuning(model) if checkpoint is None else load_tuned(model, checkpoint, task)
    if args.tuning == "full":
        check_not_the_base(model, config.output)
    initialisation = {"text": base.init_prefix_text, "examples": rows, "seed": args.seed}
    if args.tuning == "ptuning_v2":
        if checkpoint is not None:
            model.load_prefix(checkpoint, task=task)
        elif base.init_prefix is not None:
            with_head = init_from_checkpoint(model, base.init_prefix, task, head, details.get("labels"))
            if args.should_save:
                print(f"The prefix{' and the head start' if with_head else ' starts'} from {base.init_prefix}.")
        else:
            init_prefix(model, tokenizer, base.prefix_init, **initialisation)
        return PrefixTuning(model)
    ids: torch.Tensor | None = None
    if args.tuning == "prompt" and checkpoint is None and base.prefix_init in ("data", "text"):
        ids = first_ids(tokenizer, base.prefix_init, base.pre_seq_len, **initialisation)
    tuning = prepare_tuning(
        model,
        args.tuning,
        lora=args.lora(),
        prompt=args.prompt(base.pre_seq_len),
        first_ids=ids,
        tokenizer=tokenizer,
    )
    if checkpoint is not None:
        tuning.load(Path(checkpoint))
    if args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
        model.enable_input_require_grads()  # reentrant checkpointing gives gradients to what follows from its inputs
    return tuning
