"""ChatGLMTokenizer: ids against sentencepiece itself, safety of user text, padding, chats."""

from __future__ import annotations

import json
import random

import pytest
import sentencepiece
import torch
from bpe_vocabulary import TEXTS, train
from jinja2 import TemplateError
from transformers import DataCollatorWithPadding, TextIteratorStreamer

from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer
from chatglm_ptuning.model.vocabulary import SPECIAL_TOKENS

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


@pytest.fixture(scope="session")
def processor(vocabulary_file):
    return sentencepiece.SentencePieceProcessor(model_file=str(vocabulary_file))


@pytest.fixture
def tokenizer(vocabulary_file):
    return ChatGLMTokenizer(str(vocabulary_file), chat_format="chatglm3")


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
    with pytest.raises(ValueError, match=r"'<pop>' .*special token"):
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
    path = train(tmp_path / "tokenizer.model", user_defined_symbols=["sop", "<|user|>"])
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
    named = (tokenizer.pad_token, tokenizer.all_special_ids)
    for given in ({"pad_token": "<mine>"}, {"additional_special_tokens": ["<|user|>", "<mine>"]}):
        with pytest.raises(ValueError, match="Cannot add '<mine>'"):
            tokenizer.add_special_tokens(given)
        assert (tokenizer.pad_token, tokenizer.all_special_ids) == named
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


def test_padding_is_decoded_to_no_text(tokenizer):
    """Official file: convert_id_to_token in tokenization_chatglm.py of ChatGLM3-6B."""
    ids = tokenizer(["你好", "今天的天气真不错"], padding=True)["input_ids"][0]
    answer = [*tokenizer("你好", add_special_tokens=False)["input_ids"], 2, 0, 0]
    assert (tokenizer.decode(ids), tokenizer.decode(answer)) == ("[gMASK]sop你好", "你好")
    assert tokenizer.convert_tokens_to_string(tokenizer.convert_ids_to_tokens(ids)) == "[gMASK]sop你好"
    assert tokenizer.decode([0]) == tokenizer.decode(0) == ""


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
    with pytest.raises(ValueError, match=r"history\[1\] must be a .* pair"):
        tokenizer.build_prompt("三", [("一", "二"), {"role": "user"}])


def official_chat_ids(processor, messages):
    """Computed by sentencepiece alone, message by message."""
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
    with pytest.raises(ValueError, match=r"role must be .* got 'tool'"):
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


def test_wrong_chats_are_refused(tokenizer):
    with pytest.raises(TemplateError, match=r'no role "boss".* system, user'):
        tokenizer.apply_chat_template([{"role": "boss", "content": "x"}])
    with pytest.raises(TemplateError, match=r'role "user" .*no text .*"content"'):
        tokenizer.apply_chat_template([{"role": "user", "content": [{"type": "text", "text": "x"}]}])
    with pytest.raises(TypeError, match="chat must consist of"):
        tokenizer.apply_chat_template([{"role": "user", "content": object()}])
    with pytest.raises(ValueError, match="return_assistant_tokens_mask"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], return_assistant_tokens_mask=True)
