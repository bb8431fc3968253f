"""RMSNorm whose backward pass on a CPU is a few operations, for a frozen weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm, with its own backward pass where torch has no kernel for it: on a CPU.

    torch composes the norm there of many operations, whose backward pass takes about five times as long, and which
    keep several tensors as large as the input.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """States `[..., hidden_size]` -> the same shape and dtype."""
        trains_input = torch.is_grad_enabled() and x.requires_grad and not self.weight.requires_grad
        if trains_input and x.device.type == "cpu" and not torch.compiler.is_compiling():
            return _FrozenRMSNorm.apply(x, self.weight, self.eps)
        return super().forward(x)


class _FrozenRMSNorm(torch.autograd.Function):
    """`x / rms(x) * weight`, computed in float32; keeps its input and one number for each position."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x.float() * weight).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors
        states, grad_normed = x.float(), grad.float() * weight
        along = torch.linalg.vecdot(grad_normed, states)[..., None]
        along.mul_(scale.pow(3)).div_(-x.shape[-1])
        return grad_normed.mul_(scale).addcmul_(states, along).to(x.dtype), None, None
