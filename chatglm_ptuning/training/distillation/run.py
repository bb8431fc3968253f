"""`chatglm-ptuning distill`: documents, self-study with the base as its own teacher, and the training of a prefix.

The method is that of Cartridges (Eyuboglu et al. 2025, arXiv 2506.06266).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from chatglm_ptuning.chat.plain import PlainText
from chatglm_ptuning.command_line import parse_arguments
from chatglm_ptuning.data.collate import PackingCollator
from chatglm_ptuning.evaluation.recorded import recorded_details
from chatglm_ptuning.model.loading import best_device, choose_dtype
from chatglm_ptuning.model.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer
from chatglm_ptuning.prefix.export import check_room_for_export
from chatglm_ptuning.training.checkpoints import choose_checkpoint, remove_checkpoints
from chatglm_ptuning.training.command import reported, train_and_save
from chatglm_ptuning.training.distillation.arguments import (
    DistillationArguments,
    DistilledBaseArguments,
    StudyArguments,
)
from chatglm_ptuning.training.distillation.documents import Window, first_ids_of, read_document, windows_of
from chatglm_ptuning.training.distillation.teacher import Teacher
from chatglm_ptuning.training.distributed import match_precision
from chatglm_ptuning.training.trainer import PrefixTrainer, tokens_per_pass
from chatglm_ptuning.tuning.tuning import PrefixTuning

logger = logging.get_logger(__name__)

_RECORD = "distilled"


def main(argv: Sequence[str]) -> None:
    """Entry of the command; errors end it as those of `train`."""
    base, study, args = parse_arguments(
        "chatglm-ptuning distill",
        "Turn a document into a prefix, which answers as if the document were in the context.",
        (DistilledBaseArguments, StudyArguments, DistillationArguments),
        argv,
    )
    with reported(args):
        run(base, study, args)


def run(base: DistilledBaseArguments, study: StudyArguments, args: DistillationArguments) -> None:
    """Distils documents into a prefix checkpoint in the run's folder.

    Raises:
        FileNotFoundError, ValueError, ImportError: if a file, the base or the settings do not fit, naming them.
        TrainingStopped: with advice, if the training cannot continue.
    """
    if args.save_official_prefix:
        check_room_for_export(Path(args.output_dir))
    texts = {path: read_document(path) for path in study.paths}
    tokenizer = base.load_tokenizer()
    windows = read_windows(base, study, tokenizer, texts)
    first_ids = first_ids_of(windows, tokenizer.chat.start_ids, base.pre_seq_len)
    dtype = choose_dtype(base.dtype, best_device(), base.load_config().hidden_size)
    match_precision(args, dtype, base.quantization_bit)
    details = details_of(base, study, args, tokenizer, texts)
    resume_from = choose_checkpoint(args)
    if resume_from is not None:
        _check_same(resume_from, details, base)
    elif args.overwrite_output_dir and args.process_index == 0:
        remove_checkpoints(Path(args.output_dir))
    model = base.load_model(
        pre_seq_len=base.pre_seq_len,
        prefix_dropout=base.prefix_dropout,
        dtype=base.dtype,
        attn_implementation=base.attn_implementation,
    )
    batch_size = args.per_device_eval_batch_size
    rows = Teacher(model, tokenizer, study.settings(args.seed), study.cache(), batch_size).rows(
        windows, progress=args.should_save and not args.disable_tqdm
    )
    if args.should_save:
        tokens = sum(len(window.ids) - len(tokenizer.chat.start_ids) for window in windows)
        print(
            f"{', '.join(map(str, texts))}: {tokens} tokens in {len(windows)} windows, {len(rows)} conversations; "
            f"{base.pre_seq_len} virtual tokens, {tokens / base.pre_seq_len:.1f} times fewer."
        )
    model.init_prefix_from_ids(torch.tensor(first_ids))
    freeze_slots(model, base.frozen_slots)
    trainer = PrefixTrainer(
        model=model,
        args=args,
        train_dataset=rows,
        data_collator=PackingCollator(),
        tuning=PrefixTuning(model),
        details=details,
        max_tokens_per_pass=tokens_per_pass(args, rows),
    )
    train_and_save(trainer, resume_from, len(rows))


def read_windows(
    base: DistilledBaseArguments, study: StudyArguments, tokenizer: ChatGLMTokenizer, texts: dict[Path, str]
) -> list[Window]:
    """The windows of all documents.

    Raises:
        ValueError: if the base has no chat format, or its context no room.
    """
    if tokenizer.chat_format == PlainText.name:
        raise ValueError(
            f"{base.model_name_or_path} has the chat format {tokenizer.chat_format}: it continues texts and answers no "
            "questions, by which distill studies a document. Name a base with a chat format by --model_name_or_path."
        )
    config = base.load_config()
    room = config.seq_length - study.max_row_length
    if room <= len(tokenizer.chat.start_ids):
        raise ValueError(
            f"--max_row_length {study.max_row_length} leaves no room for the document in the context of "
            f"{config.seq_length} tokens: lower it."
        )
    if study.top_k >= config.padded_vocab_size:
        raise ValueError(f"--top_k must be below the vocabulary of {config.padded_vocab_size}, got {study.top_k}")
    return [window for text in texts.values() for window in windows_of(text, tokenizer, room)]


def details_of(
    base: DistilledBaseArguments,
    study: StudyArguments,
    args: DistillationArguments,
    tokenizer: ChatGLMTokenizer,
    texts: dict[Path, str],
) -> dict[str, Any]:
    """What checkpoints record beside the weights."""
    documents = {path.name: hashlib.blake2b(text.encode(), digest_size=16).hexdigest() for path, text in texts.items()}
    training = {
        "tuning": args.tuning,
        "learning_rate": args.learning_rate,
        "seed": args.seed,
        _RECORD: {
            "documents": documents,
            "pre_seq_len": base.pre_seq_len,
            "frozen_slots": base.frozen_slots,
            **asdict(study.settings(args.seed)),
        },
    }
    return {"chat_format": tokenizer.chat_format, "task": ", ".join(documents), "training": training}


def freeze_slots(model: ChatGLMForConditionalGeneration, count: int) -> None:
    """Lets the first virtual tokens keep their values, as their gradient is zero."""
    if count:
        model.transformer.prefix_encoder.embedding.weight.register_hook(
            lambda grad: torch.cat((torch.zeros_like(grad[:count]), grad[count:]))
        )


def _check_same(checkpoint: Path, details: dict[str, Any], base: DistilledBaseArguments) -> None:
    """Refuses to resume a run on other documents or settings."""
    before = recorded_details(checkpoint, base)["training"].get(_RECORD) or {}
    now = details["training"][_RECORD]
    changed = sorted(name for name in now if before.get(name) != now[name])
    if changed:
        raise ValueError(
            f"{checkpoint} is of a run with other {', '.join(changed)}: name another --output_dir, or start over by "
            "--overwrite_output_dir."
        )
