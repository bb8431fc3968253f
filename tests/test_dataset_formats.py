"""Rows of every published dataset format: which format is detected, and what they mean."""

from __future__ import annotations

import json
import pickle
import re

import pytest

from chatglm_ptuning.chat.message import Conversation, Document, Message
from chatglm_ptuning.data.formats.registry import Columns, read_row
from chatglm_ptuning.data.sources.rows import Row
from chatglm_ptuning.exact_json import dumps

DETECT = Columns()
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}}


def row(**values: object) -> Row:
    return Row(values, "rows.json", 5)


def user(content: str) -> Message:
    return Message("user", content)


def answer(content: str, loss: bool = True, metadata: str = "") -> Message:
    return Message("assistant", content, metadata, loss)


def call(name: str, arguments: object, loss: bool = True) -> Message:
    return Message("assistant", "", name, loss, arguments=arguments)


def seen(content: str) -> Message:
    return Message("observation", content)


def read(values: Row, dataset_format: str, columns: Columns = DETECT) -> Conversation:
    name, content, _ = read_row(values, columns)
    assert name == dataset_format
    return content


def refusal(values: Row, columns: Columns = DETECT) -> str:
    with pytest.raises(ValueError) as caught:
        read_row(values, columns)
    assert str(caught.value).startswith("rows.json:5: ")
    return str(caught.value).removeprefix("rows.json:5: ")


@pytest.mark.parametrize(
    "fields", [("content", "summary"), ("prompt", "response"), ("question", "answer"), ("input", "output"),
               ("input", "target"), ("problem", "solution"), ("ask", "answer"), ("text", "label")],
)  # fmt: skip
def test_known_pairs_of_columns_need_no_names(fields):
    values = dict(zip(fields, ("问", "答"), strict=True))
    assert read(row(**values, id=3), "columns").messages == [user("问"), answer("答")]


def test_a_history_is_read_beside_a_known_pair_but_not_beside_named_columns():
    values = row(prompt="问二", response="答二", history=[["问一", "答一"]])
    assert read(values, "columns").messages == [user("问一"), answer("答一", loss=False), user("问二"), answer("答二")]
    assert read(values, "columns", Columns("prompt", "response")).messages == [user("问二"), answer("答二")]


def test_one_named_column_finds_its_known_partner():
    assert read(row(content="问", summary="答"), "columns", Columns(prompt="content")).messages[1] == answer("答")
    assert re.search(
        "columns .*question and answer.*'a', 'b'.* response_column", refusal(row(a="问", b="答"), Columns(prompt="a"))
    )


def test_alpaca():
    values = row(
        instruction="翻译", input="你好", output="hello", system="你是译者", history=[["一", "one"], ["二", ""]]
    )
    assert read(values, "alpaca").messages == [
        Message("system", "你是译者"), user("一"), answer("one"), user("二"), answer("", loss=False),
        user("翻译\n你好"), answer("hello"),
    ]  # fmt: skip
    assert read(row(instruction="问", input="", output="答"), "alpaca").messages == [user("问"), answer("答")]
    assert read(row(instruction="问", output="答", system=None), "alpaca").messages == [user("问"), answer("答")]


def test_glm4_with_tools_in_the_system_message_as_published():
    published = {"name": "get_recommended_books", "arguments": {"interests": ["history"]}}
    turns = [
        {"role": "system", "content": "", "tools": [WEATHER]},
        {"role": "user", "content": "推荐几本书"},
        {"role": "assistant", "content": json.dumps(published)},
        {"role": "observation", "content": '{"books": ["史记"]}'},
        {"role": "assistant", "content": "《史记》"},
    ]
    assert read(row(messages=turns), "messages").messages == [
        Message("system", "", tools=(WEATHER,)), user("推荐几本书"), answer(json.dumps(published)),
        seen('{"books": ["史记"]}'), answer("《史记》"),
    ]  # fmt: skip


def test_glm4_with_metadata_and_a_turn_that_is_not_learned():
    turns = [
        {"role": "user", "content": "天气"},
        {"role": "assistant", "metadata": "get_weather", "content": '{"city": "北京"}', "loss": False},
        {"role": "observation", "content": "晴"},
        {"role": "assistant", "content": "晴天"},
    ]
    found = read(row(messages=turns), "messages").messages
    assert found[1] == answer('{"city": "北京"}', loss=False, metadata="get_weather")
    assert found[3] == answer("晴天")


def test_openai_chat_fine_tuning():
    turns = [
        {"role": "developer", "content": [{"type": "text", "text": "你是"}, {"type": "text", "text": "助手"}]},
        {"role": "user", "content": "天气"},
        {"role": "assistant", "content": "不知道", "weight": 0},
        {"role": "user", "content": "再想想", "name": "小王"},
        {"role": "assistant", "content": "晴", "weight": 1},
    ]
    assert read(row(messages=turns), "messages").messages == [
        Message("system", "你是助手"), user("天气"), answer("不知道", loss=False), user("再想想"), answer("晴"),
    ]  # fmt: skip


def test_openai_tool_calls_are_followed_each_by_its_result():
    def tool(identity: str, city: str) -> dict:
        arguments = json.dumps({"city": city}, ensure_ascii=False)
        return {"id": identity, "type": "function", "function": {"name": "get_weather", "arguments": arguments}}

    turns = [
        {"role": "user", "content": "北京和上海的天气"},
        {"role": "assistant", "content": None, "tool_calls": [tool("a", "北京"), tool("b", "上海")]},
        {"role": "tool", "tool_call_id": "b", "content": "雨"},
        {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "晴"}]},
        {"role": "assistant", "content": "北京晴，上海雨"},
        {"role": "user", "content": "广州呢"},
        {"role": "assistant", "content": "我查一下", "tool_calls": [tool("c", "广州")], "weight": 0},
        {"role": "tool", "tool_call_id": "c", "content": "阴"},
    ]
    found = read(row(messages=turns, tools=[WEATHER], parallel_tool_calls=True), "messages")
    assert found.tools == (WEATHER,)
    assert found.messages == [
        user("北京和上海的天气"), call("get_weather", {"city": "北京"}), seen("晴"),
        call("get_weather", {"city": "上海"}), seen("雨"),
        answer("北京晴，上海雨"), user("广州呢"), answer("我查一下", loss=False),
        call("get_weather", {"city": "广州"}, loss=False), seen("阴"),
    ]  # fmt: skip


def test_openai_results_belong_to_the_calls_before_them_even_if_ids_repeat():
    def turn(*cities: str) -> list[dict]:
        calls = [
            {"id": str(place), "type": "function", "function": {"name": "f", "arguments": json.dumps({"c": city})}}
            for place, city in enumerate(cities)
        ]
        results = [{"role": "tool", "tool_call_id": str(place), "content": city} for place, city in enumerate(cities)]
        return [{"role": "user", "content": "问"}, {"role": "assistant", "tool_calls": calls}, *results]

    found = read(row(messages=turn("a", "b") + turn("c") + turn("d", "e")), "messages").messages
    expected = []
    for cities in ("ab", "c", "de"):
        expected.append(user("问"))
        for city in cities:
            expected += [call("f", {"c": city}), seen(city)]
    assert found == expected
    without_result = turn("a", "b")[:-1]
    found = read(row(messages=without_result + turn("c", "d")), "messages").messages
    assert found[:5] == [user("问"), call("f", {"c": "a"}), seen("a"), call("f", {"c": "b"}), user("问")]
    assert found[-2:] == [call("f", {"c": "d"}), seen("d")]
    strange = {"role": "tool", "tool_call_id": ["1"], "content": "晴"}
    assert read(row(messages=[*turn("a", "b"), strange]), "messages").messages[-1] == seen("晴")


def test_openai_old_function_calls():
    turns = [
        {"role": "user", "content": "天气"},
        {"role": "assistant", "function_call": {"name": "get_weather", "arguments": "{broken"}},
        {"role": "function", "name": "get_weather", "content": "晴"},
    ]
    found = read(row(messages=turns, functions=[WEATHER["function"]]), "messages")
    assert found.messages[1:] == [call("get_weather", "{broken"), seen("晴")]
    assert found.tools == (WEATHER["function"],)


def test_sharegpt_with_tools_as_text():
    turns = [
        {"from": "human", "value": "天气"},
        {"from": "function_call", "value": '{"name": "get_weather", "arguments": {"city": "北京"}}'},
        {"from": "observation", "value": '{"t": "晴"}'},
        {"from": "gpt", "value": "晴天"},
        {"from": "human", "value": "谢谢"},
        {"from": "gpt", "value": "不客气", "loss": False},
    ]
    found = read(row(id="x", conversations=turns, system="你是助手", tools=json.dumps([WEATHER])), "sharegpt")
    assert found.tools == (WEATHER,)
    assert found.messages == [
        Message("system", "你是助手"), user("天气"), call("get_weather", {"city": "北京"}), seen('{"t": "晴"}'),
        answer("晴天"), user("谢谢"), answer("不客气", loss=False),
    ]  # fmt: skip


def test_sharegpt_conversations_that_begin_with_an_answer():
    turns = [
        {"from": "system", "value": "甲"},
        {"from": "gpt", "value": "断了头的回答"},
        {"from": "human", "value": "问"},
        {"from": "gpt", "value": "答"},
    ]
    assert read(row(conversations=turns, tools=""), "sharegpt").messages == [
        Message("system", "甲"), user("问"), answer("答"),
    ]  # fmt: skip


@pytest.mark.parametrize("keys", [("human", "assistant"), ("input", "output")])
def test_conversations_of_whole_rounds(keys):
    first, second = (dict(zip(keys, pair, strict=True)) for pair in (("问", "答"), ("再问", "再答")))
    wanted = [user("问"), answer("答"), user("再问"), answer("再答")]
    values = row(conversation_id=1, category="问答", conversation=[first, second], dataset="moss")
    assert read(values, "sharegpt").messages == wanted and read_row(values, DETECT).unread == ()
    said = read(row(conversation=[{"system": "甲", **first}, second]), "sharegpt").messages
    assert said == [Message("system", "甲"), *wanted]
    assert "'human' of message 1" in refusal(row(conversation=[{"human": ["问"], "assistant": "答"}]))


def test_a_conversation_of_chatglm3_may_be_named_in_the_singular():
    turns = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]
    values = row(_id="a", source="网", conversation=turns)
    assert read(values, "chatglm3").messages == [user("问"), answer("答")]
    assert read_row(values, DETECT).unread == ()
    assert read_row(row(prompt="问", response="答", conversation="闲聊"), DETECT).unread == ("conversation",)


def test_chatglm3_tool_alpaca():
    turns = [
        {"role": "user", "content": "查天气"},
        {"role": "assistant", "content": "我需要调用天气接口"},
        {"role": "tool", "name": "getWeather", "parameters": {"city": "北京"}, "observation": "晴"},
        {"role": "assistant", "content": "晴天"},
    ]
    found = read(row(tools=["getWeather: 查询天气"], conversations=turns), "chatglm3")
    assert found.tools == ("getWeather: 查询天气",)
    assert found.messages == [
        user("查天气"), answer("我需要调用天气接口"), call("getWeather", {"city": "北京"}), seen("晴"), answer("晴天"),
    ]  # fmt: skip


def test_plain_text():
    assert read(row(text="一段文字", url="http://a"), "text") == Document("一段文字")
    assert read(row(body="文字"), "text", Columns("body", dataset_format="text")) == Document("文字")


def test_lists_may_be_json_text_as_tables_hold_them():
    turns = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]
    assert read(row(messages=json.dumps(turns)), "messages").messages == [user("问"), answer("答")]
    assert read(row(prompt="二", response="答", history='[["一", "一"]]'), "columns").messages[0] == user("一")


def test_files_of_conversations_need_no_columns_even_if_some_are_named():
    turns = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]
    assert read(row(conversations=turns), "chatglm3", Columns("content", "summary")).messages[1] == answer("答")


def test_a_named_format_is_not_detected():
    values = row(content="问", summary="答", prompt="甲", response="乙")
    assert read(values, "columns", Columns("prompt", "response")).messages[0] == user("甲")
    assert read(row(messages=[], conversations=[]), "messages", Columns(dataset_format="openai")).messages == []
    assert re.search("no 'messages', .*the row has 'content'", refusal(values, Columns(dataset_format="glm4")))
    with pytest.raises(ValueError, match=r"dataset_format .*columns, alpaca, .*'csv'"):
        Columns(dataset_format="csv")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (row(标题="问", 正文="答"), "'标题', '正文' .*no dataset format\\.\nSet dataset_format to "),
        (row(content="问", summary="答", prompt="甲", response="乙"), "columns .*question and answer.*"
         "'content', 'summary', 'prompt', 'response'.* prompt_column and response_column"),
        (row(instruction="问", output="答", messages=[]), "'instruction', 'output', 'messages' .*several "
         "dataset formats: alpaca, messages"),
        (row(conversations=[], messages=[]), "'conversations', 'messages' .*"
         "several dataset formats: chatglm3, messages"),
        (row(text="文字", kind="新闻"), "'text', 'kind' .*no dataset format"),
        (row(instruction=["问"], output="答"), "'instruction' .*array, not text"),
        (row(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]), "message 1 of "
         "'messages' .*type 'image_url'"),
        (row(messages=[{"role": "bot", "content": "答"}]), "message 1 of 'messages' .*role 'bot'.* "
         "system, user, assistant, observation, developer, function and tool"),
        (row(messages=[{"role": "user"}]), r"message 1 of 'messages' .*no 'content' \(it has 'role'\)"),
        (row(messages=[{"role": "assistant", "content": "答", "weight": 2}]), "message 1 of 'messages'.*'weight' .*"
         "0 or 1.* 2"),
        (row(messages=[{"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}]), "message 1 of "
         "'messages' .*tool call.*'name'"),
        (row(conversations=[{"from": "function_call", "value": "get_weather()"}]), "message 1 of 'conversations' .*"
         '{"name": .*"arguments": .*"get_weather\\(\\)"'),
        (row(conversations=[{"from": "human", "value": "问"}], tools="天气"), "'tools' .*list of tool "
         'definitions.*"天气"'),
    ],
)  # fmt: skip
def test_names_what_is_wrong(values, message):
    assert re.search(message, refusal(values))


SYSTEM = Message("system", "你是助手")
PAIR = [user("问"), answer("答")]
ROLES = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]
SHAREGPT = [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}]
EVERY_FORMAT = pytest.mark.parametrize(
    ("values", "dataset_format"),
    [
        ({"query": "问", "response": "答"}, "columns"), ({"question": "问", "answer": "答"}, "columns"),
        ({"instruction": "问", "output": "答"}, "alpaca"), ({"conversations": ROLES}, "chatglm3"),
        ({"messages": ROLES}, "messages"), ({"conversations": SHAREGPT}, "sharegpt"),
    ],
)  # fmt: skip


@EVERY_FORMAT
@pytest.mark.parametrize("name", ["system", "system_prompt"])
def test_system_and_tools_beside_a_conversation_are_used(values, dataset_format, name):
    found = read(row(**values, **{name: "你是助手"}, tools=json.dumps([WEATHER])), dataset_format)
    assert (found.messages, found.tools) == ([SYSTEM, *PAIR], (WEATHER,))


@pytest.mark.parametrize("added", ["input", "context"])
@pytest.mark.parametrize(
    ("question", "reply"),
    [("query", "response"), ("prompt", "response"), ("question", "answer"), ("instruction", "response"),
     ("instruction", "output")],
)  # fmt: skip
def test_input_and_context_are_joined_to_the_question(question, reply, added):
    values = {question: "谁写的？", reply: "李白", added: "静夜思是李白写的。"}
    found = read_row(row(**values), DETECT)
    assert found.content.messages == [user("谁写的？\n静夜思是李白写的。"), answer("李白")]
    assert found.unread == ()
    several = read_row(row(**{**values, added: ["一", "二"]}), DETECT).content
    assert several.messages[0] == user("谁写的？\n一\n二")
    assert read_row(row(**{**values, added: "[3, 1, 2]"}), DETECT).content.messages[0] == user("谁写的？\n[3, 1, 2]")
    assert re.search(f"'{added}' .*ignored_columns.* object", refusal(row(**{**values, added: {"a": "b"}})))


@EVERY_FORMAT
def test_other_text_is_named_and_what_has_no_meaning_is_not(values, dataset_format):
    notes = {"id": "a", "prompt_id": "b", "source": "网", "category": "问答", "language": "zh", "score": 4.5,
             "metadata": {"url": "http://" + "长" * 500}, "createdAt": "昨天", "Unnamed: 0": "x", "empty": None,
             "count": "12.5", "urls": ["http://a"], "cate1": "内科", "subCategory": "神经", "topics": ["婚恋"],
             "answer_from": "人", "来源": "网", "序号": "甲"}  # fmt: skip
    assert read_row(row(**values, **notes), DETECT).unread == ()
    assert read_row(row(**values, **notes, 备注="注", images=["a"]), DETECT).unread == ("备注", "images")
    assert read_row(row(**values, 备注="注"), Columns(ignored=("备注",))).unread == ()


@EVERY_FORMAT
def test_a_row_of_which_most_text_would_be_left_out_is_refused(values, dataset_format):
    for passage in ("一段材料", ["一段", "材料"], {"title": "一段", "text": "材料"}):
        message = refusal(row(**values, passage=passage))
        assert "'passage' (4 characters; it reads 2)" in message and dataset_format in message
        assert "ignored_columns" in message
        assert ("prompt_column" in message) == (dataset_format in ("columns", "alpaca"))
    assert "'source'" in refusal(row(**values, source="一段材料" * 100))
    assert read_row(row(**values, passage="一段材料"), Columns(ignored=("passage",))).unread == ()


def test_named_columns_leave_the_other_columns_to_the_user():
    values = row(问题="问", 回答="答", context="很长的一段材料", 旧="题", system="你是助手")
    found = read_row(values, Columns("问题", "回答"))
    assert found.content.messages == [SYSTEM, *PAIR]
    assert found.unread == ("context", "旧")


def test_a_field_that_repeats_the_conversation_is_not_left_out():
    assert read_row(row(messages=ROLES, prompt="问", text="<|user|>问<|assistant|>答"), DETECT).unread == ()
    assert read_row(row(messages=ROLES, text="问"), DETECT).unread == ()
    assert "'text' (63 characters; it reads 2)" in refusal(row(messages=ROLES, text="问答" + "长" * 61))
    turns = [{"role": "user", "content": "一个问题" * 5}, {"role": "assistant", "content": "一个回答" * 5}]
    rendered = f"<|user|>{turns[0]['content']}<|assistant|>{turns[1]['content']}"
    assert read_row(row(messages=turns, prompt=turns[0]["content"], text=rendered), DETECT).unread == ()


def test_a_system_message_beside_another_one_is_named():
    turns = [{"role": "system", "content": "甲"}, *ROLES]
    found = read_row(row(messages=turns, system="乙"), DETECT)
    assert found.content.messages == [Message("system", "甲"), *PAIR]
    assert found.unread == ("system",)
    assert read_row(row(messages=turns, system="甲"), DETECT).unread == ()


def test_keys_of_messages_that_hold_other_text_are_named():
    def turns(**more: object) -> list[dict]:
        return [{"role": "user", "content": "问题", "name": "小王"}, {"role": "assistant", "content": "回答", **more}]

    for field in ("messages", "conversations"):
        found = read_row(row(**{field: turns(reasoning_content="想")}), DETECT)
        assert found.unread == (f"{field}.reasoning_content",)
        assert "reasoning_content' (6 " in refusal(row(**{field: turns(reasoning_content="想了很久很久")}))
        for name in ("reasoning_content", f"{field}.reasoning_content"):
            allowed = Columns(ignored=(name,))
            assert read_row(row(**{field: turns(reasoning_content="想了很久很久")}), allowed).unread == ()
    assert re.search("'function_call' of message 2 .*object", refusal(row(messages=turns(function_call="f()"))))
    calls = [{"function": {"name": "get_weather", "arguments": "{}"}}]
    assert "'conversations.tool_calls'" in refusal(row(conversations=turns(tool_calls=calls)))


def test_the_title_of_a_plain_text_is_not_its_text():
    assert read_row(row(text="短", title="一个长得多的题目", url="http://a"), DETECT).unread == ()


NUMBERS = ["12.50", "1E400", "-0", "1.0", "1e5", "0.1", "12345678901234567890.123456789", "9" * 5000, "-12"]


@pytest.mark.parametrize("number", NUMBERS)
def test_numbers_are_kept_as_they_are_written(tmp_path, number):
    from chatglm_ptuning.data.sources.files import iterate_rows

    def first(text: str) -> Conversation:
        (tmp_path / "rows.json").write_text(text, "utf-8")
        (found,) = iterate_rows([tmp_path / "rows.json"])
        return read_row(found, DETECT).content

    for text in (f'{{"prompt": {number}, "response": {number}}}', f'[{{"prompt": {number}, "response": {number}}}]'):
        assert [message.content for message in first(text).messages] == [number] * 2
    arguments = f'{{"price": {number}, "all": [{number}]}}'
    for written in (arguments, json.dumps(arguments)):
        turns = f'[{{"role": "assistant", "tool_calls": [{{"function": {{"name": "f", "arguments": {written}}}}}]}}]'
        (made,) = first(f'{{"messages": {turns}}}').messages
        assert pickle.loads(pickle.dumps(made.arguments)) == made.arguments
        assert dumps(pickle.loads(pickle.dumps(made.arguments))) == arguments
        assert repr(made.arguments["price"]) == number if len(number) < 4300 else True


def test_a_row_that_is_left_out_is_not_refused_for_its_other_fields():
    found = read_row(row(prompt="问", response="", passage="一段材料"), DETECT)
    assert (found.content.missing_side(), found.unread) == ("one_sided", ("passage",))
