"""Attention masks and positions of tokens behind a prefix."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.nn.attention.flex_attention import BlockMask
from transformers.cache_utils import Cache
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    causal_mask_function,
    create_causal_mask,
    find_packed_sequence_indices,
)

if TYPE_CHECKING:
    from chatglm_ptuning.model.configuration_chatglm import ChatGLMConfig
    from chatglm_ptuning.prefix.batch import PrefixBatch


def positions_from_mask(
    attention_mask: torch.Tensor | None, inputs_embeds: torch.Tensor, past_key_values: Cache | None
) -> torch.Tensor:
    """Default positions `[batch or 1, seq_len]`: 0, 1, 2, ... on the real tokens, 0 on pads before them.

    Raises:
        ValueError: if a 2-D `attention_mask` does not cover the cached tokens and the new ones.
    """
    seq_len = inputs_embeds.shape[1]
    cached = past_key_values.get_seq_length() if past_key_values is not None else 0
    slots = torch.arange(seq_len, device=inputs_embeds.device) + cached
    if attention_mask is None or attention_mask.ndim != 2:
        return slots[None]
    if not isinstance(cached, torch.Tensor) and attention_mask.shape[1] < cached + seq_len:
        raise ValueError(
            f"attention_mask has {attention_mask.shape[1]} columns; it must cover the {cached} cached tokens and the "
            f"{seq_len} new ones."
        )
    positions = (attention_mask.to(inputs_embeds.device).long().cumsum(-1) - 1).clamp(min=0)
    return positions[:, slots]


def causal_mask_with_prefix(
    config: ChatGLMConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | BlockMask | None,
    past_key_values: Cache | None,
    position_ids: torch.Tensor | None,
    prefix: PrefixBatch,
) -> torch.Tensor | BlockMask | None:
    """The mask for the selected attention implementation, over the prefix, the cached tokens and the new ones.

    Every real query sees the whole prefix, and the real tokens up to itself. In rows whose prefix is shorter than the
    longest of the batch, the missing slots are masked.

    Args:
        inputs_embeds: `[batch, seq_len, ...]`; only its sizes, dtype and device are read.
        attention_mask: `[batch, cached + seq_len]` over the tokens; or a 4-D mask over tokens, or over prefix and
            tokens.
        position_ids: `[batch or 1, seq_len]`. Without a mask and a cache, positions that start again at 0 mark rows
            packed from several sequences: each sequence sees the prefix and itself.

    Raises:
        ValueError: if the attention implementation does not support a prefix.
    """
    if not prefix.length:
        return create_causal_mask(
            config=config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
    batch, seq_len = inputs_embeds.shape[:2]
    if past_key_values is not None:
        cached = past_key_values.get_query_offset()
        token_slots, _ = past_key_values.get_mask_sizes(seq_len, 0)
    else:
        cached, token_slots = 0, seq_len
    if attention_mask is not None and attention_mask.ndim == 4:
        return _widen_ready_mask(attention_mask, token_slots, prefix)
    implementation = config._attn_implementation
    if implementation.startswith("paged"):
        raise ValueError(f"The attention implementation {implementation!r} does not support a prefix.")
    make_mask = ALL_MASK_ATTENTION_FUNCTIONS._global_mapping.get(implementation)
    if make_mask is None:  # a custom attention implementation that takes no mask
        return None
    mask_function = causal_mask_function
    if attention_mask is None and past_key_values is None and position_ids is not None:
        packed = find_packed_sequence_indices(position_ids.expand(batch, -1))
        if packed is not None and "flash" in implementation:
            raise ValueError(
                f"Rows packed from several sequences with a prefix are not supported by {implementation!r}."
            )
        if packed is not None:
            mask_function = _packed_mask_function(packed, prefix.length)
    padding = None
    if attention_mask is not None or prefix.mask is not None:
        if attention_mask is None:
            attention_mask = torch.ones(batch, token_slots, dtype=torch.bool, device=inputs_embeds.device)
        padding = torch.cat(
            (prefix.mask_for(batch, inputs_embeds.device), attention_mask.to(inputs_embeds.device, torch.bool)), dim=1
        )
    return make_mask(
        batch_size=batch,
        q_length=seq_len,
        kv_length=prefix.length + token_slots,
        q_offset=prefix.length + cached,
        kv_offset=0,
        mask_function=mask_function,
        attention_mask=padding,
        allow_is_causal_skip=not (getattr(past_key_values, "is_compileable", False) and seq_len == 1),
        dtype=inputs_embeds.dtype,
        config=config,
        use_vmap=False,
        device=inputs_embeds.device,
    )


def _packed_mask_function(sequence_of: torch.Tensor, prefix_length: int) -> Callable[..., torch.Tensor]:
    """A mask function over prefix and tokens; `sequence_of` `[batch, seq_len]` is the sequence number of each token."""

    def sees(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        own = sequence_of[batch, query - prefix_length] == sequence_of[batch, (key - prefix_length).clamp(min=0)]
        return (key < prefix_length) | (own & (key <= query))

    return sees


def _widen_ready_mask(
    mask: torch.Tensor | BlockMask, token_slots: int, prefix: PrefixBatch
) -> torch.Tensor | BlockMask:
    if mask.shape[-1] == prefix.length + token_slots:
        return mask
    if isinstance(mask, BlockMask):
        raise ValueError(
            f"With a prefix of {prefix.length} a BlockMask must cover {prefix.length + token_slots} keys, "
            f"it covers {mask.shape[-1]}."
        )
    visible = prefix.mask_for(mask.shape[0], mask.device)[:, None, None, :].expand(-1, mask.shape[1], mask.shape[2], -1)
    if mask.dtype != torch.bool:
        hidden = torch.full((), torch.finfo(mask.dtype).min, dtype=mask.dtype, device=mask.device)
        visible = torch.where(visible, torch.zeros_like(hidden), hidden)
    return torch.cat((visible, mask), dim=-1)
