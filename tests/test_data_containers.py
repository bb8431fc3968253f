"""Files of every type, folders and patterns: their rows, the place of each row, and errors about faults."""

from __future__ import annotations

import bz2
import datetime
import gzip
import io
import json
import lzma
import re
import zipfile
from decimal import Decimal
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from chatglm_ptuning.data.formats.fields import text
from chatglm_ptuning.data.formats.registry import Columns
from chatglm_ptuning.data.sources.files import find_sources, iterate_rows
from chatglm_ptuning.data.sources.rows import BadRows, Row
from chatglm_ptuning.data.tasks import load_task, read_examples
from chatglm_ptuning.data.tasks.task import Task
from chatglm_ptuning.exact_json import dumps


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read_rows(path: Path) -> list[Row]:
    return list(iterate_rows([path]))


def fault(name: object) -> str:
    with pytest.raises(ValueError) as caught:
        list(iterate_rows([name]))
    return str(caught.value)


CSV = 'prompt,response\n问一,"答,一"\n\n"问\n二","他说""好"""\n问三,答三\n'


@pytest.mark.parametrize("content", [CSV, "\ufeff" + CSV, CSV.replace("\n", "\r\n")])
def test_csv(tmp_path, content):
    path = written(tmp_path, "rows.csv", content)
    rows = read_rows(path)
    line_end = "\r\n" if "\r" in content else "\n"
    assert [tuple(row.values()) for row in rows] == [
        ("问一", "答,一"), (f"问{line_end}二", '他说"好"'), ("问三", "答三"),
    ]  # fmt: skip
    assert list(rows[0]) == ["prompt", "response"]
    assert [row.where for row in rows] == [f"{path}:2", f"{path}:4", f"{path}:6"]


def test_tsv_and_gzip(tmp_path):
    path = written(tmp_path, "rows.tsv.gz", gzip.compress("prompt\tresponse\n问,一\t答".encode()))
    assert read_rows(path) == [{"prompt": "问,一", "response": "答"}]


def test_tsv_is_not_quoted_and_the_first_value_in_quotes_gives_a_warning(tmp_path, caplog):
    rows = 'text\tlabel\n"很好\t1\n差 "差"\t0\n\n"全在引号里"\t1\n"也是"\t1\n'
    path = written(tmp_path, "rows.tsv", rows)
    found = [(row["text"], row.line) for row in read_rows(path)]
    assert found == [('"很好', 2), ('差 "差"', 3), ('"全在引号里"', 5), ('"也是"', 6)]
    assert [f"{path}:5: " in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize("mark", [",", "\t"])
def test_tables_of_old_systems_and_with_the_index_that_pandas_writes(tmp_path, mark):
    text = "".join(f"{mark.join(cells)}\r" for cells in (["", "a"], ["0", "一"], ["1", "二"]))
    path = written(tmp_path, "rows.csv" if mark == "," else "rows.tsv", text)
    assert [(row, row.line) for row in read_rows(path)] == [({"": "0", "a": "一"}, 2), ({"": "1", "a": "二"}, 3)]


def test_plain_text_is_a_row_per_line(tmp_path):
    path = written(tmp_path, "novel.txt", "第一段\r\n\n  第二段\n")
    assert [(dict(row), row.where) for row in read_rows(path)] == [
        ({"text": "第一段"}, f"{path}:1"), ({"text": "  第二段"}, f"{path}:3"),
    ]  # fmt: skip


MOOD = """
name: mood
title: moods of messages
reader: rows
fields: {text: text}
labels: {happy: 高兴, sad: 难过}
prompt: "{text}"
metric: macro_f1
pre_seq_len: 6
learning_rate: 5.0e-3
files: {test: test.txt}
"""


@pytest.mark.parametrize(
    ("content", "texts", "line"),
    [
        ('{"text": "好"}\n{"text": "坏"}\n', ["好", "坏"], 2),
        ('\ufeff\n [{"text": "好"},\n{"text": "坏"}]\n', ["好", "坏"], 3),
        ("好\n[坏]\n", ["好", "[坏]"], 2),
    ],
)
def test_text_files_with_rows_of_tasks_may_hold_json(tmp_path, content, texts, line):
    written(tmp_path, "mood.yaml", MOOD)
    task = load_task(tmp_path / "mood.yaml")
    path = written(tmp_path, "test.txt", content)
    examples = read_examples(task, tmp_path, "test")
    assert [example.text for example in examples] == texts
    assert examples[1].where == f"{path}:{line}"


def test_instruction_files_of_text_hold_no_json(tmp_path):
    path = written(tmp_path, "novel.txt", '[第一章]\n{"text": "好"}\n')
    examples = read_examples(Task.of_files([str(path)], Columns(), ""), path, "train")
    assert [example.content.text for example in examples] == ["[第一章]", '{"text": "好"}']


def test_parquet_leaves_out_the_nulls_that_it_fills_in(tmp_path):
    path = tmp_path / "rows.parquet"
    turns = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答", "loss": False}]
    rows = [{"id": None, "messages": turns}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows * 600), path)
    found = read_rows(path)
    assert found == rows * 600
    assert (found[0].where, found[599].where) == (f"{path} row 1", f"{path} row 600")
    packed = written(tmp_path, "packed.parquet.gz", gzip.compress(path.read_bytes()))
    assert read_rows(packed) == rows * 600


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "prompt,response\n一\n", r":2: 1 values.* 2 columns \(prompt, response\).* commas"),
        ("a.tsv", "prompt\tresponse\n一\t二\t三\n", r":2: 3 values.* 2 columns \(prompt, response\).* tabs"),
        ("a.csv", 'prompt,response\n"一"二,三\n', ":2: not a row of values: .*expected after"),
        ("a.csv", 'prompt,response\n一,"二\n', ":2: not a row of values: .*unexpected end"),
        ("a.csv", "prompt,prompt\n一,二\n", ":1: .*names of the columns .*'prompt' twice"),
        ("a.csv", "prompt,\n一,二\n", ":1: .*names of the columns .* without a name"),
        ("a.csv", "prompt\tresponse\n一\t二\n", r":1: .*'\\t'.* suffix \.tsv"),
        ("a.csv", "prompt;response\n一;二\n", r":1: .*';'.* commas"),
        ("a.tsv", "prompt,response\n一,二\n", r":1: .*','.* suffix \.csv"),
        ("a.csv", "prompt,response\n", " is empty.* names of the columns"),
        ("a.csv", "问,答\n一,二\n".encode("gbk"), r":1: .*UTF-8.*\(byte 0xce\).* GBK"),
        ("a.txt", " \n\n", r" is empty\."),
        ("a.parquet", "PAR1 and no more", " .*damaged.*Parquet"),
        ("a.parquet", b"%PDF-1.7\n", " is not a Parquet file: it is a PDF document"),
        ("a.csv.gz", gzip.compress(CSV.encode())[:-9], " .*truncated gzip"),
    ],
)
def test_names_what_is_wrong_with_a_file(tmp_path, name, content, message):
    path = written(tmp_path, name, content)
    assert re.match(re.escape(str(path)) + message, fault(path))


def test_folders_and_patterns(tmp_path):
    written(tmp_path, "b.jsonl", '{"a": 2}\n')
    written(tmp_path, "a.csv", "a\n1\n")
    written(tmp_path, "README.md", "# nothing")
    assert [dict(row) for row in iterate_rows([tmp_path])] == [{"a": "1"}, {"a": 2}]
    assert [dict(row) for row in iterate_rows([f"{tmp_path}/*.jsonl", tmp_path / "a.csv"])] == [{"a": 2}, {"a": "1"}]
    assert re.search(r"No file .*/\*\.parquet", fault(f"{tmp_path}/*.parquet"))


def test_a_folder_of_several_splits_is_refused(tmp_path):
    for name in ("train.json", "dev.json"):
        written(tmp_path, name, '{"a": 1}')
    assert re.search(r"several splits \(dev.json, train.json\).* name the files of one", fault(tmp_path))
    (tmp_path / "empty").mkdir()
    assert re.search("empty .* without data files", fault(tmp_path / "empty"))


def test_shards_of_one_split_are_one_data_set(tmp_path):
    for number in range(3):
        written(tmp_path, f"train-0000{number}-of-00003.json", json.dumps({"a": number}))
    assert [row["a"] for row in iterate_rows([tmp_path])] == [0, 1, 2]


def test_names_of_hub_datasets():
    for hub in ("huggingface", "modelscope"):
        (found,) = find_sources(f"{hub}:owner/name?split=validation&revision=abc")
        assert (found.hub, found.repository, found.config) == (hub, "owner/name", None)
        assert (found.split, found.revision) == ("validation", "abc")
    for name in ("huggingface:owner/name?rows=3", "huggingface"):
        with pytest.raises(ValueError, match=rf"^{re.escape(name)}: .*huggingface:OWNER/NAME"):
            find_sources(name)


def test_a_hub_dataset_has_the_rows_of_its_files(tmp_path):
    datasets = pytest.importorskip("datasets")
    names = datasets.ClassLabel(names=["差评", "好评"])
    turns = datasets.List({"role": datasets.Value("string"), "weight": datasets.Value("int32")})
    features = datasets.Features({"text": datasets.Value("string"), "label": names, "messages": turns})
    rows = {"text": ["好", "坏"], "label": [1, -1], "messages": [[{"role": "user", "weight": None}], []]}
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "train.parquet")
    first, second = iterate_rows([f"huggingface:{tmp_path}"])
    assert first == {"text": "好", "label": "好评", "messages": [{"role": "user"}]}
    assert (second["label"], second.where) == (None, f"huggingface:{tmp_path} row 2")


def test_a_hub_dataset_without_a_connection(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    message = fault("huggingface:owner/name")
    assert message.startswith("huggingface:owner/name cannot be downloaded")
    assert "hf download --repo-type dataset owner/name" in message


def test_an_array_larger_than_what_is_read_at_once(tmp_path):
    rows = [{"n": number, "text": "长，\n\u2028" * (number % 500)} for number in range(3000)]
    rows[7]["text"] = "很长" * 1_000_000
    path = written(tmp_path, "big.json", json.dumps(rows, ensure_ascii=False, indent=1))
    lines = path.read_bytes().split(b"\n")
    found = read_rows(path)
    assert found == rows
    assert all(lines[row.line - 1].strip() == b"{" and str(row["n"]).encode() in lines[row.line] for row in found)
    broken = written(tmp_path, "broken.json", path.read_bytes().replace(b'"n": 2900,', b'"n": 2900'))
    assert re.match(f"{broken}:{found[2900].line + 2}: .*JSON.* ','", fault(broken))
    not_utf8 = written(tmp_path, "latin.json", path.read_bytes().replace(b'"n": 2900,', b'"n\xff": 2900,'))
    assert re.match(rf"{not_utf8}:{found[2900].line + 1}: .*UTF-8.*\(byte 0xff\)", fault(not_utf8))


def test_bad_rows_are_counted_until_there_are_too_many(tmp_path):
    lines = ['{"a": 1}', '{"a": ', '["b"]', b'{"a": "\xff"}', '{"a": 2}']
    path = written(
        tmp_path, "rows.json", b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines)
    )
    table = written(tmp_path, "rows.csv", "a,b\n1\n1,2\n")
    bad_rows = BadRows(4)
    assert [dict(row) for row in iterate_rows([path, table], bad_rows)] == [{"a": 1}, {"a": 2}, {"a": "1", "b": "2"}]
    assert bad_rows.count == 4
    assert [message.partition(": ")[0] for message in bad_rows.messages] == [
        f"{path}:2", f"{path}:3", f"{path}:4", f"{table}:2",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=rf"More than 2 .*skip_bad_rows(?s:.*){path}:4: .*UTF-8"):
        list(iterate_rows([path], BadRows(2)))


def test_a_tsv_file_whose_column_names_are_quoted_is_quoted(tmp_path):
    path = written(tmp_path, "rows.tsv", '"text"\t"label"\n"他说""好""\n再说"\t"1"\n')
    assert read_rows(path) == [{"text": '他说"好"\n再说', "label": "1"}]


def test_a_quoted_value_that_swallows_rows_gives_a_warning(tmp_path, caplog):
    path = written(tmp_path, "rows.csv", 'text,label\n好,1\n"很好,1\n差,0\n不错",1\n"两行\n文字",1\n')
    assert [row.line for row in read_rows(path)] == [2, 3, 6]
    (record,) = caplog.records
    assert f"{path}:3: " in record.getMessage() and "3 lines" in record.getMessage()


BOM = "\ufeff"
TABLE = "prompt,response\n问{0},答{0}\n"


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("a.jsonl", '{{"prompt": "问{0}", "response": "答{0}"}}\n'), ("a.csv", TABLE),
        ("a.json", '[\n{{"prompt": "问{0}", "response": "答{0}"}}]\n'), ("a.tsv", TABLE.replace(",", "\t")),
        ("quoted.csv", '"prompt","response"\n"问{0}","答{0}"\n'),
    ],
)  # fmt: skip
@pytest.mark.parametrize("mark", ["", BOM, BOM * 2])
def test_joined_files_are_read_as_one(tmp_path, caplog, name, part, mark):
    path = written(tmp_path, name, "".join(mark + part.format(number) for number in "一二三"))
    rows = read_rows(path)
    assert rows == [{"prompt": f"问{number}", "response": f"答{number}"} for number in "一二三"]
    assert [row.line for row in rows] == ([1, 2, 3] if name == "a.jsonl" else [2, 4, 6])
    assert [f"{path}:3: " in record.getMessage() for record in caplog.records] == [True] * ("sv" in name)


def test_joined_text_has_no_byte_order_marks_at_the_beginnings_of_lines(tmp_path):
    path = written(tmp_path, "a.txt", f"{BOM}一\n{BOM}二\n")
    assert [row["text"] for row in read_rows(path)] == ["一", "二"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", f"a,b\n1,2\n{BOM}b,a\n3,4\n", r":3: another file .*byte order mark.*columns a, b.*one by one"),
        ("a.csv", f"a,b\n1,2{BOM}a,b\n3,4\n", ":2: 3 values.* without a line break"),
        ("a.jsonl", f'{{"a": 1}}{BOM}{{"a": 2}}\n', ":1: a byte order mark inside the line.*break the line"),
        ("a.json", f'[{{"a": 1}}]{BOM}{{"a": 2}}\n', ":1: there is more text after the end of the array"),
    ],
)
def test_joined_files_that_do_not_fit_are_named(tmp_path, name, content, message):
    path = written(tmp_path, name, content)
    assert re.match(re.escape(str(path)) + message, fault(path))


def zipped(*names: str) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name in names:
            archive.writestr(name, "内容" * 1000)
    return data.getvalue()


TEXT = '{"prompt": "一二三", "response": "一"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.xlsx", zipped("[Content_Types].xml", "xl/workbook.xml"), "an Excel workbook.* CSV"),
        ("renamed.csv", zipped("xl/workbook.xml"), "an Excel workbook.* CSV"),
        ("a.xls", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), "an old Office document.* CSV"),
        ("a.docx", zipped("[Content_Types].xml", "word/document.xml"), "a Word document.* text"),
        ("cut.docx", zipped("word/document.xml")[:500], "a damaged zip archive.*again"),
        ("a.zip", zipped("train.json"), "a zip archive.*`unzip a.zip`"),
        ("a.json.bz2", bz2.compress(TEXT.encode()), "compressed by bzip2.*`bunzip2 a.json.bz2`"),
        ("a.json.xz", lzma.compress(TEXT.encode()), "compressed by xz.*`unxz a.json.xz`"),
        ("a.json.gz", gzip.compress(gzip.compress(TEXT.encode())), "gzipped twice.*`gunzip a.json.gz`"),
        ("a.tar.gz", gzip.compress(b"train.json".ljust(257, b"\0") + b"ustar\x0000"), "a tar archive.*`tar -xf "),
        ("a.json", b"PAR1\x15\x04", r"a Parquet file.*\.parquet"),
        ("a.pkl", b"\x80\x04\x95\0", "a Python pickle"),
        ("a.pdf", b"%PDF-1.7\n", "a PDF document"),
        ("a.json", b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS.*git lfs pull"),
        ("a.jsonl", (TEXT * 3).replace("三", "\0").encode(), "text with NUL.*`tr -d .* a.jsonl > clean.jsonl`"),
        ("a.dat", bytes(range(256)) * 4, "a binary file of an unknown kind"),
        ("a.json", TEXT.encode("utf-16"), "UTF-16.*`iconv -f UTF-16 -t UTF-8 a.json > utf8.json`"),
        ("a.json", TEXT.encode("utf-16-le"), "UTF-16LE.*`iconv -f UTF-16LE"),
        ("a.csv", "一,二\n一,二\n".encode("utf-16-be"), "UTF-16BE.*`iconv -f UTF-16BE"),
        ("a.txt", TEXT.encode("utf-32"), "UTF-32.*`iconv -f UTF-32"),
        ("a.json.gz", gzip.compress(TEXT.encode("utf-16")), r"UTF-16.*`gunzip -c a.json.gz \| iconv .* > utf8.json`"),
    ],
)
def test_a_file_that_is_no_text_is_named(tmp_path, name, content, message):
    path = written(tmp_path, name, content)
    found = fault(path)
    assert re.match(rf"{re.escape(str(path))} is not UTF-8 text: it is {message}", found)
    assert ("iconv" in found) == ("iconv" in message)


def test_numbers_and_dates_of_tables_keep_their_digits(tmp_path):
    day, number = datetime.date(2024, 5, 1), Decimal("12.50")
    columns = {
        "decimal": [number], "short": pyarrow.array([0.1], pyarrow.float32()), "day": [day], "whole": [2**60],
        "nested": [{"price": number}],
    }  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    cells = written(tmp_path, "a.csv", "decimal,short\n12.50,1E400\n")
    (row,), (texts,) = read_rows(tmp_path / "a.parquet"), read_rows(cells)
    shown = {name: text(value, name) for name, value in row.items() if name != "nested"}
    assert shown == {"decimal": "12.50", "short": "0.1", "day": "2024-05-01", "whole": str(2**60)}
    assert dumps(row["nested"]) == '{"price": 12.50}'
    assert texts == {"decimal": "12.50", "short": "1E400"}
