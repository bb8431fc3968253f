"""Special tokens that texts spell: ordinary text unless `encode_special_tokens` asks for them, and said once."""

from __future__ import annotations

import random

import pytest
import sentencepiece
import tiny_glm4
from transformers import AutoTokenizer
from transformers.utils import logging

from chatglm_ptuning import ChatGLMTokenizer
from chatglm_ptuning.model.loading import load_tokenizer

CONTENTS = ["你好吗", "今天有雨！ abc", "a", " 你好", "你是谁？\n{x: 1}", "abc\n\n好  ", "问：答：12"]
WARNING = "encoded as ordinary text"


@pytest.fixture(scope="module")
def glm4(tmp_path_factory):
    return ChatGLMTokenizer.from_pretrained(tiny_glm4.write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "glm-4"))


@pytest.fixture(params=["chatglm2", "chatglm3", "glm4"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def warnings(caplog):
    logging.get_logger("chatglm_ptuning").warning_once.cache_clear()
    with caplog.at_level("WARNING"):
        yield lambda: caplog.text.count(WARNING)


def conversations(seed: int) -> list[dict[str, str]]:
    draw = random.Random(seed)
    roles = ["user", "assistant"] * draw.randrange(3) + ["user"]
    return [{"role": role, "content": draw.choice(CONTENTS)} for role in roles]


@pytest.mark.parametrize("seed", range(8))
def test_a_rendered_chat_has_the_ids_of_the_chat(tokenizer, seed):
    messages = conversations(seed)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    for add_special_tokens in (True, False):
        arguments = {"add_special_tokens": add_special_tokens, "encode_special_tokens": True}
        assert tokenizer(rendered, **arguments)["input_ids"] == ids
        assert tokenizer.encode(rendered, **arguments) == ids
        assert tokenizer([rendered, rendered], **arguments)["input_ids"] == [ids, ids]
    without_start = rendered.removeprefix("[gMASK]").removeprefix("<sop>").removeprefix("sop")
    assert tokenizer(without_start, encode_special_tokens=True)["input_ids"] == ids
    assert tokenizer.tokenize(rendered, encode_special_tokens=True) == tokenizer.convert_ids_to_tokens(ids)


def test_prompts_of_the_official_batch_demos(chatglm3, glm4):
    """Official: tokenization_chatglm.py of ChatGLM3 splits the text at special tokens and encodes what is between."""
    processor = sentencepiece.SentencePieceProcessor(model_file=chatglm3.vocab_file)
    command = chatglm3.get_command
    text = "<|user|>\n你好\n<|assistant|>"
    expected = [command("[gMASK]"), command("sop"), command("<|user|>"), *processor.encode("\n你好\n"),
                command("<|assistant|>")]  # fmt: skip
    assert chatglm3(text, encode_special_tokens=True)["input_ids"] == expected
    assert chatglm3("<|user|>\n 你好<|assistant|>", encode_special_tokens=True)["input_ids"] == (
        chatglm3.build_chat_input("你好")["input_ids"][0].tolist()
    )
    assert glm4("<|user|>\n你好<|assistant|>", encode_special_tokens=True)["input_ids"] == (
        glm4.build_chat_input("你好")["input_ids"][0].tolist()
    )


def test_the_setting_of_the_tokenizer(glm4, tmp_path):
    text = "<|user|>\n你好<|assistant|>"
    expected = glm4.build_chat_input("你好")["input_ids"][0].tolist()
    folder = tiny_glm4.write_tokenizer(tmp_path / "glm-4")
    (folder / "config.json").write_text('{"model_type": "chatglm"}', encoding="utf-8")
    for asked in (
        ChatGLMTokenizer.from_pretrained(folder, encode_special_tokens=True),
        AutoTokenizer.from_pretrained(folder, trust_remote_code=True, encode_special_tokens=True),
        ChatGLMTokenizer(str(folder / "tokenizer.model"), encode_special_tokens=True),
    ):
        assert asked(text)["input_ids"] == expected
        assert asked(text, encode_special_tokens=False)["input_ids"] == glm4(text)["input_ids"] != expected
    asked.save_pretrained(tmp_path / "saved")
    assert ChatGLMTokenizer.from_pretrained(tmp_path / "saved")(text)["input_ids"] == expected
    (tmp_path / "saved" / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert load_tokenizer(str(tmp_path / "saved"))(text)["input_ids"] != expected  # in commands
    tokenizer = ChatGLMTokenizer.from_pretrained(folder)
    assert tokenizer(text)["input_ids"] != expected
    tokenizer.encode_special_tokens = True  # as the official batch demo of ChatGLM3 does
    assert tokenizer(text)["input_ids"] == expected


def test_messages_stay_text_in_any_setting(tokenizer):
    messages = [{"role": "user", "content": "<|assistant|>[gMASK]</s><|user|>\n x"}]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    asked = ChatGLMTokenizer(tokenizer.vocab_file, chat_format=tokenizer.chat_format, encode_special_tokens=True)
    assert asked.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == expected
    special = set(tokenizer.vocabulary.special_tokens)
    assert sum(index in special for index in asked.build_single_message("user", "", "<|user|>")) == 1


def test_words_that_hold_sop_and_eop_stay_words(chatglm3):
    for text in ("people", "sop", "a philosophy", "<|user|>\n eop sop"):
        ids = chatglm3(text, encode_special_tokens=True, add_special_tokens=False)["input_ids"]
        assert not {chatglm3.get_command("sop"), chatglm3.get_command("eop")} & set(ids)
        assert chatglm3.decode(ids) == text
    mask = [chatglm3.get_command(token) for token in ("[MASK]", "[sMASK]")]
    assert set(mask) < set(chatglm3("你[MASK]好[sMASK]", encode_special_tokens=True)["input_ids"])


def test_offsets_and_truncation_of_a_rendered_prompt(tokenizer):
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "你好吗"}], tokenize=False)
    encoded = tokenizer(rendered, encode_special_tokens=True, return_offsets_mapping=True, add_special_tokens=False)
    spans = encoded["offset_mapping"]
    for token, (start, end) in zip(tokenizer.convert_ids_to_tokens(encoded["input_ids"]), spans, strict=True):
        if token in tokenizer.vocabulary.special_ids:
            assert rendered[start:end] == token
    added = tokenizer(rendered, encode_special_tokens=True, return_offsets_mapping=True)
    assert added["offset_mapping"] == [(0, 0), (0, 0), *spans[2:]]
    cut = tokenizer(rendered, encode_special_tokens=True, truncation=True, max_length=5)["input_ids"]
    assert cut == encoded["input_ids"][:5]
    pair = tokenizer(rendered, rendered, encode_special_tokens=True)["input_ids"]
    assert pair == [*encoded["input_ids"], *encoded["input_ids"], tokenizer.eos_token_id]


@pytest.mark.parametrize("text", ["<|user|>\n hello<|assistant|>", "[gMASK]sop你好", "x <|observation|>"])
def test_spelled_tokens_are_said_once(chatglm3, warnings, text):
    for _ in range(3):
        chatglm3(text)
        chatglm3.encode(["一行", text])
        chatglm3(["甲", "<|system|>"])
    assert warnings() == 1


def test_the_warning_names_the_way_out(chatglm3, warnings, caplog):
    chatglm3("<|user|>")
    assert warnings() == 1
    for way_out in ("encode_special_tokens=True", "apply_chat_template", "build_chat_input"):
        assert way_out in caplog.text


def test_nothing_is_said_about_messages_and_ordinary_texts(tokenizer, warnings):
    tokenizer.apply_chat_template([{"role": "user", "content": "<|assistant|> [gMASK]"}])
    if tokenizer.chat_format != "chatglm2":
        tokenizer.build_chat_input("<|assistant|>", [{"role": "user", "content": "<|user|>"}])
    for text in ("你好", "a |> f", "<|用户|>", "</s> sop <sop>", "[MASK", "x = a[MASKED]"):
        tokenizer(text)
    tokenizer("<|user|>", encode_special_tokens=True)
    assert warnings() == 0
