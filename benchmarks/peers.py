"""Other programs' ways to tune the same base: PEFT on transformers' GlmForCausalLM."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch

from benchmarks.shapes import Row
from benchmarks.sides import Side, checkpointing
from chatglm_ptuning.model.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm_ptuning.model.native_glm import as_glm

LORA_RANK = 8
LORA_ALPHA = 16


class _Peft(Side):
    """A model of PEFT with dynamic padding, and the loss of transformers' own GLM.

    Args:
        model: the kit's, whose weights are shared.
    """

    def __init__(
        self, model: ChatGLMForConditionalGeneration, steps: Sequence[Sequence[Row]], at_once: int | None = None
    ) -> None:
        from peft import get_peft_model

        adapted = get_peft_model(as_glm(model), self._settings(model))
        super().__init__(adapted.train(), steps, at_once)

    @abstractmethod
    def _settings(self, model: ChatGLMForConditionalGeneration) -> Any:
        """PEFT's configuration."""

    def loss(self, batch: dict[str, Any], supervised: int) -> torch.Tensor:
        """As `Side.loss`."""
        batch.pop("position_ids")
        return self.model(**batch, num_items_in_batch=supervised).loss


class PeftPrefix(_Peft):
    """PEFT's prefix tuning: the same trained numbers as P-Tuning v2."""

    name = "PEFT prefix tuning"

    def _settings(self, model: ChatGLMForConditionalGeneration) -> Any:
        from peft import PrefixTuningConfig

        return PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=model.config.pre_seq_len)


class Lora(_Peft):
    """LoRA on all linear layers, as LLaMA-Factory sets it up by default, but without gradient checkpointing.

    Rank 8, alpha 16, no dropout; adapters in float32, 16-bit bases under autocast.
    """

    name = "LoRA without checkpointing"

    def _settings(self, model: ChatGLMForConditionalGeneration) -> Any:
        from peft import LoraConfig

        return LoraConfig(task_type="CAUSAL_LM", r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules="all-linear")

    def loss(self, batch: dict[str, Any], supervised: int) -> torch.Tensor:
        """As `Side.loss`."""
        dtype = self.model.dtype
        with nullcontext() if dtype == torch.float32 else torch.autocast(self.device.type, dtype):
            return super().loss(batch | {"use_cache": False}, supervised)


class CheckpointedLora(Lora):
    """LoRA as LLaMA-Factory sets it up by default."""

    name = "LoRA"

    def step(self) -> torch.Tensor:
        """As `Side.step`, with gradient checkpointing."""
        with checkpointing(self.model):
            return super().step()
