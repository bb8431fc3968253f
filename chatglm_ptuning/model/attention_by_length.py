"""Attention of packed sequences on a CPU, by torch's flash kernel on pieces whose shapes suit it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_MOST_TOKENS_OF_A_BLOCK = 128
"""A block is not multiplied by the keys that come after it; smaller ones save little more, and need more calls."""


@dataclass(frozen=True, eq=False)
class Run:
    """Neighbouring sequences of equal lengths, which are computed together.

    Attributes:
        count: of the sequences.
        tokens: of each.
        keys: of each: its virtual tokens, then its tokens.
        folded: query heads that the kernel sees as one, `folded_heads`.
        like: a tensor with dtype and device of the masks.
    """

    count: int
    tokens: int
    keys: int
    folded: int
    like: torch.Tensor

    @cached_property
    def blocks(self) -> list[tuple[slice, slice, torch.Tensor]]:
        """The queries of a sequence in blocks of about equal size.

        For each block its queries, the keys up to its last token, and what is added to its scores `[queries, keys]`:
        each token sees the prefix and the tokens so far.
        """
        number = -(-self.tokens // _MOST_TOKENS_OF_A_BLOCK)
        size = -(-self.tokens // number)
        mask = self.like.new_full((size, self.keys), -torch.inf).triu_(self.keys - size + 1)
        mask = mask.repeat_interleave(self.folded, dim=0)
        blocks = []
        for start in range(0, self.tokens, size):
            end = min(start + size, self.tokens)
            queries, keys = slice(start * self.folded, end * self.folded), self.keys - self.tokens + end
            blocks.append((queries, slice(keys), mask[queries.start - queries.stop :, self.keys - keys :]))
        return blocks


def folded_heads(heads: int, groups: int) -> int:
    """How many query heads of a group the kernel gets as one, with their queries next to each other.

    So it multiplies larger matrices. There is work for every thread: the backward pass divides it by heads.
    """
    together = heads // groups
    dividing = (number for number in range(together, 1, -1) if together % number == 0)
    return next((number for number in dividing if heads // number >= torch.get_num_threads()), 1)


def attention_by_length(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, runs: Sequence[Run], scaling: float
) -> torch.Tensor:
    """Attention of every sequence to its keys, which end with those of its tokens so far.

    Args:
        query: `[1, heads, tokens, kv_channels]`, the sequences one after the other.
        key: `[keys, groups, kv_channels]`, likewise, and `value`.
        runs: of the sequences in their order.
        scaling: of the scores.

    Returns:
        `[1, tokens, heads, kv_channels]`.
    """
    return _AttentionByLength.apply(query.to(value), key.to(value), value, runs, scaling)


class _AttentionByLength(torch.autograd.Function):
    """The kernel of `scaled_dot_product_attention`, called for each block of each run.

    This is one node of the autograd graph. With a node for each part of a row, autograd would fill a tensor of the
    whole row with zeros for each.
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, runs: Sequence[Run], scaling: float
    ) -> torch.Tensor:
        queries, keys, values = _fold(query[0], runs[0].folded), key.transpose(0, 1), value.transpose(0, 1)
        output = torch.empty_like(queries)
        results = []
        for run, own_query, own_key in _places(runs):
            states, known, content, target = (
                _of_run(whole, place, run)
                for whole, place in ((queries, own_query), (keys, own_key), (values, own_key), (output, own_query))
            )
            for block, seen, mask in run.blocks:
                attended, log_sum = _flash(
                    states[:, :, block], known[:, :, seen], content[:, :, seen], attn_mask=mask, scale=scaling
                )
                target[:, :, block] = attended
                results.append(log_sum)
        ctx.save_for_backward(queries, keys, values, output, *results)
        ctx.runs, ctx.scaling = runs, scaling
        return _unfold(output, runs[0].folded).transpose(0, 1)[None]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        queries, keys, values, output, *log_sums = ctx.saved_tensors
        wholes = [_fold(grad[0].transpose(0, 1), ctx.runs[0].folded), queries, keys, values, output]
        grads = [torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(values)]
        log_sum = iter(log_sums)
        for run, own_query, own_key in _places(ctx.runs):
            places = (own_query, own_query, own_key, own_key, own_query)
            own_grad, states, known, content, attended = (
                _of_run(whole, place, run) for whole, place in zip(wholes, places, strict=True)
            )
            of_query, of_key, of_value = (
                _of_run(whole, place, run) for whole, place in zip(grads, places[1:4], strict=True)
            )
            for block, seen, mask in run.blocks:
                block_grads = _flash_backward(
                    own_grad[:, :, block],
                    states[:, :, block],
                    known[:, :, seen],
                    content[:, :, seen],
                    attended[:, :, block],
                    next(log_sum),
                    dropout_p=0.0,
                    is_causal=False,
                    attn_mask=mask,
                    scale=ctx.scaling,
                )
                of_query[:, :, block] = block_grads[0]
                of_key[:, :, seen] += block_grads[1]
                of_value[:, :, seen] += block_grads[2]
        of_query, of_key, of_value = grads
        of_query = _unfold(of_query, ctx.runs[0].folded)[None]
        return of_query, of_key.transpose(0, 1), of_value.transpose(0, 1), None, None


def _fold(states: torch.Tensor, folded: int) -> torch.Tensor:
    """States `[heads, tokens, kv_channels]` -> `[heads / folded, tokens * folded, kv_channels]`, by token and head."""
    return states.unflatten(0, (-1, folded)).transpose(1, 2).flatten(1, 2)


def _unfold(states: torch.Tensor, folded: int) -> torch.Tensor:
    return states.unflatten(1, (-1, folded)).transpose(1, 2).flatten(0, 1)


def _places(runs: Sequence[Run]) -> Iterator[tuple[Run, slice, slice]]:
    """The runs, each with the places of its queries and of its keys in the row."""
    query = key = 0
    for run in runs:
        last_query, last_key = query + run.count * run.tokens * run.folded, key + run.count * run.keys
        yield run, slice(query, last_query), slice(key, last_key)
        query, key = last_query, last_key


def _of_run(states: torch.Tensor, places: slice, run: Run) -> torch.Tensor:
    """States `[heads, places, kv_channels]` of a row -> those of a run, `[count, heads, places, kv_channels]`."""
    return states[:, places].unflatten(1, (run.count, -1)).transpose(0, 1)
