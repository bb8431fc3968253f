"""Which of a model's prefixes is in use, and what one forward pass gets of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import dropout
from transformers.cache_utils import Cache

from chatglm_ptuning.model.prefix_encoder import PrefixEncoder
from chatglm_ptuning.prefix.bank import ActivePrefix, PrefixBank, PrefixSelection, stack_rows

TRAINABLE_PREFIX = "default"
"""The name under which the trainable prefix of a model with `pre_seq_len` is selected."""


class PrefixSwitch:
    """The loaded prefixes of one model and the selected one; the trainable one stays in the model's own parameters.

    Args:
        selection: what is in use at first.
    """

    def __init__(self, selection: PrefixSelection = None) -> None:
        self.bank = PrefixBank()
        self.selection = selection
        self.heads: dict[str, dict[str, torch.Tensor]] = {}
        """For each prefix that came with a head, the head's parameters by their names in the model."""
        self.base_fingerprint: dict[str, Any] | None = None
        """Of a base that is partitioned among processes, once it is known."""
        self._versions: dict[str, int] = {}
        self._rows_may_repeat = False

    @property
    def selected_names(self) -> list[str]:
        """The names in use, each once."""
        selection = self.selection if isinstance(self.selection, tuple) else (self.selection,)
        return list(dict.fromkeys(name for name in selection if name is not None))

    def mark_changed(self, name: str) -> None:
        """Notes that `name` has other keys and values from now on, so that caches filled before are refused."""
        self._versions[name] = max(self._versions.values(), default=0) + 1

    @contextmanager
    def repeating_rows(self) -> Iterator[None]:
        """Inside, a list of names also serves a multiple of its rows, those of one entry next to each other (beams)."""
        before, self._rows_may_repeat = self._rows_may_repeat, True
        try:
            yield
        finally:
            self._rows_may_repeat = before

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside, the plain base is in use, whatever is selected; selection and heads are not touched."""
        before, self.selection = self.selection, None
        try:
            yield
        finally:
            self.selection = before

    def active(
        self,
        encoder: PrefixEncoder | None,
        batch: int,
        device: torch.device,
        dtype: torch.dtype,
        dropout_rate: float = 0.0,
        layer_devices: Sequence[torch.device] | None = None,
    ) -> ActivePrefix | None:
        """The selected prefix for a batch of so many rows, in the activations' dtype; None for the plain base.

        Args:
            encoder: the trainable prefix, if the model has one.
            dropout_rate: of the trainable prefix; every row draws its own, as in the official code.
            layer_devices: where each layer computes, if not all of them on `device`. A prefix is so small that every
                device keeps the whole of it, so that no step copies anything between devices.

        Raises:
            ValueError: if the selection is a list and the batch has another number of rows.
        """
        if self.selection is None:
            return None
        on = {
            place: self._active_on(encoder, batch, place, dtype, dropout_rate)
            for place in dict.fromkeys(layer_devices or (device,))
        }
        first = next(iter(on.values()))
        if len(on) == 1 or first is None:
            return first
        entries = tuple(
            on[place].key_values[2 * layer + i] for layer, place in enumerate(layer_devices) for i in (0, 1)
        )
        return ActivePrefix(entries, first.mask)

    def _active_on(
        self, encoder: PrefixEncoder | None, batch: int, device: torch.device, dtype: torch.dtype, dropout_rate: float
    ) -> ActivePrefix | None:
        if isinstance(self.selection, str):
            one = self._key_values(self.selection, encoder, device, dtype)
            rows = one.unsqueeze(1).expand(-1, batch, -1, -1, -1)
            if encoder is not None and self.selection == TRAINABLE_PREFIX:
                rows = dropout(rows, dropout_rate)
            return ActivePrefix(rows)
        names = self._names_of_rows(batch)
        active = stack_rows(
            names, {name: self._key_values(name, encoder, device, dtype) for name in self.selected_names}
        )
        if active is None or encoder is None or not dropout_rate:
            return active
        trainable = torch.tensor([name == TRAINABLE_PREFIX for name in names], device=device)[:, None, None, None]
        key_values = torch.where(trainable, dropout(active.key_values, dropout_rate), active.key_values)
        return ActivePrefix(key_values, active.mask)

    def _key_values(
        self, name: str, encoder: PrefixEncoder | None, device: torch.device, dtype: torch.dtype
    ) -> torch.Tensor:
        if encoder is not None and name == TRAINABLE_PREFIX:
            return encoder.key_values().to(device, dtype).permute(1, 2, 0, 3)
        return self.bank.get(name, device, dtype)

    def _names_of_rows(self, batch: int) -> list[str | None]:
        names = self.selection
        if batch != len(names) and (batch % len(names) or not self._rows_may_repeat):
            raise ValueError(f"set_prefix named a prefix for each of {len(names)} rows, but the batch has {batch}.")
        return [name for name in names for _ in range(batch // len(names))]

    def claim_cache(self, cache: Cache) -> None:
        """Marks a cache as filled under the selected prefix; refuses one that was filled under another.

        Raises:
            ValueError: if the cached tokens have seen another prefix.
        """
        if torch.compiler.is_compiling():
            return
        selection = self.selection if isinstance(self.selection, tuple) else (self.selection,)
        owner = tuple((name, self._versions.get(name, 0)) for name in selection)
        before = getattr(cache, "prefix_owner", owner)
        if before != owner and int(cache.get_seq_length()) > 0:
            now, then = _spell(owner), _spell(before)
            other = f"the prefix {then}, the one in use now is {now}" if then != now else f"earlier values of {now}"
            raise ValueError(
                f"This cache was filled under {other}: cached keys and values belong to one prefix. Start with an "
                "empty cache."
            )
        cache.prefix_owner = owner


def _spell(owner: tuple[tuple[str | None, int], ...]) -> str:
    names = [repr(name) for name, _ in owner]
    return names[0] if len(names) == 1 else f"[{', '.join(names)}]"
