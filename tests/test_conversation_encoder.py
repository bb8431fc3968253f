"""Rows to examples: labels, limits, what is truncated and left out, and what the report says about it."""

from __future__ import annotations

import json

import pytest
from instruction_rows import conversation_head, prompts, training_rows
from tiny_tokenizer import spell, spell_marked, train

from chatglm_ptuning.data.formats.registry import Columns
from chatglm_ptuning.data.sources.rows import Row

PLAIN = Columns()
HISTORY = Columns(history="history")

# Lengths in tokens, of which each character is one:
# chatglm2 `[gMASK] sop ▁[Round▁1]\n\n问：` + question + `\n\n答：` is 20 + the question; then `▁` + answer;
# chatglm3 `[gMASK] sop <|user|>▁\n▁` + question + `<|assistant|>` is 7 + the question; then `▁\n▁` + answer.
FRAME = {"chatglm2": 20, "chatglm3": 7}


@pytest.fixture(params=["chatglm2", "chatglm3"])
def tokenizer(request, chatglm2, chatglm3):
    return {"chatglm2": chatglm2, "chatglm3": chatglm3}[request.param]


def row(line: int = 1, **values: object) -> Row:
    return Row(values, "rows.json", line)


def turns(*contents: str, system: str | None = None, **last: object) -> Row:
    roles = ("user", "assistant")
    messages = [{"role": roles[index % 2], "content": content} for index, content in enumerate(contents)]
    messages[-1].update(last)
    return row(conversations=[{"role": "system", "content": system}, *messages] if system else messages)


def trained(tokenizer, rows: list[Row], source: int, target: int, prefix: str = "", columns: Columns = PLAIN):
    examples, report = training_rows(tokenizer, rows, source, target, prefix, columns)
    for example in examples:
        assert all(label in {-100, index} for index, label in zip(*example.values(), strict=True))
    masks = [[label != -100 for label in example["labels"]] for example in examples]
    shown = [spell_marked(tokenizer, example["input_ids"], mask) for example, mask in zip(examples, masks, strict=True)]
    return shown, report


def counted(report) -> dict[str, int]:
    """The counters that are not zero."""
    return {name: value for name, value in report.as_dict().items() if value and name not in ("lengths", "places")}


def test_prompt_columns(chatglm2, chatglm3):
    rows = [row(prompt="丙", response="丁", history=[["甲", "乙"]]), row(prompt="戊", response="己")]
    shown, report = trained(chatglm2, rows, 100, 10, "请问", HISTORY)
    assert shown == [
        "[gMASK]sop▁请问[Round▁1]\n\n问：甲\n\n答：乙\n\n[Round▁2]\n\n问：丙\n\n答：【▁丁</s>】",
        "[gMASK]sop▁请问[Round▁1]\n\n问：戊\n\n答：【▁己</s>】",
    ]
    assert counted(report) == {"rows": 2, "used": 2, "examples": 2}
    shown, _ = trained(chatglm3, rows, 100, 10, columns=HISTORY)
    assert shown == [
        "[gMASK]sop<|user|>▁\n▁甲<|assistant|>▁\n▁乙<|user|>▁\n▁丙<|assistant|>【▁\n▁丁</s>】",
        "[gMASK]sop<|user|>▁\n▁戊<|assistant|>【▁\n▁己</s>】",
    ]


def test_a_conversation_is_one_example_or_one_for_each_answer(chatglm2, chatglm3):
    rows = [turns("甲", "乙", "丙", "丁", "戊")]
    shown, report = trained(chatglm3, rows, 100, 10)
    assert shown == ["[gMASK]sop<|user|>▁\n▁甲<|assistant|>【▁\n▁乙<|user|>】▁\n▁丙<|assistant|>【▁\n▁丁<|user|>】"]
    assert counted(report) == {"rows": 1, "used": 1, "examples": 1}
    shown, report = trained(chatglm2, rows, 100, 10)
    assert [text.split("问：")[-1] for text in shown] == ["甲\n\n答：【▁乙</s>】", "丙\n\n答：【▁丁</s>】"]
    assert counted(report) == {"rows": 1, "used": 1, "examples": 2}


def test_what_just_fits_is_not_truncated(tokenizer):
    answer = 4 + (3 if tokenizer.chat_format == "chatglm3" else 1)
    rows = [row(prompt="甲乙丙", response="丁戊己庚")]
    shown, report = trained(tokenizer, rows, FRAME[tokenizer.chat_format] + 3, answer)
    assert shown[0].endswith("▁丁戊己庚</s>】")
    assert counted(report) == {"rows": 1, "used": 1, "examples": 1}
    shown, report = trained(tokenizer, rows, FRAME[tokenizer.chat_format] + 3, answer - 1)
    assert shown[0].endswith("▁丁戊己】")
    assert counted(report) == {"rows": 1, "used": 1, "examples": 1, "target_cut": 1}


def test_a_long_question_loses_its_middle(chatglm2, chatglm3):
    rows = [row(prompt="甲乙丙丁戊己庚", response="辛")]
    shown, report = trained(chatglm2, rows, 20 + 4, 10)
    assert shown == ["[gMASK]sop▁[Round▁1]\n\n问：甲乙己庚\n\n答：【▁辛</s>】"]
    assert counted(report) == {"rows": 1, "used": 1, "examples": 1, "source_cut": 1}
    shown, report = trained(chatglm3, rows, 7 + 3, 10)
    assert shown == ["[gMASK]sop<|user|>▁\n▁甲乙庚<|assistant|>【▁\n▁辛</s>】"]
    assert counted(report) == {"rows": 1, "used": 1, "examples": 1, "source_cut": 1}


def test_whole_rounds_are_dropped_oldest_first(chatglm2, chatglm3):
    rows = [row(prompt="戊", response="己", history=[["甲甲甲", "乙"], ["丙", "丁"]])]
    shown, report = trained(chatglm2, rows, 45, 10, columns=HISTORY)
    assert shown == ["[gMASK]sop▁[Round▁1]\n\n问：丙\n\n答：丁\n\n[Round▁2]\n\n问：戊\n\n答：【▁己</s>】"]
    assert counted(report) == {"rows": 1, "used": 1, "examples": 1, "history_cut": 1}
    shown, report = trained(chatglm3, rows, 16, 10, "问", HISTORY)
    assert shown == ["[gMASK]sop<|user|>▁\n▁问戊<|assistant|>【▁\n▁己</s>】"]
    assert counted(report) == {"rows": 1, "used": 1, "examples": 1, "history_cut": 1}


def test_the_question_is_truncated_if_dropping_rounds_is_not_enough(chatglm3):
    rows = [row(prompt="丙丁戊己庚", response="辛", history=[["甲", "乙"]])]
    shown, report = trained(chatglm3, rows, 7 + 2, 10, columns=HISTORY)
    assert shown == ["[gMASK]sop<|user|>▁\n▁丙庚<|assistant|>【▁\n▁辛</s>】"]
    assert counted(report) == {"rows": 1, "used": 1, "examples": 1, "history_cut": 1, "source_cut": 1}


def test_a_conversation_may_share_both_limits(chatglm3):
    long_answer = [turns("甲", "乙乙乙乙乙乙")]
    shown, report = trained(chatglm3, long_answer, 12, 5)
    assert shown == ["[gMASK]sop<|user|>▁\n▁甲<|assistant|>【▁\n▁乙乙乙乙乙乙</s>】"]
    assert counted(report) == {"rows": 1, "used": 1, "examples": 1}
    shown, report = trained(chatglm3, long_answer, 11, 5)
    assert shown == ["[gMASK]sop<|user|>▁\n▁甲<|assistant|>【▁\n▁乙乙乙乙乙】"]
    assert counted(report) == {"rows": 1, "used": 1, "examples": 1, "target_cut": 1}
    shown, report = trained(chatglm3, [turns("甲乙丙丁戊己", "庚庚庚庚庚庚")], 10, 6)
    assert shown == ["[gMASK]sop<|user|>▁\n▁甲乙己<|assistant|>【▁\n▁庚庚庚】"]
    assert counted(report) == {"rows": 1, "used": 1, "examples": 1, "source_cut": 1, "target_cut": 1}


def test_a_truncated_conversation_keeps_its_system_message(chatglm3):
    rows = [turns("甲", "乙", "丙", "丁", "戊", "己", system="公园")]
    shown, report = trained(chatglm3, rows, 32, 4)
    assert shown == [
        "[gMASK]sop<|system|>▁\n▁公园<|user|>▁\n▁丙<|assistant|>【▁\n▁丁<|user|>】▁\n▁戊<|assistant|>【▁\n▁己</s>】"
    ]
    assert counted(report) == {"rows": 1, "used": 1, "examples": 1, "history_cut": 1}


def test_the_longest_texts_of_the_last_turn_are_truncated_but_not_answers(chatglm3):
    messages = [
        {"role": "user", "content": "甲乙丙"},
        {"role": "assistant", "content": "f()", "metadata": "get"},
        {"role": "observation", "content": "abcdefghij"},
        {"role": "assistant", "content": "丁"},
    ]
    shown, report = trained(chatglm3, [row(conversations=messages)], 28, 4)
    assert shown == [
        "[gMASK]sop<|user|>▁\n▁甲乙丙<|assistant|>【▁get\n▁f()<|observation|>】▁\n▁abij<|assistant|>【▁\n▁丁</s>】"
    ]
    assert counted(report) == {"rows": 1, "used": 1, "examples": 1, "source_cut": 1}


def test_unusable_rows_are_counted_and_left_out(tokenizer):
    rows = [
        row(prompt="", response=None),
        row(prompt="甲", response=" "),
        row(prompt="", response="乙"),
        turns("甲", "乙", loss=False),
        turns("甲", ""),
        row(prompt="甲", response="乙"),
    ]
    shown, report = trained(tokenizer, rows, 50, 10)
    assert len(shown) == 1
    assert counted(report) == {
        "rows": 6, "used": 1, "examples": 1, "empty": 1, "one_sided": 3, "without_targets": 1
    }  # fmt: skip


def test_a_row_that_cannot_be_truncated_to_the_limit_is_left_out(chatglm3):
    call = {"role": "assistant", "content": "f" * 40, "metadata": "get"}
    messages = [{"role": "user", "content": "甲"}, call, {"role": "observation", "content": "雨"},
                {"role": "assistant", "content": "乙"}]  # fmt: skip
    shown, report = trained(chatglm3, [row(conversations=messages), row(prompt="甲", response="乙")], 20, 10)
    assert len(shown) == 1
    assert counted(report) == {"rows": 2, "used": 1, "examples": 1, "too_long": 1}


def test_a_real_unk_in_an_answer_is_learned(tmp_path):
    tokenizer = train(tmp_path, "chatglm2", byte_fallback=False)
    examples, _ = training_rows(tokenizer, [row(prompt="鑫", response="鑫你")], 50, 10)
    assert 0 in examples[0]["input_ids"][:-4]
    assert examples[0]["labels"][-4:] == [*tokenizer.encode("鑫你", add_special_tokens=False), 2]
    assert examples[0]["labels"][-3] == tokenizer.pad_token_id == 0


def test_generation_examples(chatglm2, chatglm3):
    rows = [row(prompt="丙", response="丁丁丁", history=[["甲", "乙"]]), turns("甲", "乙", "丙丁戊", "己", "庚")]
    examples, report = prompts(chatglm3, rows, 100, 2, HISTORY)
    assert [(spell(chatglm3, example["input_ids"]), example["reference"]) for example in examples] == [
        ("[gMASK]sop<|user|>▁\n▁甲<|assistant|>▁\n▁乙<|user|>▁\n▁丙<|assistant|>", "丁丁丁"),
        ("[gMASK]sop<|user|>▁\n▁甲<|assistant|>▁\n▁乙<|user|>▁\n▁丙丁戊<|assistant|>", "己"),
    ]
    assert counted(report) == {"rows": 2, "used": 2, "examples": 2}
    examples, report = prompts(chatglm2, rows, 22, 2, HISTORY)
    assert [(spell(chatglm2, example["input_ids"]), example["reference"]) for example in examples] == [
        ("[gMASK]sop▁[Round▁1]\n\n问：丙\n\n答：", "丁丁丁"),
        ("[gMASK]sop▁[Round▁1]\n\n问：丙戊\n\n答：", "己"),
    ]
    assert counted(report) == {"rows": 2, "used": 2, "examples": 2, "history_cut": 2, "source_cut": 1}


def test_the_reference_of_a_tool_call_has_the_name_of_the_tool(chatglm3):
    call = {"role": "assistant", "content": "f()", "metadata": "get"}
    rows = [row(conversations=[{"role": "user", "content": "甲"}, call])]
    examples, _ = prompts(chatglm3, rows, 50, 10)
    assert examples[0]["reference"] == "get\nf()"


def test_several_processes_give_the_same(tokenizer):
    rows = [row(prompt="甲" * (number % 40), response="乙" * (number % 7)) for number in range(60)]
    assert training_rows(tokenizer, rows, 40, 5, workers=2) == training_rows(tokenizer, rows, 40, 5)


def test_the_report_in_numbers_and_words(chatglm3):
    rows = [row(prompt="甲" * length, response="乙") for length in range(1, 101)]
    _, report = trained(chatglm3, [*rows, row(prompt="甲" * 9, response="乙" * 9), row(prompt="", response="")], 87, 6)
    assert json.loads(json.dumps(report.as_dict())) == {
        "rows": 102, "used": 101, "examples": 101, "empty": 1, "one_sided": 0, "without_targets": 0, "too_long": 0,
        "bad": 0, "history_cut": 0, "source_cut": 20, "target_cut": 1,
        "places": {"empty": "rows.json:1", "source_cut": "rows.json:1", "target_cut": "rows.json:1"},
        "lengths": {
            "source": {"50": 57, "90": 97, "99": 106, "100": 107},
            "target": {"50": 4, "90": 4, "99": 4, "100": 12},
            "example": {"50": 62, "90": 92, "99": 92, "100": 92},
        },
    }  # fmt: skip
    assert report.summary() == (
        "102 rows, 101 used, 101 examples\n"
        "rows left out: 1 empty (first: rows.json:1)\n"
        "examples truncated: 20 without the middle of the source (max_source_length) (first: rows.json:1), "
        "1 without the end of the answer (max_target_length) (first: rows.json:1)\n"
        "tokens of the source before truncation: half have at most 57, 90 % 97, 99 % 106, the maximum is 107\n"
        "tokens of the target before truncation: half have at most 4, 90 % 4, 99 % 4, the maximum is 12\n"
        "tokens of the example after truncation: half have at most 62, 90 % 92, 99 % 92, the maximum is 92"
    )


def refusal(tokenizer, rows: list[Row], columns: Columns = HISTORY) -> str:
    with pytest.raises(ValueError) as caught:
        training_rows(tokenizer, rows, 50, 10, columns=columns)
    return str(caught.value)


def test_faults_name_file_line_and_flag(chatglm2):
    good = row(prompt="甲", response="乙", history=[])
    assert refusal(chatglm2, [good, row(7, content="甲", response="乙")]).startswith(
        "rows.json:7: the fields 'content', 'response' fit no dataset format."
    )
    message = refusal(chatglm2, [good, row(7, content="甲", response="乙")], Columns("prompt", "response"))
    assert message.startswith("rows.json:7: there is no column 'prompt' (the row has 'content', 'response'); ")
    assert "set prompt_column" in message
    message = refusal(chatglm2, [row(3, prompt="甲", response="乙", rounds=[])])
    assert message.startswith(
        "rows.json:3: no row has the column 'history' (this one has 'prompt', 'response', 'rounds'"
    )
    assert "set history_column" in message
    message = refusal(chatglm2, [turns("甲", "乙", metadata="get")])
    assert message.startswith("rows.json:1: ChatGLM2's format has no tools")


def test_nothing_left_is_an_error_with_the_report(chatglm3):
    message = refusal(chatglm3, [row(prompt="", response=""), row(prompt="甲", response="")], PLAIN)
    assert message == (
        "No row of the data can be used:\n2 rows, 0 used, 0 examples\n"
        "rows left out: 1 empty (first: rows.json:1), 1 with only a question or only an answer (first: rows.json:1)"
    )
    assert "0 rows" in refusal(chatglm3, [])


def test_limits_too_small_for_the_format(tokenizer):
    shortest = FRAME[tokenizer.chat_format] + 1
    conversation_head(tokenizer, shortest, 1)
    with pytest.raises(ValueError, match=f"max_source_length={shortest - 1} .* {shortest} tokens"):
        conversation_head(tokenizer, shortest - 1, 10)
    with pytest.raises(ValueError, match=f" {shortest + 2} tokens .*source prefix"):
        conversation_head(tokenizer, shortest + 1, 10, "请问")
    with pytest.raises(ValueError, match=r"max_target_length=0 .*at least 1"):
        conversation_head(tokenizer, 50, 0)
