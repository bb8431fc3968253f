"""Quantising a base with bitsandbytes while it loads."""

from __future__ import annotations

import logging
from typing import Literal, get_args

import torch
from transformers import BitsAndBytesConfig
from transformers.utils import is_bitsandbytes_available

QuantizationType = Literal["nf4", "fp4"]
QUANTIZATION_TYPES = get_args(QuantizationType)


def quantization_settings(
    bits: int | None, dtype: torch.dtype, quantization_type: QuantizationType = "nf4"
) -> BitsAndBytesConfig | None:
    """Settings of bitsandbytes for a base in 8 bits, or in 4 bits with double quantisation; None for no quantisation.

    The prefix, a head and the output layer are not quantised.

    Args:
        dtype: of the computation with 4-bit weights.
        quantization_type: type of the 4-bit numbers.

    Raises:
        ValueError: if bits is not None, 0, 4 or 8, or the type is unknown.
        ImportError: if bitsandbytes is not installed.
    """
    if bits not in (None, 0, 4, 8):
        raise ValueError(f"quantization_bit must be 4 or 8, got {bits}.")
    if quantization_type not in QUANTIZATION_TYPES:
        raise ValueError(f"quantization_type must be {' or '.join(QUANTIZATION_TYPES)}, got {quantization_type!r}.")
    if not bits:
        return None
    if not is_bitsandbytes_available():
        raise ImportError("quantization_bit needs bitsandbytes: pip install bitsandbytes.")
    kept = ["output_layer", "prefix_encoder", "classifier_head", "qa_outputs"]
    if bits == 8:
        logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_no_cast_notice)
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization_type,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=kept,
    )


def _is_no_cast_notice(record: logging.LogRecord) -> bool:
    # bitsandbytes logs at every layer of every step that 8-bit products are computed in float16.
    return "inputs will be cast" not in record.getMessage()


def keep_layout(model: torch.nn.Module) -> None:
    """Makes bitsandbytes keep the layout of its 4-bit weights, so that every CPU computes the same.

    On CPUs with AVX512-BF16 it would re-order them at the first inference. They would then give no gradients, a
    float32 model would compute in bfloat16, and shapes that are not multiples of its blocks would fail.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
