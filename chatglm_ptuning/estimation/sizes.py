"""Sizes of the published bases by name, as far as memory and time depend on them."""

from __future__ import annotations

import difflib
from pathlib import Path

from chatglm_ptuning.model.configuration_chatglm import ChatGLMConfig

_SIX_B = {"num_layers": 28, "padded_vocab_size": 65024}
_NINE_B = {"num_layers": 40, "padded_vocab_size": 151552}
_SHARED = {
    "hidden_size": 4096, "ffn_hidden_size": 13696, "kv_channels": 128, "num_attention_heads": 32,
    "multi_query_attention": True, "multi_query_group_num": 2, "add_qkv_bias": True,
}  # fmt: skip

KNOWN_SIZES = {
    "chatglm2-6b": _SIX_B,
    "chatglm2-6b-32k": _SIX_B,
    "chatglm3-6b": _SIX_B,
    "chatglm3-6b-base": _SIX_B,
    "chatglm3-6b-32k": _SIX_B,
    "chatglm3-6b-128k": _SIX_B,
    "codegeex2-6b": _SIX_B,
    "glm-4-9b": _NINE_B,
    "glm-4-9b-chat": _NINE_B,
    "glm-4-9b-chat-1m": _NINE_B | {"multi_query_group_num": 4},
}
"""The sizes in which they differ (source: their config.json)."""


def find_config(model: str) -> ChatGLMConfig:
    """The configuration of a published base by name, or of a folder with a config.json.

    Raises:
        ValueError: naming the known names, if it is neither; or if the folder holds another family of models.
    """
    folder = Path(model)
    if (folder / "config.json").is_file():
        return ChatGLMConfig.from_pretrained(folder)
    name = model.lower().rpartition("/")[2]
    if folder.is_dir() or name not in KNOWN_SIZES:
        near = difflib.get_close_matches(name, KNOWN_SIZES, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(
            f"{model} is neither a folder with a config.json nor a known size{hint}: {', '.join(KNOWN_SIZES)}."
        )
    return ChatGLMConfig(**_SHARED | KNOWN_SIZES[name])
