"""Modules that know whether anything has changed the random numbers that they were created with."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_NUMBERS_PER_PARAMETER = 64


class FirstValues(nn.Module):
    """Remembers its first values, so that what nobody has trained or loaded is told from what somebody has."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._untrained: torch.Tensor | None = None

    def mark_untrained(self) -> None:
        """Remembers the present values as those that nobody has trained or set yet."""
        self._untrained = self._sample()

    def mark_set(self) -> None:
        """Lets the present values count as chosen, whatever they are."""
        self._untrained = None

    @property
    def has_first_values(self) -> bool:
        """Whether `mark_untrained` has been called, so since the parameters were drawn at random."""
        return self._untrained is not None

    @property
    def is_untrained(self) -> bool:
        """Whether the parameters still are the random numbers that they were created with."""
        if self._untrained is None:
            return False
        now = self._sample()
        return now is not None and torch.equal(now, self._untrained)

    @torch.no_grad()
    def _sample(self) -> torch.Tensor | None:
        """Some numbers of every parameter; any training step, copy or load changes them."""
        numbers = []
        for parameter in self.parameters():
            # Nothing can be said of a meta tensor, or of one that DeepSpeed has partitioned away.
            if parameter.is_meta or parameter.numel() == 0:
                return None
            step = max(1, parameter.numel() // _NUMBERS_PER_PARAMETER)
            numbers.append(parameter.detach().reshape(-1)[::step].float().cpu())
        return torch.cat(numbers)
