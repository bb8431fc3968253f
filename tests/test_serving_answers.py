"""Answers while they are generated: text in pieces, stop strings, tool calls."""

from __future__ import annotations

import random

import pytest
import tiny_glm4

from chatglm_ptuning.chat.chatglm2 import ChatGLM2Rounds
from chatglm_ptuning.chat.plain import PlainText
from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer
from chatglm_ptuning.serving.answers import AnswerReader, TextStream


@pytest.fixture(scope="module")
def glm4(tmp_path_factory) -> ChatGLMTokenizer:
    return ChatGLMTokenizer.from_pretrained(tiny_glm4.write_tokenizer(tmp_path_factory.mktemp("glm4") / "glm-4"))


@pytest.fixture(params=["chatglm2", "chatglm3", "glm4"])
def tokenizer(request) -> ChatGLMTokenizer:
    return request.getfixturevalue(request.param)


def read(reader: AnswerReader, ids: list[int]) -> list[str]:
    return [piece for piece in (*map(reader.add, ids), reader.finish()) if piece]


def said(tokenizer: ChatGLMTokenizer, text: str) -> list[int]:
    """Ids that a model may generate: the line of the metadata is encoded by itself."""
    head, newline, rest = text.partition("\n")
    vocabulary = tokenizer.vocabulary
    return [*vocabulary.encode(head + newline), *vocabulary.encode(rest)] if newline else vocabulary.encode(text)


TEXTS = [
    "\n 你好，hello  world\n\n",
    "  a  b   c",
    "\n今天\n甲乙 ",
    "get\n```x",
    "\n一😀鑫",
    "[[训练时间]]",
    "abc\n你好",
]


def random_ids(tokenizer: ChatGLMTokenizer) -> list[list[int]]:
    chance = random.Random(0)
    rows = [[chance.randrange(len(tokenizer)) for _ in range(chance.randrange(1, 30))] for _ in range(60)]
    stop = tokenizer.chat.stop_ids
    rows += [tokenizer.vocabulary.encode(text) + row[:5] for text in TEXTS for row in rows[:3]]
    return [[index for index in row if index not in stop] for row in rows]


def test_the_text_of_a_stream_is_that_of_all_its_ids(tokenizer):
    for ids in random_ids(tokenizer):
        stream = TextStream(tokenizer.vocabulary)
        for place, index in enumerate(ids):
            stream.add(index)
            assert stream.text == tokenizer.vocabulary.decode(ids[: place + 1], skip_special_tokens=True)


@pytest.mark.parametrize("names", [(), ("get", "查天气")])
def test_the_pieces_are_the_parsed_answer(tokenizer, names):
    for ids in random_ids(tokenizer):
        reader = AnswerReader(tokenizer.chat, tool_names=names)
        text = "".join(read(reader, ids))
        assert reader.messages == tokenizer.chat.parse(ids, names).messages
        shown = [message for message in reader.messages if message.metadata not in names]
        assert text == reader.text == "\n".join(map(tokenizer.chat.text_of, shown))


@pytest.mark.parametrize("names", [(), ("get", "查天气")])
def test_the_pieces_with_stop_strings_are_the_beginning_of_the_answer(tokenizer, names):
    chance = random.Random(1)
    for ids in random_ids(tokenizer):
        ids = [index for index in ids if index != tokenizer.chat.next_message_id]
        (message,) = tokenizer.chat.parse(ids, names).messages
        whole = "" if message.metadata in names else tokenizer.chat.text_of(message)
        places = [chance.randrange(len(message.content) or 1) for _ in range(3)]
        stops = [stop for place in places if (stop := message.content[place : place + 3].strip())]
        ends = [place for stop in stops if (place := whole.find(stop, len(whole) - len(message.content))) >= 0]
        expected = whole[: min(ends, default=len(whole))] if whole else ""
        text = "".join(read(AnswerReader(tokenizer.chat, stops, names), ids))
        assert text.rstrip() == expected.rstrip()


@pytest.mark.parametrize("said_first", ["search", "查天气", "get", "甲"])
def test_without_tools_no_text_is_held_back(tokenizer, said_first):
    reader = AnswerReader(tokenizer.chat)
    for index in tokenizer.chat.answer_header():
        assert reader.add(index) == ""
    shown = ""
    for index in tokenizer.vocabulary.encode(said_first):
        shown += reader.add(index)
        said_now = reader.messages[0].content
        assert shown == said_now or said_now.endswith("\ufffd")
    assert shown == said_first


@pytest.mark.parametrize("name", ["chatglm3", "glm4"])
def test_without_tools_a_first_line_like_a_tools_name_is_text(request, name):
    tokenizer = request.getfixturevalue(name)
    ids = tokenizer.vocabulary.encode("search\n{}")
    reader = AnswerReader(tokenizer.chat)
    pieces = read(reader, ids)
    assert "".join(pieces) == "search\n{}" and len(pieces) > 1
    assert [(message.metadata, message.content) for message in reader.messages] == [("", "search\n{}")]
    assert tokenizer.chat.parse(ids, ()).messages == reader.messages
    assert tokenizer.chat.parse(ids).messages[0].metadata == "search"  # as the official chat reads it


def test_no_piece_ends_within_a_character(tokenizer):
    ids = said(tokenizer, "\n一😀鑫龘好")
    assert len(ids) > 8  # the characters are several ids
    pieces = read(AnswerReader(tokenizer.chat), ids)
    assert "".join(pieces) == "一😀鑫龘好"
    assert len(pieces) > 1 and not any("\ufffd" in piece for piece in pieces)


def test_a_continuation_keeps_its_first_space(chatglm3):
    chat_format = PlainText(chatglm3.vocabulary)
    prompt, ids = chatglm3.vocabulary.encode("abc"), chatglm3.vocabulary.encode("def")
    assert read(AnswerReader(chat_format, context=prompt), ids)[0].startswith(" ")
    assert "".join(read(AnswerReader(chat_format), ids)) == "def"


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (["天气"], "今天"),
        (["气很"], "今天天"),
        (["很好吗", "好，"], "今天天气很"),
        (["没有"], "今天天气很好，我想去公园"),
        (["公园", "想去公"], "今天天气很好，我"),  # the first in the text, not in the list
        (["园散步"], "今天天气很好，我想去公园"),  # only begun: it is held back and then shown
        (["今"], ""),
    ],
)
def test_an_answer_ends_before_a_stop_string(tokenizer, stop, expected):
    reader = AnswerReader(tokenizer.chat, stop)
    pieces, shown = [], ""
    for index in said(tokenizer, "\n今天天气很好，我想去公园"):
        pieces.append(reader.add(index))
        shown += pieces[-1]
        assert expected.startswith(shown)
    assert shown + reader.finish() == reader.text == expected
    assert reader.stopped is (expected != "今天天气很好，我想去公园")
    assert reader.add(5) == reader.finish() == "" or not reader.stopped


def test_a_stop_string_may_be_a_line_break_and_the_line_of_the_metadata_has_none(chatglm3):
    reader = AnswerReader(chatglm3.chat, ["\n\n"])
    assert "".join(read(reader, said(chatglm3, "\n今天\n\n明天"))) == "今天"
    assert reader.stopped
    reader = AnswerReader(chatglm3.chat, ["\n"])
    assert "".join(read(reader, said(chatglm3, "\n今天"))) == "今天"
    assert not reader.stopped


@pytest.mark.parametrize("name", ["chatglm3", "glm4"])
def test_a_tool_call_is_no_text(request, name):
    tokenizer = request.getfixturevalue(name)
    thought = said(tokenizer, "\n我想")
    call = said(tokenizer, 'weather\n{"city": "甲"}')
    reader = AnswerReader(tokenizer.chat, ["city"], tool_names=["weather"])
    assert "".join(read(reader, [*thought, tokenizer.chat.next_message_id, *call])) == "我想"
    assert [(message.metadata, message.content) for message in reader.calls] == [("weather", '{"city": "甲"}')]
    assert not reader.stopped


@pytest.mark.parametrize("name", ["chatglm3", "glm4"])
def test_a_call_of_another_tool_is_text(request, name):
    tokenizer = request.getfixturevalue(name)
    reader = AnswerReader(tokenizer.chat, tool_names=["weather"])
    assert "".join(read(reader, said(tokenizer, "search\nabc"))) == "search\nabc"
    assert reader.calls == []


def test_bytes_of_tokens(tokenizer):
    vocabulary = tokenizer.vocabulary
    ids = vocabulary.encode("今天 a😀")
    spelled = b"".join(map(vocabulary.bytes_of_token, ids)).decode()
    assert spelled.removeprefix(" ") == "今天 a😀"
    special = vocabulary.special_ids["[gMASK]"]
    assert vocabulary.bytes_of_token(special) == b"[gMASK]"
    assert vocabulary.bytes_of_token(10**6) == b""


def test_formats_of_one_text_have_no_next_message(chatglm2):
    assert ChatGLM2Rounds(chatglm2.vocabulary).next_message_id is None
