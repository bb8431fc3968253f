"""A model of the kit as transformers' own GlmForCausalLM, with the same weights in memory."""

from __future__ import annotations

import torch
from transformers import GlmConfig, GlmForCausalLM

from chatglm_ptuning.model.modeling_chatglm import ChatGLMForConditionalGeneration


def as_native_glm(model: ChatGLMForConditionalGeneration) -> GlmForCausalLM:
    """The same network as transformers' own GLM, whose parameters are views of the model's: nothing is copied."""
    config = model.config
    settings = GlmConfig(
        vocab_size=config.padded_vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.ffn_hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.multi_query_group_num,
        head_dim=config.kv_channels,
        rms_norm_eps=config.layernorm_epsilon,
        max_position_embeddings=config.seq_length,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        attention_bias=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
        dtype=model.dtype,
    )
    with torch.device("meta"):
        native = GlmForCausalLM(settings).eval()
    groups = config.multi_query_group_num
    ours, mapped = model.state_dict(), {}
    mapped["model.embed_tokens.weight"] = ours["transformer.embedding.word_embeddings.weight"]
    mapped["model.norm.weight"] = ours["transformer.encoder.final_layernorm.weight"]
    mapped["lm_head.weight"] = ours["transformer.output_layer.weight"]
    sizes = [heads * config.kv_channels for heads in (config.num_attention_heads, groups, groups)]
    for layer in range(config.num_layers):
        old, new = f"transformer.encoder.layers.{layer}.", f"model.layers.{layer}."
        for kind in ("weight", "bias"):
            parts = ours[f"{old}self_attention.query_key_value.{kind}"].split(sizes)
            for name, part in zip("qkv", parts, strict=True):
                mapped[f"{new}self_attn.{name}_proj.{kind}"] = part
        mapped[new + "self_attn.o_proj.weight"] = ours[old + "self_attention.dense.weight"]
        mapped[new + "mlp.gate_up_proj.weight"] = ours[old + "mlp.dense_h_to_4h.weight"]
        mapped[new + "mlp.down_proj.weight"] = ours[old + "mlp.dense_4h_to_h.weight"]
        for name in ("input_layernorm", "post_attention_layernorm"):
            mapped[f"{new}{name}.weight"] = ours[f"{old}{name}.weight"]
    native.load_state_dict(mapped, assign=True)
    native.model.rotary_emb = type(native.model.rotary_emb)(settings).to(model.device)  # its buffers are in no state
    return native
