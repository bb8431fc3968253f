"""Loading a base and its tokenizer for a command: the right dtype, device and quantisation for this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import is_bitsandbytes_available

from chatglm_ptuning.model.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer

DEFAULT_MODEL = str(Path(__file__).resolve().parents[2] / "data" / "chatglm-nano")
"""The base that is bundled with the sources."""


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


def check_folder(model_name_or_path: str) -> None:
    """Refuses a base that is not there, before transformers looks for it on the hub.

    Raises:
        FileNotFoundError: naming the path, if it looks like a local one.
    """
    path = Path(model_name_or_path)
    looks_local = path.is_absolute() or model_name_or_path.startswith(".") or model_name_or_path.count("/") != 1
    if path.is_dir() and not (path / "config.json").exists():
        raise FileNotFoundError(f"{path} is not a base: it has no config.json.")
    if looks_local and not path.exists():
        raise FileNotFoundError(
            f"No base at {path}. Give the folder of ChatGLM2-6B, ChatGLM3-6B or GLM-4-9B with config.json and weights."
        )


def load_model(
    model_name_or_path: str,
    *,
    pre_seq_len: int | None = None,
    prefix_projection: bool = False,
    quantization_bit: int | None = None,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    **config_overrides: Any,
) -> ChatGLMForConditionalGeneration:
    """Loads a base once, onto this process's device, in evaluation mode.

    Args:
        model_name_or_path: a folder in the official layout, or a hub name.
        pre_seq_len: length of a trainable prefix to put in front; None for none.
        quantization_bit: 8 or 4 for a quantised base through bitsandbytes.
        dtype: see `choose_dtype`.
        config_overrides: fields of ChatGLMConfig to set.

    Raises:
        FileNotFoundError: if there is no base at the path.
        ValueError: if its configuration is not of this family, or a value is out of range.
    """
    check_folder(model_name_or_path)
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
    # Under ZeRO-3 DeepSpeed puts every process's part where it belongs.
    device_map = None if is_deepspeed_zero3_enabled() else {"": device}
    model = ChatGLMForConditionalGeneration.from_pretrained(
        model_name_or_path, dtype=chosen, device_map=device_map, **overrides
    )
    return model.eval()


def load_tokenizer(model_name_or_path: str) -> ChatGLMTokenizer:
    """Loads the tokenizer that lies beside the base.

    Raises:
        FileNotFoundError: if there is no base at the path.
        ValueError: if its vocabulary is missing, damaged or of another family.
    """
    check_folder(model_name_or_path)
    return ChatGLMTokenizer.from_pretrained(model_name_or_path)
