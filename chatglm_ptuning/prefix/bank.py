"""Many folded prefixes beside one base, and the one, or one per batch row, that is in use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

PrefixSelection = str | None | tuple[str | None, ...]
"""A prefix's name for all rows, None for the plain base, or one of these per batch row."""


@dataclass(frozen=True)
class ActivePrefix:
    """The prefix of one forward pass.

    Attributes:
        key_values: `[num_layers * 2, batch, groups, length, kv_channels]`; the batch axis may be an expanded view.
        mask: `[batch, length]`, False on the slots that a row with a shorter prefix leaves empty; None if all are used.
    """

    key_values: torch.Tensor
    mask: torch.Tensor | None = None

    @property
    def length(self) -> int:
        """Number of prefix slots in front of every row."""
        return self.key_values.shape[3]

    def mask_for(self, batch: int, device: torch.device) -> torch.Tensor:
        """Which slots each row sees, `[batch, length]`, bool."""
        if self.mask is None:
            return torch.ones(batch, self.length, dtype=torch.bool, device=device)
        return self.mask.to(device)


def repeat_rows(selection: Sequence[str | None], batch: int) -> list[str | None]:
    """One entry per row of the batch; beams of one row follow one another, as in `generate`.

    Raises:
        ValueError: if the batch is no multiple of the number of entries.
    """
    if batch % len(selection):
        raise ValueError(f"set_prefix named a prefix for each of {len(selection)} rows, but the batch has {batch}.")
    return [name for name in selection for _ in range(batch // len(selection))]


class PrefixBank:
    """Folded prefixes by name: keys and values alone, float32, `[length, num_layers * 2, groups, kv_channels]`.

    Copies in the dtype and on the device of the computation are made on first use and kept.
    """

    def __init__(self) -> None:
        self._prefixes: dict[str, torch.Tensor] = {}
        self._copies: dict[tuple, torch.Tensor] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._prefixes

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._prefixes[name]

    @property
    def names(self) -> list[str]:
        """Names in the order of loading."""
        return list(self._prefixes)

    def add(self, name: str, key_values: torch.Tensor) -> None:
        """Adds or replaces a prefix."""
        self._prefixes[name] = key_values.detach().to(torch.float32).cpu()
        self._forget_copies(name)

    def remove(self, name: str) -> None:
        """Removes a prefix and frees its copies."""
        del self._prefixes[name]
        self._forget_copies(name)

    def _forget_copies(self, name: str) -> None:
        self._copies = {key: copy for key, copy in self._copies.items() if name not in key[0]}

    def one(self, name: str, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """The prefix for all rows, `[num_layers * 2, 1, groups, length, kv_channels]`."""
        key = ((name,), device, dtype)
        if key not in self._copies:
            self._copies[key] = self._prefixes[name].to(device, dtype).permute(1, 2, 0, 3).unsqueeze(1).contiguous()
        return self._copies[key]

    def rows(self, names: Sequence[str | None], device: torch.device, dtype: torch.dtype) -> ActivePrefix | None:
        """One prefix per row, shorter ones padded in front; None if no row has one."""
        used = sorted({name for name in names if name is not None})
        if not used:
            return None
        length = max(self._prefixes[name].shape[0] for name in used)
        stack = torch.stack([self._padded(name, length, device, dtype) for name in used], dim=1)
        index = torch.tensor([used.index(name) if name is not None else 0 for name in names], device=device)
        lengths = [self._prefixes[name].shape[0] if name is not None else 0 for name in names]
        mask = torch.arange(length, device=device) >= length - torch.tensor(lengths, device=device)[:, None]
        return ActivePrefix(stack.index_select(1, index), None if bool(mask.all()) else mask)

    def _padded(self, name: str, length: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        one = self.one(name, device, dtype)[:, 0]
        return torch.nn.functional.pad(one, (0, 0, length - one.shape[2], 0))
