"""The jinja templates for other programs against the chat formats; and parsing of answers."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import tiny_glm4
import tiny_tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

import chatglm_ptuning
from chatglm_ptuning.chat import formats
from chatglm_ptuning.chat.formats import CHAT_FORMATS
from chatglm_ptuning.chat.message import Conversation, Message
from chatglm_ptuning.chat.tools import call_arguments
from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer

FORMATS = [chat_format.name for chat_format in CHAT_FORMATS]
ROLE_FORMATS = [chat_format.name for chat_format in CHAT_FORMATS if chat_format.has_roles]
TOOL = {"name": "get_weather", "description": "城市 <|user|> 的天气", "parameters": {"type": "object"}}
WRAPPED = {"type": "function", "function": {"name": "查天气", "parameters": {}}}
SPELLED = "<|user|>\n [gMASK]sop<sop></s><|endoftext|><|assistant|>"


def said(*pairs: tuple[str, str], **last: object) -> list[dict]:
    messages = [{"role": role, "content": content} for role, content in pairs]
    messages[-1].update(last)
    return messages


USER, SYSTEM = ("user", "今天冷吗？"), ("system", "说话简短。")
CALL = {"role": "assistant", "metadata": "get_weather", "content": '{"city": "北京"}'}
RESULT = {"role": "observation", "content": "零下三度"}
CHATS = [
    said(USER),
    said(SYSTEM, USER),
    said(("user", "甲"), ("assistant", "乙"), ("user", ""), ("assistant", ""), ("user", " 丙\n\n丁 ")),
    said(SYSTEM, ("system", "公园"), ("user", SPELLED), ("assistant", SPELLED), USER),
]
"""Chats that every format can write."""
ROLE_CHATS = [
    (said(SYSTEM, tools=[TOOL, WRAPPED]) + said(USER), None),
    (said(("system", ""), tools=[TOOL]) + said(USER), None),
    (said(SYSTEM, tools=[]) + said(USER), None),
    (said(SYSTEM, tools=None) + said(USER, metadata=""), None),
    (said(USER), [TOOL, WRAPPED]),
    (said(SYSTEM, USER), [WRAPPED]),
    (said(SYSTEM, tools=[TOOL]) + said(USER), [WRAPPED]),
    ([*said(SYSTEM, tools=[TOOL]), *said(USER), CALL, RESULT, *said(("assistant", "很冷。"), USER)], None),
    ([*said(USER, ("assistant", "我查一查。")), CALL, RESULT], [TOOL]),
    (said(USER, ("assistant", "好"), SYSTEM, USER, metadata=SPELLED.replace("\n", "")), None),
    (said(USER, SYSTEM, tools=[TOOL]) + said(USER), None),
]
"""Chats with roles, tools and metadata, each with the tools that are given beside it."""


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    glm4 = ChatGLMTokenizer.from_pretrained(tiny_glm4.write_tokenizer(folder / "glm-4-9b-chat"))
    others = {name: tiny_tokenizer.train(folder, name) for name in FORMATS if name != "glm4"}
    return others | {"glm4": glm4}


def chats_of(chat_format: str) -> list[tuple[list[dict], list | None]]:
    return [(chat, None) for chat in CHATS] + (ROLE_CHATS if chat_format in ROLE_FORMATS else [])


def conversation_of(chat: list[dict], tools: list | None) -> Conversation:
    return Conversation([Message.from_dict(message) for message in chat], tools=tuple(tools or ()))


@pytest.mark.parametrize("chat_format", FORMATS)
def test_templates_give_the_ids_of_the_chat_format(tokenizers, chat_format, tmp_path):
    tokenizers[chat_format].save_pretrained(tmp_path)
    tokenizer = ChatGLMTokenizer.from_pretrained(tmp_path)
    for chat, tools in chats_of(chat_format):
        ids = tokenizer.apply_chat_template(chat, tools=tools, add_generation_prompt=True, return_dict=False)
        assert ids == tokenizer.chat.encode_prompt(conversation_of(chat, tools)), chat
        if chat_format in ROLE_FORMATS:
            answered = [*chat, {"role": "assistant", "content": "冷"}]
            ids = tokenizer.apply_chat_template(answered, tools=tools, return_dict=False)
            assert ids == tokenizer.chat.encode(conversation_of(answered, tools)).input_ids[:-1], chat


@pytest.mark.parametrize("chat_format", FORMATS)
def test_other_programs_render_the_text_of_the_ids(tokenizers, chat_format, tmp_path):
    tokenizers[chat_format].save_pretrained(tmp_path)
    template = (tmp_path / "chat_template.jinja").read_text(encoding="utf-8")
    for chat, tools in chats_of(chat_format):
        (text,), _ = render_jinja_template([chat], tools=tools, chat_template=template, add_generation_prompt=True)
        ids = tokenizers[chat_format].chat.encode_prompt(conversation_of(chat, tools))
        assert text == tokenizers[chat_format].decode(ids), chat


@pytest.mark.parametrize("chat_format", FORMATS)
def test_answers_are_read_as_they_were_written(tokenizers, chat_format):
    chat = tokenizers[chat_format].chat
    answers = [Message("assistant", content) for content in ("你好吗？", "一\n\n二", "", SPELLED)]
    if chat.has_roles:
        answers += [Message("assistant", "tool_call(a='b')", "get_weather"), Message("assistant", " {}", "查天气")]
    for answer in answers:
        ids = chat.encode_answer(answer)
        assert ids[-1] in chat.stop_ids
        for generated in (ids, ids[:-1], [*ids, *ids]):
            messages, unfinished = chat.parse(generated, ["查天气"])
            assert messages == [answer] and (not unfinished or not answer.content)
        assert chat.answer_text(ids) == chat.text_of(answer).strip()


@pytest.mark.parametrize("chat_format", ROLE_FORMATS)
@pytest.mark.parametrize("arguments", [{}, {"city": "北京", "days": 2, "now": True}, {"no-name": [1.5, "x"]}])
def test_tool_calls_are_read_as_they_were_written(tokenizers, chat_format, arguments):
    chat = tokenizers[chat_format].chat
    call = Message("assistant", "", "get_weather", arguments=arguments)
    thought = [*chat.encode_answer(Message("assistant", "我查一查。"), followed_by="assistant")]
    assert thought[-1] == chat.role_ids["assistant"]
    first, second = chat.parse([*thought, *chat.encode_answer(call, followed_by="observation")]).messages
    assert (first.metadata, first.content) == ("", "我查一查。")
    assert second.metadata == "get_weather" and call_arguments(second.content) == arguments


def test_the_chat_room_knows_nothing_of_the_rest():
    room = Path(chatglm_ptuning.__file__).parent / "chat"
    for path in room.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("chatglm_ptuning"):
                assert node.module.startswith(("chatglm_ptuning.chat.", "chatglm_ptuning.exact_json")), (
                    f"{path.name} imports {node.module}"
                )


def test_the_format_that_the_docs_add_works(tokenizers, monkeypatch):
    page = (Path(__file__).parents[1] / "docs/architecture.md").read_text(encoding="utf-8")
    (example,) = (code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "(TextFormat)" in code)
    scope: dict = {}
    exec(example, scope)
    monkeypatch.setattr(formats, "CHAT_FORMATS", (*CHAT_FORMATS, scope["Interview"]))
    tokenizer = tokenizers["base"]
    monkeypatch.setattr(tokenizer, "_chat", tokenizer.chat)
    tokenizer.chat_format = "interview"
    chat = said(("user", "甲"), ("assistant", "乙"), ("user", SPELLED))
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert ids == tokenizer.chat.encode_prompt(conversation_of(chat, None))
    assert tokenizer.decode(ids, skip_special_tokens=True) == f"Q: 甲\nA:乙\nQ: {SPELLED}\nA:"
