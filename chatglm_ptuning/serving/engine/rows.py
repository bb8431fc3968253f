"""Which request is in which slot."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from chatglm_ptuning.serving.engine.prefixes import RowPrefix
from chatglm_ptuning.serving.engine.request import Generation, SamplingSettings
from chatglm_ptuning.serving.engine.slots import SlotCache


@dataclass(eq=False)
class Request:
    """A request that has been accepted; `prompt` is int64 `[tokens]`."""

    prompt: np.ndarray
    settings: SamplingSettings
    prefix: RowPrefix
    generation: Generation


@dataclass(eq=False)
class Row:
    """The content of a slot: a running request, or what is left of one that ended.

    Attributes:
        request: None after its end. The row is then kept for prompts that begin alike.
        ids: prompt and answer, with room for the whole answer; `known` of them are known.
        computed: so many of them have entries in the slot.
        last_use: grows with every use of a row.
        admitted: when the request got the slot, by `time.monotonic()`.
    """

    place: int
    prefix: RowPrefix
    request: Request | None
    ids: np.ndarray
    known: int
    computed: int = 0
    last_use: int = 0
    admitted: float = field(default_factory=time.monotonic)
    random: random.Random = field(default_factory=random.Random)

    @property
    def used(self) -> int:
        """Places of the slot with entries."""
        return self.prefix.length + self.computed

    @property
    def known_ids(self) -> np.ndarray:
        """Ids of prompt and answer so far, int64."""
        return self.ids[: self.known]

    @property
    def generated(self) -> int:
        """Tokens of the answer so far."""
        return self.known - len(self.request.prompt)

    def append(self, token: int) -> None:
        """Adds a token to the answer."""
        self.ids[self.known] = token
        self.known += 1


class SlotTable:
    """Gives slots to requests, so that those of one kind are neighbours.

    Slots from 0 on hold requests that generate; then come requests whose prompts are being computed; then rows kept of
    ended requests, and free slots. A forward pass so takes its rows as a slice of the cache.

    Attributes:
        rows: the content of every slot.
        decoding: the number of requests that generate.
        running: the number of all requests that have slots.
        evictions: how many kept rows were overwritten.
    """

    def __init__(self, cache: SlotCache) -> None:
        self.cache = cache
        self.rows: list[Row | None] = [None] * cache.slots
        self.decoding = self.running = self.evictions = 0
        self._clock = itertools.count(1)

    @property
    def prefilling(self) -> list[Row]:
        """Rows whose prompts are being computed."""
        return self.rows[self.decoding : self.running]

    def admit(self, request: Request) -> Row:
        """Gives a request a slot; there must be one that no request has.

        Entries of the longest beginning that another row has under the same prefix are copied, or taken over from an
        ended request. Otherwise the prefix is copied into the slot.
        """
        source, shared = self._longest_beginning(request)
        if source is not None:
            source.last_use = next(self._clock)
        # If all of a kept row is the beginning of this prompt, such as the next turn of a chat, the row is not kept.
        taken_over = source is not None and source.request is None and source.computed == shared
        target = source if taken_over else self._least_used()
        if target is not None and target is not source:
            self.evictions += 1
            self.rows[target.place] = None
        place = self.running
        self._swap(place, target.place if target is not None else self._free())
        settings, length = request.settings, len(request.prompt)
        if source is None and request.prefix.length:
            self.cache.put_prefix(place, request.prefix.key_values)
        elif source is not None and source.place != place:
            self.cache.copy(source.place, place, request.prefix.length + shared)
        request.prefix = request.prefix.copied()
        ids = np.concatenate((request.prompt, np.zeros(settings.max_new_tokens, np.int64)))
        row = Row(place, request.prefix, request, ids, length, shared, random=random.Random(settings.seed))
        request.generation.cached_tokens = shared
        self.rows[place] = row
        self.running += 1
        return row

    def start_decoding(self, row: Row) -> None:
        """Moves a row whose prompt has been computed to those that generate."""
        self._swap(row.place, self.decoding)
        self.decoding += 1

    def release(self, row: Row, keep: bool = True) -> None:
        """Ends the request of a row.

        Args:
            keep: whether the row's entries may be shared with later prompts.
        """
        row.request, row.last_use = None, next(self._clock)
        if row.place < self.decoding:
            self.decoding -= 1
            self._swap(row.place, self.decoding)
        self.running -= 1
        self._swap(row.place, self.running)
        if not keep:
            self.cache.clear(row.place)
            self.rows[row.place] = None

    def share_prompt(self, source: Row) -> int:
        """Copies the entries of a prompt that has been computed to rows that still compute the same beginning.

        Returns:
            Number of tokens that need not be computed.
        """
        saved = 0
        for row in self.prefilling:
            shared = _shared_beginning(source, row.prefix, row.known_ids)
            if shared > row.computed:
                self.cache.copy(source.place, row.place, row.prefix.length + shared)
                row.request.generation.cached_tokens += shared - row.computed
                saved += shared - row.computed
                row.computed = shared
        return saved

    def _longest_beginning(self, request: Request) -> tuple[Row | None, int]:
        """The row that has most of a prompt's beginning, and how many tokens; None and 0 if no row has any."""
        best, shared = None, 0
        for row in self.rows:
            if row is not None and min(row.computed, len(request.prompt)) > shared:
                count = _shared_beginning(row, request.prefix, request.prompt)
                best, shared = (row, count) if count > shared else (best, shared)
        return best, shared

    def _free(self) -> int:
        return self.rows.index(None, self.running)

    def _least_used(self) -> Row | None:
        """The kept row to overwrite; None if a slot is free."""
        kept: Sequence[Row | None] = self.rows[self.running :]
        return None if None in kept else min(kept, key=lambda row: row.last_use)

    def _swap(self, one: int, other: int) -> None:
        if one == other:
            return
        rows = self.rows
        used = [row.used for row in (rows[one], rows[other]) if row is not None]
        self.cache.swap(one, other, max(used, default=0))
        rows[one], rows[other] = rows[other], rows[one]
        for place in (one, other):
            if rows[place] is not None:
                rows[place].place = place


def _shared_beginning(row: Row, prefix: RowPrefix, prompt: np.ndarray) -> int:
    """So many tokens of a prompt have entries in a row, under the same prefix. The last token is always computed."""
    count = min(row.computed, len(prompt) - 1)
    if row.prefix.key != prefix.key or not count:
        return 0
    differ = row.ids[:count] != prompt[:count]
    place = int(differ.argmax())
    return place if differ[place] else count
