"""ChatGLMTokenizer: ids against sentencepiece itself, safety of user text, padding, chats, files."""

from __future__ import annotations

import copy
import json
import pickle
import random
from pathlib import Path

import pytest
import sentencepiece
import torch
from jinja2 import TemplateError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorWithPadding,
    TextIteratorStreamer,
    pipeline,
)
from transformers.utils import logging

from chatglm_ptuning.model.chat_templates import CHAT_TEMPLATES
from chatglm_ptuning.model.configuration_chatglm import ChatGLMConfig
from chatglm_ptuning.model.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer
from chatglm_ptuning.model.vocabulary import SPECIAL_TOKENS

TEXTS = """
春天来了，河边的柳树发了芽，孩子们在草地上放风筝。
这家店的面条很好吃，老板也热情，下次还会再来。
手机的电池不耐用，充一次电只能用半天，有点失望。
请把下面的句子翻译成英文：今天的天气真不错。
The weather is fine today, so we walked along the river to the old bridge.
她每天早上六点起床，先跑步，再读半个小时的书。
这件外套用的是羊毛面料，版型宽松，适合秋冬穿着。
问：北京到上海有多远？答：大约一千二百公里。
我们公司下个月要搬到新的办公楼，离地铁站很近。
def add(a, b):  return a + b
他喜欢在下雨天泡一壶茶，听着雨声写信。
图书馆周末开放到晚上九点，借书需要带上证件。
""".strip().splitlines()

SPELLED = [
    "<|user|>",
    "[gMASK]",
    "sop",
    "eop",
    "</s>",
    "<s>",
    "<unk>",
    "<0x0A>",
    "[gMASK]sop<|assistant|>\n 好",
    "[MASK]",
]

TOOLS = [
    {"name": "查询天气", "description": "给出 <|user|> 的天气", "parameters": {"type": "object", "properties": {}}}
]

HISTORY = [
    {"role": "system", "content": "你可以使用下面的工具：", "tools": TOOLS},
    {"role": "user", "content": "今天冷吗？"},
    {"role": "assistant", "metadata": "查询天气", "content": " ```python\ntool_call()\n```"},
    {"role": "observation", "content": "零下三度"},
    {"role": "assistant", "metadata": "", "content": "很冷，<|user|> 请多穿衣服。</s>"},
]


def train_vocabulary(path: Path, **options) -> Path:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=str(path.with_suffix("")), vocab_size=560, model_type="bpe",
        byte_fallback=True, character_coverage=1.0, normalization_rule_name="identity", remove_extra_whitespaces=False,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2, **options,
    )  # fmt: skip
    return path


@pytest.fixture(scope="session")
def vocabulary_file(tmp_path_factory):
    return train_vocabulary(tmp_path_factory.mktemp("vocabulary") / "tokenizer.model")


@pytest.fixture(scope="session")
def processor(vocabulary_file):
    return sentencepiece.SentencePieceProcessor(model_file=str(vocabulary_file))


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


def random_texts(count: int, seed: int) -> list[str]:
    """Unicode of every plane, with spaces, newlines and tabs among it; no surrogates and no U+2581."""
    rng = random.Random(seed)
    ranges = [(0x00, 0x7F), (0x80, 0x24FF), (0x3000, 0x30FF), (0x4E00, 0x9FFF), (0xE000, 0xFFFF), (0x1F300, 0x1FAFF),
              (0x20000, 0x2FFFF), (0xF0000, 0x10FFFF)]  # fmt: skip
    texts = []
    for _ in range(count):
        characters = []
        for _ in range(rng.randrange(40)):
            low, high = rng.choice(ranges)
            characters.append(rng.choice([chr(rng.randint(low, high)), " ", "\n", "\t", rng.choice(TEXTS)[:3]]))
        texts.append("".join(characters))
    return texts


# Ids


def test_special_ids_follow_the_pieces_in_the_official_order(tokenizer, processor):
    pieces = processor.vocab_size()
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(pieces, pieces + 9))
    assert tokenizer.get_command("[gMASK]") == pieces + 1
    assert tokenizer.get_command("sop") == pieces + 3
    assert [tokenizer.get_command(name) for name in ("<bos>", "<eos>", "<unk>", "<pad>")] == [1, 2, 0, 0]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id) == (
        1, 2, 0, 0,
    )  # fmt: skip
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("</s>", "<unk>")
    assert len(tokenizer) == tokenizer.vocab_size == len(tokenizer.get_vocab()) == pieces + 9
    assert tokenizer.convert_ids_to_tokens([pieces + 3, 2, 5]) == ["sop", "</s>", processor.id_to_piece(5)]
    assert sorted(tokenizer.all_special_ids) == [0, 1, 2, *range(pieces, pieces + 9)]
    with pytest.raises(ValueError, match="'<pop>' is no special token"):
        tokenizer.get_command("<pop>")


def test_vocabulary_is_one_to_one(tokenizer):
    for token, index in tokenizer.get_vocab().items():
        assert tokenizer.convert_tokens_to_ids(token) == index
        assert tokenizer.convert_ids_to_tokens(index) == token


@pytest.mark.parametrize("text", ["你好", "", " ", *TEXTS[:3], "  a\n\nb  "])
def test_sequence_is_gmask_sop_and_the_pieces(tokenizer, processor, text):
    start = [processor.vocab_size() + 1, processor.vocab_size() + 3]
    assert tokenizer(text)["input_ids"] == start + processor.encode(text)
    assert tokenizer.encode(text, add_special_tokens=False) == processor.encode(text)
    pair = tokenizer(text, "第二句")
    assert pair["input_ids"] == start + processor.encode(text) + processor.encode("第二句") + [2]
    mask = tokenizer(text, "第二句", return_special_tokens_mask=True)["special_tokens_mask"]
    assert mask == [1, 1] + [0] * (len(mask) - 3) + [1]
    assert mask == tokenizer.get_special_tokens_mask(pair["input_ids"], already_has_special_tokens=True)
    assert tokenizer.tokenize(text) == processor.encode(text, out_type=str)


def test_batches_pairs_and_words_give_the_ids_of_single_texts(tokenizer, processor):
    assert tokenizer(TEXTS)["input_ids"] == [tokenizer(text)["input_ids"] for text in TEXTS]
    assert tokenizer(TEXTS[:2], TEXTS[2:4])["input_ids"] == [
        tokenizer(TEXTS[0], TEXTS[2])["input_ids"], tokenizer(TEXTS[1], TEXTS[3])["input_ids"],
    ]  # fmt: skip
    assert tokenizer([(TEXTS[0], TEXTS[1])])["input_ids"] == [tokenizer(TEXTS[0], TEXTS[1])["input_ids"]]
    words = ["春天", "来了", "吧"]
    expected = [index for word in words for index in processor.encode(word)]
    assert tokenizer(words, is_split_into_words=True)["input_ids"][2:] == expected
    assert tokenizer([words, words[:2]], is_split_into_words=True)["input_ids"][0][2:] == expected
    assert tokenizer(["", "好"], add_special_tokens=False)["input_ids"] == [[], processor.encode("好")]


@pytest.mark.parametrize("text", SPELLED)
def test_text_that_spells_a_special_token_stays_text(tokenizer, text):
    special = set(tokenizer.all_special_ids)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert not special & set(ids)
    assert tokenizer.decode(ids) == tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer(["x" + text])["input_ids"][0][2:] == tokenizer.encode("x" + text, add_special_tokens=False)
    for chat_ids in (
        tokenizer.build_chat_input(text)["input_ids"][0].tolist(),
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)["input_ids"],
    ):
        assert len(special & set(chat_ids)) == len([i for i in chat_ids if i in special]) == 4
    assert not special & set(tokenizer(tokenizer.build_prompt(text))["input_ids"][2:])


def test_piece_spelled_like_a_special_token_stays_a_piece(tmp_path):
    path = train_vocabulary(tmp_path / "tokenizer.model", user_defined_symbols=["sop", "<|user|>"])
    tokenizer = ChatGLMTokenizer(str(path), chat_format="chatglm3")
    ids = tokenizer("sop <|user|>")["input_ids"]
    assert all(index < tokenizer.vocabulary.pieces for index in ids[2:])
    assert tokenizer.decode(ids, skip_special_tokens=True) == "sop <|user|>"
    message = {"role": "user", "content": "sop <|user|>"}
    chat_ids = tokenizer.apply_chat_template([message], add_generation_prompt=True, return_dict=False)
    assert chat_ids == tokenizer.build_chat_input("sop <|user|>")["input_ids"][0].tolist()
    assert tokenizer.convert_tokens_to_ids("sop") == tokenizer.get_command("sop")


def test_tokens_cannot_be_added_but_known_ones_can_be_named(tokenizer):
    with pytest.raises(ValueError, match=r"Cannot add '<mine>': .*tokenizer\.model"):
        tokenizer.add_tokens(["<mine>"])
    assert tokenizer.add_special_tokens({"pad_token": "</s>"}) == 0
    assert tokenizer.pad_token_id == 2


# Ids to text


def test_round_trip_of_random_unicode(tokenizer, processor):
    for text in random_texts(400, seed=11):
        ids = tokenizer(text)["input_ids"]
        assert ids[2:] == processor.encode(text)
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert tokenizer.convert_tokens_to_string(tokenizer.tokenize(text)) == text


def test_half_surrogates_do_not_crash(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud83db", add_special_tokens=False)) == "a\ufffdb"
    assert tokenizer.decode(tokenizer.encode("\ud83d\ude00", add_special_tokens=False)) == "😀"


def test_decode_spells_specials_unless_skipped(tokenizer):
    ids = [*tokenizer("你好")["input_ids"], tokenizer.get_command("<|user|>"), 2]
    assert tokenizer.decode(ids) == "[gMASK]sop你好<|user|>"
    assert tokenizer.decode(torch.tensor(ids), skip_special_tokens=True) == "你好"
    assert tokenizer.batch_decode(torch.tensor([ids, ids]), skip_special_tokens=True) == ["你好", "你好"]
    assert tokenizer.convert_tokens_to_string(tokenizer.convert_ids_to_tokens(ids[:-1])) == "[gMASK]sop你好<|user|>"
    assert tokenizer.decode(10**6) == ""


def test_incremental_decoding_shows_no_broken_character(tokenizer):
    text = "春天😀好 𠮷野家 ok 🀄了"
    ids = tokenizer.encode(text, add_special_tokens=False)
    shown = [tokenizer.decode(ids[:end]) for end in range(len(ids) + 1)]
    assert any(part.endswith("\ufffd") for part in shown)
    assert all(text.startswith(part.rstrip("\ufffd")) for part in shown)
    assert shown[-1] == text
    streamer = TextIteratorStreamer(tokenizer, skip_special_tokens=True)
    for index in [*ids, 2]:
        streamer.put(torch.tensor([index]))
    streamer.end()
    pieces = list(streamer)
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)


# Padding and truncation


def test_left_padding_with_positions(tokenizer):
    batch = tokenizer(["你好", "今天的天气真不错"], padding=True, return_tensors="pt")
    short = tokenizer("你好")["input_ids"]
    pads = batch["input_ids"].shape[1] - len(short)
    assert set(batch) == {"input_ids", "attention_mask", "position_ids"}
    assert batch["input_ids"][0].tolist() == [0] * pads + short
    assert batch["attention_mask"][0].tolist() == [0] * pads + [1] * len(short)
    assert batch["position_ids"][0].tolist() == [0] * pads + list(range(len(short)))
    assert batch["position_ids"][1].tolist() == list(range(batch["input_ids"].shape[1]))


def test_right_padding_if_asked(tokenizer):
    short = tokenizer("你好")["input_ids"]
    by_argument = tokenizer(["你好"], padding="max_length", max_length=10, padding_side="right")
    tokenizer.padding_side = "right"
    by_attribute = tokenizer(["你好"], padding="max_length", max_length=10)
    for batch in (by_argument, by_attribute):
        assert batch["input_ids"][0] == short + [0] * (10 - len(short))
        assert batch["position_ids"][0] == [*range(len(short)), *[0] * (10 - len(short))]


def test_pad_of_features_and_collator(tokenizer):
    features = [{"input_ids": [5, 6, 7]}, {"input_ids": [8]}]
    padded = tokenizer.pad(features, return_tensors="pt")
    assert padded["input_ids"].tolist() == [[5, 6, 7], [0, 0, 8]]
    assert padded["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert padded["position_ids"].tolist() == [[0, 1, 2], [0, 0, 0]]
    again = tokenizer.pad({"input_ids": [[0, 8, 9]], "attention_mask": [[0, 1, 1]]}, padding="max_length", max_length=5)
    assert again["position_ids"] == [[0, 0, 0, 0, 1]]
    collated = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=4)([tokenizer("你好"), tokenizer("今天天气")])
    assert collated["position_ids"].shape == collated["input_ids"].shape
    assert collated["input_ids"].shape[1] % 4 == 0


def test_single_text_has_mask_and_positions_too(tokenizer):
    one = tokenizer("你好")
    assert one["attention_mask"] == [1] * len(one["input_ids"])
    assert one["position_ids"] == list(range(len(one["input_ids"])))
    assert tokenizer("你好", return_tensors="pt")["position_ids"].shape == (1, len(one["input_ids"]))


def test_truncation_keeps_the_start_tokens(tokenizer):
    full = tokenizer(TEXTS[0])["input_ids"]
    assert tokenizer(TEXTS[0], truncation=True, max_length=8)["input_ids"] == full[:8]
    tokenizer.truncation_side = "left"
    assert tokenizer([TEXTS[0]], truncation=True, max_length=8)["input_ids"] == [full[:2] + full[-6:]]


@pytest.mark.parametrize("wrong", [None, 3, {"a": 1}, ["a", 3], [["a", "b", "c"]]])
def test_what_is_no_text_is_refused(tokenizer, wrong):
    with pytest.raises(ValueError):
        tokenizer(wrong)


# Chats


def test_build_prompt(tokenizer, processor):
    prompt = tokenizer.build_prompt("三", [("一", "二"), ["q", "a"]])
    assert prompt == "[Round 1]\n\n问：一\n\n答：二\n\n[Round 2]\n\n问：q\n\n答：a\n\n[Round 3]\n\n问：三\n\n答："
    assert tokenizer.build_prompt("三") == "[Round 1]\n\n问：三\n\n答："
    assert tokenizer(prompt)["input_ids"][2:] == processor.encode(prompt)
    with pytest.raises(ValueError, match="Round 2 of the history must be a pair"):
        tokenizer.build_prompt("三", [("一", "二"), {"role": "user"}])


def official_chat_ids(processor, messages):
    """Worked out from sentencepiece alone, message by message."""
    pieces = processor.vocab_size()
    roles = {"system": 5, "user": 6, "assistant": 7, "observation": 8}
    ids = [pieces + 1, pieces + 3]
    for message in messages:
        content = message["content"]
        if "tools" in message:
            content += "\n" + json.dumps(message["tools"], indent=4, ensure_ascii=False)
        ids += [pieces + roles[message["role"]]]
        ids += processor.encode(message.get("metadata", "") + "\n") + processor.encode(content)
    return [*ids, pieces + 7]


def test_build_chat_input(tokenizer, processor):
    inputs = tokenizer.build_chat_input("那明天呢？", HISTORY)
    expected = official_chat_ids(processor, [*HISTORY, {"role": "user", "content": "那明天呢？"}])
    assert inputs["input_ids"].tolist() == [expected]
    assert inputs["position_ids"].tolist() == [list(range(len(expected)))]
    assert inputs["attention_mask"].tolist() == [[1] * len(expected)]
    observed = tokenizer.build_chat_input("晴", HISTORY, role="observation")["input_ids"][0].tolist()
    assert observed == official_chat_ids(processor, [*HISTORY, {"role": "observation", "content": "晴"}])
    with pytest.raises(ValueError, match="no role 'tool'"):
        tokenizer.build_chat_input("x", role="tool")


def test_chatglm3_template_gives_the_ids_of_build_chat_input(tokenizer):
    for content in ["那明天呢？", "", " 空格 ", "\n换行", *SPELLED, *random_texts(60, seed=5)]:
        history = [*HISTORY, {"role": "user", "content": content}, {"role": "assistant", "content": content}]
        messages = [*history, {"role": "user", "content": content}]
        expected = tokenizer.build_chat_input(content, history)
        actual = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
        assert {name: value.tolist() for name, value in actual.items()} == {
            name: value.tolist() for name, value in expected.items()
        }


def test_chatglm2_template_gives_the_ids_of_build_prompt(tokenizer):
    tokenizer.chat_format = "chatglm2"
    for content in ["那明天呢？", "", " 空格 ", *SPELLED, *random_texts(60, seed=6)]:
        messages = [
            {"role": "user", "content": content}, {"role": "assistant", "content": content + "答"},
            {"role": "user", "content": "再问"},
        ]  # fmt: skip
        prompt = tokenizer.build_prompt("再问", [(content, content + "答")])
        assert (
            tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
            == (tokenizer(prompt)["input_ids"])
        )
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert text == "[gMASK]sop" + prompt
    with pytest.raises(TemplateError, match='no role "observation"'):
        tokenizer.apply_chat_template([{"role": "observation", "content": "x"}])
    with_system = [{"role": "system", "content": "简短回答。"}, {"role": "user", "content": "好"}]
    text = tokenizer.apply_chat_template(with_system, add_generation_prompt=True, tokenize=False)
    assert text == "[gMASK]sop简短回答。\n\n[Round 1]\n\n问：好\n\n答："


def test_template_text_is_the_text_of_the_ids(tokenizer):
    messages = [*HISTORY[:4], {"role": "user", "content": "好"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == tokenizer.decode(tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"])
    assert text.endswith("<|user|>\n 好<|assistant|>")


def test_batch_of_chats(tokenizer):
    chats = [[{"role": "user", "content": text}] for text in ("好", "今天的天气真不错")]
    batch = tokenizer.apply_chat_template(chats, add_generation_prompt=True, padding=True, return_tensors="pt")
    first = tokenizer.build_chat_input("好")["input_ids"][0].tolist()
    assert batch["input_ids"][0].tolist()[-len(first) :] == first
    assert batch["position_ids"][0].tolist()[-len(first) :] == list(range(len(first)))
    assert tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=False)[0] == first


def test_final_message_can_be_continued(tokenizer):
    messages = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "春天来"}]
    plain = tokenizer.apply_chat_template(messages, return_dict=False)
    assert tokenizer.apply_chat_template(messages, continue_final_message=True, return_dict=False) == plain
    tokenizer.chat_format = "chatglm2"
    continued = tokenizer.apply_chat_template(messages, continue_final_message=True, return_dict=False)
    assert continued == tokenizer("[Round 1]\n\n问：问\n\n答：春天来")["input_ids"]


def test_tools_by_argument(tokenizer):
    wrapped = [{"type": "function", "function": TOOLS[0]}]
    user = {"role": "user", "content": "今天冷吗？"}
    by_message = [{"role": "system", "content": "用工具。", "tools": TOOLS}, user]
    by_argument = [{"role": "system", "content": "用工具。"}, user]
    expected = tokenizer.apply_chat_template(by_message)["input_ids"]
    assert tokenizer.apply_chat_template(by_argument, tools=wrapped)["input_ids"] == expected
    assert tokenizer.apply_chat_template(by_argument, tools=TOOLS)["input_ids"] == expected
    alone = tokenizer.apply_chat_template([user], tools=wrapped, tokenize=False)
    assert alone.startswith("[gMASK]sop<|system|>\n Answer the following questions as best as you can.")
    ids = tokenizer.apply_chat_template([user], tools=wrapped)["input_ids"]
    assert tokenizer.decode(ids) == alone
    assert ids.count(tokenizer.get_command("<|user|>")) == 1

    def weather(city: str):
        """Tells the weather.

        Args:
            city: its name
        """

    assert '"name": "weather"' in tokenizer.decode(tokenizer.apply_chat_template([user], tools=[weather])["input_ids"])


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


def test_wrong_chats_are_refused(tokenizer):
    with pytest.raises(TemplateError, match='no role "boss": use system, user'):
        tokenizer.apply_chat_template([{"role": "boss", "content": "x"}])
    with pytest.raises(TemplateError, match=r"message 1 has no text"):
        tokenizer.apply_chat_template([{"role": "user", "content": [{"type": "text", "text": "x"}]}])
    with pytest.raises(TypeError, match="A chat is made of"):
        tokenizer.apply_chat_template([{"role": "user", "content": object()}])
    with pytest.raises(ValueError, match="return_assistant_tokens_mask"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], return_assistant_tokens_mask=True)


# Files


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
        assert tokenizer.chat_template == CHAT_TEMPLATES[expected]


def test_chat_format_by_argument_wins(official_folder, tmp_path_factory):
    folder = official_folder(chat_template="[gMASK]sop<|{{ messages[0].role }}|>")
    tokenizer = ChatGLMTokenizer.from_pretrained(folder, chat_format="chatglm2")
    assert tokenizer.chat_template == CHAT_TEMPLATES["chatglm2"]
    saved = tmp_path_factory.mktemp("saved")
    tokenizer.save_pretrained(saved)
    again = ChatGLMTokenizer.from_pretrained(saved, chat_format="chatglm3")
    assert (again.chat_format, again.chat_template) == ("chatglm3", CHAT_TEMPLATES["chatglm3"])
    with pytest.raises(ValueError, match=r"chat_format must be one of base, chatglm2, chatglm3 .* got 'glm4'"):
        ChatGLMTokenizer.from_pretrained(folder, chat_format="glm4")


def test_unknown_chat_format_is_logged_once(official_folder, caplog):
    folder = official_folder(name="mine")
    logging.get_logger("chatglm_ptuning").warning_once.cache_clear()
    with caplog.at_level("WARNING"):
        ChatGLMTokenizer.from_pretrained(folder)
        ChatGLMTokenizer.from_pretrained(folder)
    assert caplog.text.count('give chat_format="chatglm2" or chat_format="base"') == 1


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


def test_own_template_is_kept_on_reload(tokenizer, tmp_path):
    tokenizer.chat_template = "[gMASK]sop{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(tmp_path)
    assert ChatGLMTokenizer.from_pretrained(tmp_path).chat_template == tokenizer.chat_template


def test_token_outside_the_vocabulary_gives_way(official_folder):
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
        r"\(0 bytes\) is damaged": b"",
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
