"""Attention over sequences that are packed into one row, without padding: each sees its prefix and itself.

`padded_attention` works with every attention implementation, and is the reference for the two faster ways: one call
for each length on a CPU, and one kernel for sequences of different lengths on a GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn

from chatglm_ptuning.model.attention_by_length import Run, attention_by_length, folded_heads
from chatglm_ptuning.model.attention_mask import causal_mask_with_prefix
from chatglm_ptuning.model.placement import on_device

if TYPE_CHECKING:
    from chatglm_ptuning.model.configuration_chatglm import ChatGLMConfig
    from chatglm_ptuning.prefix.batch import PrefixBatch

_OLDEST_GPU_WITH_VARLEN = (8, 0)
"""CUDA compute capability from which on torch's kernel for sequences of different lengths works."""


@dataclass(frozen=True, eq=False)
class PackedSequences:
    """Where the sequences of a packed row are; derived from their lengths on the host, without waiting for a GPU.

    Attributes:
        lengths: number of tokens of each sequence, in the order of the row.
        prefix: of the sequences, one row for each.
        config: with the attention implementation.
        inputs_embeds: `[1, tokens, ...]`; only its device and dtype are read.
        filling: tokens behind the sequences, whose results are not used. They make the number of all tokens one of few,
            for which there are kernels and blocks of memory already.
    """

    lengths: tuple[int, ...]
    prefix: PrefixBatch
    config: ChatGLMConfig
    inputs_embeds: torch.Tensor
    filling: int = 0

    def __post_init__(self) -> None:
        rows, tokens = self.inputs_embeds.shape[:2]
        if rows != 1 or sum(self.segments) != tokens or min(self.lengths, default=0) < 1:
            raise ValueError(
                f"sequence_lengths {list(self.lengths)} must be positive and add up to the tokens of a single row; the "
                f"batch has {rows} rows of {tokens} tokens."
            )

    @property
    def segments(self) -> tuple[int, ...]:
        """Tokens of each sequence, and of the filling, which is one more sequence without a prefix."""
        return (*self.lengths, self.filling) if self.filling else self.lengths

    @cached_property
    def position_ids(self) -> torch.Tensor:
        """0, 1, 2, ... in each sequence, `[1, tokens]`."""
        return self._put(torch.cat([torch.arange(length) for length in self.segments])[None])

    @cached_property
    def prefix_lengths(self) -> tuple[int, ...]:
        """Virtual tokens in front of each of `segments`."""
        own = self.prefix.lengths if self.prefix.rows is not None else (self.prefix.length,) * len(self.lengths)
        return (*own, 0) if self.filling else own

    @cached_property
    def key_lengths(self) -> tuple[int, ...]:
        """Keys that belong to each of `segments`: its prefix and its tokens."""
        return tuple(map(sum, zip(self.prefix_lengths, self.segments, strict=True)))

    @cached_property
    def key_index(self) -> torch.Tensor:
        """Places of the keys of all sequences in [prefixes of all rows, one after the other; tokens], `[keys]`."""
        slots, tokens = self.prefix.length, torch.arange(sum(self.segments)) + self.prefix.length * len(self.lengths)
        places = []
        for row, (own, length) in enumerate(zip(tokens.split(self.segments), self.prefix_lengths, strict=True)):
            places += [torch.arange((row + 1) * slots - length, (row + 1) * slots), own]
        return self._put(torch.cat(places))

    @cached_property
    def starts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Cumulative lengths of queries and of keys, int32 `[sequences + 1]`."""
        return tuple(
            self._put(functional.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(torch.int32))
            for lengths in (self.segments, self.key_lengths)
        )

    @cached_property
    def runs(self) -> list[Run]:
        """Neighbours of equal lengths."""
        shapes = itertools.groupby(zip(self.segments, self.key_lengths, strict=True))
        folded = folded_heads(self.config.num_attention_heads, self.config.num_key_value_heads)
        return [Run(len(list(equal)), *shape, folded, self.inputs_embeds) for shape, equal in shapes]

    @cached_property
    def padded_index(self) -> torch.Tensor:
        """Places of the tokens in rows that are padded on the right to the longest sequence, `[tokens]`."""
        return self._put(_padded_places(self.lengths))

    @cached_property
    def padded_mask(self) -> Any:
        """The mask of the attention implementation for the padded rows."""
        real = _real_tokens(self.lengths)
        embeds = self.inputs_embeds.new_empty(()).expand(*real.shape, 1)
        return causal_mask_with_prefix(self.config, embeds, self._put(real), None, None, self.prefix)

    def _put(self, tensor: torch.Tensor) -> torch.Tensor:
        return on_device(tensor, self.inputs_embeds.device)


def packed_attention(
    attention: Callable[..., tuple[torch.Tensor, Any]],
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_key: torch.Tensor | None,
    prefix_value: torch.Tensor | None,
    packed: PackedSequences,
    **kwargs: Any,
) -> torch.Tensor:
    """Attention of the sequences of a packed row, each to its prefix and to its own tokens so far.

    Args:
        attention: the attention implementation, as in transformers' attention interface.
        module: the attention layer.
        query: `[1, heads, tokens, kv_channels]`.
        key: `[1, groups, tokens, kv_channels]`, likewise `value`.
        prefix_key: `[sequences, groups, pre_seq_len, kv_channels]`, likewise `prefix_value`; None for no prefix.
        kwargs: for the attention implementation: `dropout`, `scaling`.

    Returns:
        `[1, tokens, heads, kv_channels]`.
    """
    fast = packed.config._attn_implementation == "sdpa" and not kwargs["dropout"]
    has_varlen_kernel = fast and _has_varlen_kernel(query)
    if not has_varlen_kernel and not (fast and query.device.type == "cpu"):
        return padded_attention(attention, module, query, key, value, prefix_key, prefix_value, packed, **kwargs)
    key, value = (_behind_prefix(*pair, packed) for pair in ((prefix_key, key), (prefix_value, value)))
    if not has_varlen_kernel:
        return attention_by_length(query, key, value, packed.runs, kwargs["scaling"])
    queries_start, keys_start = packed.starts
    return varlen_attn(
        query[0].transpose(0, 1),
        key,
        value,
        queries_start,
        keys_start,
        max(packed.segments),
        max(packed.key_lengths),
        scale=kwargs["scaling"],
        window_size=(-1, 0),  # causal, and aligned to the last key
        enable_gqa=True,
    )[None]


def padded_attention(
    attention: Callable[..., tuple[torch.Tensor, Any]],
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_key: torch.Tensor | None,
    prefix_value: torch.Tensor | None,
    packed: PackedSequences,
    **kwargs: Any,
) -> torch.Tensor:
    """As `packed_attention`, through the attention implementation on rows that are padded for it."""
    query, key, value = (
        _pad(states[0].transpose(0, 1)[: sum(packed.lengths)], packed.lengths, packed.padded_index).transpose(1, 2)
        for states in (query, key, value)
    )
    if prefix_key is not None:
        key, value = torch.cat((prefix_key.to(key), key), dim=2), torch.cat((prefix_value.to(value), value), dim=2)
    output, _ = attention(module, query, key, value, packed.padded_mask, **kwargs)
    output = output.flatten(0, 1).index_select(0, packed.padded_index)
    return functional.pad(output, (0, 0, 0, 0, 0, packed.filling))[None]


def _behind_prefix(prefix: torch.Tensor | None, states: torch.Tensor, packed: PackedSequences) -> torch.Tensor:
    """Keys or values of all sequences, each behind its prefix: `[keys, groups, kv_channels]`."""
    tokens = states[0].transpose(0, 1)
    if prefix is None:
        return tokens
    virtual = prefix.to(states).transpose(1, 2).flatten(0, 1)
    return torch.cat((virtual, tokens)).index_select(0, packed.key_index)


def _has_varlen_kernel(states: torch.Tensor) -> bool:
    if states.device.type != "cuda" or states.dtype not in (torch.float16, torch.bfloat16):
        return False
    return torch.cuda.get_device_capability(states.device) >= _OLDEST_GPU_WITH_VARLEN


def last_tokens(sequence_lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    """Places of the last tokens of the sequences in their packed row, `[sequences]`."""
    return on_device(torch.tensor(sequence_lengths).cumsum(0) - 1, device)


def unpack(states: torch.Tensor, sequence_lengths: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """A packed row `[1, tokens, ...]` as rows `[sequences, longest, ...]`, padded on the right, and their mask."""
    real = _real_tokens(sequence_lengths)
    index = on_device(_padded_places(sequence_lengths), states.device)
    return _pad(states[0], sequence_lengths, index), on_device(real, states.device)


def _pad(tokens: torch.Tensor, lengths: Sequence[int], index: torch.Tensor) -> torch.Tensor:
    rows, longest = len(lengths), max(lengths)
    padded = tokens.new_zeros(rows * longest, *tokens.shape[1:]).index_copy(0, index, tokens)
    return padded.unflatten(0, (rows, longest))


def _padded_places(lengths: Sequence[int]) -> torch.Tensor:
    """The places of the tokens in rows that are padded to the longest, `[tokens]`, on the CPU."""
    return torch.cat([torch.arange(length) + row * max(lengths) for row, length in enumerate(lengths)])


def _real_tokens(lengths: Sequence[int]) -> torch.Tensor:
    """`[sequences, longest]`, on the CPU: False on the padding."""
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
