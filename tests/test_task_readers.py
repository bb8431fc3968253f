"""Readers take the published forms, here in tiny files of that form, and the real files where they are available."""

import gzip
import json
from pathlib import Path

import pytest
from json_lines import write_rows

from chatglm_ptuning.data.tasks import load_task, read_examples
from chatglm_ptuning.data.tasks.examples import Answer

SHARED = Path(__file__).resolve().parents[2] / "shared"
if not SHARED.is_dir():  # the tests may run in a worktree one folder deeper
    SHARED = Path(__file__).resolve().parents[3] / "shared"


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1), "utf-8")


CLUE_ROWS = {
    "tnews": {"label": "102", "label_desc": "news_entertainment", "sentence": "新片今天上映", "keywords": "新片"},
    "iflytek": {"label": "8", "label_des": "公共交通", "sentence": "扫码乘车"},
    "afqmc": {"sentence1": "怎么还款", "sentence2": "如何还款", "label": "1"},
    "cmnli": {"sentence1": "他来了", "sentence2": "他没来", "label": "contradiction"},
    "ocnli": {"level": "easy", "sentence1": "他来了", "sentence2": "有人来了", "label": "entailment", "id": 4},
    "csl": {"id": 2, "abst": "本文研究稻谷。", "keyword": ["稻谷", "研究"], "label": "1"},
}
ANSWERS = {"tnews": "娱乐", "iflytek": "公共交通", "afqmc": "是", "cmnli": "矛盾", "ocnli": "蕴含", "csl": "是"}


@pytest.mark.parametrize("name", sorted(CLUE_ROWS))
@pytest.mark.parametrize("folder", ["", "{}_public"])
def test_clue_classification(tmp_path, name, folder):
    base = tmp_path / folder.format(name)
    row = CLUE_ROWS[name]
    write_rows(base / ("train.50k.json" if name == "ocnli" else "train.json"), row)
    write_rows(base / "test.json", {"id": 9} | {key: value for key, value in row.items() if key not in ("label", "id")})
    task = load_task(name)
    (example,) = read_examples(task, tmp_path, "train")
    assert example.answer_text(task) == ANSWERS[name] in example.candidate_answers(task).values()
    assert example.text in example.prompt(task)
    (blind,) = read_examples(task, tmp_path, "test")
    assert (blind.id, blind.label) == (9, None)


def test_labels_with_whitespace_or_as_whole_floats(tmp_path):
    row = {"sentence": "甲", "label_desc": "news_story"}
    write_rows(tmp_path / "test.json", *(row | {"label": label} for label in (" 101 ", 101.0, 101, "101")))
    assert [example.label for example in read_examples(load_task("tnews"), tmp_path, "test")] == ["101"] * 4
    write_rows(tmp_path / "test.json", *(row | {"label": label} for label in (-1.0, " ", "-1", None)))
    assert [example.label for example in read_examples(load_task("tnews"), tmp_path, "test")] == [None] * 4
    write_rows(tmp_path / "test.json", row | {"label": 101.5})
    with pytest.raises(ValueError, match=r"json:1: .*tnews .*no label '101.5'"):
        read_examples(load_task("tnews"), tmp_path, "test")


def test_numbers_in_texts_are_kept_as_written_and_labels_are_compared_as_numbers(tmp_path):
    row = '{{"sentence": {}, "label": {}, "label_desc": "news_story"}}\n'
    (tmp_path / "test.json").write_text(row.format("12.50", "1.01e2") + row.format("1E400", "101.00"), "utf-8")
    examples = read_examples(load_task("tnews"), tmp_path, "test")
    assert [(example.text, example.label) for example in examples] == [("12.50", "101"), ("1E400", "101")]


def test_rows_with_a_dropped_label_are_left_out(tmp_path, caplog):
    write_rows(tmp_path / "dev.json", CLUE_ROWS["cmnli"] | {"label": "-"}, CLUE_ROWS["cmnli"])
    assert [example.label for example in read_examples(load_task("cmnli"), tmp_path, "dev")] == ["contradiction"]
    assert "1 of 2 rows of cmnli, split dev, are labelled -" in caplog.text and "dev.json:1" in caplog.text
    write_rows(tmp_path / "dev.json", CLUE_ROWS["cmnli"] | {"label": "-"})
    with pytest.raises(ValueError, match=r"1 of 1 .*cmnli, .*dev, .* - .*dev.json:1"):
        read_examples(load_task("cmnli"), tmp_path, "dev")
    unlabelled = {name: value for name, value in CLUE_ROWS["cmnli"].items() if name != "label"}
    for other, label in ((CLUE_ROWS["cmnli"], "contradiction"), (unlabelled, None)):
        write_rows(tmp_path / "test.json", other | {"id": 4}, unlabelled | {"id": 5, "label": "-"})
        examples = read_examples(load_task("cmnli"), tmp_path, "test")
        assert [(example.id, example.label, example.left_out) for example in examples] == [
            (4, label, False), (5, None, True),
        ]  # fmt: skip


def test_csl_joins_its_keywords(tmp_path):
    write_rows(tmp_path / "train.json", CLUE_ROWS["csl"])
    (example,) = read_examples(load_task("csl"), tmp_path, "train")
    assert "关键词：稻谷、研究\n" in example.prompt(load_task("csl"))


def wsc(start: int = 5, **more: object) -> dict:
    target = {"span1_text": "猫", "span1_index": 0, "span2_text": "它", "span2_index": start}
    return {"target": target, "text": "猫看见它，它跑了", "label": "true", "idx": 3, **more}


@pytest.mark.parametrize("name", ["cluewsc2020", "fewclue_cluewsc"])
def test_winograd_marks_the_spans_that_are_meant(tmp_path, name):
    write_rows(tmp_path / "train.json", wsc())
    write_rows(tmp_path / "train_0.json", wsc())
    task = load_task(name)
    (example,) = read_examples(task, tmp_path, "train" if name == "cluewsc2020" else "train_0")
    assert (example.id, example.text, example.answer_text(task)) == (3, "[猫]看见它，_它_跑了", "是")
    assert "“它”指的是“猫”" in example.prompt(task)
    with pytest.raises(ValueError, match=r"json:1: .*span2_index .*index .*'x'"):
        write_rows(tmp_path / "train.json", wsc(start="x"))
        read_examples(load_task("cluewsc2020"), tmp_path, "train")


@pytest.mark.parametrize(
    ("span1", "span2", "marked"),
    [
        (("猫", 0), ("它", 6), "[猫]看见它，_它_跑了"),  # one off
        (("猫", 0), ("它", -1), "[猫]看见_它_，它跑了"),
        (("猫", 0), ("她", 3), "[猫]看见_它_，它跑了"),  # another spelling: as the file counts
        (("猫看见它", 0), ("它", 3), "[猫看见_它_]，它跑了"),
        (("它，它", 3), ("它", 3), "猫看见[_它_，它]跑了"),
        (("猫", 0), ("看", 1), "[猫]_看_见它，它跑了"),
        (("它", 3), ("它", 3), "猫看见[_它_]，它跑了"),
        (("猫", 0), ("他们的", 6), "[猫]看见它，它_跑了_"),  # beyond the end
    ],
)
def test_winograd_spans_that_are_off_or_inside_each_other(tmp_path, span1, span2, marked):
    target = dict(zip(("span1_text", "span1_index", "span2_text", "span2_index"), span1 + span2, strict=True))
    write_rows(tmp_path / "train.json", wsc(target=target))
    (example,) = read_examples(load_task("cluewsc2020"), tmp_path, "train")
    assert example.text == marked
    write_rows(tmp_path / "train.json", wsc(target=target | {"span2_text": "她", "span2_index": 40}))
    with pytest.raises(ValueError, match=r"json:1: .*span2 '她', .*no character 40"):
        read_examples(load_task("cluewsc2020"), tmp_path, "train")


def test_ids_are_whole_numbers_or_text(tmp_path):
    row = {"sentence": "甲", "label": "100", "label_desc": "news_story"}
    write_rows(tmp_path / "test.json", row | {"id": 5.0}, row | {"id": "a"}, row | {"id": None})
    assert [example.id for example in read_examples(load_task("tnews"), tmp_path, "test")] == [5, "a", 2]
    for wrong in (7.5, [1], True):
        write_rows(tmp_path / "test.json", row, row | {"id": wrong})
        with pytest.raises(ValueError, match=r"json:2: .*id .*whole number or text, found "):
            read_examples(load_task("tnews"), tmp_path, "test")


def test_ids_in_another_column_than_the_task_names(tmp_path):
    by_id = {name: value for name, value in wsc(id=41).items() if name != "idx"}
    write_rows(tmp_path / "test.json", by_id, by_id | {"id": 40.0}, wsc(id=39), by_id | {"id": None})
    assert [example.id for example in read_examples(load_task("fewclue_cluewsc"), tmp_path, "test")] == [41, 40, 3, 3]


@pytest.mark.parametrize("text", ["王\n宁\n\n来\n", "王 \n宁\t\n\n来\n", "text_a\n王\x02宁\n来\n"])
def test_a_test_split_of_entities_may_be_without_tags(tmp_path, text):
    task = load_task("msra_ner")
    (file,) = task.files["test"][0]
    (tmp_path / file).write_text(text, "utf-8")
    examples = read_examples(task, tmp_path, "test")
    assert [(example.tokens, example.tags) for example in examples] == [(("王", "宁"), None), (("来",), None)]
    (tmp_path / task.files["train"][0][0]).write_text(text, "utf-8")
    with pytest.raises(ValueError, match=r"token, .*tab or space, .*tag|no tag ''"):
        read_examples(task, tmp_path, "train")


def test_a_first_token_that_looks_like_json(tmp_path):
    task = load_task("msra_ner")
    (tmp_path / task.files["train"][0][0]).write_text("[\tO\n王\tB-PER\n", "utf-8")
    (example,) = read_examples(task, tmp_path, "train")
    assert (example.tokens, example.tags) == (("[", "王"), ("O", "B-PER"))


def test_a_single_file_of_an_examination_is_one_subject(tmp_path):
    table = "id,question,A,B,C,D,answer\n3,甲,一,二,三,四, b \n"
    (tmp_path / "law_val.csv").write_text(table, "utf-8")
    (example,) = read_examples(load_task("ceval"), tmp_path / "law_val.csv", "val")
    assert (example.subject, example.id, example.answer) == ("law", 3, 1)
    (tmp_path / "mine.csv").write_text(table, "utf-8")
    with pytest.raises(ValueError, match=r"mine.csv is one file, .* ceval .* choose a subject"):
        read_examples(load_task("ceval"), tmp_path / "mine.csv", "val")
    (example,) = read_examples(load_task("ceval"), tmp_path / "mine.csv", "val", subjects=["law"])
    assert example.subject == "law"
    with pytest.raises(ValueError, match=r"law_val.csv .*one file.* val \(computer_network_val.csv"):
        others = ["computer_network", "operating_system"]
        read_examples(load_task("ceval"), tmp_path / "law_val.csv", "val", subjects=others)
    with pytest.raises(ValueError, match="has no split 'vall'"):
        read_examples(load_task("ceval"), tmp_path / "law_val.csv", "vall")
    for wrong in ("AB", "ABCD"):
        (tmp_path / "law_val.csv").write_text(table.replace(" b ", wrong), "utf-8")
        with pytest.raises(ValueError, match=rf"law_val.csv:2: .*answer .*A, B, C or D.*'{wrong}'"):
            read_examples(load_task("ceval"), tmp_path / "law_val.csv", "val")
    (tmp_path / "law_val.csv").write_text(table.replace(" b ", " "), "utf-8")
    with pytest.raises(ValueError, match=r"law_val.csv:2: .*no answer"):
        read_examples(load_task("ceval"), tmp_path / "law_val.csv", "val")


def test_gzipped_idioms_have_gzipped_answers(tmp_path):
    row = {"content": ["a#idiom1#"], "candidates": ["甲", "乙"]}
    for name, content in (("train.json", row), ("train_answer.json", {"#idiom1#": 1})):
        with gzip.open(tmp_path / f"{name}.gz", "wt", encoding="utf-8") as file:
            file.write(json.dumps(content))
    (example,) = read_examples(load_task("chid"), tmp_path, "train")
    assert example.answer == 1


CMRC = {
    "version": "v1.0",
    "data": [{"title": "范", "id": "TRAIN_186", "paragraphs": [{
        "id": "TRAIN_186", "context": " 他生于1900年，死于1999年。", "qas": [
        {"question": "他生于哪年？", "id": "TRAIN_186_QUERY_0", "answers": [{"text": "1900年", "answer_start": 4}]},
        {"question": "他死于哪年？", "id": "TRAIN_186_QUERY_1", "answers": [
            {"text": "1999年", "answer_start": 99}, {"text": "2000年", "answer_start": 0}]},
    ]}]}],
}  # fmt: skip


def test_cmrc_in_squad_form(tmp_path):
    write_json(tmp_path / "cmrc2018_train.json", CMRC)
    first, second = read_examples(load_task("cmrc2018"), tmp_path, "train")
    assert (first.id, first.answers) == ("TRAIN_186_QUERY_0", (Answer("1900年", 4),))
    assert first.context[4:].startswith("1900年")
    # What does not stand where the file says is found, or has no place.
    assert second.answers == (Answer("1999年", 12), Answer("2000年", None))
    prompt = first.prompt(load_task("cmrc2018"))
    assert prompt.index("问题：他生于哪年？") < prompt.index(first.context)  # a causal base reads the question first


def test_cmrc_in_its_own_form(tmp_path):
    query = {"query_text": "是多少？", "query_id": "DEV_0_QUERY_0", "answers": ["78.1", "指数78.1"]}
    write_json(
        tmp_path / "dev.json", [{"context_id": "DEV_0", "context_text": "指数78.1", "title": "指", "qas": [query]}]
    )
    (example,) = read_examples(load_task("cmrc2018"), tmp_path, "dev")
    assert example.answers == (Answer("78.1", 2), Answer("指数78.1", 0))


def test_drcd_and_files_without_answers(tmp_path):
    qa = {"id": "2128-2-1", "question": "什麼理念?", "answers": [{"id": "1", "text": "因信稱義", "answer_start": 2}]}
    blind = qa | {"answers": [{"id": "1", "text": "", "answer_start": -1}]}
    for name, entry in (("DRCD_training", qa), ("DRCD_test", blind), ("DRCD_dev", blind)):
        paragraphs = [{"context": "強調因信稱義", "id": "2128-2", "qas": [entry]}]
        write_json(tmp_path / f"{name}.json", {"version": "1.3", "data": [{"id": "2128", "paragraphs": paragraphs}]})
    task = load_task("drcd")
    assert read_examples(task, tmp_path, "train")[0].answers == (Answer("因信稱義", 2),)
    assert read_examples(task, tmp_path, "test")[0].answers is None
    with pytest.raises(
        ValueError, match=r"DRCD_dev.json: document 1, paragraph 1, question 1: .*'2128-2-1' .*no answer"
    ):
        read_examples(task, tmp_path, "dev")


def test_chid_takes_its_answers_from_their_own_file(tmp_path):
    row = {"content": ["水平#idiom000378#再进一步。", "模式#idiom000379#，诚然#idiom000380#辛苦"],
           "candidates": ["百尺竿头", "随波逐流", "方兴未艾"]}  # fmt: skip
    write_rows(tmp_path / "train.json", row)
    write_rows(tmp_path / "test1.1.json", row)
    task = load_task("chid")
    with pytest.raises(ValueError, match=r"no answer for #idiom000378#.*train_answer.json"):
        read_examples(task, tmp_path, "train")
    write_json(tmp_path / "train_answer.json", {"#idiom000378#": 0, "#idiom000379#": 1, "#idiom000380#": 2})
    examples = read_examples(task, tmp_path, "train")
    assert [(example.id, example.answer_text(task)) for example in examples] == [
        ("#idiom000378#", "百尺竿头"), ("#idiom000379#", "随波逐流"), ("#idiom000380#", "方兴未艾"),
    ]  # fmt: skip
    assert examples[1].context == "模式____，诚然〇〇〇〇辛苦"
    assert [example.answer for example in read_examples(task, tmp_path, "test")] == [None] * 3
    write_json(tmp_path / "train_answer.json", {"#idiom000378#": 3, "#idiom000379#": 1, "#idiom000380#": 2})
    with pytest.raises(ValueError, match=r"index below 3 .* found 3"):
        read_examples(task, tmp_path, "train")


def test_fewclue_idioms_without_ids_count_their_rows(tmp_path):
    row = {"content": "水平#idiom#再进一步。", "candidates": ["百尺竿头", "随波逐流"], "answer": 1}
    array = [row, row | {"id": None}, row | {"id": 3000}, row | {"id": ""}]
    (tmp_path / "test_public.json").write_text(json.dumps(array), "utf-8")  # in one line
    examples = read_examples(load_task("fewclue_chid"), tmp_path, "test_public")
    assert [(example.id, example.answer) for example in examples] == [(0, 1), (1, 1), (3000, 1), (3, 1)]


def test_c3_is_a_nested_list_in_two_files(tmp_path):
    question = {"question": "他去哪？", "choice": ["学校", "医院"], "answer": "医院"}
    write_json(tmp_path / "d-train.json", [[["男：走吧。", "女：去医院。"], [question], "3-12"]])
    with pytest.raises(ValueError, match=r"part of c3, .*train: m-train.json .*missing"):
        read_examples(load_task("c3"), tmp_path, "train")
    write_json(tmp_path / "m-train.json", [[["他病了。"], [question, question], "m13"]])
    blind = {"question": "他去哪？", "choice": ["学校", "医院"], "id": 7}
    write_json(tmp_path / "test1.1.json", [[["他病了。"], [blind], "m13"]])
    task = load_task("c3")
    examples = read_examples(task, tmp_path, "train")
    assert [(example.id, example.answer) for example in examples] == [("3-12-0", 1), ("m13-0", 1), ("m13-1", 1)]
    assert examples[0].context == "男：走吧。\n女：去医院。"
    assert [(example.id, example.answer) for example in read_examples(task, tmp_path, "test")] == [(7, None)]
    write_json(tmp_path / "m-train.json", [[["他病了。"], [question | {"answer": "家"}], "m13"]])
    with pytest.raises(ValueError, match=r"document 1, question 1: .*answer '家' .*choices"):
        read_examples(task, tmp_path, "train")


def test_a_c3_answer_can_differ_from_its_choice_by_surrounding_whitespace(tmp_path):
    task = load_task("c3")
    question = {"question": "他去哪？", "choice": ["学校", "医院 ", "医 院", " 学校"]}
    asked = [question | {"answer": answer} for answer in ("医院", "\u3000学校", "医 院\n", " 学校")]
    write_json(tmp_path / "test.json", [[["他病了。"], asked, "m1"]])
    assert [example.answer for example in read_examples(task, tmp_path, "test")] == [1, 0, 2, 3]


CLUENER = {"text": "北京勘察设计协会副会长兼秘书长周荫如", "label": {
    "organization": {"北京勘察设计协会": [[0, 7]]}, "name": {"周荫如": [[15, 17]]},
    "position": {"副会长": [[8, 10]], "秘书长": [[12, 14]]}}}  # fmt: skip


def test_cluener_ends_are_inclusive(tmp_path):
    write_rows(
        tmp_path / "train.json", CLUENER, {"text": "张三", "label": {"name": {"三": [[1, 1]], "张三": [[0, 1]]}}}
    )
    first, second = read_examples(load_task("cluener"), tmp_path, "train")
    assert " ".join(first.tags) == (
        "B-organization " + "I-organization " * 7 + "B-position I-position I-position O B-position I-position "
        "I-position B-name I-name I-name"
    )
    assert second.tags == ("B-name", "I-name")
    write_rows(tmp_path / "train.json", {"text": "张三来", "label": {"name": {"张三": [[0, 2]]}}})
    with pytest.raises(ValueError, match=r"train.json:1: characters 0 to 2 .* '张三来', not '张三'"):
        read_examples(load_task("cluener"), tmp_path, "train")
    write_rows(tmp_path / "train.json", {"text": "张三", "label": {"nam": {"张三": [[0, 1]]}}})
    with pytest.raises(ValueError, match=r"entity type 'nam' .did you mean 'name'"):
        read_examples(load_task("cluener"), tmp_path, "train")
    write_rows(tmp_path / "train.json", {"text": "张三", "label": {"name": {"张三": [[0, 1, 2]]}}})
    with pytest.raises(ValueError, match=r"train.json:1: 'label.name.张三.0' .*at most 2"):
        read_examples(load_task("cluener"), tmp_path, "train")


BIO_FORMS = {
    "msra_train_bio.txt": "王\tB-PER\n宁\tI-PER\n到\tO\n\n沪\tB-LOC\n\n",
    "train.txt": "王 B-PER\r\n宁 I-PER\r\n到 O\r\n\r\n沪 B-LOC",
    "train.tsv": "text_a\tlabel\n王\x02宁\x02到\tB-PER\x02I-PER\x02O\n沪\tB-LOC\n",
}


@pytest.mark.parametrize("name", sorted(BIO_FORMS))
def test_msra_forms(tmp_path, name):
    (tmp_path / name).write_bytes(BIO_FORMS[name].encode())
    examples = read_examples(load_task("msra_ner"), tmp_path, "train")
    assert [(example.text, example.tags) for example in examples] == [
        ("王宁到", ("B-PER", "I-PER", "O")), ("沪", ("B-LOC",)),
    ]  # fmt: skip


def test_peoples_daily_forms(tmp_path):
    row = json.dumps({"tokens": ["海", "钓"], "ner_tags": ["B-LOC", "O"]}, ensure_ascii=False)
    (tmp_path / "peoples_daily_ner_train.jsonl.gz").write_bytes(gzip.compress(row.encode()))
    (tmp_path / "example.dev").write_text("海 B-LOC\n钓 O\n", "utf-8")
    task = load_task("peoples_daily")
    for split in ("train", "dev"):
        (example,) = read_examples(task, tmp_path, split)
        assert (example.tokens, example.tags) == (("海", "钓"), ("B-LOC", "O"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("海\tB-LOC\n钓\tX-LOC\n", r"txt:1: .* no tag 'X-LOC' .did you mean '[BI]-LOC'.* at token 2 '钓'"),
        ("海\tB-LOC\n钓\n", r"txt:2: .*token, .*tab or space, .*tag"),
        ('{"tokens": ["海"], "ner_tags": ["O", "O"]}', r"1 tokens and 2 tags"),
        ('{"tokens": ["海"], "ner_tags": [5]}', "numbers .*which tag"),
        ('{"tokens": ["海"], "tags": ["O"]}', "no field 'ner_tags'"),
    ],
)
def test_faulty_tags_are_refused(tmp_path, text, message):
    (tmp_path / "train.txt").write_text(text, "utf-8")
    with pytest.raises(ValueError, match=message):
        read_examples(load_task("msra_ner"), tmp_path, "train")


def test_chnsenticorp_is_an_unquoted_table(tmp_path):
    (tmp_path / "train.tsv").write_text('label\ttext_a\n1\t"很好\n0\t差 "差"\n', "utf-8")
    task = load_task("chnsenticorp")
    examples = read_examples(task, tmp_path, "train")
    assert [(example.text, example.answer_text(task)) for example in examples] == [
        ('"很好', "正面"),
        ('差 "差"', "负面"),
    ]
    (tmp_path / "train.tsv").write_text("label\ttext_a\n1\t好\t坏\n", "utf-8")
    with pytest.raises(ValueError, match=r"train.tsv:2: 3 values.* 2 columns \(label, text_a\)"):
        read_examples(task, tmp_path, "train")


def test_generation_tasks(tmp_path):
    write_rows(tmp_path / "adgen" / "train.json", {"content": "类型#裤", "summary": "宽松"})
    (example,) = read_examples(load_task("adgen"), tmp_path, "train")
    assert (example.text, example.target) == ("类型#裤", "宽松")
    part = (
        "<doc id={}>\n{}    <summary>\n        标题\n    </summary>\n"
        "    <short_text>\n        正文\n    </short_text>\n</doc>\n"
    )
    (tmp_path / "PART_I.txt").write_text(part.format(0, "") + part.format(1, ""), "utf-8")
    scored = [f"    <human_label>{score}</human_label>\n" for score in (2, 3, 5)]
    (tmp_path / "PART_III.txt").write_text("".join(part.format(i, label) for i, label in enumerate(scored)), "utf-8")
    task = load_task("lcsts")
    train = read_examples(task, tmp_path, "train")
    assert [(example.id, example.text, example.target) for example in train] == [
        (0, "正文", "标题"),
        (1, "正文", "标题"),
    ]
    assert train[1].where.endswith("PART_I.txt:9")
    assert [example.id for example in read_examples(task, tmp_path, "test")] == [1, 2]
    (tmp_path / "PART_I.txt").write_text(part.format(0, "").replace("</summary>", ""), "utf-8")
    with pytest.raises(ValueError, match=r"1 <doc id=...>.* 0 hold"):
        read_examples(task, tmp_path, "train")


def test_examinations_by_subject_and_category(tmp_path):
    for subject in ("law", "logic"):
        path = tmp_path / "val" / f"{subject}_val.csv"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'id,question,A,B,C,D,answer\n0,"{subject}，哪个？",甲,乙,丙,丁,C\n', "utf-8")
    task = load_task("ceval")
    examples = read_examples(task, tmp_path, "val", subjects=["law", "logic"])
    assert [(example.subject, example.category, example.answer) for example in examples] == [
        ("logic", "Humanities", 2), ("law", "Humanities", 2),
    ]  # fmt: skip
    assert examples[1].prompt(task) == (
        "以下是中国关于法学考试的单项选择题，请选出其中的正确答案。\n\nlaw，哪个？\nA. 甲\nB. 乙\nC. 丙\nD. 丁\n答案："
    )
    assert [*examples[0].candidate_answers(task).values()] == ["A", "B", "C", "D"] and examples[0].answer_text(
        task
    ) == "C"
    with pytest.raises(ValueError, match=r"modern_chinese_history_val.csv"):
        read_examples(task, tmp_path, "val", subjects=["Humanities"])
    with pytest.raises(ValueError, match="subject or category Law"):
        read_examples(task, tmp_path, "val", subjects=["Law"])
    cmmlu = tmp_path / "test" / "agronomy.csv"
    cmmlu.parent.mkdir()
    cmmlu.write_text(",Question,A,B,C,D,Answer\n0,哪个？,甲,乙,丙,丁,B\n", "utf-8")
    (example,) = read_examples(load_task("cmmlu"), tmp_path, "test", subjects=["agronomy"])
    assert (example.id, example.question, example.answer) == (0, "哪个？", 1)
    cmmlu.write_text(",Question,A,B,C,D,Answer\n7,哪个？,甲,乙,丙,丁,B\n,哪个？,甲,乙,丙,丁,B\n", "utf-8")
    examples = read_examples(load_task("cmmlu"), tmp_path, "test", subjects=["agronomy"])
    assert [example.id for example in examples] == [7, 1]


def test_a_user_defined_task_of_choices(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "name: riddle\ntitle: riddles\nreader: choices\nfields: {question: q, candidates: c, answer: a}\n"
        'prompt: "{question}\\n{options}\\n"\nletters: true\nmetric: accuracy\npre_seq_len: 8\nlearning_rate: 0.01\n'
        "files: {train: t.jsonl}\n",
        "utf-8",
    )
    write_rows(tmp_path / "t.jsonl", {"q": "谜", "c": ["日", "月"], "a": "月"}, {"q": "谜", "c": ["日", "月"], "a": 0})
    task = load_task(tmp_path / "mine.yaml")
    examples = read_examples(task, tmp_path, "train")
    assert [example.answer_text(task) for example in examples] == ["B", "A"]
    assert examples[0].prompt(task) == "谜\nA. 日\nB. 月\n"


def test_wrong_files_are_named(tmp_path):
    task = load_task("tnews")
    with pytest.raises(ValueError, match=r"looked for train.json .*holds nothing"):
        read_examples(task, tmp_path, "train")
    with pytest.raises(ValueError, match=r"no split 'trian' .did you mean 'train'"):
        read_examples(task, tmp_path, "trian")
    with pytest.raises(ValueError, match=r"does not exist.* folder"):
        read_examples(task, tmp_path / "no", "train")
    good = CLUE_ROWS["tnews"]
    for row, message in (
        (good | {"label": "105"}, r"train.json:2: .*tnews .*no label '105' .did you mean '1"),
        ({"label": "102", "sentense": "甲"}, r"train.json:2: .*no field 'sentence' .did you mean 'sentense'"),
        ({"sentence": "甲"}, r"train.json:2: .*no field 'label'"),
        (good | {"sentence": None}, r"train.json:2: .*'sentence' .*text.* null"),
    ):
        write_rows(tmp_path / "train.json", good, row)
        with pytest.raises(ValueError, match=message):
            read_examples(task, tmp_path, "train")
    write_rows(tmp_path / "test.json", good, {"sentence": "甲"})
    with pytest.raises(ValueError, match=r"test.json:2: .*no label .*1 of 2 "):
        read_examples(task, tmp_path, "test")


def test_bundled_data():
    root = Path(__file__).parents[1] / "data"
    counts = {name: len(read_examples(load_task(name), root, "train")) for name in
              ("sentiment", "news_topic", "inference", "entities", "advertisement")}  # fmt: skip
    assert counts == {"sentiment": 294, "news_topic": 600, "inference": 156, "entities": 183, "advertisement": 290}


@pytest.mark.skipif(not (SHARED / "fewclue").is_dir(), reason="the FewCLUE files are not available")
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("eprstmt", (32, 160)), ("bustm", (32, 160)), ("ocnli", (32, 160)), ("csldcp", (536, 2036)),
        ("tnews", (240, 1185)), ("iflytek", (928, 3024)), ("cluewsc", (32, 160)), ("csl", (32, 160)),
        ("chid", (42, 202)),
    ],
)  # fmt: skip
def test_real_fewclue_files(name, sizes):
    task = load_task(f"fewclue_{name}")
    for split, size in zip(("train_0", "train_few_all"), sizes, strict=True):
        examples = read_examples(task, SHARED / "fewclue", split)
        assert len(examples) == size
        assert all(example.answer_text(task) in example.candidate_answers(task).values() for example in examples)
        assert len({example.prompt(task) for example in examples}) > 0.8 * size


@pytest.mark.skipif(not (SHARED / "corpus").is_dir(), reason="the corpora are not available")
def test_real_corpora():
    assert len(read_examples(load_task("reviews"), SHARED / "corpus", "test")) == 2000
    sentences = read_examples(load_task("peoples_daily_ner"), SHARED / "corpus", "dev")
    assert len(sentences) == 1000
    assert sum(tag == "B-PER" for sentence in sentences for tag in sentence.tags) == 814
