"""Settings beside a base that editors and other programs have changed: byte order marks, damage, dtypes."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny_chat_base
import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer

from chatglm_ptuning import ChatGLMConfig, ChatGLMForConditionalGeneration, ChatGLMTokenizer
from chatglm_ptuning.model.loading import load_model, load_tokenizer

MARK = b"\xef\xbb\xbf"
TOKENIZERS = [ChatGLMTokenizer.from_pretrained, AutoTokenizer.from_pretrained, lambda path: load_tokenizer(str(path))]
MODELS = [
    ChatGLMForConditionalGeneration.from_pretrained,
    AutoModel.from_pretrained,
    lambda path: load_model(str(path)),
]
# File -> what reads it.
READERS = {
    "config.json": [ChatGLMConfig.from_pretrained, AutoConfig.from_pretrained, *TOKENIZERS, *MODELS],
    "tokenizer_config.json": TOKENIZERS,
    "special_tokens_map.json": TOKENIZERS,
    "generation_config.json": MODELS,
    "pytorch_model.bin.index.json": MODELS,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tiny_chat_base.write_base(tmp_path_factory.mktemp("settings") / "chatglm3-6b")
    (folder / "generation_config.json").write_text('{"eos_token_id": [7]}', encoding="utf-8")
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "chatglm3-6b")


@pytest.mark.parametrize("name", READERS)
def test_a_byte_order_mark_is_named(folder, name):
    path = folder / name
    path.write_bytes(MARK + (path.read_bytes() if path.exists() else b"{}"))
    for read in READERS[name]:
        with pytest.raises(ValueError, match=r"byte order mark \(BOM\).*without BOM") as error:
            read(folder)
        assert str(path) in str(error.value)


@pytest.mark.parametrize("content", [b'{"eos_token_id": [7],}', b"[7]", '{"eos_token_id": 7}'.encode("utf-16")])
def test_damaged_generation_settings_are_not_ignored(folder, content):
    (folder / "generation_config.json").write_bytes(content)
    for read in MODELS:
        with pytest.raises(ValueError, match=r"generation_config\.json"):
            read(folder)


def test_a_configuration_that_is_no_object_is_named(folder):
    (folder / "config.json").write_text("[]", encoding="utf-8")
    for read in (*TOKENIZERS, ChatGLMConfig.from_pretrained, ChatGLMForConditionalGeneration.from_pretrained):
        with pytest.raises(ValueError, match=r"config\.json must hold a JSON object"):
            read(folder)


def test_a_byte_order_mark_is_no_part_of_a_chat_template(whole, folder):
    path = folder / "chat_template.jinja"
    path.write_bytes(MARK + path.read_bytes())
    expected = ChatGLMTokenizer.from_pretrained(whole)
    messages = [{"role": "user", "content": "你好"}]
    for read in TOKENIZERS:
        tokenizer = read(folder)
        assert tokenizer.chat_format == expected.chat_format
        for tokenize in (True, False):
            found = tokenizer.apply_chat_template(messages, tokenize=tokenize)
            assert found == expected.apply_chat_template(messages, tokenize=tokenize)


DTYPES = {
    "torch.float16": torch.float16,
    "float16": torch.float16,
    "half": torch.float16,
    "torch.bfloat16": torch.bfloat16,
    "torch.float": torch.float32,
    "auto": torch.float32,
    None: torch.float32,
}


def set_field(folder, key, value):
    path = folder / "config.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    fields.pop("dtype")
    path.write_text(json.dumps(fields | {key: value}), encoding="utf-8")


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
@pytest.mark.parametrize("value", DTYPES)
def test_dtypes_are_read_as_users_write_them(whole, folder, key, value):
    set_field(folder, key, value)
    wanted = DTYPES[value]
    assert ChatGLMConfig.from_pretrained(folder).dtype == (None if value in (None, "auto") else wanted)
    for read in MODELS[:2]:
        assert read(folder).dtype == wanted
        assert read(whole, **{key: value}).dtype == wanted
    assert ChatGLMConfig(**{key: value}).dtype in (None, wanted)


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
@pytest.mark.parametrize("value", ["fp16", "bf16", "torch.fp16", "int8", "float8_e4m3fn", 16, {"": "float16"}])
def test_other_dtypes_are_named(whole, folder, key, value):
    set_field(folder, key, value)
    named = r"must be float32, bfloat16 or float16, got "
    for read in (*MODELS, ChatGLMConfig.from_pretrained):
        with pytest.raises(ValueError, match=rf"^{key} of .*chatglm3-6b.* {named}") as error:
            read(folder)
        assert repr(value) in str(error.value)
    for read in MODELS[:2]:
        with pytest.raises(ValueError, match=rf"^(torch_)?dtype {named}"):
            read(whole, **{key: value})


def test_dtypes_of_a_native_base_are_read(tmp_path):
    fields = {"model_type": "glm", "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
              "num_hidden_layers": 2, "intermediate_size": 48, "vocab_size": 96, "pad_token_id": 0,
              "torch_dtype": "torch.bfloat16"}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    assert ChatGLMConfig.from_pretrained(tmp_path).dtype == torch.bfloat16
