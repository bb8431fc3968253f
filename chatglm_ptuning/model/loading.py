"""Loading a base and its tokenizer for a command: the right dtype, device and quantisation for this machine."""

from __future__ import annotations

from typing import Any

import torch
from transformers import BitsAndBytesConfig
from transformers.utils import is_bitsandbytes_available

from chatglm_ptuning.model.configuration_chatglm import ChatGLMConfig
from chatglm_ptuning.model.hub import find_base
from chatglm_ptuning.model.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer


def best_device() -> torch.device:
    """The accelerator of this process (as torchrun or DeepSpeed numbers it), or the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        return torch.device("cpu")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype of the frozen base.

    Args:
        dtype: "auto", "float32", "bfloat16" or "float16". "auto" is float32 on a CPU, where 16 bits are slow, and
            otherwise bfloat16, or float16 on GPUs that cannot compute in it.

    Raises:
        ValueError: if it is none of these.
    """
    if dtype != "auto":
        chosen = getattr(torch, dtype, None)
        if chosen not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"dtype must be auto, float32, bfloat16 or float16, got {dtype!r}.")
        return chosen
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if device.type != "cuda" or torch.cuda.is_bf16_supported() else torch.float16


def quantization_settings(bits: int | None, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """Settings of bitsandbytes for a base in 8 bits, or in 4 (nf4 with double quantisation); None for neither.

    The prefix and the output layer keep their precision.

    Raises:
        ValueError: if bits is not None, 0, 4 or 8.
        ImportError: if bitsandbytes is not installed.
    """
    if not bits:
        return None
    if bits not in (4, 8):
        raise ValueError(f"quantization_bit must be 4 or 8, got {bits}.")
    if not is_bitsandbytes_available():
        raise ImportError("quantization_bit needs bitsandbytes: pip install bitsandbytes.")
    kept = ["output_layer", "prefix_encoder"]
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=kept,
    )


def load_model(
    model_name_or_path: str,
    *,
    hub: str = "hf",
    revision: str | None = None,
    pre_seq_len: int | None = None,
    prefix_projection: bool = False,
    quantization_bit: int | None = None,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    **config_overrides: Any,
) -> ChatGLMForConditionalGeneration:
    """Loads a base once, onto this process's device, in evaluation mode.

    Args:
        model_name_or_path: a folder in the official layout or in that of transformers' GlmForCausalLM, or a hub name.
        hub, revision: of a hub name, see `find_base`.
        pre_seq_len: length of a trainable prefix to put in front; None for none.
        quantization_bit: 8 or 4 for a quantised base through bitsandbytes.
        dtype: see `choose_dtype`.
        config_overrides: fields of ChatGLMConfig to set.

    Raises:
        FileNotFoundError, ConnectionError, ImportError: if there is no base, see `find_base`.
        ValueError: if its configuration is not of this family, or a value is out of range.
    """
    folder = find_base(model_name_or_path, hub, revision)
    device = best_device()
    chosen = choose_dtype(dtype, device)
    overrides = {**config_overrides}
    if pre_seq_len:
        overrides |= {"pre_seq_len": pre_seq_len, "prefix_projection": prefix_projection}
    quantization = quantization_settings(quantization_bit, chosen)
    if quantization is not None:
        overrides["quantization_config"] = quantization
    if attn_implementation:
        overrides["attn_implementation"] = attn_implementation
    model = ChatGLMForConditionalGeneration.from_pretrained(folder, dtype=chosen, device_map={"": device}, **overrides)
    # Prefix checkpoints record it: a path in the hub's cache says little to others.
    model.config.name_or_path = str(model_name_or_path)
    return model.eval()


def load_tokenizer(model_name_or_path: str, *, hub: str = "hf", revision: str | None = None) -> ChatGLMTokenizer:
    """Loads the tokenizer that lies beside the base; arguments as in `load_model`.

    Raises:
        FileNotFoundError, ConnectionError, ImportError: if there is no base, see `find_base`.
        ValueError: if the base is not of this family, or its vocabulary is missing, damaged or of another family.
    """
    folder = find_base(model_name_or_path, hub, revision, weights=False)
    ChatGLMConfig.from_pretrained(folder)  # refuses other architectures, some of which share the vocabulary
    return ChatGLMTokenizer.from_pretrained(folder)
