"""A cache of keys and values with one slot for each request, allocated once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache

from chatglm_ptuning.prefix.shape import PrefixShape


class SlotCache(Cache):
    """Keys and values of all slots. A slot has the entries of a request's prefix in front, and its tokens behind.

    Before a forward pass `select` says which slots its rows are and where their new entries go. `update` writes them
    there, so that nothing is concatenated. The caller gives masks and positions: these
    differ from the places in a slot by the length of the prefix.

    Behind the places of a slot there is one more, `spare`, which no pass sees. Rows and tokens that only fill up a
    batch write there.

    Args:
        shape: sizes of the base.
        slots: number of slots.
        slot_tokens: places of each slot.
        device: of the inputs.
        devices: of each layer; None if all are on `device`.

    Attributes:
        spare: the place for entries that nobody needs.
        is_spread: whether accelerate places the layers.
    """

    def __init__(
        self,
        shape: PrefixShape,
        slots: int,
        slot_tokens: int,
        device: torch.device,
        dtype: torch.dtype,
        devices: Sequence[torch.device] | None = None,
    ) -> None:
        super().__init__(layers=[])
        self.slots, self.slot_tokens, self.spare = slots, slot_tokens, slot_tokens
        self.device, self.dtype, self.is_spread = device, dtype, devices is not None
        places: dict[torch.device, list[int]] = {}
        for layer, one in enumerate(devices or [device] * shape.num_layers):
            places.setdefault(one, []).append(layer)
        size = (2, slots, shape.multi_query_group_num, slot_tokens + 1, shape.kv_channels)
        # Keys and values of the layers on each device, [layers, 2, slots, groups, places, kv_channels]. Places
        # without an entry are hidden by the mask, but must be finite numbers.
        self._entries = [torch.zeros((len(part), *size), device=one, dtype=dtype) for one, part in places.items()]
        self._places = list(places.values())
        entries = {
            layer: own.unbind(0)
            for part, whole in zip(self._places, self._entries, strict=True)
            for layer, own in zip(part, whole.unbind(0), strict=True)
        }
        self._layers = [entries[layer] for layer in range(shape.num_layers)]
        self._numbers = {whole.device: torch.arange(slots, device=whole.device) for whole in self._entries}

    def select(self, places: torch.Tensor, longest: int, slots: torch.Tensor | None = None) -> None:
        """Chooses the slots of the next forward pass.

        Args:
            places: where the new entries go, int64 `[rows, seq_len]`.
            longest: the pass sees the first places of each slot, this many.
            slots: of the rows, int64 `[rows]`; their entries are copied for the pass. None for the first slots, whose
                entries are seen as they are.
        """
        self._rows, self._longest, self._is_copied = len(places), longest, slots is not None
        self._index = {
            one: ((numbers if slots is None else slots.to(one))[: self._rows, None], slice(None), places.to(one))
            for one, numbers in self._numbers.items()
        }

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the entries of new tokens, `[rows, groups, seq_len, kv_channels]`, and returns the rows' entries."""
        index = self._index[self._layers[layer_idx][0].device]
        seen = []
        for entries, states in zip(self._layers[layer_idx], (key_states, value_states), strict=True):
            entries[index] = states.transpose(1, 2)
            own = entries[:, :, : self._longest]
            seen.append(own.index_select(0, index[0][:, 0]) if self._is_copied else own[: self._rows])
        return seen[0], seen[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0: the tokens of the rows differ, and the engine counts them."""
        return 0

    def put_prefix(self, slot: int, key_values: torch.Tensor) -> None:
        """Writes a prefix, `[num_layers * 2, groups, length, kv_channels]`, to the front of a slot."""
        length = key_values.shape[2]
        layers = key_values.unflatten(0, (-1, 2))
        for part, entries in zip(self._places, self._entries, strict=True):
            own = layers[part] if self.is_spread else layers
            entries[:, :, slot, :, :length] = own.to(entries.device)

    def copy(self, source: int, target: int, length: int) -> None:
        """Copies the first places of a slot to another slot."""
        for entries in self._entries:
            entries[:, :, target, :, :length] = entries[:, :, source, :, :length]

    def swap(self, one: int, other: int, length: int) -> None:
        """Exchanges the first places of two slots: those that either uses.

        A slot so keeps nothing of the longer one, which may hold numbers that are not finite.
        """
        kept = [entries[:, :, one, :, :length].clone() for entries in self._entries]
        self.copy(other, one, length)
        for entries, own in zip(self._entries, kept, strict=True):
            entries[:, :, other, :, :length] = own

    def clear(self, slot: int) -> None:
        """Fills a slot with zeros: it may have held numbers that are not finite."""
        for entries in self._entries:
            entries[:, :, slot] = 0

    def clear_all(self) -> None:
        """Fills all slots with zeros."""
        for entries in self._entries:
            entries.zero_()
