"""Official checkpoints in 4 or 8 bits (`chatglm2-6b-int4`), de-quantised tensor by tensor while they load.

Their `config.json` has `quantization_bit`. Every linear layer of the encoder has an int8 `weight` and a `weight_scale`
with one number per output row; the other parameters are not quantised. A weight is `scale * integer`, where the scale
is the row's largest absolute weight over `2 ** (bits - 1) - 1`. With 4 bits a byte holds two neighbours of a row, the
even input in the high half, each in two's complement (source: the extraction kernels in `quantization.py` of
chatglm2-6b).
"""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import ConversionOps, WeightConverter

from chatglm_ptuning.model.configuration_chatglm import ChatGLMConfig

PACKED_LAYERS = (
    "self_attention.query_key_value",
    "self_attention.dense",
    "mlp.dense_h_to_4h",
    "mlp.dense_4h_to_h",
)
"""The linear layers that an official quantised checkpoint packs."""


def unpack(packed: torch.Tensor, scale: torch.Tensor, in_features: int, bits: int) -> torch.Tensor:
    """De-quantises packed weights to `[out_features, in_features]`, float32.

    Args:
        packed: integers from -128 to 127 in any dtype, `[out_features, in_features * bits / 8]`.
        scale: `[out_features]`.
        bits: 4 or 8.

    Raises:
        ValueError: for another number of bits, or if the shapes do not fit.
    """
    if bits not in (4, 8):
        raise ValueError(f"official checkpoints have 4 or 8 bits, not {bits}")
    if packed.ndim != 2 or packed.shape[1] * 8 != in_features * bits or scale.shape != packed.shape[:1]:
        raise ValueError(
            f"{tuple(packed.shape)} with a weight_scale of {tuple(scale.shape)} is not {bits} bits of {in_features} "
            "inputs"
        )
    integers = packed.to(torch.int8)
    if bits == 4:
        # Shifts of signed bytes keep the sign: the low half is moved up and down again to get one.
        integers = torch.stack((integers >> 4, (integers << 4) >> 4), dim=-1).flatten(1)
    return integers * scale.float().reshape(-1, 1)


class Unpack(ConversionOps):
    """Returns an ordinary weight unchanged, and de-quantises a packed one with its scale."""

    def convert(
        self,
        input_dict: dict[str, list[torch.Tensor]],
        target_patterns: list[str],
        full_layer_name: str,
        model: PreTrainedModel,
        config: ChatGLMConfig,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """The weight under its pattern, in the dtype of the model; nothing if it cannot be de-quantised.

        The reason is then stored in the model's `packing_errors`, as transformers would only log an exception.
        """
        (target,) = target_patterns
        tensors = {pattern: value[0] if isinstance(value, list) else value for pattern, value in input_dict.items()}
        scale = tensors.pop(f"{target}_scale", None)
        if scale is None and not config.quantization_bit:
            return {target: tensors[target]}
        try:
            if scale is None or not tensors:
                raise ValueError(f"it has no {'weight_scale' if scale is None else 'weight'}")
            in_features = model.get_submodule(full_layer_name.removesuffix(".weight")).in_features
            weight = unpack(tensors[target], scale, in_features, config.quantization_bit)
        except ValueError as error:
            model.packing_errors[full_layer_name] = str(error)
            return {}
        return {target: weight.to(model.get_input_embeddings().weight.dtype)}


def register_packed_weights() -> None:
    """Makes transformers load packed checkpoints into every ChatGLM class; called once, after other conversions."""
    converters = [
        WeightConverter([f"{layer}.weight", f"{layer}.weight_scale"], f"{layer}.weight", [Unpack()])
        for layer in PACKED_LAYERS
    ]
    others = get_checkpoint_conversion_mapping(ChatGLMConfig.model_type) or []
    register_checkpoint_conversion_mapping(ChatGLMConfig.model_type, others + converters, overwrite=True)


def packed_dtype_plan(config: ChatGLMConfig) -> dict[str, torch.dtype]:
    """For transformers' dtype plan: packed weights and their scales are read in float32, which rounds neither."""
    if not config.quantization_bit:
        return {}
    return {rf"{re.escape(layer)}\.weight": torch.float32 for layer in PACKED_LAYERS}


def check_unpacked(model: PreTrainedModel, source: str) -> None:
    """Records in the configuration that the weights are no longer quantised, and how many bits they had.

    Raises:
        ValueError: naming a weight that could not be de-quantised, and why.
    """
    config = model.config
    for name, reason in model.packing_errors.items():
        more = f" (and {len(model.packing_errors) - 1} more)" if len(model.packing_errors) > 1 else ""
        raise ValueError(
            f"{source} says quantization_bit={config.quantization_bit} in its configuration, which does not fit the "
            f"weights {name}{more}: {reason}. If they are not quantised, set quantization_bit to 0 there. To quantise "
            "while loading, use the argument quantization_bit of load_model, or a quantization_config of bitsandbytes."
        )
    if config.quantization_bit:
        config.dequantized_from_bit, config.quantization_bit = config.quantization_bit, 0
