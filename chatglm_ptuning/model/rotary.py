"""Rotary positions of the ChatGLM family: half of each head, in interleaved pairs."""

from __future__ import annotations

import torch

from chatglm_ptuning.model.configuration_chatglm import ChatGLMConfig
from chatglm_ptuning.model.float32_module import Float32Module


class RotaryEmbedding(Float32Module):
    """Cosines and sines for the rotated half of each head, computed in float32.

    `rope_ratio` multiplies the base of 10000, or divides the positions (`position_interpolation`).
    """

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.dim = config.kv_channels // 2
        self.base = 10000.0 * (1.0 if config.position_interpolation else config.rope_ratio)
        self.position_scale = config.rope_ratio if config.position_interpolation else 1.0
        self.register_buffer("inv_freq", self.frequencies(), persistent=False)

    def frequencies(self) -> torch.Tensor:
        """Radians per position of each pair, float32 `[kv_channels // 4]`."""
        return 1.0 / self.base ** (torch.arange(0, self.dim, 2, dtype=torch.float32) / self.dim)

    @torch.no_grad()
    def forward(self, position_ids: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """`position_ids` `[batch, seq_len]` -> cosines and sines `[batch, 1, seq_len, kv_channels // 4]`."""
        angles = position_ids[:, None, :, None].float() / self.position_scale * self.inv_freq
        return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary_pos_emb(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the first half of each head in interleaved pairs; `states` `[batch, heads, seq_len, kv_channels]`."""
    half = states.shape[-1] // 2
    rotated, passed = states[..., :half], states[..., half:]
    even, odd = rotated[..., 0::2], rotated[..., 1::2]
    rotated = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
    return torch.cat((rotated, passed), dim=-1)


def rotate_prefix_keys(key_values: torch.Tensor, positions: int, config: ChatGLMConfig) -> torch.Tensor:
    """Rotates the keys of a prefix by a number of positions, so that it serves tokens that start that much later.

    A prefix of PEFT stands before tokens whose positions start at `pre_seq_len`, ours before tokens that start at 0.
    RoPE is relative, so rotating the keys by `-pre_seq_len` turns the former into the latter exactly.

    Args:
        key_values: `[pre_seq_len, num_layers * 2, groups, kv_channels]`; the even slices of the second axis are keys.
    """
    position_ids = torch.full((1, 1), positions, device=key_values.device)
    cos, sin = RotaryEmbedding(config).to(key_values.device)(position_ids, key_values.dtype)
    rotated = key_values.clone()
    rotated[:, 0::2] = apply_rotary_pos_emb(key_values[:, 0::2], cos, sin)
    return rotated
