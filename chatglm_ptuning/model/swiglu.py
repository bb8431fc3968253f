"""SwiGLU that keeps its input alone for the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional


class SwiGLU(torch.autograd.Function):
    """`silu(gate) * up` of a fused tensor `[..., 2 * size]`, gate first.

    In front of a frozen linear layer, autograd would keep `silu(gate)` for nothing else than this product: half as
    much again as the fused tensor. Here it is computed again.
    """

    @staticmethod
    def forward(ctx: Any, fused: torch.Tensor) -> torch.Tensor:
        """The product, `[..., size]`."""
        ctx.save_for_backward(fused)
        gate, up = fused.chunk(2, dim=-1)
        return functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        """The gradient of the fused tensor."""
        (fused,) = ctx.saved_tensors
        gate, up = fused.chunk(2, dim=-1)
        grad_fused = torch.empty_like(fused)
        grad_gate, grad_up = grad_fused.chunk(2, dim=-1)
        torch.mul(grad, functional.silu(gate), out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return grad_fused
