"""Flags of `chatglm-ptuning distill`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from chatglm_ptuning.data.cache import TokenCache
from chatglm_ptuning.model.arguments import BaseArguments
from chatglm_ptuning.training.arguments import PrefixTrainingArguments
from chatglm_ptuning.training.distillation.teacher import StudySettings

_LEARNING_RATE = 2e-2
_SHORTEST_ROW = 32


@dataclass
class DistilledBaseArguments(BaseArguments):
    """The base model, and the prefix that is trained on it."""

    pre_seq_len: int = field(default=64, metadata={"help": "number of virtual tokens"})
    frozen_slots: int = field(
        default=1,
        metadata={"help": "virtual tokens at the beginning that keep their first values: every token attends to them "
                  "(attention sinks), and training them is unstable"},
    )  # fmt: skip
    prefix_dropout: float = field(default=0.0, metadata={"help": "dropout on the prefix during training"})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "dtype of the base (auto: bfloat16 or float16 on a GPU that has it)"}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "eager, sdpa, flash_attention_2 or flex_attention (default: sdpa)"}
    )

    def __post_init__(self) -> None:
        if self.pre_seq_len < 1:
            raise ValueError(f"--pre_seq_len must be at least 1, got {self.pre_seq_len}")
        if not 0 <= self.frozen_slots < self.pre_seq_len:
            raise ValueError(
                f"--frozen_slots must be at least 0 and below --pre_seq_len {self.pre_seq_len}, got {self.frozen_slots}"
            )


@dataclass
class StudyArguments:
    """The documents, and the conversations about them."""

    document: list[str] | None = field(
        default=None, metadata={"help": "text files (UTF-8), which together become one prefix"}
    )
    rounds: int = field(
        default=8,
        metadata={"help": "how often self-study goes through the documents, each time with other questions"},
    )
    own_questions: int = field(
        default=1,
        metadata={"help": "in each round, questions about each sentence that the base writes and answers itself; the "
                  "others are templates"},
    )  # fmt: skip
    max_row_length: int = field(
        default=256, metadata={"help": "maximum number of tokens of a question with its answer"}
    )
    top_k: int = field(default=20, metadata={"help": "the teacher's likeliest tokens that are kept at each position"})
    data_cache_dir: str | None = field(
        default=None, metadata={"help": "folder for the teacher's rows (default: ~/.cache/chatglm_ptuning/data)"}
    )
    overwrite_cache: bool = field(default=False, metadata={"help": "ignore rows on disk and ask the teacher again"})

    def __post_init__(self) -> None:
        if not self.document:
            raise ValueError("--document is missing: name the text file that becomes a prefix")
        for name, least in (("rounds", 1), ("own_questions", 0), ("max_row_length", _SHORTEST_ROW), ("top_k", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be at least {least}, got {getattr(self, name)}")

    @property
    def paths(self) -> list[Path]:
        """The files."""
        return [Path(name) for name in self.document]

    def settings(self, seed: int) -> StudySettings:
        """What the rows depend on."""
        return StudySettings(self.rounds, self.own_questions, self.max_row_length, self.top_k, seed)

    def cache(self) -> TokenCache:
        """Where the rows are."""
        return TokenCache(self.data_cache_dir, self.overwrite_cache)


@dataclass
class DistillationArguments(PrefixTrainingArguments):
    """The training arguments, with defaults for a distillation."""

    do_train: bool = field(default=True, metadata={"help": "always true"})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "rows of a step on each device"})
    num_train_epochs: float = field(default=3.0, metadata={"help": "how often each row is learned"})
    save_steps: float = field(default=100, metadata={"help": "number of steps between checkpoints"})
    save_total_limit: int | None = field(default=2, metadata={"help": "number of checkpoints that are kept"})

    def __post_init__(self) -> None:
        given = self.learning_rate
        super().__post_init__()
        if given is None:
            self.learning_rate = _LEARNING_RATE
        for name in ("do_eval", "do_predict", "deepspeed", "label_smoothing_factor", "neftune_noise_alpha"):
            if getattr(self, name):
                raise ValueError(f"--{name} does not work with distill, which learns the teacher's distributions alone")
        if not self.do_train:
            raise ValueError("--do_train false leaves nothing to do: distill trains a prefix")
        if self.tuning != "ptuning_v2":
            raise ValueError(f"--tuning {self.tuning}: distill trains a prefix, which is ptuning_v2")
        if not self.packing:
            raise ValueError("--packing false: distill always packs its rows; leave it out, and --torch_compile too")
        if self.weight_decay:
            raise ValueError(
                f"--weight_decay {self.weight_decay:g} would change the frozen slots and pull keys and values of real "
                "tokens to zero: leave it out"
            )
