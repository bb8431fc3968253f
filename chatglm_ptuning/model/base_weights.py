"""Reading single weights of a base wherever and however it holds them (quantised, offloaded, partitioned), and its
fingerprint by a few of them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from accelerate.utils import align_module_device
from transformers import PreTrainedModel

from chatglm_ptuning.model.zero3 import gathered, is_partitioned
from chatglm_ptuning.prefix.fingerprint import fingerprint_of

_SHAPE_FIELDS = ("num_layers", "padded_vocab_size", "hidden_size", "ffn_hidden_size", "kv_channels",
                 "num_attention_heads", "multi_query_attention", "multi_query_group_num", "rope_ratio")  # fmt: skip


def fingerprint_of_base(base: PreTrainedModel) -> dict[str, Any]:
    """What prefixes of a base are known by; collective under ZeRO-3.

    The sample is of the embeddings, and of the norms and linear layers at the bottom, middle and top.

    Args:
        base: the ChatGLMModel.
    """
    config = base.config
    names = ["embedding.word_embeddings.weight"]
    if config.post_layer_norm:
        names.append("encoder.final_layernorm.weight")
    for layer in sorted({0, config.num_layers // 2, config.num_layers - 1}):
        names += [
            f"encoder.layers.{layer}.{part}.weight"
            for part in ("input_layernorm", "self_attention.query_key_value", "mlp.dense_4h_to_h")
        ]
    shape = {name: getattr(config, name) for name in _SHAPE_FIELDS}
    return fingerprint_of(shape, names, partial(read_weight, base))


def read_weight(base: PreTrainedModel, name: str) -> tuple[torch.Tensor | None, bool]:
    """One weight of the base, and whether it is as exact as it was published; collective under ZeRO-3.

    Args:
        base: the ChatGLMModel.
        name: of a module's parameter in it.

    Returns:
        The weight in floating point, on whatever device it is; None if this process does not hold it (a meta tensor, or
        one that bitsandbytes has re-ordered for this CPU). False if it
        was quantised, by bitsandbytes or in its file.
    """
    module_name, _, leaf = name.rpartition(".")
    module = base.get_submodule(module_name)
    parameter = getattr(module, leaf)
    if is_partitioned([parameter]):
        with gathered([parameter]):
            return parameter.detach().clone(), True
    with align_module_device(module):  # brings an offloaded weight into memory meanwhile
        weight = getattr(module, leaf)
        if weight.is_meta or weight.numel() == 0:
            return None, True
        if type(weight).__name__ in ("Params4bit", "Int8Params"):
            if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
                return None, False
            from transformers.integrations.bitsandbytes import dequantize_bnb_weight  # imports bitsandbytes

            return dequantize_bnb_weight(weight, getattr(module, "state", None)), False
        # An official quantised checkpoint packs the linear layers of the encoder, and nothing else.
        packed = bool(base.config.dequantized_from_bit) and isinstance(module, torch.nn.Linear)
        return weight.detach(), not packed
