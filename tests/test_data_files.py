"""Reading data files and rows, and the error for each kind of fault."""

from __future__ import annotations

import gzip
import pickle
import re
from pathlib import Path

import pytest

from chatglm_ptuning.chat.message import Conversation, Message
from chatglm_ptuning.data.formats.registry import Columns, read_row
from chatglm_ptuning.data.sources.files import iterate_rows
from chatglm_ptuning.data.sources.rows import Row


def written(folder: Path, content: str | bytes, name: str = "rows.json") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def fault(path: Path) -> str:
    with pytest.raises(ValueError) as caught:
        list(iterate_rows([path]))
    return str(caught.value)


LINES = '{"a": "一"}\n\n  {"a": "二"}\r\n{"a": "三\u2028"}'


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(LINES.encode(), id="lines"),
        pytest.param(LINES.encode("utf-8-sig"), id="byte order mark"),
        pytest.param(gzip.compress(LINES.encode()), id="gzip"),
        pytest.param('[{"a": "一"},\n\n {"a": "二"}, \n{"a":\n "三\u2028"}]\n'.encode(), id="array"),
    ],
)
def test_reads_objects_with_their_lines(tmp_path, content):
    path = written(tmp_path, content)
    rows = list(iterate_rows([path]))
    assert rows == [{"a": "一"}, {"a": "二"}, {"a": "三\u2028"}]
    assert [row.where for row in rows] == [f"{path}:1", f"{path}:3", f"{path}:4"]


def test_a_row_survives_pickling():
    row = pickle.loads(pickle.dumps(Row({"a": 1}, "f.json", 7)))
    assert (row, row.where) == ({"a": 1}, "f.json:7")


@pytest.mark.parametrize(
    ("content", "line", "reason", "shown"),
    [
        ('{"a": 1}\n{"a": 2\n{"a": 3}', 2, r"JSON.*',' .*\(column 8\)", '{"a": 2'),
        ('{"a": 1}\n\n{"a": 1} {"a": 2}', 3, r"JSON: Extra data \(column 10\)", '{"a": 1} {"a": 2}'),
        ('{"a": 1}\n["b"]', 2, "expected a JSON object", '["b"]'),
        ('{"a": 1}\nnull', 2, "expected a JSON object", "null"),
        ('{"a": NaN}', 1, "JSON: NaN .* null or a number", '{"a": NaN}'),
        ('{"a": 1, "b": 2, "a": 3}', 1, "names 'a' twice", '{"a": 1, "b"'),
        ('[{"a": 1},\n{"b": {"c": 1, "c": 2}}]', 2, "names 'c' twice", '{"b": {"c"'),
        ('{"a": ' + "[" * 100_000, 1, "nested too deeply", '{"a": [[['),
        ('[{"a": 1},\n{"a": 2}\n{"a": 3}]', 3, "',' or ']' .*'{'", '{"a": 3}]'),
        ('[{"a": 1},\n{"a": 2}\n', 3, "',' or ']' .*file ends", ""),
        ('[{"a": 1},\n{"a" 2}]', 2, r"JSON.*':' .*\(column 6\)", '{"a" 2}]'),
        ('[{"a": 1},\n "b"]', 2, "expected a JSON object", '"b"'),
        ('[{"a": 1},\n]', 2, r"JSON: Expecting value \(column 1\)", "]"),
        ('[{"a": 1}]\n{"a": 2}', 2, "more text .*end of the array", '{"a": 2}'),
    ],
)
def test_names_file_line_and_reason_of_a_malformed_line(tmp_path, content, line, reason, shown):
    path = written(tmp_path, content)
    message = fault(path)
    assert re.match(rf"{path}:{line}: .*{reason}, in: {re.escape(shown)}", message)
    assert "one JSON object per line" in message


def test_a_long_malformed_line_is_shown_by_its_start(tmp_path):
    message = fault(written(tmp_path, '{"a": "' + "长" * 1000))
    assert "长" * 53 + "...\n" in message and "长" * 54 not in message


@pytest.mark.parametrize("content", ["", " \n\n", b"\xef\xbb\xbf", gzip.compress(b"")])
def test_an_empty_file(tmp_path, content):
    path = written(tmp_path, content)
    assert fault(path).startswith(f"{path} is empty.")


def test_an_empty_array(tmp_path):
    assert ":1: an empty array" in fault(written(tmp_path, "[ ]"))


def test_a_missing_file_names_near_ones(tmp_path):
    written(tmp_path, "{}", "train.json")
    assert "did you mean train.json?" in fault(tmp_path / "trian.json")
    assert "nor does its folder" in fault(tmp_path / "none" / "train.json")


def test_other_encodings(tmp_path):
    gbk = written(tmp_path, b'{"a": 1}\n' + '{"a": "你好"}'.encode("gbk"))
    assert re.match(rf"{gbk}:2: .*UTF-8.*\(byte 0xc4\).* GBK", fault(gbk))
    assert "iconv -f UTF-16" in fault(written(tmp_path, '{"a": "你好"}'.encode("utf-16")))
    assert "iconv -f UTF-16" in fault(written(tmp_path, '{"a": "你好"}'.encode("utf-16-le")))


def test_a_cut_off_gzip_file(tmp_path):
    assert "truncated gzip file" in fault(written(tmp_path, gzip.compress(LINES.encode())[:-12]))


def row(**values: object) -> Row:
    return Row(values, "rows.json", 5)


def content(values: Row, columns: Columns) -> Conversation:
    return read_row(values, columns)[1]


def refusal(values: Row, columns: Columns) -> str:
    with pytest.raises(ValueError) as caught:
        content(values, columns)
    message = str(caught.value)
    assert message.startswith("rows.json:5: ")
    return message.removeprefix("rows.json:5: ")


def test_prompt_columns_learn_the_response_alone():
    columns = Columns("content", "summary", "rounds")
    found = content(row(content="问二", summary=3.5, rounds=[["问一", "答一"]]), columns)
    assert found == Conversation(
        [
            Message("user", "问一"),
            Message("assistant", "答一"),
            Message("user", "问二"),
            Message("assistant", "3.5", loss=True),
        ]
    )


@pytest.mark.parametrize("rounds", [{}, {"rounds": None}, {"rounds": []}])
def test_no_history(rounds):
    found = content(row(prompt="问", response=True, **rounds), Columns(history="rounds"))
    assert found.messages == [Message("user", "问"), Message("assistant", "true", loss=True)]


def test_conversations_learn_every_answer_by_default():
    turns = [
        {"role": "system", "content": "系统", "loss": True},
        {"role": "user", "content": "问一", "loss": True},
        {"role": "assistant", "content": "答一", "loss": False},
        {"role": "user", "content": "问二"},
        {"role": "assistant", "content": "调用", "metadata": "get_weather"},
        {"role": "observation", "content": "晴"},
        {"role": "assistant", "content": " "},
    ]
    assert content(row(conversations=turns), Columns()).messages == [
        Message("system", "系统"),
        Message("user", "问一"),
        Message("assistant", "答一"),
        Message("user", "问二"),
        Message("assistant", "调用", "get_weather", loss=True),
        Message("observation", "晴"),
        Message("assistant", " "),
    ]


def test_official_tool_calls():
    call = {
        "role": "tool",
        "name": "get_weather",
        "parameters": {"city": "北京", "days": 2},
        "observation": {"t": "晴"},
    }
    turns = [{"role": "user", "content": "问"}, call, {**call, "loss": False, "observation": "雨"}]
    tools = [{"name": "get_weather"}]
    found = content(row(tools=tools, conversations=turns), Columns())
    assert found.tools == (tools[0],)
    _, first, seen, second, _ = found.messages
    arguments = {"city": "北京", "days": 2}
    assert first == Message("assistant", "", "get_weather", loss=True, arguments=arguments)
    assert seen == Message("observation", '{"t": "晴"}')
    assert second == Message("assistant", "", "get_weather", loss=False, arguments=arguments)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (row(prompt=["问"], response="答"), r"'prompt' .* array, not text: \[\"问\"\]"),
        (row(prompt="问", response={"a": 1}), "'response' .* object, not text: {\"a\": 1}"),
        (row(prompt="问\ud83d", response="答"), r"'prompt' .*surrogate pair \('\\ud83d'\) .*character 2"),
        (row(prompt="问", response="答", history="无"), r"'history' .*\[question, answer\] .*\"无\".* history_column"),
        (row(prompt="问", response="答", history=[["a", "b"], ["c"]]), r"'history' .*\[question, answer\] "
         r".*round 2 .*\[\"c\"\]"),
        (row(conversations="问"), "'conversations' .*list of messages"),
        (row(conversations=["问"]), "message 1 of 'conversations' .*not an object"),
        (row(conversations=[{"content": "问"}]), r"message 1 of 'conversations' .*no 'role' "
         r"\(it has 'content'\).*'role' and 'content'"),
        (row(conversations=[{"from": "human", "text": "问"}]), "message 1 of 'conversations' .*'from', 'text'"
         ".* ShareGPT .*'from' and 'value'"),
        (row(conversations=[{"from": "alien", "value": "问"}]), "message 1 of 'conversations' .*'alien'"),
        (row(conversations=[{"role": "human", "content": "问"}]), "message 1 of 'conversations' .*role "
         "'human'.* system, user, assistant, observation and tool"),
        (row(conversations=[{"role": "assistant", "content": "答", "loss": "no"}]), "message 1 of 'conversations'.*"
         "'loss' .*true or false.*'no'"),
        (row(conversations=[{"role": "tool", "name": "f"}]), "message 1 of 'conversations' .*tool call.*"
         "'name' .*'parameters'"),
        (row(conversations=[{"role": "assistant", "content": "", "metadata": "a\nb"}]), "metadata of message 1 of "
         "'conversations' .*line break"),
    ],
)  # fmt: skip
def test_names_what_is_wrong_in_a_row(values, message):
    assert re.search(message, refusal(values, Columns(history="history")))


def test_only_answers_can_be_learned():
    with pytest.raises(ValueError, match=r"role 'user' .*learned"):
        Message("user", "问", loss=True)


@pytest.mark.parametrize(
    ("values", "missing"),
    [
        (row(prompt="问", response="答"), None),
        (row(prompt=0, response=0), None),
        (row(prompt=" ", response=None), "empty"),
        (row(prompt="问", response=""), "one_sided"),
        (row(prompt="", response="答"), "one_sided"),
        (row(prompt="", response="答", history=[["问", "答"]]), "one_sided"),
        (row(prompt="问", response="", history=[["问", "答"]]), "one_sided"),
        (row(conversations=[]), "empty"),
        (row(conversations=[{"role": "user", "content": "问"}]), "one_sided"),
        (row(conversations=[{"role": "assistant", "content": "答"}]), "one_sided"),
        (row(conversations=[{"role": "user", "content": "问"}, {"role": "assistant", "content": ""}]), "one_sided"),
        (row(conversations=[{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]), "empty"),
        (row(conversations=[{"role": "system", "content": "介绍"}, {"role": "assistant", "content": "答"}]), None),
    ],
)
def test_recognises_rows_without_both_sides(values, missing):
    assert content(values, Columns(history="history")).missing_side() == missing


def test_a_dataset_on_a_hub_without_the_hubs_name_is_refused_with_its_right_name():
    for name in ("a/b", "hub:a/b"):
        with pytest.raises(ValueError, match=r" huggingface:a/b"):
            list(iterate_rows([name]))
