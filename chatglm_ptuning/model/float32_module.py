"""Modules that stay in float32 whatever the type of the model around them becomes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


class Float32Module(nn.Module):
    """Follows its model to another device, but keeps its dtype through `half()`, `bfloat16()` and `to(dtype)`."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Float32Module:
        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            changed = fn(tensor)
            return changed if changed.dtype == tensor.dtype else tensor.to(changed.device)

        return super()._apply(keep_dtype, recurse)
