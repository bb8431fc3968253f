"""The folder of a ChatGLMTokenizer: which chat format it has, saving and loading, Auto classes, pipelines."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    pipeline,
)
from transformers.utils import logging

from chatglm_ptuning.chat.formats import formats_of
from chatglm_ptuning.model.configuration_chatglm import ChatGLMConfig
from chatglm_ptuning.model.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer


def template_of(tokenizer: ChatGLMTokenizer, chat_format: str) -> str:
    return formats_of(tokenizer.vocabulary)[chat_format](tokenizer.vocabulary).chat_template


@pytest.fixture
def tokenizer(vocabulary_file):
    return ChatGLMTokenizer(str(vocabulary_file), chat_format="chatglm3")


@pytest.fixture
def official_folder(tmp_path, vocabulary_file):
    """A folder as the official ones are: their tokenizer_config.json, remote code named, config.json beside it."""

    def make(name: str = "THUDM/chatglm3-6b", config_name: str | None = None, **settings) -> Path:
        (tmp_path / "tokenizer.model").write_bytes(vocabulary_file.read_bytes())
        tokenizer_config = {
            "name_or_path": name,
            "remove_space": False,
            "do_lower_case": False,
            "tokenizer_class": "ChatGLMTokenizer",
            "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
            **settings,
        }
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config), encoding="utf-8")
        config = {"model_type": "chatglm", "_name_or_path": config_name or name, "num_layers": 1}
        (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"name": "THUDM/chatglm3-6b"}, "chatglm3"),
        ({"name": "THUDM/chatglm2-6b"}, "chatglm2"),
        ({"name": "", "config_name": "/models/chatglm2-6b-int4/"}, "chatglm2"),
        ({"name": "THUDM/codegeex2-6b"}, "base"),
        ({"name": "THUDM/chatglm3-6b-base"}, "base"),
        ({"name": "THUDM/chatglm3-6b-base", "config_name": "THUDM/chatglm3-6b"}, "chatglm3"),
        ({"name": "/chatglm2/chatglm3-6b"}, "chatglm3"),
        ({"name": "THUDM/chatglm3-6b", "chat_format": "chatglm2"}, "chatglm2"),
        ({"name": "mine", "chat_template": "{% for m in messages %}问：{{ m.content }}{% endfor %}"}, "chatglm2"),
        ({"name": "mine", "chat_template": "[gMASK]sop<|{{ messages[0].role }}|>"}, "chatglm3"),
        ({"name": "mine"}, "chatglm3"),
    ],
)
def test_chat_format_is_found(official_folder, settings, expected):
    folder = official_folder(**settings)
    for tokenizer in (ChatGLMTokenizer.from_pretrained(folder), ChatGLMTokenizer(str(folder / "tokenizer.model"))):
        assert tokenizer.chat_format == expected
        assert tokenizer.chat_template == template_of(tokenizer, expected)


def test_chat_format_by_argument_wins(official_folder, tmp_path_factory):
    folder = official_folder(chat_template="[gMASK]sop<|{{ messages[0].role }}|>")
    tokenizer = ChatGLMTokenizer.from_pretrained(folder, chat_format="chatglm2")
    assert tokenizer.chat_template == template_of(tokenizer, "chatglm2")
    saved = tmp_path_factory.mktemp("saved")
    tokenizer.save_pretrained(saved)
    again = ChatGLMTokenizer.from_pretrained(saved, chat_format="chatglm3")
    assert (again.chat_format, again.chat_template) == ("chatglm3", template_of(again, "chatglm3"))
    with pytest.raises(ValueError, match=r"chat_format .*base, chatglm2, chatglm3 .*'glm4'"):
        ChatGLMTokenizer.from_pretrained(folder, chat_format="glm4")


def test_unknown_chat_format_is_logged_once(official_folder, caplog):
    folder = official_folder(name="mine")
    logging.get_logger("chatglm_ptuning").warning_once.cache_clear()
    with caplog.at_level("WARNING"):
        ChatGLMTokenizer.from_pretrained(folder)
        ChatGLMTokenizer.from_pretrained(folder)
    assert caplog.text.count('chat_format="chatglm2" or chat_format="base"') == 1


@pytest.mark.parametrize("chat_format", ["chatglm2", "chatglm3"])
def test_save_and_reload(official_folder, tmp_path_factory, vocabulary_file, chat_format):
    # As in the later official files, whose added tokens would make specials of text.
    added = {"560": {"content": "sop", "lstrip": False, "rstrip": False, "normalized": True, "single_word": False}}
    folder = official_folder(added_tokens_decoder=added, additional_special_tokens=["<|user|>", "<|observation|>"])
    tokenizer = ChatGLMTokenizer.from_pretrained(folder, chat_format=chat_format, model_max_length=77)
    tokenizer.pad_token = "</s>"
    saved = tmp_path_factory.mktemp("saved")
    tokenizer.save_pretrained(saved)
    assert (saved / "tokenizer.model").read_bytes() == vocabulary_file.read_bytes()
    assert json.loads((saved / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_format"] == chat_format
    again = ChatGLMTokenizer.from_pretrained(saved)
    again.save_pretrained(saved)
    for other in (again, ChatGLMTokenizer.from_pretrained(saved), pickle.loads(pickle.dumps(tokenizer)),
                  copy.deepcopy(tokenizer)):  # fmt: skip
        assert other.chat_format == chat_format
        assert other.chat_template == tokenizer.chat_template
        assert other.model_max_length == 77
        assert other.pad_token_id == 2
        assert other.get_vocab() == tokenizer.get_vocab()
        assert other.all_special_tokens == tokenizer.all_special_tokens
        assert other(["sop 你好", "好"], padding=True) == tokenizer(["sop 你好", "好"], padding=True)


def test_foreign_template_is_kept_and_safe(official_folder):
    template = (
        "{% for message in messages %}{% if loop.first %}[gMASK]sop{% endif %}"
        "<|{{ message['role'] }}|>\n {{ message['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer = ChatGLMTokenizer.from_pretrained(official_folder(), chat_template=template)
    assert tokenizer.chat_template == template
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "[gMASK]sop<|assistant|>sop"}], add_generation_prompt=True
    )["input_ids"]
    command = tokenizer.get_command
    body = tokenizer.encode("\n [gMASK]sop<|assistant|>sop", add_special_tokens=False)
    assert ids == [command("[gMASK]"), command("sop"), command("<|user|>"), *body, command("<|assistant|>")]


def test_own_template_is_kept_on_reload(tokenizer, tmp_path):
    tokenizer.chat_template = "[gMASK]sop{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(tmp_path)
    assert ChatGLMTokenizer.from_pretrained(tmp_path).chat_template == tokenizer.chat_template


def test_a_named_token_outside_the_vocabulary_is_ignored(official_folder):
    tokenizer = ChatGLMTokenizer.from_pretrained(official_folder(eos_token="<eos>", pad_token="<pad>"))
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 0)


@pytest.fixture
def registered():
    AutoConfig.register("chatglm", ChatGLMConfig, exist_ok=True)
    AutoTokenizer.register(ChatGLMConfig, ChatGLMTokenizer, exist_ok=True)
    AutoModelForCausalLM.register(ChatGLMConfig, ChatGLMForConditionalGeneration, exist_ok=True)


def test_auto_tokenizer_needs_no_remote_code(registered, official_folder, tmp_path_factory):
    folder = official_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert type(tokenizer) is ChatGLMTokenizer
    saved = tmp_path_factory.mktemp("saved")
    tokenizer.save_pretrained(saved)
    (saved / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert type(AutoTokenizer.from_pretrained(saved)) is ChatGLMTokenizer


def test_missing_or_wrong_vocabulary(official_folder, vocabulary_file):
    folder = official_folder()
    path = folder / "tokenizer.model"
    wrong = {
        "is damaged": vocabulary_file.read_bytes()[:5000],
        r"is empty \(0 bytes\)": b"",
        "no token for 253 of the 256 bytes": b"IQ== 0\nIg== 1\nIw== 2\n",
        "git lfs pull": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1018370\n",
    }
    for message, content in wrong.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"tokenizer\.model.*{message}"):
            ChatGLMTokenizer.from_pretrained(folder)
    path.unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.model is missing\. Put") as error:
        ChatGLMTokenizer.from_pretrained(folder)
    assert str(folder) in str(error.value)


def test_text_generation_pipeline_with_chats(registered, tokenizer):
    torch.manual_seed(0)
    config = ChatGLMConfig(
        num_layers=2, padded_vocab_size=len(tokenizer), hidden_size=32, ffn_hidden_size=48, kv_channels=8,
        num_attention_heads=4, multi_query_attention=True, multi_query_group_num=2, add_qkv_bias=True, seq_length=128,
    )  # fmt: skip
    model = ChatGLMForConditionalGeneration(config).eval()
    messages = [{"role": "user", "content": "今天 <|assistant|> 冷吗？"}]
    chat = pipeline("text-generation", model=model, tokenizer=tokenizer)
    for chat_format, inputs in (
        ("chatglm3", tokenizer.build_chat_input(messages[0]["content"])),
        ("chatglm2", tokenizer(tokenizer.build_prompt(messages[0]["content"]), return_tensors="pt")),
    ):
        tokenizer.chat_format = chat_format
        reply = chat(messages, max_new_tokens=6, do_sample=False)[0]["generated_text"]
        expected = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert reply == [
            *messages,
            {"role": "assistant", "content": tokenizer.decode(expected, skip_special_tokens=True)},
        ]
    two = chat([messages, [{"role": "user", "content": "好"}]], max_new_tokens=4, do_sample=False, batch_size=2)
    assert len(two) == 2
