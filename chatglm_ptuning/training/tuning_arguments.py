"""Flags of the tuning method."""

from __future__ import annotations

from dataclasses import dataclass, field

from chatglm_ptuning.training.head_start import HeadInit
from chatglm_ptuning.tuning.methods import (
    LEARNING_RATES,
    LINEAR_LAYERS,
    LoraSettings,
    PromptEncoder,
    PromptSettings,
    TuningMethod,
)

_LORA = LoraSettings()


@dataclass
class TuningArguments:
    """The tuning method, its settings and learning rates."""

    tuning: TuningMethod = field(
        default="ptuning_v2", metadata={"help": "tuning method (none: evaluate the plain base)"}
    )
    learning_rate: float | None = field(
        default=None,
        metadata={"help": "default: the task's; else 1e-2 for a prefix (the official script has 2e-2) and head_only, "
                  "3e-2 for prompt, 1e-3 for p_tuning, 2e-4 for lora, 5e-5 for full"},
    )  # fmt: skip
    head_learning_rate: float | None = field(
        default=None, metadata={"help": "learning rate of a linear head (default: --learning_rate)"}
    )
    head_init: HeadInit = field(
        default="probe",
        metadata={"help": "first values of a linear head for texts or tokens: probe (logistic regression on the states "
                  "of the training rows before training) or random"},
    )  # fmt: skip
    lora_rank: int = field(default=_LORA.rank, metadata={"help": "LoRA: rank of the update matrices"})
    lora_alpha: float = field(default=_LORA.alpha, metadata={"help": "LoRA: the update is scaled by alpha / rank"})
    lora_dropout: float = field(default=_LORA.dropout, metadata={"help": "LoRA: dropout on the input"})
    lora_target: list[str] = field(
        default_factory=lambda: list(_LORA.targets),
        metadata={"help": f"LoRA: the layers, among {', '.join(LINEAR_LAYERS)}"},
    )
    prompt_encoder: PromptEncoder = field(
        default="mlp", metadata={"help": "P-Tuning: the network that makes the prompt"}
    )
    prompt_encoder_hidden_size: int | None = field(
        default=None, metadata={"help": "P-Tuning: width of that network (default: the base's hidden_size)"}
    )

    def __post_init__(self) -> None:
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
        """The settings of LoRA."""
        return LoraSettings(self.lora_rank, self.lora_alpha, self.lora_dropout, tuple(self.lora_target))

    def prompt(self, pre_seq_len: int) -> PromptSettings:
        """The settings of soft prompts."""
        return PromptSettings(pre_seq_len, self.prompt_encoder, self.prompt_encoder_hidden_size)
