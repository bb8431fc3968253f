"""The formats in which the family's bases are published, and converting those of transformers' GlmForCausalLM.

transformers has the same network as `GlmForCausalLM` (`model_type: glm`, such as glm-4-9b-chat-hf), with other names,
and with separate weights for query, key and value. Other bases whose names resemble the family's have another
architecture and are refused; the message names a base to use instead.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, ConversionOps, WeightConverter, WeightRenaming
from transformers.models.glm.configuration_glm import GlmConfig

SUPPORTED = (
    "ChatGLM2-6B, ChatGLM3-6B, CodeGeeX2-6B, GLM-4-9B (of 2024) or CodeGeeX4-ALL-9B, in the official format "
    "(model_type chatglm) or in that of transformers' GlmForCausalLM (model_type glm)"
)
_PREFIX_PARAMETERS = ("embedding.weight", "trans.0.weight", "trans.0.bias", "trans.2.weight", "trans.2.bias")
_INSTEAD = "Use glm-4-9b-chat or glm-4-9b-chat-hf (bases: glm-4-9b, glm-4-9b-hf), or chatglm3-6b."
_OTHER_ARCHITECTURES = {
    "glm4": "GLM-4-0414 or GLM-Z1, whose layers have two more norms",
    "glm4_moe": "GLM-4.5 or later, a mixture of experts",
    "glm4_moe_lite": "GLM-4.7-Flash, a mixture of experts",
    "glm_moe_dsa": "GLM-5, a mixture of experts",
    "glm4v": "GLM-4.1V, which has image input",
    "glm4v_moe": "GLM-4.5V, which has image input",
    "glm_edge": "GLM-Edge",
}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ROPE_BASE = 10000.0
"""Base of the rotary frequencies where `rope_ratio` is 1."""
DTYPE_KEYS = {"torch_dtype", "dtype"}
"""The dtype of the weights in a config.json, old and new."""
# Fields that only the first ChatGLM-6B has, whose `model_type` is chatglm, too.
_FIRST_GENERATION_FIELDS = ("position_encoding_2d", "inner_hidden_size", "max_sequence_length")


GLM_NAMES = (
    ("transformer.embedding.word_embeddings.", "model.embed_tokens."),
    ("transformer.encoder.layers.", "model.layers."),
    ("transformer.encoder.final_layernorm.", "model.norm."),
    ("transformer.output_layer.", "lm_head."),
    ("self_attention.dense.", "self_attn.o_proj."),
    ("mlp.dense_h_to_4h.", "mlp.gate_up_proj."),
    ("mlp.dense_4h_to_h.", "mlp.down_proj."),
)
"""Parts of the official names of parameters, each with its name in GlmForCausalLM."""
GLM_SPLIT = ("self_attention.query_key_value.", tuple(f"self_attn.{part}_proj." for part in "qkv"))
"""The same for the fused parameter, whose rows GlmForCausalLM has in three."""


def check_architecture(fields: dict[str, Any], source: str = "This") -> None:
    """Refuses a configuration of another architecture.

    Args:
        fields: fields of a config.json.
        source: name of the configuration in the message.

    Raises:
        ValueError: naming the base and what to use instead.
    """
    first_generation = [name for name in _FIRST_GENERATION_FIELDS if name in fields]
    if first_generation:
        raise ValueError(
            f"{source} is a configuration of the first ChatGLM-6B (it has {', '.join(first_generation)}), whose "
            "architecture differs from ChatGLM2, ChatGLM3 and GLM-4. Use chatglm2-6b, chatglm3-6b or glm-4-9b."
        )
    if "vision_config" in fields:
        raise ValueError(
            f"{source} is a base with image input (it has vision_config), such as glm-4v-9b or cogagent; this kit is "
            f"for text. {_INSTEAD}"
        )
    attention = fields.get("source_attention", "causal")  # version 0.1.0 recorded it
    if attention != "causal":
        raise ValueError(
            f"{source} is the configuration of a base that was trained with source_attention {attention!r}; this "
            "version has causal attention only. Use version 0.1.0 of chatglm-ptuning for it, or train it again."
        )
    model_type = fields.get("model_type", "chatglm")
    if model_type in _OTHER_ARCHITECTURES:
        raise ValueError(
            f"{source} is a configuration of {_OTHER_ARCHITECTURES[model_type]} (model_type {model_type!r}). This kit "
            f"does not support this architecture. {_INSTEAD}"
        )
    if model_type not in ("chatglm", "glm"):
        raise ValueError(f"{source} has model_type {model_type!r}, which is not of this family. Use {SUPPORTED}.")


def official_fields(fields: dict[str, Any], source: str, name: str) -> dict[str, Any]:
    """Converts the fields of any config.json of the family to the official format.

    Args:
        fields: the fields in the file; not changed.
        source: name of the configuration in messages.
        name: path of the folder, or name of the repository.

    Raises:
        ValueError: if it is of another architecture, or has values that this network does not support.
    """
    check_architecture(fields, source)
    fields = dict(fields)
    for key in DTYPE_KEYS & fields.keys():
        fields[key] = checked_dtype(fields[key], f"{key} of {source}")
    if fields.get("model_type") == "glm":
        return _from_glm(fields, source)
    names = [last_part(str(fields.get("_name_or_path", ""))), last_part(name)]
    if "position_interpolation" not in fields and fields.get("rope_ratio", 1) != 1:
        fields["position_interpolation"] = any("chatglm2" in name for name in names)
    return fields


def checked_dtype(value: Any, name: str) -> Any:
    """A dtype of a configuration or an argument, which may be spelled as `float16` or as `torch.float16`.

    Args:
        value: its name, the dtype itself, None or "auto" (both are returned as they are).
        name: what it is called in messages.

    Raises:
        ValueError: naming a value that is no dtype of weights, such as one of 8 bits.
    """
    if value is None or value == "auto":
        return value
    dtype = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    if dtype not in _DTYPES:
        raise ValueError(f"{name} must be float32, bfloat16 or float16, got {value!r}.")
    return dtype


def check_not_quantised(fields: dict[str, Any], source: str) -> None:
    """Refuses a base whose weights were saved quantised by bitsandbytes or another library.

    Args:
        fields, source: as for `check_architecture`.

    Raises:
        ValueError: naming the library and what to do.
    """
    settings = fields.get("quantization_config")
    if settings is not None:
        method = settings.get("quant_method", "another library") if isinstance(settings, dict) else settings
        raise ValueError(
            f"{source} has a quantization_config: the weights were saved quantised by {method}, which this kit does "
            "not read. Load the base as it was published, and quantise it while it loads, by quantization_bit 4 or 8."
        )


def without_recorded_prefix(fields: dict[str, Any], pre_seq_len: Any) -> dict[str, Any]:
    """The fields of a folder's config.json without the prefix that it records.

    Args:
        pre_seq_len: of the prefix that the caller wants to train, whose `prefix_projection` is then the recorded one;
            None for no prefix.
    """
    if pre_seq_len:
        return fields | {"pre_seq_len": pre_seq_len}
    return {name: value for name, value in fields.items() if name not in ("pre_seq_len", "prefix_projection")}


def last_part(name: str) -> str:
    """The name of a base in a path, hub name or folder of the hub's cache, in lower case."""
    parts = [part for part in re.split(r"[/\\]", name) if part]
    if len(parts) >= 3 and parts[-2] == "snapshots":
        parts = parts[:-2]
    return parts[-1].split("--")[-1].lower() if parts else ""


def _from_glm(fields: dict[str, Any], source: str) -> dict[str, Any]:
    glm = GlmConfig.from_dict(fields)
    rope = glm.rope_parameters
    interpolated = rope.get("rope_type") == "linear" and rope["rope_theta"] == ROPE_BASE
    required = {
        "hidden_act": (glm.hidden_act, "silu"),
        "tie_word_embeddings": (bool(glm.tie_word_embeddings), False),
        "rope_type": ("default" if interpolated else rope.get("rope_type", "default"), "default"),
        "partial_rotary_factor": (rope.get("partial_rotary_factor", 1.0), 0.5),
    }
    for name, (found, wanted) in required.items():
        if found != wanted:
            raise ValueError(f"{source} has {name} {found!r}; this network supports {wanted!r} only.")
    kept = ("initializer_range", "use_cache", "attention_dropout", "hidden_size", "num_attention_heads",
            "pad_token_id", "bos_token_id", "eos_token_id", "dtype", "torch_dtype", "_name_or_path",
            "num_labels", "id2label", "label2id", "problem_type", "quantization_config")  # fmt: skip
    head_dim = glm.head_dim or glm.hidden_size // glm.num_attention_heads
    return {name: getattr(glm, name, fields.get(name)) for name in kept if name in fields} | {
        "model_type": "chatglm",
        "num_layers": glm.num_hidden_layers,
        "padded_vocab_size": glm.vocab_size,
        "hidden_size": glm.hidden_size,
        "ffn_hidden_size": glm.intermediate_size,
        "kv_channels": head_dim,
        "num_attention_heads": glm.num_attention_heads,
        "multi_query_attention": True,
        "multi_query_group_num": glm.num_key_value_heads or glm.num_attention_heads,
        "add_qkv_bias": glm.attention_bias,
        "layernorm_epsilon": glm.rms_norm_eps,
        "rope_ratio": rope["factor"] if interpolated else rope["rope_theta"] / ROPE_BASE,
        "position_interpolation": interpolated,
        "seq_length": glm.max_position_embeddings,
        "pad_token_id": glm.pad_token_id,
        "eos_token_id": glm.eos_token_id,
    }


class LeaveOut(ConversionOps):
    """Loads nothing, so that the parameter counts as missing."""

    def convert(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """An empty dictionary."""
        return {}


def register_conversions() -> None:
    """Registers with transformers how tensors of a GlmForCausalLM checkpoint are converted while they load.

    Official checkpoints have none of these names, so they are not changed. A prefix among the weights of a base is
    left out: it must not become the values of a new prefix to train (`stored_prefix.py`).
    """
    conversions: list[WeightConverter | WeightRenaming] = [
        WeightRenaming(("^" if ours.startswith("transformer.") else "") + re.escape(theirs), ours)
        for ours, theirs in GLM_NAMES
    ]
    conversions += [
        WeightConverter(
            [name + kind for name in GLM_SPLIT[1]],
            GLM_SPLIT[0] + kind,
            [Concatenate(dim=0)],
        )
        for kind in ("weight", "bias")
    ]
    conversions += [
        WeightConverter([f"prefix_encoder.{name}"], f"prefix_encoder.{name}", [LeaveOut()])
        for name in _PREFIX_PARAMETERS
    ]
    register_checkpoint_conversion_mapping("chatglm", conversions, overwrite=True)
