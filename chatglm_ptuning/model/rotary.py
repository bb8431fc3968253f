"""Rotary position embedding."""

from __future__ import annotations

from typing import Any

import torch

from chatglm_ptuning.model.configuration_chatglm import ChatGLMConfig
from chatglm_ptuning.model.trained_module import Float32Module
from chatglm_ptuning.prefix.rotation import apply_rotary_pos_emb, rotary_frequencies


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


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """As `apply_rotary_pos_emb`; in float32 by a product of complex numbers, with the same results in less time."""
    if states.dtype == cos.dtype == torch.float32 and not torch.compiler.is_compiling():
        return _ComplexRotation.apply(states, torch.complex(cos, sin))
    return apply_rotary_pos_emb(states, cos, sin)


class _ComplexRotation(torch.autograd.Function):
    """Pairs of channels as complex numbers; the gradient is rotated back."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(turns)
        return _turn(states, turns)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (turns,) = ctx.saved_tensors
        return _turn(grad, turns.conj()), None


def _turn(states: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    half = states.shape[-1] // 2
    turned = torch.empty_like(states)
    before, after = (torch.view_as_complex(whole[..., :half].unflatten(-1, (-1, 2))) for whole in (states, turned))
    torch.mul(before, turns, out=after)
    turned[..., half:] = states[..., half:]
    return turned
