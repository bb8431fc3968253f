"""The prefixes of one batch, as an argument of a forward pass or a generation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch.nn.functional import dropout, pad
from transformers.cache_utils import Cache

PrefixSelection = str | None | tuple[str | None, ...]
"""A prefix's name for all rows, None for the plain base, or one of these per batch row."""


@dataclass(frozen=True, eq=False)
class PrefixBatch:
    """Keys and values in front of the rows of a batch, with what else belongs to their prefixes.

    `PrefixBatch()` is the plain base, for any number of rows.

    Attributes:
        key_values: for layer `l` the keys `[prefixes, groups, length, kv_channels]` as entry `2 * l` and the values as
            entry `2 * l + 1`, each on the device of its layer. Prefixes that are shorter than the longest are padded in
            front. Empty if no row has a prefix.
        rows: of the batch; None if it serves any number of rows alike.
        index: the prefix of each row, int64 `[rows]`; None if one prefix serves all rows, or every row has an entry.
        lengths: virtual tokens of each row; a single entry if `rows` is None.
        mask: `[rows, length]`, False on the slots that a row with a shorter prefix leaves empty; None if all are used.
        owner: name and version of each row's prefix, by which a cache knows what it was filled under.
        heads: parameters of the linear head that was loaded with the prefix, by their full names; empty if none was.
    """

    key_values: tuple[torch.Tensor, ...] = ()
    rows: int | None = None
    index: torch.Tensor | None = None
    lengths: tuple[int, ...] = (0,)
    mask: torch.Tensor | None = None
    owner: tuple[tuple[str | None, int], ...] = ((None, 0),)
    heads: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Number of prefix slots in front of every row; 0 for the plain base."""
        return self.key_values[0].shape[2] if self.key_values else 0

    @property
    def names(self) -> list[str]:
        """The names of the prefixes in use, each once."""
        return list(dict.fromkeys(name for name, _ in self.owner if name is not None))

    def layer(self, number: int, rows: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Keys and values of a layer, each `[rows, groups, length, kv_channels]`; None for the plain base."""
        if not self.key_values:
            return None, None
        pair = self.key_values[2 * number : 2 * number + 2]
        if self.index is None:
            keys, values = (entry.expand(rows, -1, -1, -1) for entry in pair)
        else:
            keys, values = (entry.index_select(0, self.index.to(entry.device)) for entry in pair)
        return keys, values

    def mask_for(self, rows: int, device: torch.device) -> torch.Tensor:
        """Which slots each row sees, `[rows, length]`, bool."""
        if self.mask is None:
            return torch.ones(rows, self.length, dtype=torch.bool, device=device)
        return self.mask.to(device)

    def check_rows(self, rows: int) -> None:
        """Checks that the batch is for so many rows.

        Raises:
            ValueError: if it is for another number.
        """
        if self.rows not in (None, rows):
            raise ValueError(f"There is a prefix for each of {self.rows} rows, but the batch has {rows}.")

    def for_rows(self, rows: int) -> PrefixBatch:
        """The batch for a multiple of its rows, in which those of one row follow each other (beams).

        Raises:
            ValueError: if it is no multiple.
        """
        if self.rows in (None, rows):
            return self
        if rows % self.rows:
            self.check_rows(rows)
        places = torch.arange(self.rows).repeat_interleave(rows // self.rows)
        return replace(self.select(places.tolist()), owner=self.owner)

    def select(self, places: Sequence[int]) -> PrefixBatch:
        """The batch for some of its rows, in the given order."""
        if self.rows is None:
            return self
        chosen = None if self.index is None else torch.tensor(places, device=self.index.device)
        return replace(
            self,
            rows=len(places),
            index=None if chosen is None else self.index[chosen],
            lengths=tuple(self.lengths[place] for place in places),
            mask=None if self.mask is None else self.mask[chosen],
            owner=tuple(self.owner[place] for place in places),
        )

    def spread(self, devices: Sequence[torch.device]) -> PrefixBatch:
        """The batch for layers on several devices, given that of each layer."""
        return replace(self, key_values=tuple(entry.to(devices[i // 2]) for i, entry in enumerate(self.key_values)))

    def claim(self, cache: Cache) -> None:
        """Marks a cache as filled under these prefixes; refuses one that was filled under others.

        Raises:
            ValueError: if the cached tokens have seen another prefix.
        """
        if torch.compiler.is_compiling():
            return
        before = getattr(cache, "prefix_owner", self.owner)
        if before != self.owner and int(cache.get_seq_length()) > 0:
            now, then = _spell(self.owner), _spell(before)
            other = f"the prefix {then}, the one in use now is {now}" if then != now else f"earlier values of {now}"
            raise ValueError(
                f"This cache was filled under {other}: cached keys and values belong to one prefix. Start with an "
                "empty cache."
            )
        cache.prefix_owner = self.owner


PrefixArgument = PrefixBatch | str | Sequence[str | None] | None
"""What `forward` and `generate` take as `prefix`: a batch, a name, or a name or None per row; None: the selected."""


class RowDropout(NamedTuple):
    """Dropout on one of the prefixes, drawn anew for each of so many rows (as in the official code)."""

    name: str
    rate: float
    rows: int


def assemble(
    selection: PrefixSelection,
    prefixes: Mapping[str, torch.Tensor],
    versions: Mapping[str, int],
    heads: Mapping[str, torch.Tensor],
    row_dropout: RowDropout | None = None,
) -> PrefixBatch:
    """Makes a batch of prefixes by their names.

    Args:
        prefixes: each selected one, `[num_layers * 2, groups, length, kv_channels]`.
        versions: of the prefixes; 0 where there is none.
    """
    names = selection if isinstance(selection, tuple) else (selection,)
    rows = len(names) if isinstance(selection, tuple) else None
    owner = tuple((name, versions.get(name, 0)) for name in names)
    if not prefixes:
        return PrefixBatch(rows=rows, lengths=(0,) * len(names), owner=owner)
    used = list(prefixes)
    device = prefixes[used[0]].device
    lengths = tuple(prefixes[name].shape[2] if name is not None else 0 for name in names)
    length = max(lengths)
    index = mask = None
    if rows is not None:
        index = torch.tensor([used.index(name) if name is not None else 0 for name in names], device=device)
        if min(lengths) < length:
            mask = torch.arange(length, device=device) >= length - torch.tensor(lengths, device=device)[:, None]
    stacked = _stack(list(prefixes.values()), length)
    if row_dropout is not None and row_dropout.name in used:
        stacked = _drop(stacked, index, used.index(row_dropout.name), row_dropout)
        index = None  # every row has an entry now
    return PrefixBatch(stacked.unbind(0), rows, index, lengths, mask, owner, heads)


def _stack(prefixes: Sequence[torch.Tensor], length: int) -> torch.Tensor:
    """Prefixes `[num_layers * 2, groups, ..., kv_channels]` -> `[num_layers * 2, prefixes, groups, length, ...]`."""
    if len(prefixes) == 1:
        return prefixes[0].unsqueeze(1)
    return torch.stack([pad(prefix, (0, 0, length - prefix.shape[2], 0)) for prefix in prefixes], dim=1)


def _drop(stacked: torch.Tensor, index: torch.Tensor | None, place: int, row_dropout: RowDropout) -> torch.Tensor:
    """Stacked prefixes -> one for each row, `[num_layers * 2, rows, ...]`, with dropout on the prefix at `place`."""
    if index is None:
        return dropout(stacked.expand(-1, row_dropout.rows, -1, -1, -1), row_dropout.rate)
    of_rows = stacked.index_select(1, index)
    dropped = (index == place)[:, None, None, None]
    return torch.where(dropped, dropout(of_rows, row_dropout.rate), of_rows)


def _spell(owner: tuple[tuple[str | None, int], ...]) -> str:
    names = [repr(name) for name, _ in owner]
    return names[0] if len(names) == 1 else f"[{', '.join(names)}]"
