"""What readers of tasks take beside the plain form of their files, and what they say about what they refuse."""

import json
import re
from pathlib import Path

import pytest
from json_lines import write_rows

from chatglm_ptuning.cli import main
from chatglm_ptuning.data.sources.rows import BadRows
from chatglm_ptuning.data.tasks import load_task, read_examples
from chatglm_ptuning.data.tasks.task import Task

# Lines of tokens and tags


@pytest.mark.parametrize("mark", ["\t", " ", "  "])
def test_columns_between_token_and_tag_are_ignored(tmp_path, mark):
    rows = [["-DOCSTART-", "-X-", "-X-", "O"], [], ["[", "PU", "X", "O"], ["王", "NN", "X", "B-PER"], [],
            ["沪", "NR", "X", "B-LOC"]]  # fmt: skip
    text = "".join(mark.join(row).replace("\t\t", "\t") + "\n" for row in rows)
    task = load_task("msra_ner")
    for name, split in (("train.txt", "train"), ("test.txt", "test")):
        (tmp_path / name).write_text(text, "utf-8")
        examples = read_examples(task, tmp_path, split)
        assert [(example.tokens, example.tags) for example in examples] == [
            (("[", "王"), ("O", "B-PER")), (("沪",), ("B-LOC",)),
        ]  # fmt: skip


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_of_any_system(tmp_path, end):
    (tmp_path / "train.txt").write_bytes(end.join(["王\tB-PER", "宁\tI-PER", "", "沪\tB-LOC", ""]).encode())
    examples = read_examples(load_task("msra_ner"), tmp_path, "train")
    assert [example.tokens for example in examples] == [("王", "宁"), ("沪",)]


def test_a_token_may_be_a_space_or_a_tab(tmp_path):
    text = "王  B-PER\n\u3000 O\n  O\n \tO\n\t\tO\n\u3000\tO\n"
    (tmp_path / "train.txt").write_text(text, "utf-8")
    (example,) = read_examples(load_task("msra_ner"), tmp_path, "train")
    assert example.tokens == ("王", "\u3000", " ", " ", "\t", "\u3000")


@pytest.mark.parametrize(
    ("split", "text", "message"),
    [
        ("train", "感 B-PER NN X\n", r"train.txt:1: 4 columns.* tag\. .*'感 B-PER NN X'"),
        ("train", "感 O\n冒 NN X O\n", r"train.txt:2: 4 columns.* tag\..*\(2\)"),
        ("train", "感\tNN\tX\tO\n冒\tO\n", r"train.txt:2: 2 columns.*\(4\)"),
        ("test", "感\n冒 NN X\n", r"test.txt:2: 3 columns.* without tags"),
    ],
)
def test_uneven_columns_are_refused(tmp_path, split, text, message):
    (tmp_path / f"{split}.txt").write_text(text, "utf-8")
    with pytest.raises(ValueError, match=message):
        read_examples(load_task("msra_ner"), tmp_path, split)


# Rows

MOOD = """
name: mood
title: moods of messages
reader: rows
fields: {text: message, label: mood}
labels: {happy: 高兴, sad: 难过}
prompt: "{text}"
metric: macro_f1
pre_seq_len: 6
learning_rate: 5.0e-3
files: {train: train.jsonl, test: test.jsonl}
"""


def task_of(folder: Path, text: str) -> Task:
    (folder / "mine.yaml").write_text(text, "utf-8")
    return load_task(folder / "mine.yaml")


@pytest.mark.parametrize("value", [None, "", -1])
def test_an_empty_label_is_not_a_missing_field(tmp_path, value):
    task = task_of(tmp_path, MOOD)
    write_rows(tmp_path / "train.jsonl", {"message": "好", "mood": "happy"}, {"message": "好", "mood": value})
    message = rf"jsonl:2: .*'mood'.* label.* {json.dumps(value)};.* train"
    with pytest.raises(ValueError, match=message):
        read_examples(task, tmp_path, "train")


def test_an_empty_list_of_labels_is_not_a_missing_field(tmp_path):
    task = task_of(tmp_path, MOOD + "multi_label: true\n")
    write_rows(tmp_path / "train.jsonl", {"message": "好", "mood": []}, {"message": "好", "mood": None})
    with pytest.raises(ValueError, match=r"jsonl:2: .*'mood'.* null;.* without any label.* empty list"):
        read_examples(task, tmp_path, "train")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"label": []}, r"json:1: 'label' .* \[\];.* row like {\"text\""),
        ({"label": {"name": {"王": [0, 1]}}}, r"'label.name.王.0' .* 0;.* row like"),
        ({"label": {"name": {"王": [["a", 1]]}}}, r"'label.name.王.0.0' .*'a';.* row like"),
        ({"label": None}, r"no field 'label'.* entities.* text, label;.* row like"),
        ({"entities": [{"start": 0}]}, r"no field 'label'.* text, entities;.* row like"),
    ],
)
def test_other_formats_of_entities_are_refused_with_an_example_of_the_right_one(tmp_path, row, message):
    write_rows(tmp_path / "train.json", {"text": "王来了", **row})
    with pytest.raises(ValueError, match=message) as raised:
        read_examples(load_task("cluener"), tmp_path, "train")
    example = re.search(r"a row like ({.*}):", str(raised.value))
    (tmp_path / "train.json").write_text(example[1], "utf-8")
    (read,) = read_examples(load_task("cluener"), tmp_path, "train")
    assert read.tags == ("B-name", "I-name", "O", "B-address")


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("cluener", {"text": "", "label": {}}, r"json:2: .*no text"),
        ("adgen", {"content": "裤", "summary": " "}, r"json:2: .*'summary' is empty.* train .*target"),
    ],
)
def test_empty_texts_and_targets_are_refused(tmp_path, name, row, message):
    good = {"text": "王", "label": {}, "content": "裤", "summary": "宽松"}
    write_rows(tmp_path / "train.json", good, row)
    with pytest.raises(ValueError, match=message):
        read_examples(load_task(name), tmp_path, "train")


# Task files


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            MOOD.replace("reader: rows", "reader: [rows"),
            r"mine.yaml:5: .*YAML.*',' or '\]'.* line 4\.$",
        ),
        (MOOD.replace("reader:", "name:"), r"mine.yaml:4: .*YAML.* duplicate .*'name'.* line 2"),
        (MOOD.replace("messages", "a\x07"), r"mine.yaml:3: .*YAML.* U\+0007"),
        (MOOD.encode("gb18030"), r"mine.yaml:6: .*UTF-8.*`iconv -f GB18030 -t UTF-8 mine.yaml > utf8.yaml`"),
    ],
)
def test_a_task_file_that_cannot_be_read_is_named_with_its_line(tmp_path, text, message):
    (tmp_path / "mine.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        load_task(tmp_path / "mine.yaml")
    with pytest.raises(ValueError, match=r"no task file \S*/mind.yaml .*'mine.yaml'\?.\.$"):
        load_task(tmp_path / "mind.yaml")


# Questions

QUESTION = {"id": "Q1", "question": "谁？", "answers": [{"text": "王", "answer_start": 0}]}


def squad(*questions: object) -> str:
    content = {"data": [{"paragraphs": [{"context": "王来了", "qas": questions}]}]}
    return json.dumps(content, ensure_ascii=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n", r"cmrc2018_dev.json is empty.* SQuAD"),
        ('{"id": 1}\n{"id": 2}', r'json:2: .*JSON: Extra data.* SQuAD.* {"data": \['),
        ('{"id": 1}', r"json: .*no key 'data'.* SQuAD"),
        ("[[]]", r"json: 'data.0' .* \[\];.* SQuAD"),
        ('{"data": {}}', r"json: 'data' .* list.* {}"),
        (squad(QUESTION, {"question": "谁？"}),
         r"document 1, paragraph 1, question 2: .*no key 'id'"),
        (squad(QUESTION | {"answers": {"text": "王"}}), "question 1: 'answers' .* {'text': '王'"),
        (squad(QUESTION | {"answers": {"text": ["王"], "answer_start": []}}), "question 1: 'answers' "),
        (squad(QUESTION | {"answers": [{"text": "王", "answer_start": True}]}), "'answers.0.answer_start'"),
        (squad(QUESTION | {"answers": [{"answer": "王"}]}), "no key 'text' .*answers.0"),
        ('[{"context_text": "王", "qas": [{"query_text": "谁？"}]}]', "1, question 1: .*no key 'id'"),
    ],
)  # fmt: skip
def test_faulty_questions_are_refused_with_their_place(tmp_path, text, message):
    (tmp_path / "cmrc2018_dev.json").write_text(text, "utf-8")
    with pytest.raises(ValueError, match=message):
        read_examples(load_task("cmrc2018"), tmp_path, "dev")


def test_an_empty_file_of_another_benchmark(tmp_path):
    (tmp_path / "d-dev.json").write_text("", "utf-8")
    (tmp_path / "m-dev.json").write_text("", "utf-8")
    with pytest.raises(ValueError, match=r"d-dev.json is empty.* JSON list"):
        read_examples(load_task("c3"), tmp_path, "dev")


# Choices

RIDDLE = """
name: riddle
title: riddles
reader: choices
fields: {question: q, candidates: c, answer: a}
prompt: "{question}（{options}）"
metric: accuracy
pre_seq_len: 8
learning_rate: 0.01
files: {train: t.jsonl}
"""


def test_answers_by_index_text_and_letter(tmp_path):
    task = task_of(tmp_path, RIDDLE + "letters: true\n")
    rows = [(["日", "月"], 1), (["日", "月"], "月"), (["日", "月"], "B"), (["日", "月"], " b "), ([5, 6.5, 7], "6.5"),
            ([5, 6, 7], 6)]  # fmt: skip
    write_rows(tmp_path / "t.jsonl", *({"q": "谜", "c": candidates, "a": answer} for candidates, answer in rows))
    examples = read_examples(task, tmp_path, "train")
    assert [example.answer for example in examples] == [1] * 6
    assert examples[4].candidates == ("5", "6.5", "7")


@pytest.mark.parametrize(
    ("row", "letters", "message"),
    [
        ({"c": ["日", "月"], "a": "C"}, True,
         r"jsonl:1: .* below 2 .* A to B.* text .*日、月.*'C'"),
        ({"c": ["日", "月"], "a": "B"}, False, r"index below 2 .* text .*日、月.*'B'"),
        ({"c": [5, 6, 7], "a": 2}, False, None),
        ({"c": [5, 6, 7], "a": 8}, False, r"index below 3 .* text .* 8"),
        ({"c": [2, 3, 1], "a": 2}, False, r"answer 2 .* index.* candidate 0.* write 0"),
        ({"a": 1}, False, r"no field 'c', .*candidates.* riddle.* q, a"),
        ({"c": "日月", "a": 1}, False, r"'c' .* list of texts.* 日月"),
        ({"c": ["日", None], "a": 1}, False, r"'c' .* text.* null"),
        ({"c": ["日"], "a": 0}, False, r"'c' .* two .*\['日'\]"),
        ({"c": ["日", "日"], "a": 0}, False, r"'c' .* equal .*\['日', '日'\]"),
        ({"c": ["日", "日"], "a": 1}, True, None),
        ({"c": ["日", "月"]}, False, r"no field 'a', .*answer.* riddle"),
        ({"c": ["日", "月"], "a": None}, False, r"'a', .*answer.* null"),
    ],
)  # fmt: skip
def test_faulty_choices_are_refused(tmp_path, row, letters, message):
    task = task_of(tmp_path, RIDDLE + "letters: true\n" * letters)
    write_rows(tmp_path / "t.jsonl", {"q": "谜", **row})
    if message is None:
        assert read_examples(task, tmp_path, "train")[0].answer == row["a"]
        return
    with pytest.raises(ValueError, match=message):
        read_examples(task, tmp_path, "train")


# Bad rows that are skipped

MARKED = "王\tB-PER\n\n宁\tI-PER\tX\n宁\n\n沪\tB-LOC\n"


@pytest.mark.parametrize(
    ("name", "file", "content", "bad"),
    [
        ("tnews", "train.json", '{"sentence": "甲", "label": "100"}\n{"sentence": \n{"label": "100"}\n', ":2:|:3:"),
        ("adgen", "train.json", '{"content": "裤", "summary": ""}\n{"content": "裤", "summary": "宽"}\n', ":1:"),
        ("chnsenticorp", "train.tsv", "label\ttext_a\n1\t好\n0\t差\t差\n7\t好\n", ":3:|:4:"),
        ("msra_ner", "train.txt", MARKED, ":3:"),
        ("msra_ner", "train.txt", '{"tokens": ["王"], "ner_tags": ["O"]}\n{"tokens": [1], "ner_tags": ["O"]}', ":2:"),
        ("cluener", "train.json", '{"text": "王", "label": {}}\n{"text": "王", "label": []}\n', ":2:"),
        ("cmrc2018", "train.json", squad(QUESTION, {"id": "Q2"}, QUESTION | {"id": "Q3", "answers": []}),
         "question 2|Q3"),
        ("c3", "test.json", '[[["他病了。"], [{"question": "谁？", "choice": ["他"], "answer": "他"}, {}], "1"]]',
         "question 2"),
        ("fewclue_chid", "train_0.json", '{"content": "#idiom#", "candidates": ["甲"], "answer": 0}\n{"content": ""}',
         ":2:"),
    ],
)  # fmt: skip
def test_bad_rows_are_skipped_and_counted(tmp_path, name, file, content, bad):
    (tmp_path / file).write_text(content, "utf-8")
    split = "test" if file.startswith("test") else Path(file).stem
    bad_rows = BadRows(2)
    examples = read_examples(load_task(name), tmp_path / file, split, bad_rows=bad_rows)
    assert len(examples) == 2 if file == "train.txt" and "\t" in content else len(examples) == 1
    assert bad_rows.count == len(bad.split("|"))
    for message, place in zip(bad_rows.messages, bad.split("|"), strict=True):
        assert place in message and str(tmp_path / file) in message
    with pytest.raises(ValueError, match=bad.split("|")[0]):
        read_examples(load_task(name), tmp_path / file, split)


# The command


def test_the_command_shows_entities_of_several_tokens(tmp_path, capsys):
    write_rows(tmp_path / "train.jsonl", {"tokens": ["Barack", "Obama", "来了"], "ner_tags": ["B-PER", "I-PER", "O"]})
    main(["tasks", "show", "msra_ner", str(tmp_path / "train.jsonl"), "--split", "train"])
    assert "answer: BarackObama (PER)" in capsys.readouterr().out


def test_a_split_without_a_file_is_shown_as_not_found(tmp_path, capsys):
    (tmp_path / "train.txt").write_text("王\tB-PER\n", "utf-8")
    main(["tasks", "show", "msra_ner", str(tmp_path)])
    shown = " ".join(capsys.readouterr().out.split())
    assert "train │ 1 │ PER 1" in shown
    assert "dev │ not found │ looked for msra_dev_bio.txt or dev.tsv or" in shown
