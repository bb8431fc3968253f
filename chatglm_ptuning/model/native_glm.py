"""Converts a base to transformers' own GlmForCausalLM; `checkpoint_formats.py` has the way back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import GlmConfig, GlmForCausalLM

from chatglm_ptuning.model.checkpoint_formats import GLM_NAMES, GLM_SPLIT
from chatglm_ptuning.model.configuration_chatglm import ChatGLMConfig
from chatglm_ptuning.model.modeling_chatglm import ChatGLMForConditionalGeneration

_REQUIRED = {
    "multi_query_attention": (True, "its fused weight has queries, keys and values in the order of groups"),
    "apply_residual_connection_post_layernorm": (False, "its residuals are taken before the norms"),
    "post_layer_norm": (True, "it always has the final norm"),
    "rmsnorm": (True, "its norms are RMSNorm"),
    "add_bias_linear": (False, "only queries, keys and values may have a bias"),
    "fp32_residual_connection": (False, "its residuals have the dtype of the weights"),
}
"""Fields whose other value GlmForCausalLM cannot express, with the reason."""


def glm_config(config: ChatGLMConfig) -> GlmConfig:
    """The configuration of GlmForCausalLM for the same network.

    Where positions are divided (ChatGLM2-6B-32K), it has the rotary type `linear`, which does the same.

    Raises:
        ValueError: naming the field that GlmForCausalLM cannot express, its value and the reason.
    """
    for name, (wanted, reason) in _REQUIRED.items():
        value = getattr(config, name)
        if value != wanted:
            raise ValueError(
                f"{config.name_or_path or 'This base'} has {name} {value}, which GlmForCausalLM cannot express: "
                f"{reason}. Keep this base in the official format."
            )
    rope = {"rope_type": "default", "rope_theta": config.rope_base, "partial_rotary_factor": 0.5}
    if config.position_scale != 1:
        rope |= {"rope_type": "linear", "factor": config.position_scale}
    return GlmConfig(
        architectures=["GlmForCausalLM"],
        vocab_size=config.padded_vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.ffn_hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.multi_query_group_num,
        head_dim=config.kv_channels,
        attention_bias=config.add_qkv_bias,
        attention_dropout=config.attention_dropout,
        initializer_range=config.initializer_range,
        rms_norm_eps=config.layernorm_epsilon,
        max_position_embeddings=config.seq_length,
        rope_parameters=rope,
        pad_token_id=config.pad_token_id,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        tie_word_embeddings=False,
        use_cache=config.use_cache,
        dtype=config.dtype,
    )


def glm_names(name: str) -> list[str]:
    """The names in GlmForCausalLM of a parameter: three for the fused queries, keys and values, else one."""
    for ours, theirs in GLM_NAMES:
        name = name.replace(ours, theirs)
    fused, parts = GLM_SPLIT
    return [name.replace(fused, part) for part in parts] if fused in name else [name]


def glm_tensors(tensors: Mapping[str, torch.Tensor], config: ChatGLMConfig) -> dict[str, torch.Tensor]:
    """The parameters by their names in GlmForCausalLM; nothing is copied.

    Args:
        tensors: parameters of the base by their official names.
    """
    groups = config.multi_query_group_num
    rows = [heads * config.kv_channels for heads in (config.num_attention_heads, groups, groups)]
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        names = glm_names(name)
        found |= zip(names, tensor.split(rows) if len(names) > 1 else [tensor], strict=True)
    return found


def as_glm(model: ChatGLMForConditionalGeneration) -> GlmForCausalLM:
    """The same network as transformers' own GlmForCausalLM; its parameters are views of the model's.

    Raises:
        ValueError: as `glm_config`.
    """
    settings = glm_config(model.config)
    settings.dtype = model.dtype
    with torch.device("meta"):
        native = GlmForCausalLM(settings).eval()
    weights = {name: value for name, value in model.state_dict().items() if "prefix_encoder." not in name}
    native.load_state_dict(glm_tensors(weights, model.config), assign=True)
    native.model.rotary_emb = type(native.model.rotary_emb)(settings).to(model.device)  # its buffers are in no state
    return native
