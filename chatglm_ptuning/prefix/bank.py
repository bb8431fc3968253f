"""Folded prefixes of one base, by their names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

TRAINABLE_PREFIX = "default"
"""The name of the trainable prefix of a model with `pre_seq_len`, and the default name of a loaded one."""


@dataclass(frozen=True)
class LoadedPrefix:
    """A prefix for inference.

    Attributes:
        key_values: `[length, num_layers * 2, groups, kv_channels]`, float32 unless its bank has another dtype.
        heads: parameters of the linear head that was trained beside it, by their full names.
        trained: False if it was saved untrained.
    """

    key_values: torch.Tensor
    heads: Mapping[str, torch.Tensor]
    trained: bool = True


class PrefixBank:
    """Prefixes by name, on the CPU. Copies on the device of the computation are made on first use and kept.

    Args:
        dtype: in which keys and values are kept.
        memory: bound on the bytes of keys and values, device copies included. Above it, the least recently used
            prefixes are removed, except the one in use. None keeps all.

    Attributes:
        versions: a number for every name, including the trainable prefix. It grows with new keys and values, so that
            caches filled under earlier ones are refused.
        evictions: how many prefixes were removed because of the bound.
    """

    def __init__(self, dtype: torch.dtype = torch.float32, memory: int | None = None) -> None:
        self.versions: dict[str, int] = {}
        self.evictions = 0
        self._dtype, self._memory = dtype, memory
        self._prefixes: dict[str, LoadedPrefix] = {}
        self._copies: dict[tuple[str, torch.device, torch.dtype], torch.Tensor] = {}
        self._uses: dict[str, None] = {}  # names, the most recently used last

    def __contains__(self, name: str) -> bool:
        return name in self._prefixes

    def __getitem__(self, name: str) -> LoadedPrefix:
        return self._prefixes[name]

    @property
    def names(self) -> list[str]:
        """Names in the order of loading."""
        return list(self._prefixes)

    @property
    def memory_used(self) -> int:
        """Bytes of keys and values, with the copies."""
        kept = [prefix.key_values for prefix in self._prefixes.values()]
        return sum({part.data_ptr(): part.nbytes for part in (*kept, *self._copies.values())}.values())

    def add(self, name: str, prefix: LoadedPrefix) -> None:
        """Adds or replaces a prefix."""
        self.remove(name)
        heads = {key: value.detach().to("cpu", torch.float32) for key, value in prefix.heads.items()}
        key_values = prefix.key_values.detach().to("cpu", self._dtype)
        # Laid out as for use in attention, which then needs no copy on a CPU.
        key_values = key_values.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)
        self._prefixes[name] = replace(prefix, key_values=key_values, heads=heads)
        self.mark_changed(name)
        self._use(name)

    def mark_changed(self, name: str) -> None:
        """Records that the keys and values of `name` have changed."""
        self.versions[name] = max(self.versions.values(), default=0) + 1

    def remove(self, name: str) -> None:
        """Removes a prefix, if it exists, and frees its copies."""
        self._prefixes.pop(name, None)
        self._uses.pop(name, None)
        self._copies = {key: copy for key, copy in self._copies.items() if key[0] != name}

    def key_values(self, name: str, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """The prefix for use in attention, `[num_layers * 2, groups, length, kv_channels]`."""
        key = (name, device, dtype)
        if key not in self._copies:
            self._copies[key] = self._prefixes[name].key_values.to(device, dtype).permute(1, 2, 0, 3).contiguous()
        self._use(name)
        return self._copies[key]

    def _use(self, name: str) -> None:
        """Records a use, and keeps within the bound."""
        self._uses.pop(name, None)
        self._uses[name] = None
        while self._memory is not None and len(self._uses) > 1 and self.memory_used > self._memory:
            self.remove(next(iter(self._uses)))
            self.evictions += 1
