"""Loads a base and its tokenizer for a command, with dtype, device and quantisation for this machine."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from typing import Any

import torch
from transformers.integrations import is_deepspeed_zero3_enabled

from chatglm_ptuning.model.configuration_chatglm import ChatGLMConfig
from chatglm_ptuning.model.hub import find_base
from chatglm_ptuning.model.modeling_chatglm import ChatGLMForConditionalGeneration, ChatGLMPreTrainedModel
from chatglm_ptuning.model.modeling_heads import head_to_come
from chatglm_ptuning.model.quantization import quantization_settings
from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer

_BFLOAT16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16")
_WIDE = 1024
"""Hidden size from which on a CPU with such instructions computes in bfloat16."""


def best_device() -> torch.device:
    """The accelerator of this process (as torchrun or DeepSpeed numbers it), or the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        return torch.device("cpu")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


def choose_dtype(dtype: str, device: torch.device, hidden_size: int) -> torch.dtype:
    """The dtype of the frozen base.

    Args:
        dtype: "auto", "float32", "bfloat16" or "float16". "auto" is bfloat16 on a GPU, or float16 if it has no
            bfloat16. On a CPU it is float32, and bfloat16 for wide bases if the CPU has instructions for it: then these
            train 2 to 4 times as fast in half the memory (docs/measurements.md). Small bases gain less; their results
            stay equal on all CPUs.
        hidden_size: of the base.

    Raises:
        ValueError: for another dtype.
    """
    if dtype != "auto":
        chosen = getattr(torch, dtype, None)
        if chosen not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"dtype must be auto, float32, bfloat16 or float16, got {dtype!r}.")
        return chosen
    if device.type == "cpu":
        has_bfloat16 = any(map(torch.cpu.get_capabilities().get, _BFLOAT16_INSTRUCTIONS))
        return torch.bfloat16 if has_bfloat16 and hidden_size >= _WIDE else torch.float32
    return torch.bfloat16 if device.type != "cuda" or torch.cuda.is_bf16_supported() else torch.float16


def load_model(
    model_name_or_path: str,
    *,
    hub: str = "huggingface",
    revision: str | None = None,
    pre_seq_len: int | None = None,
    prefix_projection: bool = False,
    quantization_bit: int | None = None,
    quantization_type: str = "nf4",
    dtype: str = "auto",
    attn_implementation: str | None = None,
    device_map: str | None = None,
    offload_folder: str | None = None,
    max_memory: dict[int | str, int | str] | None = None,
    model_class: type[ChatGLMPreTrainedModel] = ChatGLMForConditionalGeneration,
    **config_overrides: Any,
) -> ChatGLMPreTrainedModel:
    """Loads a base in evaluation mode, by default onto this process's device.

    Args:
        model_name_or_path: a folder in the official format or in that of transformers' GlmForCausalLM, or a hub name.
        hub, revision: hub and revision of a hub name, see `find_base`.
        pre_seq_len: length of the trainable prefix; None for no prefix.
        quantization_bit: 8 or 4 to quantise the base by bitsandbytes.
        quantization_type: type of the 4-bit numbers, "nf4" or "fp4".
        dtype: see `choose_dtype`.
        device_map: "auto" spreads the layers over all GPUs, then the CPU's memory and the disk; for inference.
        offload_folder: for layers on the disk; by default a temporary folder that is removed when the process ends.
        max_memory: memory of each device, in accelerate's format; by default the free memory.
        model_class: the language model, or one of the classes with a linear head (`modeling_heads.py`).
        config_overrides: fields of ChatGLMConfig to set.

    Raises:
        FileNotFoundError, ConnectionError, ImportError: if there is no base, see `find_base`.
        ValueError: if its configuration is not of this family, or a value is out of range.
    """
    folder = find_base(model_name_or_path, hub, revision)
    device = best_device()
    chosen = choose_dtype(dtype, device, ChatGLMConfig.from_pretrained(folder).hidden_size)
    if pre_seq_len:
        config_overrides |= {"pre_seq_len": pre_seq_len, "prefix_projection": prefix_projection}
    quantization = quantization_settings(quantization_bit, chosen, quantization_type)
    if quantization is not None:
        config_overrides["quantization_config"] = quantization
    if is_deepspeed_zero3_enabled():
        device_map = None  # DeepSpeed places the part of every process
    elif device_map is None:
        device_map = {"": device}
    elif offload_folder is None:
        offload_folder = tempfile.mkdtemp(prefix="chatglm-offload-")
        atexit.register(shutil.rmtree, offload_folder, ignore_errors=True)
    with head_to_come():
        model = model_class.from_pretrained(
            folder,
            dtype=chosen,
            attn_implementation=attn_implementation,
            device_map=device_map,
            offload_folder=offload_folder,
            max_memory=max_memory,
            **config_overrides,
        )
    # Prefix checkpoints record the name; a path in the hub's cache would mean nothing to others.
    model.config.name_or_path = str(model_name_or_path)
    return model.eval()


def load_tokenizer(
    model_name_or_path: str, *, hub: str = "huggingface", revision: str | None = None
) -> ChatGLMTokenizer:
    """Loads the tokenizer of a base; arguments as in `load_model`.

    Raises:
        FileNotFoundError, ConnectionError, ImportError: if there is no base, see `find_base`.
        ValueError: if the base is not of this family, or its vocabulary is missing, damaged or of another family.
    """
    folder = find_base(model_name_or_path, hub, revision, weights=False)
    ChatGLMConfig.from_pretrained(folder)  # refuses other architectures, some of which share the vocabulary
    # Commands make their prompts as ids; no text of a user may set roles, whatever was saved with the tokenizer.
    return ChatGLMTokenizer.from_pretrained(folder, encode_special_tokens=False)
