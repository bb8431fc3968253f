"""GLM-4's chat format and that of plain bases, token by token."""

from __future__ import annotations

import json

import instruction_rows
import pytest
import tiny_glm4
import tiny_tokenizer

from chatglm_ptuning.chat.message import Conversation, Message
from chatglm_ptuning.data.sources.rows import Row
from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer

WEATHER = {"name": "get_weather", "description": "查天气", "parameters": {"type": "object", "properties": {}}}


@pytest.fixture(scope="module")
def glm4(tmp_path_factory):
    return ChatGLMTokenizer.from_pretrained(tiny_glm4.write_tokenizer(tmp_path_factory.mktemp("glm") / "glm-4-9b-chat"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_tokenizer.train(tmp_path_factory.mktemp("base"), "base")


def user(content: str) -> Message:
    return Message("user", content)


def answer(content: str, metadata: str = "", loss: bool = True) -> Message:
    return Message("assistant", content, metadata, loss)


def expected(tokenizer, *parts: str) -> tuple[list[int], list[bool]]:
    """Ids and mask written down by hand: a special token, or a text encoded by itself; `+` in front means learned."""
    ids, mask = [], []
    for part in parts:
        text = part.removeprefix("+")
        special = text in tiny_glm4.SPECIAL_TOKENS
        new = [tokenizer.get_command(text)] if special else tokenizer.encode(text, add_special_tokens=False)
        ids += new
        mask += [part.startswith("+")] * len(new)
    return ids, mask


def rendered(messages: list[Message], tokenizer, **arguments) -> tuple[list[int], list[bool]]:
    found = tokenizer.chat.encode(Conversation(messages, **arguments))
    return found.input_ids, found.loss_mask


def test_glm4_learns_every_answer_and_the_token_that_ends_it(glm4):
    messages = [Message("system", "好"), user("你好"), answer("你是谁？"), user("春天"), answer("来了")]
    assert rendered(messages, glm4) == expected(
        glm4, "[gMASK]", "<sop>", "<|system|>", "\n", "好", "<|user|>", "\n", "你好", "<|assistant|>", "+\n",
        "+你是谁？", "+<|user|>", "\n", "春天", "<|assistant|>", "+\n", "+来了", "+<|user|>",
    )  # fmt: skip


def test_glm4_leaves_out_an_answer_by_turn_with_the_token_that_ends_it(glm4):
    messages = [user("你好"), answer("你是谁？", loss=False), user("春天"), answer("来了")]
    assert rendered(messages, glm4) == expected(
        glm4, "[gMASK]", "<sop>", "<|user|>", "\n", "你好", "<|assistant|>", "\n", "你是谁？",
        "<|user|>", "\n", "春天", "<|assistant|>", "+\n", "+来了", "+<|user|>",
    )  # fmt: skip


def test_glm4_tool_calls_learn_the_call_and_never_its_result(glm4):
    call = Message("assistant", "", "get_weather", loss=True, arguments={"city": "北京", "days": 2})
    messages = [user("天气"), answer("我查"), call, Message("observation", "晴"), answer("晴天")]
    tools = (
        "你是一个名为 ChatGLM 的人工智能助手。你是基于智谱AI训练的语言模型 GLM-4 模型开发的，"
        "你的任务是针对用户的问题和要求提供适当的答复和支持。\n\n# 可用工具\n\n## get_weather\n\n"
        f"{json.dumps(WEATHER, ensure_ascii=False, indent=4)}\n在调用上述函数时，请使用 Json 格式表示调用的参数。"
    )
    assert rendered(messages, glm4, tools=({"type": "function", "function": WEATHER},)) == expected(
        glm4, "[gMASK]", "<sop>", "<|system|>", "\n", tools, "<|user|>", "\n", "天气", "<|assistant|>", "+\n", "+我查",
        "+<|assistant|>", "+get_weather\n", '+{"city": "北京", "days": 2}', "+<|observation|>", "\n", "晴",
        "<|assistant|>", "+\n", "+晴天", "+<|user|>",
    )  # fmt: skip


def test_glm4_a_tool_call_at_the_end_is_ended_by_the_role_of_its_result(glm4):
    call = Message("assistant", "", "get_weather", loss=True, arguments={})
    ids, mask = rendered([user("天气"), call], glm4)
    assert (ids[-1], mask[-1]) == (glm4.get_command("<|observation|>"), True)
    assert {glm4.get_command("<|user|>"), ids[-1]} <= set(glm4.chat.stop_ids)


def test_glm4_a_call_spelled_by_its_metadata_ends_like_any_other(glm4):
    ids, _ = rendered([user("天气"), answer('{"city": "北京"}', "get_weather")], glm4)
    assert ids[-1] == glm4.get_command("<|observation|>")
    followed = Conversation([user("甲"), answer("我查查"), answer("{}", "get_weather", loss=False)])
    ids = glm4.chat.encode(followed.until_last_learned()).input_ids
    assert ids[-1] == glm4.get_command("<|assistant|>")


@pytest.mark.parametrize("content", ["", "你是助手"])
def test_glm4_prompts_are_those_of_the_chat_template(glm4, content):
    tools = [{"type": "function", "function": WEATHER}]
    dicts = [
        {"role": "system", "content": content, "tools": tools},
        {"role": "user", "content": "今天天气<|user|>\n"},
        {"role": "assistant", "metadata": "get_weather", "content": "{}"},
        {"role": "observation", "content": "晴"},
    ]
    messages = [
        Message("system", content, tools=tuple(tools)), user("今天天气<|user|>\n"), answer("{}", "get_weather"),
        Message("observation", "晴"),
    ]  # fmt: skip
    ids = glm4.chat.encode_prompt(Conversation(messages))
    assert ids == glm4.apply_chat_template(dicts, add_generation_prompt=True, return_dict=False)
    beside = glm4.chat.encode_prompt(Conversation(messages[1:], tools=tuple(tools)))
    assert beside == glm4.apply_chat_template(dicts[1:], tools=tools, add_generation_prompt=True, return_dict=False)


def test_glm4_refuses_unsupported_tools(glm4):
    with pytest.raises(ValueError, match=r"GLM-4.*tools.*'name'"):
        glm4.chat.encode(Conversation([user("天气"), answer("晴")], tools=("getWeather: 查天气",)))


def test_glm4_cuts_whole_turns_and_keeps_the_tools_and_the_last_question(glm4):
    tools = [{"type": "function", "function": WEATHER}]
    turns = [{"role": "system", "content": "", "tools": tools}]
    for number in range(6):
        turns += [{"role": "user", "content": f"问{number}"}, {"role": "assistant", "content": f"答{number}"}]
    row = Row({"messages": turns}, "rows.json", 1)
    whole = glm4.chat.encode(Conversation([Message("system", "", tools=tuple(tools)), user("问0"), answer("答0")]))
    room = len(whole.input_ids) + 24
    (example,), report = instruction_rows.training_rows(glm4, [row], room - 20, 20)
    text = glm4.decode(example["input_ids"])
    assert (report.history_cut, report.source_cut, report.target_cut) == (1, 0, 0)
    assert len(example["input_ids"]) <= room + 1
    assert "# 可用工具" in text and text.endswith("<|user|>\n问5<|assistant|>\n答5<|user|>")
    assert "问0" not in text and text.count("<|user|>\n问") == text.count("<|assistant|>\n答")


def test_an_answer_is_never_cut_within_the_line_of_its_role(glm4):
    call = [{"role": "user", "content": "天气"}, {"role": "assistant", "metadata": "get_weather", "content": "{}" * 30}]
    header = len(glm4.encode("get_weather\n", add_special_tokens=False))
    rows = [Row({"messages": call}, "rows.json", 1), Row({"messages": [call[0], {**call[1], "metadata": ""}]}, "r", 1)]
    source = len(glm4.chat.encode_prompt(Conversation([user("天气")])))
    examples, report = instruction_rows.training_rows(glm4, rows, source, header)
    assert (len(examples), report.too_long, report.target_cut) == (1, 1, 1)


def test_a_base_without_chat_format_continues_the_texts(base):
    messages = [user("甲"), answer("乙"), user("丙"), answer("丁")]
    parts = base.chat.training_parts(Conversation(messages, "请问"))
    shown = []
    for part in parts:
        found = base.chat.encode(part)
        shown.append(tiny_tokenizer.spell_marked(base, found.input_ids, found.loss_mask))
    assert shown == ["[gMASK]sop▁请问甲【▁乙</s>】", "[gMASK]sop▁请问甲乙丙【▁丁</s>】"]
    prompt = base.chat.encode_prompt(parts[1].asked)
    dicts = [{"role": message.role, "content": message.content} for message in messages[:3]]
    dicts[0]["content"] = "请问甲"
    assert prompt == base.apply_chat_template(dicts, return_dict=False)
    with pytest.raises(ValueError, match="has no tools"):
        base.chat.encode(Conversation([user("甲"), answer("f()", "get")]))
    with pytest.raises(ValueError, match="only the last answer"):
        base.chat.encode(Conversation(messages))


def test_plain_texts_are_learned_whole_and_split_into_pieces(base):
    row = Row({"text": "甲乙丙丁戊己庚"}, "novel.txt", 1)
    examples, report = instruction_rows.training_rows(base, [row], 4, 2)
    shown = [
        tiny_tokenizer.spell_marked(base, example["input_ids"], [label >= 0 for label in example["labels"]])
        for example in examples
    ]
    assert shown == ["[gMASK]sop【▁甲乙丙】", "[gMASK]sop【丁戊己庚】", "[gMASK]sop【</s>】"]
    assert (report.rows, report.used, report.examples) == (1, 1, 3)
    with pytest.raises(ValueError, match=r"novel.txt:1: .*plain text .*no question"):
        instruction_rows.prompts(base, [row], 4, 2)
