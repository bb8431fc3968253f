"""The forward passes of the engine: over parts of prompts, and over one token of each row.

Decoding on a GPU is bound by the launches of its kernels. There each size of a decoding step is recorded as a CUDA
graph once, and then replayed (`graphs.py`); its inputs are buffers at fixed addresses. Elsewhere the step is called.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from chatglm_ptuning.model.frozen_linear import apply_linear
from chatglm_ptuning.model.placement import layer_devices
from chatglm_ptuning.model.zero3 import is_partitioned
from chatglm_ptuning.prefix.batch import PrefixBatch
from chatglm_ptuning.serving.engine.graphs import Step
from chatglm_ptuning.serving.engine.rows import Row
from chatglm_ptuning.serving.engine.slots import SlotCache

if TYPE_CHECKING:
    from chatglm_ptuning.model.modeling_chatglm import ChatGLMForConditionalGeneration


def obstacle(model: ChatGLMForConditionalGeneration) -> str | None:
    """Why the engine cannot run a base; None if it can."""
    attention = model.config._attn_implementation
    if attention not in ("sdpa", "eager"):
        return f"The engine needs attn_implementation 'sdpa' or 'eager', the base has {attention!r}."
    if is_partitioned(model.parameters()):
        return "The engine needs the whole base; ZeRO-3 has partitioned it among processes."
    return None


def make_cache(model: ChatGLMForConditionalGeneration, slots: int, slot_tokens: int) -> SlotCache:
    """The cache for a base, on its devices."""
    dtype = model.transformer.embedding.word_embeddings.weight.dtype
    devices = layer_devices(model.transformer.encoder.layers)
    return SlotCache(model.config.prefix_shape, slots, slot_tokens, model.device, dtype, devices)


class Sizes:
    """Sizes of a decoding step: numbers of rows and of places, each rounded up to one of a few.

    Args:
        slots, slot_tokens: the largest sizes.
        is_static: whether every size has a price (a recorded graph): then they are powers of 2 from 256 places on, and
            rows in steps that grow. Otherwise rows are not rounded, and places to multiples of 64.
    """

    def __init__(self, slots: int, slot_tokens: int, is_static: bool) -> None:
        if is_static:
            rows, places = [1, 2, 4, *range(8, 64, 8), *range(64, slots, 32)], [2**power for power in range(8, 31)]
        else:
            rows, places = range(1, slots), range(64, slot_tokens, 64)
        self.rows = [*(size for size in rows if size < slots), slots]
        self.places = [*(size for size in places if size < slot_tokens), slot_tokens]

    def of(self, rows: int, places: int) -> tuple[int, int]:
        """The smallest sizes that hold so many rows and places."""
        return next(size for size in self.rows if size >= rows), next(size for size in self.places if size >= places)


class Passes:
    """Runs the base over rows of the cache.

    Args:
        model: the base.
        cache: with the rows' entries.
        sizes: of decoding steps.
        record: makes a step that gives the same logits in less time (`GraphRecorder`), or returns the step itself.
    """

    def __init__(
        self, model: ChatGLMForConditionalGeneration, cache: SlotCache, sizes: Sizes, record: Callable[[Step], Step]
    ) -> None:
        self._model, self._cache, self._sizes, self._record = model, cache, sizes, record
        self._device, self._dtype = cache.device, cache.dtype
        self._slots = torch.arange(cache.slot_tokens, device=self._device)
        # Token ids, positions and places of one token per row.
        self._inputs = torch.zeros(3, cache.slots, 1, dtype=torch.int64, device=self._device)
        self._steps: dict[tuple[int, int], Step] = {}

    def prefill(self, rows: Sequence[Row], counts: Sequence[int]) -> torch.Tensor:
        """Computes the next tokens of prompts.

        Args:
            rows: of neighbouring slots.
            counts: number of tokens of each row.

        Returns:
            Logits after the last of each row's tokens, float32 `[rows, vocabulary]`.
        """
        inputs = np.zeros((3, len(rows), max(counts)), np.int64)
        inputs[2] = self._cache.slot_tokens - 1
        for number, (row, count) in enumerate(zip(rows, counts, strict=True)):
            inputs[0, number, :count] = row.ids[row.computed : row.computed + count]
            positions = np.arange(row.computed, row.computed + count)
            inputs[1, number, :count] = positions
            inputs[2, number, :count] = row.prefix.length + positions
        last = [number * max(counts) + count - 1 for number, count in enumerate(counts)]
        longest = max(row.used + count for row, count in zip(rows, counts, strict=True))
        logits = self._forward(
            torch.from_numpy(inputs).to(self._device), rows[0].place, longest, torch.tensor(last, device=self._device)
        )
        for row, count in zip(rows, counts, strict=True):
            row.computed += count
        return logits.float()

    def decode(self, rows: Sequence[Row]) -> torch.Tensor:
        """Computes the last known token of each row, in the slots from 0 on; logits float32 `[rows, vocabulary]`.

        A step of more rows than there are computes something for the slots behind, in the places that are never used.
        """
        size = self._sizes.of(len(rows), max(row.used for row in rows) + 1)
        inputs = np.zeros((3, size[0], 1), np.int64)
        inputs[2] = self._cache.slot_tokens - 1
        for number, row in enumerate(rows):
            inputs[:, number, 0] = row.ids[row.computed], row.computed, row.used
        self._inputs[:, : size[0]].copy_(torch.from_numpy(inputs))
        if size not in self._steps:
            this = weakref.proxy(self)  # a circle of references would keep the cache's memory
            self._steps[size] = self._record(lambda: this._forward(this._inputs[:, : size[0]], 0, size[1]))
        logits = self._steps[size]()
        for row in rows:
            row.computed += 1
        return logits[: len(rows)].float()

    def _forward(
        self, inputs: torch.Tensor, first: int, longest: int, kept: torch.Tensor | None = None
    ) -> torch.Tensor:
        ids, positions, places = inputs
        self._cache.select(first, places, longest)
        hidden = self._slots[:longest] > places[:, None, :, None]
        mask = torch.zeros(hidden.shape, dtype=self._dtype, device=self._device)
        mask.masked_fill_(hidden, torch.finfo(self._dtype).min)
        states = self._model.transformer(
            input_ids=ids,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=self._cache,
            prefix=PrefixBatch(),
            kept_positions=kept,
        ).last_hidden_state
        return apply_linear(self._model.transformer.output_layer, states.flatten(0, 1))
