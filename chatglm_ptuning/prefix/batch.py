"""The prefixes of one batch, as an argument of a forward pass or a generation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch.nn.functional import pad
from transformers.cache_utils import Cache

from chatglm_ptuning.prefix.bank import TRAINABLE_PREFIX
from chatglm_ptuning.prefix.dropout import dropout

PrefixSelection = str | None | tuple[str | None, ...]
"""A prefix's name for all rows, None for the plain base, or one of these per batch row. `a+b` names two prefixes, one
behind the other."""
JOINT = "+"
"""Between the names of prefixes that are used one behind the other."""


def names_in(selection: PrefixSelection) -> list[str]:
    """The names of the single prefixes in a selection, each once: of `a+b` both."""
    wholes = selection if isinstance(selection, tuple) else (selection,)
    return list(dict.fromkeys(name for whole in wholes if whole is not None for name in whole.split(JOINT)))


def check_name(name: str) -> None:
    """Checks the name under which a prefix is loaded.

    Raises:
        ValueError: if it would read as the names of several prefixes.
    """
    if JOINT in name:
        raise ValueError(
            f"A prefix cannot be loaded as {name!r}: {JOINT!r} stands between the names of prefixes that are used "
            "together. Load it under another name."
        )


@dataclass(frozen=True, eq=False)
class PrefixBatch:
    """The prefixes of the rows of a batch: keys, values, lengths, mask and head.

    `PrefixBatch()` is the plain base, for any number of rows.

    Attributes:
        key_values: for layer `l` the keys `[prefixes, groups, length, kv_channels]` as entry `2 * l` and the values as
            entry `2 * l + 1`, each on the device of its layer. Shorter prefixes are padded in front to the length of
            the longest. Empty if no row has a prefix.
        rows: number of rows; None if the batch fits any number of rows.
        index: the prefix of each row, int64 `[rows]`; None if all rows have one prefix, or every row has its own entry.
        lengths: virtual tokens of each row; a single entry if `rows` is None.
        mask: `[rows, length]`, False on the padding of shorter prefixes; None without padding.
        owner: name and version of each row's prefix; a cache records them.
        heads: parameters of the linear head that was loaded with the prefix, by their full names.
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
        """Number of slots in front of every row; 0 for the plain base."""
        return self.key_values[0].shape[2] if self.key_values else 0

    @property
    def names(self) -> list[str]:
        """The names of the prefixes, each once."""
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
        """The slots that each row sees, `[rows, length]`, bool."""
        if self.mask is None:
            return torch.ones(rows, self.length, dtype=torch.bool, device=device)
        return self.mask.to(device)

    def check_rows(self, rows: int) -> None:
        """Checks the number of rows.

        Raises:
            ValueError: if the batch is for another number.
        """
        if self.rows not in (None, rows):
            raise ValueError(f"There is a prefix for each of {self.rows} rows, but the batch has {rows}.")

    def by_row(self) -> PrefixBatch:
        """The batch with an entry of its own for every row, which many forward passes use without a copy."""
        if self.index is None:
            return self
        entries = tuple(entry.index_select(0, self.index.to(entry.device)) for entry in self.key_values)
        return replace(self, key_values=entries, index=None)

    def for_rows(self, rows: int) -> PrefixBatch:
        """The batch for a multiple of its rows; the copies of one row (its beams) follow each other.

        Raises:
            ValueError: if `rows` is not a multiple.
        """
        if self.rows in (None, rows):
            return self
        if rows % self.rows:
            self.check_rows(rows)
        places = torch.arange(self.rows).repeat_interleave(rows // self.rows)
        return replace(self.select(places.tolist()), owner=self.owner)

    def select(self, places: Sequence[int]) -> PrefixBatch:
        """The batch of some of its rows, in the given order."""
        if self.rows is None:
            return self
        chosen = torch.tensor(places, device=self.key_values[0].device if self.key_values else None)
        entries = chosen if self.index is None else self.index[chosen]
        return replace(
            self,
            rows=len(places),
            index=entries if self.key_values else None,
            lengths=tuple(self.lengths[place] for place in places),
            mask=None if self.mask is None else self.mask[chosen],
            owner=tuple(self.owner[place] for place in places),
        )

    def spread(self, devices: Sequence[torch.device]) -> PrefixBatch:
        """The batch for layers on several devices, one device per layer."""
        return replace(self, key_values=tuple(entry.to(devices[i // 2]) for i, entry in enumerate(self.key_values)))

    def claim(self, cache: Cache) -> None:
        """Records in a cache that it was filled under these prefixes.

        Raises:
            ValueError: if it was filled under other prefixes.
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
"""The argument `prefix` of `forward` and `generate`: a batch, a name, a name or None per row; None: the selected."""


def assemble(
    selection: PrefixSelection,
    prefixes: Mapping[str, torch.Tensor],
    versions: Mapping[str, int],
    heads: Mapping[str, torch.Tensor],
    dropout_rate: float = 0.0,
    dropout_rows: int = 0,
) -> PrefixBatch:
    """Makes the batch of the selected prefixes.

    Args:
        prefixes: every selected prefix by its name, `[num_layers * 2, groups, length, kv_channels]`.
        versions: versions of the prefixes; 0 for a name without one.
        dropout_rate: dropout on the trainable prefix, drawn for each of `dropout_rows` (as in the official code).
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
    if dropout_rate and TRAINABLE_PREFIX in used:
        # Every row gets its own entry: stacked prefixes become `[num_layers * 2, rows, ...]`.
        if index is None:
            stacked = dropout(stacked.expand(-1, dropout_rows, -1, -1, -1), dropout_rate)
        else:
            stacked = stacked.index_select(1, index)
            dropped = (index == used.index(TRAINABLE_PREFIX))[:, None, None, None]
            stacked = torch.where(dropped, dropout(stacked, dropout_rate), stacked)
        index = None
    return PrefixBatch(stacked.unbind(0), rows, index, lengths, mask, owner, heads)


def _stack(prefixes: Sequence[torch.Tensor], length: int) -> torch.Tensor:
    """Prefixes `[num_layers * 2, groups, ..., kv_channels]` -> `[num_layers * 2, prefixes, groups, length, ...]`."""
    if len(prefixes) == 1:
        return prefixes[0].unsqueeze(1)
    return torch.stack([pad(prefix, (0, 0, length - prefix.shape[2], 0)) for prefix in prefixes], dim=1)


def _spell(owner: tuple[tuple[str | None, int], ...]) -> str:
    names = [repr(name) for name, _ in owner]
    return names[0] if len(names) == 1 else f"[{', '.join(names)}]"
