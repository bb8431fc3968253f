"""Rotary positions of the ChatGLM family (half of each head, in interleaved pairs), and rotating a prefix by them."""

from __future__ import annotations

import torch

from chatglm_ptuning.prefix.shape import PrefixShape


def rotary_frequencies(channels: int, base: float) -> torch.Tensor:
    """Radians per position of each pair of the rotated channels, float32 `[channels // 2]`."""
    return 1.0 / base ** (torch.arange(0, channels, 2, dtype=torch.float32) / channels)


def apply_rotary_pos_emb(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the first half of each head in interleaved pairs.

    Args:
        states: `[..., kv_channels]`.
        cos, sin: of the angles, broadcast against `[..., kv_channels // 4]`.
    """
    half = states.shape[-1] // 2
    rotated, passed = states[..., :half], states[..., half:]
    even, odd = rotated[..., 0::2], rotated[..., 1::2]
    rotated = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
    return torch.cat((rotated, passed), dim=-1)


def rotate_keys(key_values: torch.Tensor, positions: int, shape: PrefixShape) -> torch.Tensor:
    """Rotates the keys of a prefix by a number of positions, for tokens whose positions start that much later.

    RoPE is relative. So a prefix for tokens whose positions start at `n`, rotated by `-n`, is exactly equivalent for
    tokens whose positions start at 0.

    Args:
        key_values: `[length, num_layers * 2, groups, kv_channels]`; the even slices of the second axis are keys.
    """
    frequencies = rotary_frequencies(shape.kv_channels // 2, shape.rope_base).to(key_values.device)
    angles = positions / shape.position_scale * frequencies
    cos, sin = angles.cos().to(key_values.dtype), angles.sin().to(key_values.dtype)
    rotated = key_values.clone()
    rotated[:, 0::2] = apply_rotary_pos_emb(key_values[:, 0::2], cos, sin)
    return rotated
