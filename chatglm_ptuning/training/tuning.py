"""From a run's flags to what it trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from chatglm_ptuning.model.configuration_chatglm import ChatGLMConfig
from chatglm_ptuning.model.hub import find_base
from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer
from chatglm_ptuning.prefix.formats import read_prefix
from chatglm_ptuning.training.initialisation import first_ids, init_from_checkpoint, init_prefix
from chatglm_ptuning.tuning.load import load_tuned, prepare_tuning
from chatglm_ptuning.tuning.methods import PROMPT_METHODS
from chatglm_ptuning.tuning.record import read_record
from chatglm_ptuning.tuning.tuning import NoTuning, PrefixTuning, Tuning, check_not_the_base

if TYPE_CHECKING:
    from chatglm_ptuning.training.arguments import ModelArguments, PrefixTrainingArguments

DEFAULT_PRE_SEQ_LEN = 128


def prefix_length(args: PrefixTrainingArguments, model_args: ModelArguments) -> int | None:
    """With which `pre_seq_len` the base is to be loaded: None where no prefix is trained."""
    if model_args.init_prefix is not None and not (args.do_train and args.tuning == "ptuning_v2"):
        raise ValueError("--init_prefix is what the training of a prefix starts from: it needs --do_train and --tuning "
                         "ptuning_v2. To evaluate a prefix, name it by --ptuning_checkpoint.")  # fmt: skip
    if not args.do_train or args.tuning != "ptuning_v2":
        return None
    if model_args.init_prefix is not None:
        return _length_of_start(model_args)
    return model_args.pre_seq_len or DEFAULT_PRE_SEQ_LEN


def _length_of_start(model_args: ModelArguments) -> int:
    base = find_base(model_args.model_name_or_path, model_args.hub, model_args.revision, weights=False)
    shape = ChatGLMConfig.from_pretrained(base).prefix_shape
    found = read_prefix(model_args.init_prefix, shape).metadata.pre_seq_len
    if model_args.pre_seq_len not in (None, found):
        raise ValueError(
            f"--pre_seq_len is {model_args.pre_seq_len}, but --init_prefix {model_args.init_prefix} has {found} "
            "virtual tokens. Leave --pre_seq_len out: the size is read from the checkpoint."
        )
    return found


def base_dtype(args: PrefixTrainingArguments, model_args: ModelArguments) -> str:
    """The dtype to load the base in: one that is trained itself has to be in float32, or small steps are rounded away.

    The computation may still be in 16 bits (`--bf16`, `--fp16`).
    """
    return "float32" if args.tuning == "full" and model_args.dtype == "auto" else model_args.dtype


def tuning_of_run(
    model: PreTrainedModel,
    args: PrefixTrainingArguments,
    model_args: ModelArguments,
    tokenizer: ChatGLMTokenizer,
    examples: Sequence[dict[str, list[int]]] = (),
    details: Mapping[str, Any] | None = None,
) -> Tuning:
    """What the flags ask to train on a base, from its first values or those of --ptuning_checkpoint.

    Without --do_train it is what that checkpoint holds, of whatever method, or the plain base.

    Args:
        model: loaded with `prefix_length`.
        examples: training rows, for `--prefix_init data`.
        details: the run's own task, head and labels, by which it finds its head in a prefix that several tasks share.

    Raises:
        FileNotFoundError, ValueError, ImportError: if the flags contradict each other, the method cannot be used on
            this model, or the checkpoint does not fit.
    """
    checkpoint = model_args.ptuning_checkpoint
    head = (details or {}).get("head")
    task = None if head is None else details["task"]
    if args.do_train and args.tuning == "full":
        check_not_the_base(model, Path(args.output_dir))
    if checkpoint is not None:
        if args.tuning == "none":
            raise ValueError(f"--tuning none is the plain base: leave --ptuning_checkpoint {checkpoint} out.")
        _check_wanted_length(model, model_args)
    if not args.do_train:
        if checkpoint is not None:
            return load_tuned(model, checkpoint, task)
        if model_args.pre_seq_len and args.tuning != "none":
            raise ValueError(
                f"--pre_seq_len {model_args.pre_seq_len} without --do_train needs a --ptuning_checkpoint: an untrained "
                "prefix is random. Without --pre_seq_len the plain base is used."
            )
        return NoTuning(model)
    initialisation = {"text": model_args.init_prefix_text, "examples": examples, "seed": args.seed}
    if args.tuning == "ptuning_v2":
        if checkpoint is not None:
            model.load_prefix(checkpoint, task=task)
        elif model_args.init_prefix is not None:
            with_head = init_from_checkpoint(model, model_args.init_prefix, task, head, (details or {}).get("labels"))
            if args.should_save:
                print(f"The prefix{' and the head start' if with_head else ' starts'} from {model_args.init_prefix}.")
        else:
            init_prefix(model, tokenizer, model_args.prefix_init, **initialisation)
        return PrefixTuning(model)
    length = model_args.pre_seq_len or DEFAULT_PRE_SEQ_LEN
    ids: torch.Tensor | None = None
    if args.tuning == "prompt" and checkpoint is None and model_args.prefix_init in ("data", "text"):
        ids = first_ids(tokenizer, model_args.prefix_init, length, **initialisation)
    tuning = prepare_tuning(
        model, args.tuning, lora=args.lora(), prompt=args.prompt(length), first_ids=ids, tokenizer=tokenizer
    )
    if checkpoint is not None:
        tuning.load(Path(checkpoint))
    if args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
        model.enable_input_require_grads()  # reentrant checkpointing gives gradients to what follows from its inputs
    return tuning


def _check_wanted_length(model: PreTrainedModel, model_args: ModelArguments) -> None:
    wanted, path = model_args.pre_seq_len, model_args.ptuning_checkpoint
    if wanted is None or not _is_prefix(Path(path)):
        return
    found = read_prefix(path, model.base_model.config.prefix_shape).metadata.pre_seq_len
    if found != wanted:
        raise ValueError(
            f"--pre_seq_len is {wanted}, but the prefix in {path} has {found} virtual tokens. Leave --pre_seq_len "
            "out: the size is read from the checkpoint."
        )


def _is_prefix(path: Path) -> bool:
    record = read_record(path) if path.is_dir() else None
    return record is None or record.tuning in PROMPT_METHODS
