"""Rotary position embedding."""

from __future__ import annotations

import torch

from chatglm_ptuning.model.configuration_chatglm import ChatGLMConfig
from chatglm_ptuning.model.trained_module import Float32Module
from chatglm_ptuning.prefix.rotation import rotary_frequencies


class RotaryEmbedding(Float32Module):
    """Cosines and sines for the rotated half of each head, computed in float32.

    `rope_ratio` multiplies the base of 10000, or divides the positions (`position_interpolation`).
    """

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.dim = config.kv_channels // 2
        self.base = config.rope_base
        self.position_scale = config.position_scale
        self.register_buffer("inv_freq", self.frequencies(), persistent=False)

    def frequencies(self) -> torch.Tensor:
        """Radians per position of each pair, float32 `[kv_channels // 4]`."""
        return rotary_frequencies(self.dim, self.base)

    @torch.no_grad()
    def forward(self, position_ids: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """`position_ids` `[batch, seq_len]` -> cosines and sines `[batch, 1, seq_len, kv_channels // 4]`."""
        angles = position_ids[:, None, :, None].float() / self.position_scale * self.inv_freq
        return angles.cos().to(dtype), angles.sin().to(dtype)
