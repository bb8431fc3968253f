"""Sets vLLM up for a base: what it cannot serve is refused, and its flags follow from the base."""

from __future__ import annotations

import json
from pathlib import Path

from chatglm_ptuning.files import read_json_object
from chatglm_ptuning.model.configuration_chatglm import ChatGLMConfig
from chatglm_ptuning.model.hub import find_base
from chatglm_ptuning.model.loading import best_device, choose_dtype, load_model
from chatglm_ptuning.model.modeling_chatglm import ChatGLMPreTrainedModel
from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer
from chatglm_ptuning.prefix.formats import official
from chatglm_ptuning.serving.engine.engine import LONGEST_PREFIX
from chatglm_ptuning.serving.engine.prefixes import PrefixFolder
from chatglm_ptuning.serving.vllm.engine import VllmEngine
from chatglm_ptuning.serving.vllm.exports import Exports
from chatglm_ptuning.serving.vllm.process import VllmProcess, find_python

_MOST_LOGPROBS = 21
"""The 20 of a request, and the chosen token."""


def check_servable(config: ChatGLMConfig, folder: Path) -> None:
    """Checks that vLLM computes a base as this kit does.

    Args:
        folder: of the base.

    Raises:
        ValueError: with the reason and the way out, if not.
    """
    own_engine = "Leave out --engine vllm: this kit's own engine serves it."
    if config.position_scale != 1.0:
        raise ValueError(
            f"{folder} is ChatGLM2-6B-32K: its rope_ratio divides the positions by {config.position_scale:g}, and vLLM "
            f"multiplies the rotary base by it, so that answers would differ. {own_engine}"
        )
    if bits := config.quantization_bit or config.dequantized_from_bit:
        raise ValueError(
            f"{folder} has weights in the official {bits}-bit format, which vLLM does not read. Serve the unquantised "
            f"base. {own_engine}"
        )
    is_official = read_json_object(folder / "config.json").get("model_type", "chatglm") == "chatglm"
    if is_official and not config.multi_query_attention:
        raise ValueError(
            f"{folder} has multi_query_attention false: its queries, keys and values are stored head by head, which "
            f"vLLM reads in another order. {own_engine}"
        )
    if is_official and config.hidden_size != config.num_attention_heads * config.kv_channels:
        raise ValueError(
            f"{folder} has kv_channels {config.kv_channels}, which is not hidden_size / num_attention_heads "
            f"({config.hidden_size} / {config.num_attention_heads}), as vLLM takes it to be. {own_engine}"
        )
    if official.has_prefix(folder):
        raise ValueError(
            f"{folder} holds a prefix among the weights of the base, which vLLM does not load. Serve the plain base, "
            "with the prefix in a folder of its own."
        )


def make_engine(
    base: str,
    hub: str,
    revision: str | None,
    folder: PrefixFolder,
    tokenizer: ChatGLMTokenizer,
    *,
    python: str | None,
    more_flags: str,
    slots: int,
    slot_tokens: int | None,
    queue_limit: int,
    prefix_memory_mb: int,
    base_name: str,
) -> tuple[VllmEngine, ChatGLMPreTrainedModel]:
    """An engine that is not started, and the base without its weights.

    The weights are read once, for the fingerprint by which prefixes recognise their base.

    Args:
        base, hub, revision: as in `load_model`.
        python: see `find_python`.
        more_flags: further flags of vLLM's server.
        slots, slot_tokens, queue_limit: as in `Engine`.
        prefix_memory_mb: memory of each of vLLM's workers for prefixes.
        base_name: name of the plain base in requests to vLLM.

    Raises:
        OSError, ValueError, ImportError: if the base cannot be loaded, vLLM cannot serve it, or there is no vLLM.
    """
    path = find_base(base, hub, revision)
    config = ChatGLMConfig.from_pretrained(path)
    check_servable(config, path)
    found = find_python(python)
    longest = config.seq_length + LONGEST_PREFIX if slot_tokens is None else slot_tokens
    for name, value, least in (("slots", slots, 1), ("slot_tokens", longest, 2), ("queue_limit", queue_limit, 0)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}.")
    model = load_model(base, hub=hub, revision=revision, device_map={"": "cpu"})
    model.base_model.known_fingerprint = model.base_fingerprint()
    model.to("meta")
    # The rotary tables have as many places as the configuration says. Fields that vLLM needs, and files may lack.
    overrides = {"seq_length": longest, "max_position_embeddings": longest, "original_rope": config.original_rope,
                 "padded_vocab_size": config.padded_vocab_size}  # fmt: skip
    flags = [
        "--model", str(path), "--dtype", str(choose_dtype("auto", best_device(), config.hidden_size)).split(".")[-1],
        "--max-model-len", str(longest), "--max-num-seqs", str(slots), "--max-logprobs", str(_MOST_LOGPROBS),
        "--hf-overrides", json.dumps(overrides), "--generation-config", "vllm", "--enable-prompt-tokens-details",
        "--disable-uvicorn-access-log",
    ]  # fmt: skip
    # A token that every prompt has: then a repetition penalty does not count the placeholders.
    placeholder = next(iter(tokenizer.chat.start_ids), tokenizer.pad_token_id or 0)
    settings = {"placeholder_id": placeholder, "prefix_memory_mb": prefix_memory_mb}
    process = VllmProcess(found, flags, more_flags, settings, base_name)
    engine = VllmEngine(
        process, Exports(model, folder, process.prefix_dir), config,
        slots=slots, slot_tokens=longest, queue_limit=queue_limit, base_name=base_name,
    )  # fmt: skip
    return engine, model
