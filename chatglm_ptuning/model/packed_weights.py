"""Official checkpoints in 4 or 8 bits (`chatglm2-6b-int4`), de-quantised tensor by tensor while they load.

Their `config.json` has `quantization_bit`, and every linear layer of the encoder an int8 `weight` and a `weight_scale`
of one number per output row; embedding, norms, biases and output layer are as in any other checkpoint. A weight is
`scale * integer`, where the scale is the row's largest absolute weight over `2 ** (bits - 1) - 1`. With 4 bits a byte
holds two neighbours of a row, the even input in the high half, each in two's complement (source: the extraction
kernels in `quantization.py` of chatglm2-6b).
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
    """Weights `[out_features, in_features]`, float32, from packed ones.

    Args:
        packed: integers from -128 to 127 in any dtype, `[out_features, in_features * bits / 8]`.
        scale: `[out_features]`.
        bits: 4 or 8.

    Raises:
        ValueError: if it is neither, or the shapes do not fit.
    """
    if bits not in (4, 8):
        raise ValueError(f"{bits} bits are not a published form, which are 4 and 8")
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
    """Passes an ordinary weight on, and turns a packed one with its scale into an ordinary one."""

    def convert(
        self,
        input_dict: dict[str, list[torch.Tensor]],
        target_patterns: list[str],
        full_layer_name: str,
        model: PreTrainedModel,
        config: ChatGLMConfig,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """The weight under its pattern, in the dtype of the model; nothing if it cannot be had.

        What is wrong then goes into the model's `packing_errors`: transformers would only log an exception.
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

    @property
    def reverse_op(self) -> ConversionOps:
        """A model is saved as it is in memory: unpacked."""
        return _AsItIs()


class _AsItIs(ConversionOps):
    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return input_dict


def register_packed_weights() -> None:
    """Lets transformers load packed checkpoints into every ChatGLM class; called once, after other conversions."""
    converters = [
        WeightConverter([f"{layer}.weight", f"{layer}.weight_scale"], f"{layer}.weight", [Unpack()])
        for layer in PACKED_LAYERS
    ]
    others = get_checkpoint_conversion_mapping(ChatGLMConfig.model_type) or []
    register_checkpoint_conversion_mapping(ChatGLMConfig.model_type, others + converters, overwrite=True)


def packed_dtype_plan(config: ChatGLMConfig) -> dict[str, torch.dtype]:
    """For transformers' plan of dtypes: packed weights and their scales are read in float32, which rounds neither."""
    if not config.quantization_bit:
        return {}
    return {rf"{re.escape(layer)}\.weight": torch.float32 for layer in PACKED_LAYERS}


def check_unpacked(model: PreTrainedModel, source: str) -> None:
    """Notes in the configuration that the weights are ordinary ones now, and from how many bits they came.

    Raises:
        ValueError: naming a weight that could not be unpacked, and why.
    """
    config = model.config
    for name, reason in model.packing_errors.items():
        more = f" (and {len(model.packing_errors) - 1} more)" if len(model.packing_errors) > 1 else ""
        raise ValueError(
            f"{source} says quantization_bit={config.quantization_bit} in its configuration, which does not fit the "
            f"weights {name}{more}: {reason}. If they are not quantised, set quantization_bit to 0 there; to quantise "
            "while loading, use --quantization_bit, or a quantization_config of bitsandbytes."
        )
    if config.quantization_bit:
        config.dequantized_from_bit, config.quantization_bit = config.quantization_bit, 0
