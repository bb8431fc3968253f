"""The forward passes of the engine: over parts of prompts, and over one token of each row.

Decoding on a GPU is bound by the launches of its kernels. There each size of a decoding step that is used
again is recorded as a CUDA graph, and then replayed (`graphs.py`); its inputs are buffers at fixed addresses.
Elsewhere the step is called.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from chatglm_ptuning.model.frozen_linear import apply_linear
from chatglm_ptuning.model.placement import layer_devices, on_device
from chatglm_ptuning.model.zero3 import is_partitioned
from chatglm_ptuning.prefix.batch import PrefixBatch
from chatglm_ptuning.serving.engine.graphs import Step
from chatglm_ptuning.serving.engine.rows import Row
from chatglm_ptuning.serving.engine.sampling import most_probable
from chatglm_ptuning.serving.engine.slots import SlotCache

if TYPE_CHECKING:
    from chatglm_ptuning.model.modeling_chatglm import ChatGLMForConditionalGeneration

_ATTENTION_ON_GPU = (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
_PLACES_TOGETHER = 8
"""16 bytes in half precision."""
_USE_TO_RECORD = 2
"""A recording takes as long as some steps; a size that is used once is not recorded."""


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


@dataclass
class _Sized:
    """A decoding step of one size: its buffer of token ids, positions and places, `[3, rows, 1]`, and its uses."""

    inputs: torch.Tensor
    run: Step
    uses: int = 0


class Passes:
    """Runs the base over rows of the cache.

    Args:
        model: the base.
        cache: with the rows' entries.
        sizes: of decoding steps.
        record: makes a step that gives the same results in less time (`GraphRecorder`), or returns the step itself.
    """

    def __init__(
        self, model: ChatGLMForConditionalGeneration, cache: SlotCache, sizes: Sizes, record: Callable[[Step], Step]
    ) -> None:
        self._model, self._cache, self._sizes, self._record = model, cache, sizes, record
        self._device, self._dtype = cache.device, cache.dtype
        self._slots = torch.arange(_aligned(cache.slot_tokens), device=self._device)
        self._steps: dict[tuple[int, int], _Sized] = {}

    def prefill(self, rows: Sequence[Row], counts: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes the next tokens of prompts.

        Args:
            rows: of neighbouring slots.
            counts: number of tokens of each row.

        Returns:
            Logits after the last of each row's tokens, `[rows, vocabulary]`, and what is `most_probable`.
        """
        inputs = np.zeros((3, len(rows), max(counts)), np.int64)
        inputs[2] = self._cache.spare
        for number, (row, count) in enumerate(zip(rows, counts, strict=True)):
            inputs[0, number, :count] = row.ids[row.computed : row.computed + count]
            positions = np.arange(row.computed, row.computed + count)
            inputs[1, number, :count] = positions
            inputs[2, number, :count] = row.prefix.length + positions
        last = torch.tensor([number * max(counts) + count - 1 for number, count in enumerate(counts)])
        longest = max(row.used + count for row, count in zip(rows, counts, strict=True))
        inputs, last = (on_device(one, self._device) for one in (torch.from_numpy(inputs), last))
        results = self._forward(inputs, rows[0].place, longest, last)
        for row, count in zip(rows, counts, strict=True):
            row.computed += count
        return results

    def decode(self, rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes the last known token of each row, in the slots from 0 on; returns the same as `prefill`.

        A step of more rows than there are computes something for the slots behind, without a trace in them.
        """
        count, used = len(rows), [row.used for row in rows]
        size = self._sizes.of(count, max(used) + 1)
        inputs = np.zeros((3, size[0], 1), np.int64)
        inputs[2] = self._cache.spare
        inputs[:, :count, 0] = [row.ids[row.computed] for row in rows], [row.computed for row in rows], used
        step = self._steps.get(size) or self._make_step(size)
        step.inputs.copy_(on_device(torch.from_numpy(inputs), self._device))
        step.uses += 1
        if step.uses == _USE_TO_RECORD:
            step.run = self._record(step.run)
        logits, best = step.run()
        for row in rows:
            row.computed += 1
        return logits[:count], best[:, :count]

    def _make_step(self, size: tuple[int, int]) -> _Sized:
        inputs = torch.zeros(3, size[0], 1, dtype=torch.int64, device=self._device)
        this = weakref.proxy(self)  # a circle of references would keep the cache's memory
        self._steps[size] = _Sized(inputs, lambda: this._forward(inputs, 0, size[1]))
        return self._steps[size]

    def _forward(
        self, inputs: torch.Tensor, first: int, longest: int, kept: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ids, positions, places = inputs.unbind()
        self._cache.select(first, places, longest)
        # A GPU's kernel takes a mask as it is if its rows begin at aligned addresses; otherwise each layer copies it.
        hidden = self._slots[: _aligned(longest)] > places[:, None, :, None]
        mask = torch.zeros(hidden.shape, dtype=self._dtype, device=self._device)
        mask.masked_fill_(hidden, torch.finfo(self._dtype).min)
        # cuDNN, which torch prefers on some GPUs, would take up to half a second for every new length of a prompt.
        with sdpa_kernel(_ATTENTION_ON_GPU) if self._device.type == "cuda" else nullcontext():
            states = self._model.transformer(
                input_ids=ids,
                position_ids=positions,
                attention_mask=mask[..., :longest],
                past_key_values=self._cache,
                prefix=PrefixBatch(),
                kept_positions=kept,
            ).last_hidden_state
        logits = apply_linear(self._model.transformer.output_layer, states.flatten(0, 1))
        return logits, most_probable(logits)


def _aligned(places: int) -> int:
    return -(-places // _PLACES_TOGETHER) * _PLACES_TOGETHER
