"""Base classes of trained modules: they stay in float32, and record whether they were trained."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

_NUMBERS_PER_PARAMETER = 64


class Float32Module(nn.Module):
    """Moves with its model to another device, but keeps its dtype through `half()`, `bfloat16()` and `to(dtype)`."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Float32Module:
        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            changed = fn(tensor)
            return changed if changed.dtype == tensor.dtype else tensor.to(changed.device)

        return super()._apply(keep_dtype, recurse)


class FirstValues(nn.Module):
    """Remembers a sample of its random initial values, to tell an untrained module from a trained or loaded one."""

    _untrained: torch.Tensor | None = None

    def mark_untrained(self) -> None:
        """Records the present values as untrained."""
        self._untrained = self._sample()

    def mark_set(self) -> None:
        """Counts the present values as trained, whatever they are."""
        self._untrained = None

    @property
    def has_first_values(self) -> bool:
        """Whether the present values or earlier ones were recorded as untrained."""
        return self._untrained is not None

    @property
    def is_untrained(self) -> bool:
        """Whether the parameters still have the values that were recorded as untrained."""
        if self._untrained is None:
            return False
        now = self._sample()
        return now is not None and torch.equal(now, self._untrained)

    @torch.no_grad()
    def _sample(self) -> torch.Tensor | None:
        """Some numbers of every parameter; any training step, copy or load changes them."""
        numbers = []
        for parameter in self.parameters():
            # A meta tensor, or one that DeepSpeed has partitioned, has no values here.
            if parameter.is_meta or parameter.numel() == 0:
                return None
            step = max(1, parameter.numel() // _NUMBERS_PER_PARAMETER)
            numbers.append(parameter.detach().reshape(-1)[::step].float().cpu())
        return torch.cat(numbers)
