"""The tuning methods, their default learning rates and their settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

TuningMethod = Literal["ptuning_v2", "prompt", "p_tuning", "lora", "full", "head_only", "none"]
LEARNING_RATES: dict[TuningMethod, float] = {
    "ptuning_v2": 1e-2,
    "prompt": 3e-2,
    "p_tuning": 1e-3,
    "lora": 2e-4,
    "full": 5e-5,
    "head_only": 1e-2,
    "none": 0.0,
}
"""Method -> default learning rate.

`ptuning_v2`: P-Tuning v2's scripts use 5e-3 to 1e-2 for most tasks. `prompt` and `p_tuning`: PEFT's examples of these
methods. `lora`: LoRA (Hu et al. 2021), tables of GPT-2 and GPT-3. `full`: ChatGLM3's finetune_demo, sft.yaml.
`head_only`: our choice, for bases as small as chatglm-nano.
"""

TUNING_METHODS = get_args(TuningMethod)
PROMPT_METHODS = ("prompt", "p_tuning")
"""Methods that train embeddings in front of the input."""
PREFIX_METHODS = ("ptuning_v2", *PROMPT_METHODS)
"""Methods with virtual tokens (`pre_seq_len`)."""
PromptEncoder = Literal["mlp", "lstm"]
LINEAR_LAYERS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
"""Names of the linear layers of every ChatGLM layer, which LoRA can adapt."""


@dataclass(frozen=True)
class LoraSettings:
    """Settings of `lora`; the defaults are those of ChatGLM3's finetune_demo (lora.yaml)."""

    rank: int = 8
    alpha: float = 32
    dropout: float = 0.1
    targets: tuple[str, ...] = ("query_key_value",)


@dataclass(frozen=True)
class PromptSettings:
    """Settings of `prompt` and `p_tuning`.

    Attributes:
        encoder: of `p_tuning`.
        encoder_hidden_size: of `p_tuning`; None for the base's hidden size.
    """

    pre_seq_len: int = 128
    encoder: PromptEncoder = "mlp"
    encoder_hidden_size: int | None = None
