"""Registers the kit's classes with transformers' Auto classes: official folders load without their remote code."""

from __future__ import annotations

from functools import wraps
from os import PathLike
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedConfig,
)

from chatglm_ptuning.files import check_json_files
from chatglm_ptuning.model.configuration_chatglm import ChatGLMConfig
from chatglm_ptuning.model.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm_ptuning.model.modeling_heads import (
    ChatGLMForQuestionAnswering,
    ChatGLMForSequenceClassification,
    ChatGLMForTokenClassification,
)
from chatglm_ptuning.model.tokenization_chatglm import ChatGLM4Tokenizer, ChatGLMTokenizer, check_settings

_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")

_auto_config, _auto_tokenizer = AutoConfig.from_pretrained, AutoTokenizer.from_pretrained


@wraps(_auto_config)
def _named_config(pretrained_model_name_or_path: str | PathLike[str], *args: Any, **kwargs: Any) -> Any:
    try:
        return _auto_config(pretrained_model_name_or_path, *args, **kwargs)
    except OSError:
        check_json_files(Path(pretrained_model_name_or_path), "config.json")  # says what is wrong with it
        raise


@wraps(_auto_tokenizer)
def _tokenizer_of_the_kit(pretrained_model_name_or_path: str | PathLike[str], *inputs: Any, **kwargs: Any) -> Any:
    trusted = kwargs.get("trust_remote_code")
    # Without trust, transformers finds the kit's class under a hub name by itself.
    if (trusted or Path(pretrained_model_name_or_path).is_dir()) and _is_of_the_family(
        pretrained_model_name_or_path, kwargs
    ):
        check_settings(pretrained_model_name_or_path)
        kwargs["trust_remote_code"] = False
    return _auto_tokenizer(pretrained_model_name_or_path, *inputs, **kwargs)


def _is_of_the_family(path: str | PathLike[str], kwargs: dict[str, Any]) -> bool:
    """Whether the base is one of the kit's, by the argument `config` or its config.json.

    Raises:
        ValueError: for a base of `model_type` chatglm with another architecture or a damaged configuration.
    """
    if kwargs.get("config") is not None:
        return isinstance(kwargs["config"], ChatGLMConfig)
    where = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
    check_json_files(Path(path), "config.json")
    try:
        fields, _ = PreTrainedConfig.get_config_dict(path, **where)
    except OSError:
        return False  # transformers has the message
    if fields.get("model_type") != ChatGLMConfig.model_type:
        return False
    ChatGLMConfig.from_pretrained(path, **where)
    return True


def register_auto_classes() -> None:
    """Makes transformers' Auto classes use the kit's classes for `model_type` chatglm, with or without
    `trust_remote_code`.
    """
    AutoConfig.register("chatglm", ChatGLMConfig, exist_ok=True)
    # As in the official files, whose `auto_map` gives these the class that can chat.
    for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM):
        auto_class.register(ChatGLMConfig, ChatGLMForConditionalGeneration, exist_ok=True)
    AutoModelForSequenceClassification.register(ChatGLMConfig, ChatGLMForSequenceClassification, exist_ok=True)
    AutoModelForTokenClassification.register(ChatGLMConfig, ChatGLMForTokenClassification, exist_ok=True)
    AutoModelForQuestionAnswering.register(ChatGLMConfig, ChatGLMForQuestionAnswering, exist_ok=True)
    # The second is registered by its name alone, which GLM-4's tokenizer_config.json gives.
    AutoTokenizer.register(ChatGLMConfig, ChatGLMTokenizer, slow_tokenizer_class=ChatGLM4Tokenizer, exist_ok=True)
    # Unlike the other Auto classes, AutoTokenizer prefers remote code to a registered class if both are allowed.
    AutoTokenizer.from_pretrained = staticmethod(_tokenizer_of_the_kit)
    AutoConfig.from_pretrained = staticmethod(_named_config)
