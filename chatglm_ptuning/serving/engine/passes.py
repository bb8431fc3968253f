"""The forward passes of the engine: over parts of prompts, and over one token of each row.

On a GPU, decoding steps and short prompts are bound by the launches of their kernels. There each size of a pass that
is used again is recorded as a CUDA graph, and then replayed (`graphs.py`); its inputs are buffers at fixed addresses.
Elsewhere the pass is called.
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
_FEWEST_TOKENS, _MOST_RECORDED_TOKENS = 16, 1024
"""Of a recorded pass over prompts. A larger one takes longer to compute than to launch."""


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
    """Sizes of passes: numbers of rows and of places, each rounded up to one of a few.

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
        self.is_static = is_static
        self.rows = [*(size for size in rows if size < slots), slots]
        self.places = [*(size for size in places if size < slot_tokens), slot_tokens]

    def of(self, rows: int, places: int) -> tuple[int, int]:
        """The smallest sizes of a decoding step that hold so many rows and places."""
        return next(size for size in self.rows if size >= rows), next(size for size in self.places if size >= places)

    def of_prompts(self, rows: int, tokens: int, places: int) -> tuple[int, int, int] | None:
        """The sizes of a pass over prompts: powers of 2 for rows and tokens; None if it is not to be rounded."""
        many = _next_power(rows), max(_next_power(tokens), _FEWEST_TOKENS)
        if not self.is_static or many[0] * many[1] > _MOST_RECORDED_TOKENS:
            return None
        return *many, self.of(1, places)[1]


def _next_power(number: int) -> int:
    return 1 << (number - 1).bit_length()


@dataclass
class _Sized:
    """A pass of one size.

    Attributes:
        inputs: token ids, positions and places, `[3, rows, tokens]`.
        ends: the slot of each row, and the place of its last token in `[rows * tokens]`, `[2, rows]`; None for a
            decoding step.
        uses: how often it ran.
    """

    inputs: torch.Tensor
    ends: torch.Tensor | None
    run: Step
    uses: int = 0


class Passes:
    """Runs the base over rows of the cache.

    Args:
        model: the base.
        cache: with the rows' entries.
        sizes: of passes; those of static sizes are recorded.
        record: makes a step that gives the same results in less time (`GraphRecorder`).
    """

    def __init__(
        self, model: ChatGLMForConditionalGeneration, cache: SlotCache, sizes: Sizes, record: Callable[[Step], Step]
    ) -> None:
        self._model, self._cache, self._sizes, self._record = model, cache, sizes, record
        self._device, self._dtype = cache.device, cache.dtype
        self._slots = torch.arange(_aligned(cache.slot_tokens), device=self._device)
        self._steps: dict[tuple[int, int, int, bool], _Sized] = {}

    def prefill(self, rows: Sequence[Row], counts: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes the next tokens of prompts.

        Args:
            rows: of different slots.
            counts: number of tokens of each row.

        Returns:
            Logits after the last of each row's tokens, `[rows, vocabulary]`, and what is `most_probable`.
        """
        exact = len(rows), max(counts), max(row.used + count for row, count in zip(rows, counts, strict=True))
        size = self._sizes.of_prompts(*exact)
        number, tokens, longest = size or exact
        inputs = self._empty_inputs(number, tokens)
        ends = np.full((2, number), [[rows[0].place], [0]])  # rows that fill up write to the first one's spare place
        for place, (row, count) in enumerate(zip(rows, counts, strict=True)):
            positions = np.arange(row.computed, row.computed + count)
            inputs[:, place, :count] = row.ids[positions], positions, row.prefix.length + positions
            ends[:, place] = row.place, place * tokens + count - 1
        logits, best = self._run(inputs, ends, longest, is_exact=size is None)
        for row, count in zip(rows, counts, strict=True):
            row.computed += count
        return logits[: len(rows)], best[:, : len(rows)]

    def decode(self, rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes the last known token of each row, in the slots from 0 on; returns the same as `prefill`.

        A step of more rows than there are computes something for the slots behind, without a trace in them.
        """
        count, used = len(rows), [row.used for row in rows]
        number, longest = self._sizes.of(count, max(used) + 1)
        inputs = self._empty_inputs(number, 1)
        inputs[:, :count, 0] = [row.ids[row.computed] for row in rows], [row.computed for row in rows], used
        logits, best = self._run(inputs, None, longest, is_exact=not self._sizes.is_static)
        for row in rows:
            row.computed += 1
        return logits[:count], best[:, :count]

    def _empty_inputs(self, rows: int, tokens: int) -> np.ndarray:
        inputs = np.zeros((3, rows, tokens), np.int64)
        inputs[2] = self._cache.spare
        return inputs

    def _run(
        self, inputs: np.ndarray, ends: np.ndarray | None, longest: int, is_exact: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs a pass; unless its size is exact, the recorded one of its size."""
        moved = on_device(torch.from_numpy(inputs), self._device)
        moved_ends = None if ends is None else on_device(torch.from_numpy(ends), self._device)
        if is_exact:
            return self._forward(moved, moved_ends, longest)
        size = *inputs.shape[1:], longest, ends is None
        if size not in self._steps:
            this = weakref.proxy(self)  # a circle of references would keep the cache's memory
            self._steps[size] = _Sized(moved, moved_ends, lambda: this._forward(moved, moved_ends, longest))
        step = self._steps[size]
        step.inputs.copy_(moved)
        if ends is not None:
            step.ends.copy_(moved_ends)
        step.uses += 1
        if step.uses == _USE_TO_RECORD:
            step.run = self._record(step.run)
        return step.run()

    def _forward(
        self, inputs: torch.Tensor, ends: torch.Tensor | None, longest: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ids, positions, places = inputs.unbind()
        slots, kept = (None, None) if ends is None else ends.unbind()
        self._cache.select(places, longest, slots)
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
