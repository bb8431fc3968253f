"""Muon that orthogonalises in bfloat16 on a GPU and in float32 on a CPU.

torch.optim.Muon always takes bfloat16, which CPUs without bfloat16 arithmetic run some hundred times slower, and
orthogonalises one matrix at a time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch

# Coefficients of the quintic iteration (Jordan et al. 2024, "Muon").
_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonalise(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Brings the singular values of each matrix `[count, rows, columns]` near 1 (Newton-Schulz iteration)."""
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = (matrices if wide else matrices.mT).to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return (x if wide else x.mT).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised, for matrices; updates have the root mean square of AdamW's (0.2).

    Matrices of one shape are orthogonalised together.
    """

    def __init__(self, params: Iterable[torch.nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step; parameters without gradient are not changed."""
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for shape, parameters in by_shape.items():
                updates = []
                for parameter in parameters:
                    momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                    momentum.lerp_(parameter.grad, 1 - group["momentum"])
                    updates.append(parameter.grad.lerp(momentum, group["momentum"]))
                scale = -group["lr"] * 0.2 * max(shape) ** 0.5
                for parameter, update in zip(parameters, orthogonalise(torch.stack(updates)), strict=True):
                    parameter.add_(update, alpha=scale)
