"""ChatGLM2, ChatGLM3 and GLM-4 with a prefix in front of every layer, on transformers' attention and generation.

The prefix is never stored in the cache: every attention layer puts it in front of the keys and values. So the cache,
the attention mask and the positions that callers and `generate` see are those of the tokens alone.

As in transformers, the network is one file, from the attention to the language model. Masks, rotary positions,
prefixes and loading have their own files.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, slice_logits_to_keep
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from chatglm_ptuning.files import check_json_files
from chatglm_ptuning.model.attention_mask import causal_mask_with_prefix, positions_from_mask
from chatglm_ptuning.model.base_weights import describe_damage, describe_missing
from chatglm_ptuning.model.chat_mixin import ChatMixin
from chatglm_ptuning.model.checkpoint_formats import DTYPE_KEYS, checked_dtype, register_conversions
from chatglm_ptuning.model.configuration_chatglm import ChatGLMConfig
from chatglm_ptuning.model.frozen_linear import apply_linear, rounded_up
from chatglm_ptuning.model.generation_mixin import PrefixGenerationMixin
from chatglm_ptuning.model.losses import IGNORED_LABEL, cross_entropy, divergence_of_states, loss_of_states, next_labels
from chatglm_ptuning.model.official_model import OfficialModelSurface, refuse_retired
from chatglm_ptuning.model.packed_sequences import PackedSequences, packed_attention
from chatglm_ptuning.model.packed_weights import check_unpacked, packed_dtype_plan
from chatglm_ptuning.model.placement import execution_device, out_of_offload
from chatglm_ptuning.model.prefix_encoder import PrefixEncoder
from chatglm_ptuning.model.prefix_mixin import PrefixMixin
from chatglm_ptuning.model.quantization import keep_layout
from chatglm_ptuning.model.rms_norm import RMSNorm
from chatglm_ptuning.model.rotary import RotaryEmbedding, rotate
from chatglm_ptuning.model.stored_prefix import folder_of_base
from chatglm_ptuning.model.swiglu import SwiGLU
from chatglm_ptuning.model.trained_module import FirstValues
from chatglm_ptuning.model.zero3 import gathered, is_partitioned
from chatglm_ptuning.prefix.bank import TRAINABLE_PREFIX, PrefixBank
from chatglm_ptuning.prefix.batch import PrefixArgument, PrefixBatch, PrefixSelection

register_conversions()


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention that also returns its weights; arguments as in transformers' attention interface."""
    key = repeat_kv(key, module.num_key_value_groups)
    value = repeat_kv(value, module.num_key_value_groups)
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class SelfAttention(nn.Module):
    """Grouped-query attention with a fused projection; the official fields and parameter names."""

    def __init__(self, config: ChatGLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.kv_channels
        self.num_heads = config.num_attention_heads
        self.num_groups = config.num_key_value_heads
        self.num_key_value_groups = self.num_heads // self.num_groups
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        projected = (self.num_heads + 2 * self.num_groups) * self.head_dim
        qkv_bias = config.add_bias_linear or config.add_qkv_bias
        self.query_key_value = nn.Linear(config.hidden_size, projected, bias=qkv_bias)
        self.dense = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, bias=config.add_bias_linear)

    def _split(self, fused: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        batch, seq_len, _ = fused.shape
        if self.config.multi_query_attention:
            heads = fused.view(batch, seq_len, -1, self.head_dim).transpose(1, 2)
            return heads.split((self.num_heads, self.num_groups, self.num_groups), dim=1)
        # Without multi-query attention the fused weight holds query, key and value of one head next to each other.
        return fused.view(batch, seq_len, self.num_heads, 3 * self.head_dim).transpose(1, 2).chunk(3, dim=-1)

    def forward(
        self,
        hidden_states: torch.Tensor,
        prefix_key: torch.Tensor | None,
        prefix_value: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None = None,
        packed: PackedSequences | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Hidden states `[batch, seq_len, hidden_size]` -> the same shape, and the attention weights or None.

        Args:
            hidden_states: after the norm.
            prefix_key: `[batch, groups, pre_seq_len, kv_channels]`, likewise `prefix_value`; None for no prefix.
            position_embeddings: cosines and sines of the tokens' positions.
            attention_mask: over prefix, cached tokens and new ones, in the format of the attention implementation.
            past_key_values: stores the tokens' keys and values, never the prefix's.
            packed: the sequences of a packed row; the prefix then has an entry for each of them.
            kwargs: for the attention function.
        """
        query, key, value = self._split(apply_linear(self.query_key_value, hidden_states))
        query = rotate(query, *position_embeddings)
        key = rotate(key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        kwargs |= {"dropout": self.config.attention_dropout if self.training else 0.0, "scaling": self.scaling}
        if packed is not None:
            output = packed_attention(attention, self, query, key, value, prefix_key, prefix_value, packed, **kwargs)
            return apply_linear(self.dense, output.flatten(2)), None
        if prefix_key is not None:
            key = torch.cat((prefix_key.to(key), key), dim=2)
            value = torch.cat((prefix_value.to(value), value), dim=2)
        output, weights = attention(self, query, key, value, attention_mask, **kwargs)
        return apply_linear(self.dense, output.flatten(2)), weights


class MLP(nn.Module):
    """SwiGLU with gate and up projections fused."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        bias = config.add_bias_linear
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 2 * config.ffn_hidden_size, bias=bias)
        self.dense_4h_to_h = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Hidden states `[..., hidden_size]` -> the same shape."""
        return apply_linear(self.dense_4h_to_h, SwiGLU.apply(apply_linear(self.dense_h_to_4h, hidden_states)))


def _norm(config: ChatGLMConfig) -> nn.Module:
    return (RMSNorm if config.rmsnorm else nn.LayerNorm)(config.hidden_size, eps=config.layernorm_epsilon)


class GLMBlock(GradientCheckpointingLayer):
    """One pre-norm transformer layer."""

    def __init__(self, config: ChatGLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.post_norm_residual = config.apply_residual_connection_post_layernorm
        self.hidden_dropout = config.hidden_dropout
        self.input_layernorm = _norm(config)
        self.self_attention = SelfAttention(config, layer_idx)
        self.post_attention_layernorm = _norm(config)
        self.mlp = MLP(config)

    def _add(self, residual: torch.Tensor, normed: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        output = nn.functional.dropout(output, p=self.hidden_dropout, training=self.training)
        return output + (normed if self.post_norm_residual else residual)

    def forward(
        self,
        hidden_states: torch.Tensor,
        prefix_key: torch.Tensor | None,
        prefix_value: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        kept_positions: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Hidden states `[batch, seq_len, hidden_size]` -> the same shape; the rest as for SelfAttention.

        Args:
            kept_positions: places in `[batch * seq_len]`; the result is then `[1, places, hidden_size]`, and nothing
                after the attention is computed for the other places.
        """
        # The prefix is passed as positional tensors: reentrant checkpointing tracks gradients of no other arguments.
        dtype = position_embeddings[0].dtype  # of the layers; the residual stream may be in float32
        normed = self.input_layernorm(hidden_states).to(dtype)
        attended, _ = self.self_attention(normed, prefix_key, prefix_value, position_embeddings, **kwargs)
        if kept_positions is not None:
            hidden_states, normed, attended = (
                states.flatten(0, 1).index_select(0, kept_positions)[None]
                for states in (hidden_states, normed, attended)
            )
        hidden_states = self._add(hidden_states, normed, attended)
        normed = self.post_attention_layernorm(hidden_states).to(dtype)
        return self._add(hidden_states, normed, self.mlp(normed))


class Embedding(nn.Module):
    """Word embeddings, in their own module for the official parameter name."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.padded_vocab_size, config.hidden_size)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Ids `[batch, seq_len]` -> embeddings `[batch, seq_len, hidden_size]`."""
        return self.word_embeddings(input_ids)


class GLMTransformer(nn.Module):
    """The layers and, with `post_layer_norm`, the final norm."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList([GLMBlock(config, layer_idx) for layer_idx in range(config.num_layers)])
        self.final_layernorm = _norm(config) if config.post_layer_norm else nn.Identity()

    def forward(
        self,
        hidden_states: torch.Tensor,
        prefix: PrefixBatch,
        rows: int,
        kept_positions: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Hidden states `[batch, seq_len, hidden_size]` -> the same shape.

        Args:
            hidden_states: the embeddings.
            prefix: of the batch's rows, or of the sequences in its packed row.
            rows: how many these are.
            kept_positions: for the last layer, see GLMBlock.
            kwargs: for every layer.
        """
        for layer_idx, layer in enumerate(self.layers):
            key, value = prefix.layer(layer_idx, rows)
            if layer_idx == len(self.layers) - 1:
                kwargs["kept_positions"] = kept_positions
            hidden_states = layer(hidden_states, key, value, **kwargs)
        return self.final_layernorm(hidden_states)


class ChatGLMPreTrainedModel(OfficialModelSurface, PrefixMixin, PreTrainedModel):
    """Loading, saving and initialisation shared by all ChatGLM classes."""

    config: ChatGLMConfig
    config_class = ChatGLMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["GLMBlock"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs: ClassVar[dict[str, type]] = {"hidden_states": GLMBlock, "attentions": SelfAttention}
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"rotary_pos_emb\.inv_freq", r"prefix_encoder\."]
    _keys_to_ignore_on_load_missing: ClassVar[list[str]] = [r"prefix_encoder\."]
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = ["prefix_encoder"]

    def __init__(self, config: ChatGLMConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.packing_errors: dict[str, str] = {}

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PathLike[str] | None,
        *args: Any,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As in transformers; with a trainable prefix (`pre_seq_len`) all but the prefix and a head is frozen.

        The trainable prefix is a new one, and only the argument or a given configuration asks for it. A prefix that the
        folder itself holds is loaded under the folder's name, and not selected (`stored_prefix.py`).

        Checkpoints of transformers' GlmForCausalLM are converted tensor by tensor while they load; official checkpoints
        in 4 or 8 bits are de-quantised (`packed_weights.py`).

        Raises:
            ValueError: naming the file that is damaged or holds more than tensors, or the parameters of the base that
                are missing or do not fit `quantization_bit`: a base never gets random weights. Also if the folder's
                own prefix is damaged, or contradicts its `config.json`.
        """
        if pretrained_model_name_or_path is not None:
            check_json_files(
                Path(pretrained_model_name_or_path), "config.json", "generation_config.json", "*.index.json"
            )
        for key in DTYPE_KEYS & kwargs.keys():
            kwargs[key] = checked_dtype(kwargs[key], key)
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        except Exception as error:
            path = pretrained_model_name_or_path
            damage = None if path is None else describe_damage(Path(path))
            if damage is None:
                raise
            raise ValueError(damage) from error
        check_unpacked(model, str(pretrained_model_name_or_path))
        keep_layout(model)
        inside = "" if model.base_model is model else cls.base_model_prefix + "."
        missing = [name for name in info["missing_keys"] if name.startswith(inside) and "prefix_encoder." not in name]
        if missing:
            raise ValueError(describe_missing(str(pretrained_model_name_or_path), missing))
        if model._trainable is not None:
            encoder = out_of_offload(model._trainable, PrefixEncoder(model.config), is_new=True)
            model.base_model.prefix_encoder = encoder
            # The Trainer refuses quantised models without an adapter of PEFT; here the prefix is the adapter.
            model.is_quantized = False
            if is_partitioned(encoder.parameters()) and encoder.has_first_values:
                with gathered(encoder.parameters()):
                    encoder.mark_untrained()  # again: all processes now have the values of the first
        model.freeze_base()
        model._keep_stored_prefix(folder_of_base(pretrained_model_name_or_path, model.config, kwargs))
        return (model, info) if output_loading_info else model

    def save_pretrained(
        self, save_directory: str | PathLike[str], *args: Any, state_dict: dict | None = None, **kwargs: Any
    ) -> None:
        """As in transformers: the base, and a trainable prefix under its official names; loaded prefixes are not saved.

        The layout is always the official one. An untrained prefix is left out.

        Raises:
            ValueError: for a quantised base, which could not be loaded again.
        """
        if getattr(self, "hf_quantizer", None) is not None:
            raise ValueError(
                "A quantised base is not saved: load it again from its own folder with the same quantization_bit. "
                "save_prefix saves a prefix."
            )
        if self._trainable is not None and self._trainable.is_untrained:
            tensors = self.state_dict() if state_dict is None else state_dict
            state_dict = {name: tensor for name, tensor in tensors.items() if "prefix_encoder." not in name}
        kwargs["save_original_format"] = False
        super().save_pretrained(save_directory, *args, state_dict=state_dict, **kwargs)

    @property
    def device(self) -> torch.device:
        """The device of the inputs, also for a model whose weights are offloaded to the disk."""
        device = super().device
        return (execution_device(self) or device) if device.type == "meta" else device

    def _get_dtype_plan(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        return super()._get_dtype_plan(dtype) | packed_dtype_plan(self.config)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # For classes outside transformers this skips modules without own parameters, such as PrefixEncoder, so that
        # their initialisation does not overwrite loaded weights; ours never does.
        super()._initialize_weights(module)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, RotaryEmbedding):
            init.copy_(module.inv_freq, module.frequencies())
        elif isinstance(module, PrefixEncoder):
            # The official initialisation is torch's default: N(0, 1) for the table.
            init.normal_(module.embedding.weight)
            if module.prefix_projection:
                for linear in (module.trans[0], module.trans[2]):
                    bound = linear.in_features**-0.5
                    init.uniform_(linear.weight, -bound, bound)
                    init.uniform_(linear.bias, -bound, bound)
            module.mark_untrained()
        elif not getattr(module, "_is_hf_initialized", False):
            super()._init_weights(module)
            if isinstance(module, FirstValues) and not all(
                getattr(parameter, "_is_hf_initialized", False) for parameter in module.parameters()
            ):
                module.mark_untrained()


class ChatGLMModel(ChatGLMPreTrainedModel):
    """The transformer; with `config.pre_seq_len` also a trainable `prefix_encoder`, and everything else frozen."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        config.validate_sizes()
        self.embedding = Embedding(config)
        self.rotary_pos_emb = RotaryEmbedding(config)
        self.encoder = GLMTransformer(config)
        self.output_layer = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=config.add_bias_linear)
        if config.pre_seq_len:
            self.prefix_encoder = PrefixEncoder(config)
        self.gradient_checkpointing = False  # read by merge_with_config_defaults: no cache while it is on
        self.prefixes = PrefixBank()
        self.prefix_selection: PrefixSelection = TRAINABLE_PREFIX if config.pre_seq_len else None
        self.known_fingerprint: dict[str, Any] | None = None  # of a base whose weights are elsewhere
        self.freeze_base()
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The word embeddings."""
        return self.embedding.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replaces the word embeddings."""
        self.embedding.word_embeddings = value

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        prefix: PrefixArgument = None,
        sequence_lengths: Sequence[int] | None = None,
        kept_positions: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states `[batch, seq_len, hidden_size]` after the final norm, with a prefix in front of every layer.

        Args:
            input_ids: `[batch, seq_len]`, or instead `inputs_embeds` `[batch, seq_len, hidden_size]`.
            attention_mask: `[batch, cached + seq_len]`, 1 on real tokens; it covers the tokens, never the prefix.
            position_ids: `[batch, seq_len]`; by default 0, 1, 2, ... on the real tokens, whether padded left or right.
            past_key_values: a cache of the previous tokens. It belongs to the prefix it was filled with.
            use_cache: whether to return a cache; by default as in the configuration.
            prefix: the result of `prefix_batch`, or a name, or a list with a name or None for each row. None means the
                selected prefix; `prefix_batch(None)` is the plain base.
            sequence_lengths: of the sequences that are packed one after the other in `input_ids` `[1, tokens]`. Each
                has its own entry of `prefix` and sees only this and itself. There is no mask and no cache then.
            kept_positions: int64, places in `[batch * seq_len]` to return states for, `[1, places, hidden_size]`.
            kwargs: `output_hidden_states`, `output_attentions` and arguments for the attention function.

        Raises:
            KeyError: if a prefix of that name is not loaded.
            TypeError: for a retired argument of the official code.
            ValueError: if the mask does not cover the tokens, the cache was filled under another prefix, the prefix
                is for another number of rows, or the lengths do not add up to the tokens.
        """
        refuse_retired(kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.embedding(input_ids)
        rows = inputs_embeds.shape[0] if sequence_lengths is None else len(sequence_lengths)
        prefix, packed, mask = self._prefix_for(prefix, inputs_embeds, rows), None, None
        if sequence_lengths is not None:
            if attention_mask is not None or past_key_values is not None:
                raise ValueError("Packed sequences take neither attention_mask nor past_key_values: nothing is padded.")
            # Without kept positions all states are returned, and there are as many as tokens.
            filling = 0 if kept_positions is None else rounded_up(inputs_embeds.shape[1]) - inputs_embeds.shape[1]
            inputs_embeds = nn.functional.pad(inputs_embeds, (0, 0, 0, filling))
            packed = PackedSequences(tuple(sequence_lengths), prefix, self.config, inputs_embeds, filling)
            if position_ids is None:
                position_ids = packed.position_ids
            else:
                position_ids = nn.functional.pad(position_ids, (0, filling))
        else:
            if use_cache and past_key_values is None:
                past_key_values = DynamicCache(config=self.config)
            if past_key_values is not None:
                prefix.claim(past_key_values)
            if position_ids is None:
                position_ids = positions_from_mask(attention_mask, inputs_embeds, past_key_values)
            mask = causal_mask_with_prefix(
                self.config, inputs_embeds, attention_mask, past_key_values, position_ids, prefix
            )
        hidden_states = self.encoder(
            inputs_embeds.float() if self.config.fp32_residual_connection else inputs_embeds,
            prefix=prefix,
            rows=rows,
            position_embeddings=self.rotary_pos_emb(position_ids, inputs_embeds.dtype),
            attention_mask=mask,
            packed=packed,
            kept_positions=kept_positions,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = hidden_states.to(inputs_embeds.dtype)
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, past_key_values=past_key_values)


class ChatGLMForConditionalGeneration(ChatMixin, ChatGLMPreTrainedModel, PrefixGenerationMixin):
    """The language model: `forward` gives logits and loss, `generate` is transformers' own, `chat` the official one."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        """The output layer."""
        return self.transformer.output_layer

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replaces the output layer."""
        self.transformer.output_layer = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        smoothing: float = 0.0,
        prefix: PrefixArgument = None,
        sequence_lengths: Sequence[int] | None = None,
        skip_logits: bool = False,
        supervised_positions: torch.Tensor | None = None,
        teacher_ids: torch.Tensor | None = None,
        teacher_logprobs: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As `ChatGLMModel.forward`, with logits `[batch, seq_len, padded_vocab_size]`.

        Args:
            labels: `[batch, seq_len]`, not shifted, -100 at masked positions. The loss is computed in float32 and is
                the mean over all supervised tokens of the batch.
            logits_to_keep: number of last positions whose logits are computed (0: all), or these positions.
            num_items_in_batch: divides the loss, instead of the number of supervised tokens here; the Trainer passes
                the number in all batches of a step.
            smoothing: of the labels, see `cross_entropy`.
            prefix: as for `ChatGLMModel.forward`.
            sequence_lengths: as for `ChatGLMModel.forward`; the first token of a sequence is not predicted.
            skip_logits: with labels, return the loss alone. It then takes less time and memory: states and logits are
                computed only where a token is supervised, and only some logits exist at a time.
            supervised_positions: int64, places of the supervised tokens in `[batch * seq_len]`, none of them the first
                of its sequence. Without them `skip_logits` looks for them, and waits for the GPU.
            teacher_ids, teacher_logprobs: with `skip_logits`: distributions at the supervised tokens, as
                `divergence_of_states` takes them. The loss is then the divergence from them.
        """
        if labels is not None:
            labels = next_labels(labels, sequence_lengths)
        if skip_logits and labels is not None:
            labels = labels.flatten()
            if supervised_positions is None:
                predicting = (labels != IGNORED_LABEL).nonzero().flatten()
            else:
                predicting = supervised_positions - 1
            labels = labels.index_select(0, predicting)
            use_cache, kwargs["kept_positions"] = False, predicting
        outputs = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            prefix=prefix,
            sequence_lengths=sequence_lengths,
            **kwargs,
        )
        if skip_logits and labels is not None:
            states, output_layer = outputs.last_hidden_state[0], self.transformer.output_layer
            if teacher_ids is not None:
                teacher = teacher_ids, teacher_logprobs
                return CausalLMOutputWithPast(
                    loss=divergence_of_states(states, output_layer, *teacher, num_items_in_batch)
                )
            loss = loss_of_states(states, output_layer, labels, num_items_in_batch, smoothing)
            return CausalLMOutputWithPast(loss=loss)
        # Contiguous: for a slice, torch would copy the weight of the output layer once for every row.
        hidden_states = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep).contiguous()
        logits = apply_linear(self.transformer.output_layer, hidden_states)
        return CausalLMOutputWithPast(
            loss=None if labels is None else cross_entropy(logits, labels, num_items_in_batch, smoothing),
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
