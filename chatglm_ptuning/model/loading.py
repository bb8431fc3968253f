"""Loading a base and its tokenizer for a command: the right dtype, device and quantisation for this machine."""

from __future__ import annotations

import atexit
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig
from transformers.utils import is_bitsandbytes_available

from chatglm_ptuning.model.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer

DEFAULT_MODEL = str(Path(__file__).resolve().parents[2] / "data" / "chatglm-nano")
"""The base that is bundled with the sources."""

QUANTIZATION_TYPES = ("nf4", "fp4")
DEVICE_MAP_HELP = "auto: spread the base over all GPUs, then the CPU's memory and the disk (default: one device)"


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


def quantization_settings(
    bits: int | None, dtype: torch.dtype, quantization_type: str = "nf4"
) -> BitsAndBytesConfig | None:
    """Settings of bitsandbytes for a base in 8 bits, or in 4 with double quantisation; None for neither.

    The prefix, a head and the output layer keep their precision.

    Args:
        dtype: of the computation with 4-bit weights.
        quantization_type: the 4-bit numbers, "nf4" or "fp4".

    Raises:
        ValueError: if bits is not None, 0, 4 or 8, or the type is unknown.
        ImportError: if bitsandbytes is not installed.
    """
    check_quantization(bits, quantization_type)
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


def check_quantization(bits: int | None, quantization_type: str) -> None:
    """Checks the values of `--quantization_bit` and `--quantization_type`.

    Raises:
        ValueError: naming the flag and its value.
    """
    if bits not in (None, 0, 4, 8):
        raise ValueError(f"--quantization_bit must be 4 or 8, got {bits}")
    if quantization_type not in QUANTIZATION_TYPES:
        raise ValueError(f"--quantization_type must be {' or '.join(QUANTIZATION_TYPES)}, got {quantization_type!r}")


def check_device_map(device_map: str | None) -> None:
    """Checks the value of `--device_map`.

    Raises:
        ValueError: naming the flag and its value.
    """
    if device_map not in (None, "auto"):
        raise ValueError(f"--device_map must be auto, got {device_map!r}")


def _is_no_cast_notice(record: logging.LogRecord) -> bool:
    # bitsandbytes says at every layer of every step that 8-bit products are computed in float16.
    return "inputs will be cast" not in record.getMessage()


def _keep_layout(model: torch.nn.Module) -> None:
    # On some CPUs bitsandbytes re-orders 4-bit weights at the first inference, and from then on gives no gradients.
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _temporary_folder() -> str:
    folder = tempfile.mkdtemp(prefix="chatglm-offload-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


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
    quantization_type: str = "nf4",
    dtype: str = "auto",
    attn_implementation: str | None = None,
    device_map: str | None = None,
    offload_folder: str | None = None,
    max_memory: dict[int | str, int | str] | None = None,
    **config_overrides: Any,
) -> ChatGLMForConditionalGeneration:
    """Loads a base once, in evaluation mode, onto this process's device unless `device_map` says otherwise.

    Args:
        model_name_or_path: a folder in the official layout, or a hub name.
        pre_seq_len: length of a trainable prefix to put in front; None for none.
        quantization_bit: 8 or 4 for a quantised base through bitsandbytes.
        quantization_type: "nf4" or "fp4", the numbers of 4 bits.
        dtype: see `choose_dtype`.
        device_map: "auto" spreads the layers over all GPUs, the CPU's memory and the disk, as far as each is needed;
            for inference.
        offload_folder: for layers on the disk; by default a temporary folder that goes when the process ends.
        max_memory: of each device, as accelerate takes it; by default what is free.
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
    quantization = quantization_settings(quantization_bit, chosen, quantization_type)
    if quantization is not None:
        overrides["quantization_config"] = quantization
    if attn_implementation:
        overrides["attn_implementation"] = attn_implementation
    if device_map is None:
        overrides["device_map"] = {"": device}
    else:
        overrides |= {"device_map": device_map, "offload_folder": offload_folder or _temporary_folder()}
        overrides |= {"max_memory": max_memory} if max_memory else {}
    model = ChatGLMForConditionalGeneration.from_pretrained(model_name_or_path, dtype=chosen, **overrides)
    if pre_seq_len and quantization is not None:
        _keep_layout(model)
    return model.eval()


def load_tokenizer(model_name_or_path: str) -> ChatGLMTokenizer:
    """Loads the tokenizer that lies beside the base.

    Raises:
        FileNotFoundError: if there is no base at the path.
        ValueError: if its vocabulary is missing, damaged or of another family.
    """
    check_folder(model_name_or_path)
    return ChatGLMTokenizer.from_pretrained(model_name_or_path)
