"""The weights of a base: reading single ones, the fingerprint, and messages about files that do not load."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import align_module_device
from transformers import PreTrainedModel

from chatglm_ptuning.files import read_tensors
from chatglm_ptuning.model.configuration_chatglm import ChatGLMConfig
from chatglm_ptuning.model.zero3 import gathered, is_partitioned
from chatglm_ptuning.prefix.fingerprint import fingerprint_of

_SHAPE_FIELDS = ("num_layers", "padded_vocab_size", "hidden_size", "ffn_hidden_size", "kv_channels",
                 "num_attention_heads", "multi_query_attention", "multi_query_group_num", "rope_ratio")  # fmt: skip
_WEIGHT_FILE = re.compile(r"(pytorch_model|model)(-\d+-of-\d+)?\.(bin|safetensors)")
_NAMES_SHOWN = 5


def fingerprint_of_base(base: PreTrainedModel) -> dict[str, Any]:
    """The fingerprint by which prefixes recognise a base. Under ZeRO-3, must be called on every rank.

    Args:
        base: the ChatGLMModel.
    """
    return fingerprint_with(base.config, partial(read_weight, base))


def fingerprint_with(config: ChatGLMConfig, read: Callable[[str], tuple[torch.Tensor | None, bool]]) -> dict[str, Any]:
    """The fingerprint of a base.

    The sample is taken from the embeddings, and from norms and linear layers at the bottom, middle and top.

    Args:
        read: gives a weight by its name in the ChatGLMModel, as `read_weight` does.
    """
    names = ["embedding.word_embeddings.weight"]
    if config.post_layer_norm:
        names.append("encoder.final_layernorm.weight")
    for layer in sorted({0, config.num_layers // 2, config.num_layers - 1}):
        names += [
            f"encoder.layers.{layer}.{part}.weight"
            for part in ("input_layernorm", "self_attention.query_key_value", "mlp.dense_4h_to_h")
        ]
    return fingerprint_of({name: getattr(config, name) for name in _SHAPE_FIELDS}, names, read)


def read_weight(base: PreTrainedModel, name: str) -> tuple[torch.Tensor | None, bool]:
    """One weight of the base, and whether it has its full precision. Under ZeRO-3, must be called on every rank.

    Args:
        base: the ChatGLMModel.
        name: name of a parameter in it.

    Returns:
        The weight in floating point, on any device; None if this process does not hold it (a meta tensor, or one that
        bitsandbytes has re-ordered for this CPU). False if it was quantised, by bitsandbytes or in its file.
    """
    module_name, _, leaf = name.rpartition(".")
    module = base.get_submodule(module_name)
    parameter = getattr(module, leaf)
    if is_partitioned([parameter]):
        with gathered([parameter]):
            return parameter.detach().clone(), True
    with align_module_device(module):  # loads an offloaded weight into memory meanwhile
        weight = getattr(module, leaf)
        if weight.is_meta or weight.numel() == 0:
            return None, True
        if type(weight).__name__ in ("Params4bit", "Int8Params"):
            if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
                return None, False
            from transformers.integrations.bitsandbytes import dequantize_bnb_weight  # imports bitsandbytes

            layer = getattr(module, "base_layer", module)  # inside a layer of PEFT
            return dequantize_bnb_weight(weight, getattr(layer, "state", None)), False
        # An official quantised checkpoint packs the linear layers of the encoder, and nothing else.
        packed = bool(base.config.dequantized_from_bit) and isinstance(module, torch.nn.Linear)
        return weight.detach(), not packed


def describe_damage(folder: Path) -> str | None:
    """Which weight file of a folder cannot be opened, and why; None if all of them can.

    A pickle that holds more than tensors cannot be opened: it could run any code.
    """
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if _WEIGHT_FILE.fullmatch(path.name):
            try:
                read_tensors(path, lambda name: False)
            except ValueError as error:
                return str(error)
    return None


def describe_missing(source: str, missing: Collection[str]) -> str:
    """Which parameters of the base are missing in the files at `source`."""
    shown = ", ".join(sorted(missing)[:_NAMES_SHOWN])
    more = f" and {len(missing) - _NAMES_SHOWN} more" if len(missing) > _NAMES_SHOWN else ""
    return (
        f"{source} is not a complete base: its weight files lack {shown}{more}. If it holds only a prefix, load the "
        "base and then the prefix by load_prefix."
    )
