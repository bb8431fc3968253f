"""Writes whole folders of a base: in the official format, with or without a prefix, and for GlmForCausalLM."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

from chatglm_ptuning.files import read_json_object, read_json_object_or_empty, write_json
from chatglm_ptuning.model.base_files import BaseFiles
from chatglm_ptuning.model.fast_tokenizer import fast_tokenizer
from chatglm_ptuning.model.native_glm import glm_config, glm_tensors
from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer
from chatglm_ptuning.model.vocabulary import BytePairVocabulary
from chatglm_ptuning.prefix.checkpoint import PREFIX_KEY, PrefixCheckpoint

_TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                    "added_tokens.json", "chat_template.jinja")  # fmt: skip
_OTHER_FILES = ("generation_config.json", "*.py", "*LICENSE*")
_NO_TOKENIZER = "{} has no tokenizer: copy its files into the folder."
_CODE = "modeling_chatglm.py"
# Of the official config.json. Programs with the official Python files find the classes by it.
_AUTO_MAP = {
    "AutoConfig": "configuration_chatglm.ChatGLMConfig",
    "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForSequenceClassification": "modeling_chatglm.ChatGLMForSequenceClassification",
}


def official_config(base: BaseFiles, checkpoint: PrefixCheckpoint | None) -> dict[str, Any]:
    """The content of config.json for a base in the official format, with the size of the prefix."""
    own = base.config.to_dict()
    fields = own if base.is_glm else read_json_object(base.folder / "config.json")
    fields = {
        name: value for name, value in fields.items() if name not in ("pre_seq_len", "prefix_projection", "dtype")
    }
    fields = {"architectures": ["ChatGLMModel"], "torch_dtype": own["dtype"]} | fields
    fields |= {name: own[name] for name in ("eos_token_id", "pad_token_id") if name not in fields}
    if base.config.rope_ratio != 1:  # what it means would else be told by the name of the folder
        fields["position_interpolation"] = base.config.position_interpolation
    if checkpoint is not None:
        fields["pre_seq_len"] = checkpoint.metadata.pre_seq_len
        fields["prefix_projection"] = checkpoint.metadata.prefix_projection
    return fields


def write_official_base(base: BaseFiles, folder: Path, checkpoint: PrefixCheckpoint | None = None) -> list[str]:
    """Writes a base in the official format, with a prefix among its weights if there is one.

    Args:
        folder: empty.

    Returns:
        What the folder lacks for programs with the official Python code, a sentence for each.

    Raises:
        FileNotFoundError, ValueError: naming a damaged file of the base.
        OSError: if the disk is full.
    """
    parameters = {} if checkpoint is None else checkpoint.parameters
    base.copy_weights(folder, added={PREFIX_KEY + name: value.float() for name, value in parameters.items()})
    _copy(base.folder, folder, _OTHER_FILES)
    tokenizer = _tokenizer(base)
    if tokenizer is not None and base.is_glm:
        tokenizer.save_pretrained(folder)
    elif tokenizer is not None:
        _copy(base.folder, folder, _TOKENIZER_FILES)
    config = official_config(base, checkpoint)
    config["auto_map"] = _AUTO_MAP | config.get("auto_map", {})
    write_json(folder / "config.json", config)
    if tokenizer is None:
        return [_NO_TOKENIZER.format(base.folder)]
    # The chat format would else be told by the name of the folder.
    settings = folder / "tokenizer_config.json"
    name = "ChatGLM4Tokenizer" if isinstance(tokenizer.vocabulary, BytePairVocabulary) else "ChatGLMTokenizer"
    known = {"auto_map": {"AutoTokenizer": [f"tokenization_chatglm.{name}", None]}, "tokenizer_class": name}
    write_json(settings, known | read_json_object_or_empty(settings) | {"chat_format": tokenizer.chat_format})
    if not (folder / _CODE).exists():
        return [
            "Programs with the official Python code, such as the converter of chatglm.cpp, also need its files: copy "
            f"configuration_chatglm.py, {_CODE}, tokenization_chatglm.py and quantization.py (of ChatGLM2 and "
            "ChatGLM3) from the repository of the base into the folder."
        ]
    return []


def write_glm_base(base: BaseFiles, folder: Path) -> list[str]:
    """Writes a base for transformers' GlmForCausalLM; arguments, result and errors as `write_official_base`.

    Raises:
        ValueError: also if GlmForCausalLM cannot express the base, see `glm_config`.
    """
    settings = glm_config(base.config)
    base.copy_weights(folder, partial(glm_tensors, config=base.config))
    _copy(base.folder, folder, ("generation_config.json", "*LICENSE*"))
    settings.save_pretrained(folder)
    tokenizer = _tokenizer(base)
    if tokenizer is None:
        return [_NO_TOKENIZER.format(base.folder)]
    fast = fast_tokenizer(tokenizer)
    if fast is None:
        tokenizer.save_pretrained(folder)
        return [
            "The vocabulary has no equal in transformers' own tokenizers: load the tokenizer by ChatGLMTokenizer of "
            "this kit, not by AutoTokenizer."
        ]
    fast.save_pretrained(folder)
    settings_file = folder / "tokenizer_config.json"
    # The name that every version of transformers knows.
    write_json(settings_file, read_json_object(settings_file) | {"tokenizer_class": "PreTrainedTokenizerFast"})
    tokenizer.save_vocabulary(str(folder))  # for this kit
    return []


def _tokenizer(base: BaseFiles) -> ChatGLMTokenizer | None:
    """The tokenizer of a base; None if its folder has none.

    Raises:
        ValueError: naming the file, if it is damaged.
    """
    if not any((base.folder / name).exists() for name in ChatGLMTokenizer.vocab_files_names.values()):
        return None
    return ChatGLMTokenizer.from_pretrained(base.folder)


def _copy(source: Path, target: Path, patterns: tuple[str, ...]) -> None:
    for file in (file for pattern in patterns for file in sorted(source.glob(pattern)) if file.is_file()):
        shutil.copyfile(file, target / file.name)
