"""Dropout on the numbers of a prefix."""

from __future__ import annotations

import torch
from torch.nn import functional

_VALUES = 2**16


def dropout(states: torch.Tensor, rate: float) -> torch.Tensor:
    """Zeros instead of a random share of the numbers; the others are scaled, so that their mean stays the same.

    On a CPU torch draws one number at a time, which takes 2 % of a training step on a small base model. Here a draw of
    64 bits decides about four numbers, with the rate rounded to a multiple of 2**-16.
    """
    if states.device.type != "cpu":
        return functional.dropout(states, rate)
    dropped = round(rate * _VALUES)
    draws = torch.empty(-(-states.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    kept = draws[: states.numel()].view(states.shape) >= dropped - _VALUES // 2
    return states * kept.to(states.dtype).mul_(_VALUES / max(_VALUES - dropped, 1))
