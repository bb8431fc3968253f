"""Flags that choose what is trained."""

from __future__ import annotations

from dataclasses import dataclass, field

from chatglm_ptuning.training.head_start import HEAD_INITS
from chatglm_ptuning.tuning.methods import (
    LEARNING_RATES,
    LINEAR_LAYERS,
    PROMPT_ENCODERS,
    TUNING_METHODS,
    LoraSettings,
    PromptSettings,
)

_LORA = LoraSettings()


@dataclass
class TuningArguments:
    """The way of tuning, its settings and learning rates."""

    tuning: str = field(
        default="ptuning_v2",
        metadata={"help": f"what is trained: {', '.join(TUNING_METHODS)} (none: evaluate the plain base)"},
    )
    learning_rate: float | None = field(
        default=None,
        metadata={"help": "of what is trained (default: 1e-2 for a prefix, where the official script has 2e-2, and for "
                  "head_only; prompt 3e-2, p_tuning 1e-3, lora 2e-4, full 5e-5)"},
    )  # fmt: skip
    head_learning_rate: float | None = field(
        default=None, metadata={"help": "of a linear head (default: --learning_rate)"}
    )
    head_init: str = field(
        default="probe",
        metadata={"help": "first values of a linear head for texts or tokens: probe (logistic regression on the states "
                  "of the training rows, as they are before training) or random"},
    )  # fmt: skip
    lora_rank: int = field(default=_LORA.rank, metadata={"help": "of lora: rank of the matrices"})
    lora_alpha: float = field(default=_LORA.alpha, metadata={"help": "of lora: they count alpha / rank times"})
    lora_dropout: float = field(default=_LORA.dropout, metadata={"help": "of lora: dropout on their input"})
    lora_target: list[str] = field(
        default_factory=lambda: list(_LORA.targets),
        metadata={"help": f"of lora: the layers, among {', '.join(LINEAR_LAYERS)}"},
    )
    prompt_encoder: str = field(
        default="mlp", metadata={"help": f"of p_tuning: {' or '.join(PROMPT_ENCODERS)}, which makes the prompt"}
    )
    prompt_encoder_hidden_size: int | None = field(
        default=None, metadata={"help": "of p_tuning (default: the base's hidden_size)"}
    )

    def __post_init__(self) -> None:
        if self.tuning not in TUNING_METHODS:
            raise ValueError(f"--tuning must be one of {', '.join(TUNING_METHODS)}, got {self.tuning!r}")
        if self.head_init not in HEAD_INITS:
            raise ValueError(f"--head_init must be {' or '.join(HEAD_INITS)}, got {self.head_init!r}")
        if self.prompt_encoder not in PROMPT_ENCODERS:
            raise ValueError(f"--prompt_encoder must be {' or '.join(PROMPT_ENCODERS)}, got {self.prompt_encoder!r}")
        unknown = [name for name in self.lora_target if name not in LINEAR_LAYERS]
        if unknown or not self.lora_target:
            raise ValueError(f"--lora_target takes {', '.join(LINEAR_LAYERS)}, got {', '.join(unknown) or 'nothing'}")
        if self.lora_rank < 1:
            raise ValueError(f"--lora_rank must be at least 1, got {self.lora_rank}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"--lora_dropout must be at least 0 and below 1, got {self.lora_dropout}")
        if self.prompt_encoder_hidden_size is not None and self.prompt_encoder_hidden_size < 1:
            raise ValueError(f"--prompt_encoder_hidden_size must be at least 1, got {self.prompt_encoder_hidden_size}")
        self.learning_rate_is_default = self.learning_rate is None
        if self.learning_rate is None:
            self.learning_rate = LEARNING_RATES[self.tuning]

    def lora(self) -> LoraSettings:
        """What the flags say about LoRA."""
        return LoraSettings(self.lora_rank, self.lora_alpha, self.lora_dropout, tuple(self.lora_target))

    def prompt(self, pre_seq_len: int) -> PromptSettings:
        """What the flags say about prompts."""
        return PromptSettings(pre_seq_len, self.prompt_encoder, self.prompt_encoder_hidden_size)
