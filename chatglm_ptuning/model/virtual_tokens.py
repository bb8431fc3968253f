"""Prompt tuning: trained embeddings in front of the input, computed as the equivalent prefix."""

from __future__ import annotations

import weakref
from contextvars import Context

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from chatglm_ptuning.model.attention_mask import causal_mask_with_prefix, positions_from_mask
from chatglm_ptuning.model.trained_module import Float32Module
from chatglm_ptuning.prefix.batch import PrefixBatch
from chatglm_ptuning.prefix.rotation import rotate_keys


def key_values_before(base: PreTrainedModel, inputs_embeds: torch.Tensor) -> torch.Tensor:
    """The prefix that is equivalent to embeddings in front of the input, for tokens whose positions start at 0.

    With it, the model gives exactly the logits of the plain base with these embeddings in front: in a causal model they
    act on later tokens only through their keys and values, and RoPE is relative. Gradients flow back to the embeddings;
    dropout is off.

    Args:
        base: the ChatGLMModel.
        inputs_embeds: `[length, hidden_size]`.

    Returns:
        float32 `[length, num_layers * 2, groups, kv_channels]`, as `PrefixEncoder.key_values`.
    """
    config, encoder = base.config, base.encoder
    states = inputs_embeds[None].to(base.embedding.word_embeddings.weight.dtype)
    cache = DynamicCache(config=config)
    position_ids = positions_from_mask(None, states, None)
    training = [module for module in encoder.modules() if module.training]
    encoder.eval()  # with gradient checkpointing, layers in training mode take no cache
    try:
        # In its own context: an outer forward pass may be collecting the layers' outputs.
        Context().run(
            encoder,
            states.float() if config.fp32_residual_connection else states,
            PrefixBatch(),
            1,
            position_embeddings=base.rotary_pos_emb(position_ids, states.dtype),
            attention_mask=causal_mask_with_prefix(config, states, None, None, position_ids, PrefixBatch()),
            past_key_values=cache,
            use_cache=True,
        )
    finally:
        for module in training:
            module.training = True
    device = inputs_embeds.device
    per_layer = [entry[0].to(device).float() for layer in cache.layers for entry in (layer.keys, layer.values)]
    return rotate_keys(torch.stack(per_layer).permute(2, 0, 1, 3), -len(inputs_embeds), config.prefix_shape)


class VirtualTokens(Float32Module):
    """Replaces a PrefixEncoder where embeddings are trained instead of keys and values.

    They run through the base once per batch, and their keys and values are the prefix of the batch. Results and
    gradients equal those of PEFT's forward pass, which puts the embeddings in front of every row; here rows, labels and
    logits keep their length under every head.

    Args:
        prompt_encoder: PEFT's PromptEmbedding or PromptEncoder: int64 `[1, length]` -> float32
            `[1, length, hidden_size]`. Kept in float32.
        pre_seq_len: its number of virtual tokens.
        base: the ChatGLMModel that computes the keys and values. It is not a submodule of this one.
    """

    prefix_projection = False
    is_untrained = False
    """Embeddings start from words, or from PEFT's PromptEncoder, not from a random prefix."""

    def __init__(self, prompt_encoder: nn.Module, pre_seq_len: int, base: PreTrainedModel) -> None:
        super().__init__()
        self.prompt_encoder = prompt_encoder.float()
        self.pre_seq_len = pre_seq_len
        self._base = weakref.ref(base)

    def forward(self) -> torch.Tensor:
        """The embeddings of the virtual tokens, float32 `[pre_seq_len, hidden_size]`."""
        device = next(self.prompt_encoder.parameters()).device
        with torch.autocast(device.type, enabled=False):
            return self.prompt_encoder(torch.arange(self.pre_seq_len, device=device)[None])[0]

    def key_values(self) -> torch.Tensor:
        """As `PrefixEncoder.key_values`: `[pre_seq_len, num_layers * 2, groups, kv_channels]`, float32."""
        return key_values_before(self._base(), self())

    @torch.no_grad()
    def saved_parameters(self) -> dict[str, torch.Tensor]:
        """The content of a prefix checkpoint: the keys and values, as the table of a PrefixEncoder."""
        return {"embedding.weight": self.key_values().flatten(1)}
