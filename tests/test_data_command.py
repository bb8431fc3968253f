"""`data show` and `data check` as a user runs them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import tiny_tokenizer
from json_lines import write_rows
from rich.console import Console

from chatglm_ptuning.cli import main
from chatglm_ptuning.data.check import count_scripts, is_mojibake, special_spellings
from chatglm_ptuning.data.show import print_example


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases") / "base"
    tiny_tokenizer.train(folder.parent, "chatglm3").save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "chatglm"}', "utf-8")
    return folder


def data_file(folder: Path, *rows: dict | str, name: str = "rows.jsonl") -> Path:
    return write_rows(folder / name, *rows)


def fails(*argv: object, code: int = 1) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in argv])
    assert ended.value.code == code


def test_show_marks_what_is_learned(base, tmp_path, capsys):
    path = data_file(tmp_path, {"prompt": "甲", "response": "乙"}, {"content": "今天<|user|>", "summary": "有雨"})
    main(["data", "show", str(path), "--row", "2", "--model_name_or_path", str(base)])
    assert capsys.readouterr().out == (
        f"{path}:2: dataset format columns, chat format chatglm3\n23 tokens, 6 learned\n"
        "[gMASK]sop<|user|>\n 今天<|user|><|assistant|>⟦\n 有雨</s>⟧\n"
    )
    main(["data", "show", "--rows", "2", str(path), "--model_name_or_path", str(base), "--tokens"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[2:5]] == [
        ["0", lines[2].split()[1], "-", "'[gMASK]'"], ["1", lines[3].split()[1], "-", "'sop'"],
        ["2", lines[4].split()[1], "-", "'<|user|>'"],
    ]  # fmt: skip
    # 8 tokens in front of the answer; `▁`, line feed, `▁`, the answer, `</s>`.
    assert [line.split()[2] for line in lines[2:15]] == ["-"] * 8 + ["learned"] * 5


def test_show_colours_on_a_terminal(tmp_path, capsys):
    tokenizer = tiny_tokenizer.train(tmp_path, "chatglm3")
    ids = tokenizer("你好")["input_ids"]
    console = Console(force_terminal=True, color_system="standard")
    print_example(tokenizer, ids, [-100] * (len(ids) - 1) + ids[-1:], console)
    assert capsys.readouterr().out == "\x1b[2m[gMASK]sop你\x1b[0m\x1b[1;32m好\x1b[0m\n"


def test_show_reports_truncation_and_missing_rows(base, tmp_path, capsys):
    path = data_file(tmp_path, {"prompt": "甲" * 50, "response": "乙"}, {"prompt": "", "response": ""})
    more = ["--model_name_or_path", str(base), "--max_source_length", "20"]
    main(["data", "show", str(path), *more])
    assert re.search("truncated: .*middle of the source", capsys.readouterr().out)
    main(["data", "show", str(path), "--row", "2", *more])
    assert "left out: empty" in capsys.readouterr().out
    fails("data", "show", path, "--row", "3", *more)
    assert re.search(f"no row 3: {path} .*2", capsys.readouterr().err)
    fails("data", "show", data_file(tmp_path, {"甲": 1}), *more)
    assert re.search("rows.jsonl:1: .*'甲' .*no dataset format", capsys.readouterr().err)
    fails("data", code=0)
    fails("data", "chekc", code=2)


def test_check_of_good_data(base, tmp_path, capsys):
    rows = [{"prompt": "甲" * (1 + number % 30), "response": "乙" * (number % 40)} for number in range(1, 40)]
    path = data_file(tmp_path, *rows)
    more = ["--model_name_or_path", base, "--max_source_length", "30", "--max_target_length", "20"]
    main(["data", "check", str(path), *map(str, more), "--output_dir", str(tmp_path / "out")])
    out = capsys.readouterr().out
    assert "39 rows, dataset format: columns" in out and "letters: han 100.0 %" in out and "Fit to train on." in out
    assert (tmp_path / "out" / "lengths.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "out" / "data_check.json").read_text("utf-8"))
    assert (found["fit"], found["rows"], found["formats"]) == (True, 39, {"columns": 39})
    # 7 tokens around a question and 3 in front of an answer, of which each character is one.
    sources = [7 + len(row["prompt"]) for row in rows]
    targets = [3 + len(row["response"]) for row in rows]
    assert found["tokens"]["source_cut"] == sum(source > 30 for source in sources) > 0
    assert found["tokens"]["target_cut"] == sum(target > 20 for target in targets) > 0
    assert found["tokens"]["percentiles"]["source"]["50"] == sorted(sources)[19]


def test_check_finds_faults_and_suspicious_rows(tmp_path, capsys):
    path = data_file(
        tmp_path,
        {"prompt": "问", "response": "答"},
        {"prompt": "问", "response": "答"},
        "{broken",
        {"prompt": "", "response": ""},
        {"prompt": "问", "response": " "},
        {"prompt": "<|user|>说", "response": "こんにちは hello 안녕 привет"},
        {"prompt": "丢了\ufffd字", "response": "答"},
        {"prompt": "锟斤拷", "response": "中文测试".encode().decode("latin-1")},
        {"conversations": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答", "loss": False}]},
        {"甲": "乙"},
        {"prompt": "问\ufeff", "response": "答"},
    )
    fails("data", "check", path, "--output_dir", tmp_path)
    out = capsys.readouterr().out
    assert (
        f"error: {path}:3: not valid JSON" in out and f"error: {path}:10: the fields '甲' fit no dataset format" in out
    )
    assert "Not fit to train on" in out
    found = json.loads((tmp_path / "data_check.json").read_text("utf-8"))
    assert (found["fit"], found["rows"], found["bad"]) == (False, 9, 2)
    assert found["counts"] == {
        "duplicates": 1, "empty": 1, "one_sided": 1, "without_targets": 1, "replacement_characters": 1, "mojibake": 1,
        "special_tokens": 1, "byte_order_marks": 1,
    }  # fmt: skip
    assert {name: [place.rpartition(":")[2] for place in places] for name, places in found["places"].items()} == {
        "duplicates": ["2"], "empty": ["4"], "one_sided": ["5"], "without_targets": ["9"],
        "replacement_characters": ["7"], "mojibake": ["8"], "special_tokens": ["6"],
        "byte_order_marks": ["11"],
    }  # fmt: skip
    assert found["scripts"]["kana"]["rows"] == found["scripts"]["hangul"]["rows"] == 1


@pytest.mark.parametrize("rows", [[{"prompt": "问", "response": ""}], ["[1, 2"], []])
def test_check_of_data_with_nothing_to_learn(tmp_path, rows, capsys):
    fails("data", "check", data_file(tmp_path, *rows))
    assert "error: " in capsys.readouterr().out
    fails("data", "check", tmp_path / "none.json")
    assert "none.json does not exist" in capsys.readouterr().out
    good = data_file(tmp_path, {"prompt": "问", "response": "答"}, name="good.json")
    fails("data", "check", tmp_path / "none.json", good)
    out = capsys.readouterr().out
    assert "1 rows, dataset format: columns" in out and "none.json does not exist" in out


def test_scripts_are_counted_by_letters():
    text = "中文 abcé かナ 한글 русский 123，。!?"
    assert count_scripts(text) == {"han": 2, "latin": 4, "kana": 2, "hangul": 2, "other": 7}


@pytest.mark.parametrize("text", ["你好".encode().decode("latin-1"), "锟斤拷", "é—®é¢˜", "â€œå¼•å·â€"])
def test_mojibake(text):
    assert is_mojibake(text)


@pytest.mark.parametrize("text", ["café naïve", "中文，“引号”", "Ãngstrom", "âéîôû", "façade – déjà"])
def test_no_mojibake(text):
    assert not is_mojibake(text)


def test_special_spellings():
    text = "<|user|> [gMASK]<sop> soporific </s> <|endoftext|> [MASK"
    assert special_spellings(text) == ["<|user|>", "[gMASK]", "<sop>", "</s>", "<|endoftext|>"]


def test_check_names_fields_with_text_that_is_not_read(tmp_path, capsys):
    pair = {"question": "谁写的？", "answer": "李白", "context": "静夜思是李白写的。", "id": "a"}
    path = data_file(tmp_path, pair, {**pair, "备注": "注"}, {**pair, "备注": "再注", "id": "b"})
    main(["data", "check", str(path), "--output_dir", str(tmp_path)])
    out = capsys.readouterr().out
    assert "2 rows whose field '备注' holds text that is not read" in out and f"{path}:2, {path}:3" in out
    assert "Fit to train on, without the text of '备注' (2 rows)." in out
    assert json.loads((tmp_path / "data_check.json").read_text("utf-8"))["unread"] == {"备注": 2}
    main(["data", "check", str(path), "--ignored_columns", "备注"])
    assert "Fit to train on." in capsys.readouterr().out
    main(["data", "show", str(path), "--row", "2"])
    assert "not read: 备注\n" in capsys.readouterr().out
    lost = data_file(tmp_path, pair, {"question": "问", "answer": "答", "passage": "一段材料"}, name="lost.jsonl")
    fails("data", "check", lost)
    out = capsys.readouterr().out
    assert re.search(rf"error: {lost}:2: .*columns.*'passage'.*prompt_column.*ignored_columns", out)
    assert "Not fit to train on" in out
    main(["data", "check", str(lost), "--prompt_column", "question", "--response_column", "answer"])
    assert "Fit to train on, without the text of 'context' (1 rows), 'passage' (1 rows)." in capsys.readouterr().out


def test_check_names_rows_that_are_longer_than_the_base_reads(base, tmp_path, capsys):
    path = data_file(tmp_path, {"prompt": "甲" * 3000, "response": "乙"}, {"prompt": "甲", "response": "乙"})
    more = ["--model_name_or_path", str(base), "--max_source_length"]
    main(["data", "check", str(path), *more, "4000"])
    assert re.search("warning: 1 of 2 .*seq_length of 2048 .*longest has 3012.*max_source", capsys.readouterr().out)
    main(["data", "check", str(path), *more, "1000"])
    assert "seq_length" not in capsys.readouterr().out
