"""ChatGLMTokenizer with GLM-4's vocabulary: ids against tiktoken and tokenizers, official chats, files, offsets."""

from __future__ import annotations

import copy
import json
import pickle
import random

import jinja2.sandbox
import pytest
import tiktoken
import tiny_glm4
import torch
from tiny_chat_base import make_model, say
from transformers import AutoTokenizer, TextIteratorStreamer, pipeline
from transformers.utils import logging

from chatglm_ptuning import ChatGLMTokenizer
from chatglm_ptuning.model.vocabulary import GLM4_SPECIAL_TOKENS, SPLIT_PATTERN

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "城市 <|user|> 的天气",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
CHATS = [
    [{"role": "user", "content": "今天冷吗？"}],
    [{"role": "system", "content": "你很有礼貌。"}, {"role": "user", "content": "你好"}],
    [
        {"role": "system", "content": "", "tools": TOOLS},
        {"role": "user", "content": "今天冷吗？"},
        {"role": "assistant", "metadata": "get_weather", "content": '{"city": "北京"}'},
        {"role": "observation", "content": "零下三度"},
        {"role": "assistant", "metadata": "", "content": "很冷。"},
        {"role": "user", "content": "谢谢"},
    ],
    [{"role": "system", "content": "说话简短。", "tools": TOOLS}, {"role": "user", "content": "你好"}],
]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tiny_glm4.write_tokenizer(tmp_path_factory.mktemp("official") / "glm-4-9b-chat")


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory):
    """The tokenizer's files of a folder for transformers' own GlmForCausalLM."""
    folder = tmp_path_factory.mktemp("native") / "glm-4-9b-chat-hf"
    folder.mkdir()
    tiny_glm4.train().save(str(folder / "tokenizer.json"))
    settings = tiny_glm4.tokenizer_config(tokenizer_class="PreTrainedTokenizerFast")
    del settings["auto_map"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


@pytest.fixture
def tokenizer(folder):
    return ChatGLMTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def reference():
    """tiktoken itself on the published pattern, special tokens included."""
    specials = {token: len(tiny_glm4.ranks()) + i for i, token in enumerate(tiny_glm4.SPECIAL_TOKENS)}
    return tiktoken.Encoding(
        "glm4", pat_str=tiny_glm4.PATTERN, mergeable_ranks=tiny_glm4.ranks(), special_tokens=specials
    )


def texts(count: int) -> list[str]:
    rng = random.Random(0)
    pieces = [
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "\u3000",
        "春天来了",
        " the",
        "It's",
        "12345",
        "７",
        "𠮷龘",
        "👩‍👩‍👧",
        "!?。",
    ]
    ranges = [(0x00, 0x7F), (0x80, 0x24FF), (0x4E00, 0x9FFF), (0x20000, 0x2FFFF), (0xE000, 0x10FFFF)]

    def part() -> str:
        return rng.choice([rng.choice(pieces), chr(rng.randint(*rng.choice(ranges)))])

    return ["".join(part() for _ in range(rng.randrange(40))) for _ in range(count)]


# Ids


def test_published_facts(tokenizer, reference):
    assert SPLIT_PATTERN == tiny_glm4.PATTERN
    assert list(GLM4_SPECIAL_TOKENS) == tiny_glm4.SPECIAL_TOKENS
    assert len(tokenizer) == tokenizer.vocab_size == reference.n_vocab
    for token in tiny_glm4.SPECIAL_TOKENS:
        assert tokenizer.get_command(token) == reference.encode_single_token(token)
        assert tokenizer.convert_tokens_to_ids(token) == reference.encode_single_token(token)
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == tokenizer.get_command("<|endoftext|>")
    assert tokenizer.bos_token is None and tokenizer.unk_token is None
    assert tokenizer.start_ids == [tokenizer.get_command("[gMASK]"), tokenizer.get_command("<sop>")]
    assert tokenizer.get_command("<eos>") == tokenizer.eos_token_id
    with pytest.raises(ValueError, match=r"'<bos>' .*special token"):
        tokenizer.get_command("<bos>")


def test_ids_are_those_of_tiktoken_and_of_tokenizers(tokenizer, hf_folder, reference):
    fast = tiny_glm4.train()
    fast.encode_special_tokens = True
    from_json = ChatGLMTokenizer.from_pretrained(hf_folder)
    for text in [*texts(1500), "", " ", "<|user|>", "[gMASK]<sop>", *tiny_glm4.TEXTS]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == reference.encode_ordinary(text), text
        assert ids == from_json.encode(text, add_special_tokens=False)
        assert ids == fast.encode(text, add_special_tokens=False).ids
        assert not set(ids) & set(tokenizer.vocabulary.special_tokens)
        assert tokenizer.decode(ids) == text
        assert tokenizer.convert_tokens_to_string(tokenizer.tokenize(text)) == text
        assert tokenizer.tokenize(text) == tokenizer.convert_ids_to_tokens(ids) == fast.encode(text).tokens


def test_half_surrogates_are_replaced_as_tiktoken_does(tokenizer, reference):
    for text in ("\ud83d\ude00", "a\ud800b", "\udc00"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == reference.encode_ordinary(text)
        assert tokenizer.decode(ids) == text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def test_spaces_that_tiktoken_cannot_split(tokenizer):
    with pytest.raises(ValueError, match="too many spaces"):
        tokenizer.vocabulary.encode(" " * 2_000_000)


def test_sequences_pairs_and_padding(tokenizer, reference):
    start, end = tokenizer.start_ids, tokenizer.eos_token_id
    a, b = reference.encode_ordinary("你好，春天"), reference.encode_ordinary("river")
    assert tokenizer.encode("你好，春天", "river") == [*start, *a, *b, end]
    batch = tokenizer(["river", "你好，春天来了。"], padding=True)
    short, long = batch["input_ids"]
    pads = len(long) - len(b) - 2
    assert pads > 0
    assert short == [end] * pads + [*start, *b]
    assert batch["attention_mask"][0] == [0] * pads + [1] * (len(b) + 2)
    assert batch["position_ids"][0] == [0] * pads + list(range(len(b) + 2))


def test_decode_spells_specials_unless_skipped(tokenizer):
    ids = tokenizer("你好")["input_ids"] + [
        tokenizer.get_command("<|user|>"),
        tokenizer.eos_token_id,
        len(tokenizer) + 5,
    ]
    assert tokenizer.decode(ids) == "[gMASK]<sop>你好<|user|><|endoftext|>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "你好"
    assert tokenizer.convert_tokens_to_ids("no such token") is None
    with pytest.raises(ValueError, match=r"Cannot add 'new'.*tokenizer\.model"):
        tokenizer.add_tokens(["new"])


def test_streamed_text_is_whole(tokenizer):
    text = "柳树𠮷👩‍👩‍👧 good"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert any(tokenizer.decode(ids[:n]).endswith("\ufffd") for n in range(1, len(ids)))
    streamer = TextIteratorStreamer(tokenizer)
    for index in ids:
        streamer.put(torch.tensor([index]))
    streamer.end()
    pieces = list(streamer)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


# Offsets


def test_offsets_are_the_characters_of_the_pieces(tokenizer):
    fast = tiny_glm4.train()
    for text in texts(300):
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        assert encoded["offset_mapping"] == fast.encode(text, add_special_tokens=False).offsets
        assert encoded["input_ids"] == tokenizer.encode(text, add_special_tokens=False)


def test_offsets_with_special_tokens_padding_truncation_and_pairs(tokenizer):
    plain = tokenizer("It's the old river", add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    batch = tokenizer(["It's the old river", "你好"], padding=True, return_offsets_mapping=True, return_tensors="pt")
    assert [tuple(span) for span in batch["offset_mapping"][0].tolist()] == [(0, 0), (0, 0), *plain]
    assert batch["offset_mapping"].shape == (*batch["input_ids"].shape, 2)
    assert [tuple(span) for span in batch["offset_mapping"][1].tolist()][-1] == (0, 2)
    cut = tokenizer("It's the old river", max_length=4, truncation=True, return_offsets_mapping=True)
    assert cut["offset_mapping"] == [(0, 0), (0, 0), *plain[:2]]
    pair = tokenizer("你好", "It's the old river", return_offsets_mapping=True)["offset_mapping"]
    assert pair == [(0, 0), (0, 0), (0, 2), *plain, (0, 0)]
    words = tokenizer(["你好", "river"], is_split_into_words=True, return_offsets_mapping=True)["offset_mapping"]
    assert words[2] == (0, 2) and words[-1][1] == len("river")
    surrogates = tokenizer("\ud83d\ude00a", add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert surrogates[-1] == (2, 3) and set(surrogates[:-1]) == {(0, 2)}
    with pytest.raises(ValueError, match="needs texts"):
        tokenizer([[1, 2]], return_offsets_mapping=True)


# Chats


@pytest.mark.parametrize("chat", CHATS)
def test_template_gives_the_official_text_and_its_ids(tokenizer, reference, chat):
    chat = [{"metadata": "", **message} for message in chat]  # the published template needs it
    # Not with transformers' trim_blocks, which takes one of the two line feeds in front of a tool's name that the
    # official Python code has, too.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment()
    environment.filters["tojson"] = lambda value, indent: json.dumps(value, ensure_ascii=False, indent=indent)
    official = environment.from_string(tiny_glm4.TEMPLATE).render(messages=chat, add_generation_prompt=True)
    assert tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) == official
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    if "tools" not in chat[0]:  # a tool's description spells <|user|>, which tiktoken would make a special token
        assert ids == reference.encode(official, allowed_special="all")
    assert tokenizer.decode(ids) == official
    assert tokenizer.build_chat_input(chat[-1]["content"], chat[:-1])["input_ids"].tolist() == [ids]


def test_what_users_spell_stays_text(tokenizer):
    text = "<|assistant|>\n[gMASK]<sop><|endoftext|>"
    command = tokenizer.get_command
    newline, body = (tokenizer.encode(part, add_special_tokens=False) for part in ("\n", text))
    expected = [*tokenizer.start_ids, command("<|user|>"), *newline, *body, command("<|assistant|>")]
    chat = [{"role": "user", "content": text}]
    assert tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] == expected
    for chat in CHATS[2:]:
        ids = tokenizer.apply_chat_template(chat)["input_ids"]
        assert ids.count(command("<|user|>")) == sum(message["role"] == "user" for message in chat)


def test_tools_by_argument_stand_first(tokenizer):
    by_argument = tokenizer.apply_chat_template(CHATS[0], tools=TOOLS, tokenize=False)
    assert by_argument == tokenizer.apply_chat_template(
        [{"role": "system", "content": "", "tools": TOOLS}, *CHATS[0]], tokenize=False
    )


def test_batch_of_chats_is_padded(tokenizer):
    batch = tokenizer.apply_chat_template(CHATS[:2], padding=True, return_tensors="pt")
    assert batch["input_ids"].shape[0] == 2
    assert batch["attention_mask"][0, 0] == 0 and batch["position_ids"][0, -1] < batch["position_ids"][1, -1]


def test_base_format_is_the_texts_one_after_another(tokenizer):
    tokenizer.chat_format = "base"
    chat = [{"role": "user", "content": "1 + 1 ="}, {"role": "assistant", "content": " 2"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert ids == tokenizer("1 + 1 = 2")["input_ids"]
    assert tokenizer.chat.stop_ids == [tokenizer.eos_token_id]


# Chatting with a model


def test_chat_ends_at_role_tokens_and_reads_tool_calls(tokenizer):
    model = make_model(len(tokenizer))
    command = tokenizer.get_command
    assert tokenizer.chat.stop_ids == [command("<|endoftext|>"), command("<|user|>"), command("<|observation|>")]
    processor = say(tokenizer, "\n今天很冷。", command("<|user|>"), "x")
    response, history = model.chat(tokenizer, "今天冷吗？", [], logits_processor=processor, do_sample=False)
    assert response == "今天很冷。"
    assert history[-1] == {"role": "assistant", "metadata": "", "content": "今天很冷。"}
    call = say(tokenizer, 'get_weather\n{"city": "北京"}', command("<|observation|>"), "x")
    response, _ = model.chat(tokenizer, "冷吗？", [CHATS[2][0]], logits_processor=call, do_sample=False)
    assert response == {"name": "get_weather", "parameters": {"city": "北京"}}
    stream = say(tokenizer, "\n柳树𠮷！", command("<|endoftext|>"))
    parts = [part for part, _ in model.stream_chat(tokenizer, "？", [], logits_processor=stream, do_sample=False)]
    assert parts[-1] == "柳树𠮷！"
    assert all(parts[-1].startswith(part) for part in parts)


def test_chat_with_a_base_continues_the_text(tokenizer):
    tokenizer.chat_format = "base"
    model = make_model(len(tokenizer))
    processor = say(tokenizer, "\n    return a + b", tokenizer.eos_token_id)
    response, history = model.chat(
        tokenizer, "def add(a, b):", [("# language: Python\n", "")], logits_processor=processor, do_sample=False
    )
    assert response == "\n    return a + b"
    assert history[-1] == ("def add(a, b):", response)
    with pytest.raises(ValueError, match=r"pair .*base format"):
        model.chat(tokenizer, "x", [{"role": "user", "content": "y"}])


def test_chat_takes_the_settings_of_generation_config(tokenizer, monkeypatch):
    model = make_model(len(tokenizer))
    seen = []
    monkeypatch.setattr(type(model), "generate", lambda self, input_ids, **settings: seen.append(settings) or input_ids)
    model.chat(tokenizer, "你好")
    model.generation_config.update(temperature=0.3, top_p=0.6)
    model.chat(tokenizer, "你好", top_p=0.9)
    model.generation_config.do_sample = False
    model.chat(tokenizer, "你好")
    chosen = [{name: settings.get(name) for name in ("do_sample", "top_p", "temperature")} for settings in seen]
    assert chosen == [
        {"do_sample": True, "top_p": 0.8, "temperature": 0.8},
        {"do_sample": True, "top_p": 0.9, "temperature": 0.3},
        {"do_sample": False, "top_p": None, "temperature": None},
    ]


def test_pipeline(tokenizer):
    model = make_model(len(tokenizer))
    chat = pipeline("text-generation", model=model, tokenizer=tokenizer)
    reply = chat(CHATS[1], max_new_tokens=5, do_sample=False)[0]["generated_text"]
    inputs = tokenizer.build_chat_input("你好", CHATS[1][:1])
    expected = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert reply[-1]["content"] == tokenizer.decode(expected, skip_special_tokens=True)


# Files


def test_save_and_reload(folder, hf_folder, tmp_path):
    for number, source in enumerate((folder, hf_folder)):
        tokenizer = ChatGLMTokenizer.from_pretrained(source)
        saved = tmp_path / str(number)
        tokenizer.save_pretrained(saved)
        again = ChatGLMTokenizer.from_pretrained(saved)
        again.save_pretrained(saved)
        for other in (again, pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer)):
            assert other.get_vocab() == tokenizer.get_vocab()
            assert other.chat_format == "glm4" and other.chat_template == tokenizer.chat_template
            assert other.all_special_ids == tokenizer.all_special_ids
            assert other(["你好", "春天来了 <|user|>"], padding=True) == tokenizer(
                ["你好", "春天来了 <|user|>"], padding=True
            )
    assert (tmp_path / "0/tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()
    assert (tmp_path / "1/tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()


def test_special_tokens_are_read_from_the_folder(tmp_path):
    """CodeGeeX4 has more of them than GLM-4-9B; their ids are the folder's."""
    settings = tiny_glm4.tokenizer_config()
    more = dict(settings["added_tokens_decoder"])
    more[str(len(tiny_glm4.ranks()) + 18)] = more[str(len(tiny_glm4.ranks()))] | {"content": "<|code_prefix|>"}
    folder = tiny_glm4.write_tokenizer(tmp_path / "codegeex4-all-9b", added_tokens_decoder=more)
    for tokenizer in (ChatGLMTokenizer.from_pretrained(folder), auto_tokenizer(folder)):
        assert tokenizer.get_command("<|code_prefix|>") == len(tiny_glm4.ranks()) + 18
        assert len(tokenizer) == len(tiny_glm4.ranks()) + 19
        tokenizer.save_pretrained(tmp_path / "saved")
        assert ChatGLMTokenizer.from_pretrained(tmp_path / "saved").get_vocab() == tokenizer.get_vocab()


def auto_tokenizer(folder):
    (folder / "config.json").write_text('{"model_type": "chatglm", "num_layers": 1}', encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert isinstance(tokenizer, ChatGLMTokenizer)
    return tokenizer


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("glm-4-9b-chat", {}, "glm4"),
        ("glm-4-9b", {}, "base"),
        ("glm-4-9b-hf", {}, "base"),
        ("models--THUDM--glm-4-9b/snapshots/0123abc", {}, "base"),
        ("models--THUDM--codegeex4-all-9b/snapshots/0123abc", {"chat_template": None}, "glm4"),
        ("mine", {"chat_template": None, "name_or_path": "THUDM/glm-4-9b"}, "base"),
        ("mine", {"name_or_path": "THUDM/glm-4-9b"}, "glm4"),  # trained on: the template says for what
        ("mine", {"chat_template": None}, "glm4"),
        ("glm-4-9b", {"chat_format": "glm4"}, "glm4"),
    ],
)
def test_chat_format_is_found(tmp_path, name, settings, expected):
    logging.get_logger("chatglm_ptuning").warning_once.cache_clear()
    folder = tiny_glm4.write_tokenizer(tmp_path / name, **settings)
    assert ChatGLMTokenizer.from_pretrained(folder).chat_format == expected


def test_chat_format_must_suit_the_vocabulary(tokenizer):
    with pytest.raises(ValueError, match=r"base, glm4 .*vocabulary .*'chatglm3'"):
        tokenizer.chat_format = "chatglm3"


def test_damaged_files_are_named(tmp_path):
    folder = tiny_glm4.write_tokenizer(tmp_path / "glm-4-9b-chat")
    path = folder / "tokenizer.model"
    lines = path.read_text(encoding="ascii").splitlines(keepends=True)
    wrong = {
        "line 3 of tokenizer.model is not base64, a space and a rank": [*lines[:2], "Iw==\n", *lines[3:]],
        "line 4 of tokenizer.model gives a token or a rank for the second time": [*lines[:3], lines[0], *lines[4:]],
        "has no token for 1 of the 256 bytes": lines[1:],
        "damaged or not": [lines[0], "\0\1\2"],
    }
    for message, content in wrong.items():
        path.write_text("".join(content), encoding="ascii")
        with pytest.raises(ValueError, match=rf"tokenizer\.model \(\d+ bytes\).*{message}"):
            ChatGLMTokenizer.from_pretrained(folder)
    path.unlink()
    content = json.loads(tiny_glm4.train().to_str())
    changes = {
        "does not cut text by GLM-4's pattern": {"pre_tokenizer": {"type": "ByteLevel"}},
        "is not plain BPE": {"normalizer": {"type": "NFC"}},
        "merges are not in the order": {"model": content["model"] | {"merges": content["model"]["merges"][::-1]}},
    }
    for message, change in changes.items():
        (folder / "tokenizer.json").write_text(json.dumps(content | change), encoding="utf-8")
        with pytest.raises(ValueError, match=rf"tokenizer\.json.*{message}"):
            ChatGLMTokenizer.from_pretrained(folder)
    added = [token for token in content["added_tokens"] if token["content"] != "<sop>"]
    (folder / "tokenizer.json").write_text(json.dumps(content | {"added_tokens": added}), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"tokenizer\.json.*no special token <sop>"):
        ChatGLMTokenizer.from_pretrained(folder)
