"""Many folded prefixes beside one base, and the one, or one per batch row, that is in use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

PrefixSelection = str | None | tuple[str | None, ...]
"""A prefix's name for all rows, None for the plain base, or one of these per batch row."""


@dataclass(frozen=True)
class ActivePrefix:
    """The prefix of one forward pass.

    Attributes:
        key_values: `[num_layers * 2, batch, groups, length, kv_channels]`, the batch axis may be an expanded view; or,
            where layers are on several devices, the `num_layers * 2` entries of it, each where its layer is.
        mask: `[batch, length]`, False on the slots that a row with a shorter prefix leaves empty; None if all are used.
    """

    key_values: torch.Tensor | tuple[torch.Tensor, ...]
    mask: torch.Tensor | None = None

    @property
    def length(self) -> int:
        """Number of prefix slots in front of every row."""
        return self.key_values[0].shape[2]

    def mask_for(self, batch: int, device: torch.device) -> torch.Tensor:
        """Which slots each row sees, `[batch, length]`, bool."""
        if self.mask is None:
            return torch.ones(batch, self.length, dtype=torch.bool, device=device)
        return self.mask.to(device)


class PrefixBank:
    """Folded prefixes by name: keys and values alone, float32, `[length, num_layers * 2, groups, kv_channels]`.

    Copies in the dtype and on the device of the computation are made on first use and kept.
    """

    def __init__(self) -> None:
        self._prefixes: dict[str, torch.Tensor] = {}
        self._untrained: set[str] = set()
        self._copies: dict[tuple[str, torch.device, torch.dtype], torch.Tensor] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._prefixes

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._prefixes[name]

    @property
    def names(self) -> list[str]:
        """Names in the order of loading."""
        return list(self._prefixes)

    def add(self, name: str, key_values: torch.Tensor, trained: bool = True) -> None:
        """Adds or replaces a prefix.

        Args:
            trained: False for one that was saved with its random first values.
        """
        self.remove(name)
        self._prefixes[name] = key_values.detach().to(torch.float32).cpu()
        if not trained:
            self._untrained.add(name)

    def remove(self, name: str) -> None:
        """Removes a prefix, if it is there, and frees its copies."""
        self._prefixes.pop(name, None)
        self._untrained.discard(name)
        self._copies = {key: copy for key, copy in self._copies.items() if key[0] != name}

    def is_untrained(self, name: str) -> bool:
        """Whether the prefix was saved with its random first values."""
        return name in self._untrained

    def get(self, name: str, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """The prefix for use in attention, `[num_layers * 2, groups, length, kv_channels]`."""
        key = (name, device, dtype)
        if key not in self._copies:
            self._copies[key] = self._prefixes[name].to(device, dtype).permute(1, 2, 0, 3).contiguous()
        return self._copies[key]


def stack_rows(names: Sequence[str | None], prefixes: Mapping[str, torch.Tensor]) -> ActivePrefix | None:
    """One prefix per batch row, shorter ones padded in front; None if no row has one.

    Args:
        names: for each row a key of `prefixes`, or None.
        prefixes: each `[num_layers * 2, groups, length, kv_channels]`.
    """
    used = list(prefixes)
    if not used:
        return None
    device = prefixes[used[0]].device
    length = max(prefix.shape[2] for prefix in prefixes.values())
    stack = torch.stack([pad(prefix, (0, 0, length - prefix.shape[2], 0)) for prefix in prefixes.values()], dim=1)
    index = torch.tensor([used.index(name) if name is not None else 0 for name in names], device=device)
    lengths = [prefixes[name].shape[2] if name is not None else 0 for name in names]
    mask = torch.arange(length, device=device) >= length - torch.tensor(lengths, device=device)[:, None]
    return ActivePrefix(stack.index_select(1, index), mask if min(lengths) < length else None)
