"""Task files: those that the kit ships, one that a user adds, and what is refused."""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from chatglm_ptuning.cli import main
from chatglm_ptuning.data.tasks import load_task, read_examples, task_names
from chatglm_ptuning.data.tasks.heads import heads_of
from chatglm_ptuning.data.tasks.readers import READERS
from chatglm_ptuning.data.tasks.submission import FORMATS

CLUE = ["tnews", "iflytek", "afqmc", "cmnli", "ocnli", "csl", "cluewsc2020", "cmrc2018", "drcd", "chid", "c3"]
FEWCLUE = [
    f"fewclue_{name}" for name in ["eprstmt", "bustm", "ocnli", "csldcp", "tnews", "iflytek", "cluewsc", "csl", "chid"]
]
OTHERS = ["cluener", "msra_ner", "peoples_daily_ner", "chnsenticorp", "reviews", "adgen", "lcsts", "ceval", "cmmlu"]
BUNDLED = ["sentiment", "news_topic", "inference", "entities", "advertisement"]

MINE = """
name: mood
title: moods of messages
reader: rows
fields: {text: message, label: mood, id: number}
labels: {0: 难过, 1: 高兴}
prompt: "消息：{text}\\n心情是{labels}里的哪一个？"
metric: macro_f1
pre_seq_len: 6
learning_rate: 5.0e-3
files: {train: mine.jsonl, test: [a.csv, b.csv]}
"""


def write(folder: Path, text: str = MINE) -> Path:
    path = folder / "mood.yaml"
    path.write_text(text, "utf-8")
    return path


def test_the_registry_holds_every_task():
    assert sorted(CLUE + FEWCLUE + OTHERS + BUNDLED) == task_names()


@pytest.mark.parametrize("name", CLUE + FEWCLUE + OTHERS + BUNDLED)
def test_every_packaged_task_is_valid_and_names_the_source_of_its_settings(name):
    task = load_task(name)
    assert task.name == name and task.head in heads_of(task)
    assert task.source != "-" and task.settings_from.startswith(("published", "measured"))


def test_label_sets_have_their_published_sizes():
    sizes = {name: len(load_task(name).labels) for name in ("tnews", "iflytek", "csldcp", "cluener", "cmnli")}
    assert sizes == {"tnews": 15, "iflytek": 119, "csldcp": 67, "cluener": 10, "cmnli": 3}
    assert Counter(subject.category for subject in load_task("ceval").subjects.values()) == {
        "STEM": 20, "Social Science": 10, "Humanities": 11, "Other": 11,
    }  # fmt: skip
    assert Counter(subject.category for subject in load_task("cmmlu").subjects.values()) == {
        "STEM": 17, "Social Science": 22, "Humanities": 13, "Other": 15,
    }  # fmt: skip


def test_fewclue_has_all_its_splits():
    splits = {f"{side}_{number}" for side in ("train", "dev") for number in (*range(5), "few_all")}
    assert set(load_task("eprstmt").files) == splits | {"test", "test_public", "unlabeled"}
    assert load_task("msra_ner").tags == ("O", "B-PER", "I-PER", "B-LOC", "I-LOC", "B-ORG", "I-ORG")


def test_a_task_is_added_by_a_file_alone(tmp_path):
    task = load_task(write(tmp_path))
    (tmp_path / "mine.jsonl").write_text('{"message": "下雨了", "mood": 0, "number": 7}\n', "utf-8")
    (tmp_path / "b.csv").write_text('number,message\n3,"好，\n真好"\n', "utf-8")
    (example,) = read_examples(task, tmp_path, "train")
    assert (example.id, example.text, example.label) == (7, "下雨了", "0")
    assert example.prompt(task) == "消息：下雨了\n心情是难过、高兴里的哪一个？"
    assert example.candidate_answers(task) == {"0": "难过", "1": "高兴"} and example.answer_text(task) == "难过"
    (unlabelled,) = read_examples(task, tmp_path, "test")
    assert (unlabelled.text, unlabelled.label) == ("好，\n真好", None)


def test_groups_across_categories_are_those_the_benchmarks_publish(tmp_path):
    sizes = [{group: len(own) for group, own in load_task(name).groups.items()} for name in ("ceval", "cmmlu")]
    assert sizes == [{"Hard": 8}, {"China specific": 15}]
    text = Path(load_task("ceval").origin).read_text("utf-8")
    for old, new, message in (
        ("[advanced_mathematics, dis", "[advanced_maths, dis", "groups.Hard 'advanced_maths' .did you mean"),
        ("  Hard:", "  STEM:", "group 'STEM' .* subject or category"),
    ):
        with pytest.raises(ValueError, match=message):
            load_task(write(tmp_path, text.replace(old, new)))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("metric:", "metrik:", "unknown key 'metrik' .did you mean 'metric'"),
        ("1: 高兴", "1: ", "yaml:6: 'labels.1' .*string.* None"),
        ("0: 难过", "no: 难过", "yaml:6: 'labels.* False .* quotes"),
        ("1: 高兴", "1: 是, yes: 好", "duplicate key 'yes'"),
        ("1: 高兴", "1: 难过", "'0' and '1' .* verbaliser 难过"),
        ("name: mood", "name: a/../../b", "'name' .* without / .*'a/../../b'"),
        ("name: mood", "name: 'a\\b'", "'name' .* without / .*'a.{1,2}b'"),
        ("name: mood", "name: ..", "'name' .* without / .*'[.]{2}'"),
        ("name: mood", "name: ' '", "'name' must be text"),
        ("reader: rows", "reader: row", "unknown reader 'row' .did you mean 'rows'"),
        ("macro_f1", "entity_f1", "unknown metric .*'rows'.*'entity_f1'"),
        ("5.0e-3", "5e-3", "write 5.0e-3"),
        ("pre_seq_len: 6", "pre_seq_len: 0", "yaml:9: 'pre_seq_len' .* 1.* 0"),
        ("{text: message, ", "{", "'fields' .*'text'"),
        ("{text}", "{txt}", "unknown {txt} .*prompt .did you mean 'text'"),
        ("{text}", "", "prompt .* nothing .*{text}"),
        ("{text}", "{text!r}", "prompt .*'{text}' .*plain name"),
        ("labels: {0: 难过, 1: 高兴}", "", "needs the key 'labels'"),
        ("title: moods of messages", "", "there is no key 'title'"),
        ("metric:", "head: token_classification\nmetric:", "unknown head .*token_classification"),
        (
            "metric:",
            "hub: {github: a/b}\nmetric:",
            "yaml:8: 'hub.github' .*'huggingface' or 'modelscope'",
        ),
        ("metric:", "submission: {format: label_line, file: a}\nmetric:", "did you mean 'label_lines'"),
        ("metric:", "name: twice\nmetric:", "duplicate key 'name'"),
        ("labels: {", "labels: {0: 中, ", "duplicate key '0'"),
        ("labels: {", "labels: [", "not valid YAML"),
        ("metric:", "label_separator: /\nmetric:", "'label_separator' needs 'multi_label: true'"),
        ("metric: macro_f1", "metric: micro_f1", "'micro_f1' needs 'multi_label: true'"),
        ("metric: macro_f1", "multi_label: true\nmetric: accuracy", "multi_label.*'accuracy'"),
        (
            "metric:",
            "multi_label: true\nhead: generation\nmetric:",
            "head .* 'generation'.* sequence_",
        ),
        ("metric:", "multi_label: true\ndrop_labels: [x]\nmetric:", "'drop_labels' .* 'multi_label'"),
        ("metric:", "echo: true\nmetric:", "'echo' .* bio, cluener, squad.*'rows'"),
        ("metric:", "echo: twice\nmetric:", "'echo' .*boolean.*'twice'"),
        ("mine.jsonl", "'{subj}.jsonl'", "'{subj}.jsonl' .*{subj}.*{subject}"),
        ("metric:", "hub: {modelscope: {idd: a/b}}\nmetric:", "'idd' of hub.modelscope .did you mean 'id'"),
        ("metric:", "hub: {modelscope: {config: a}}\nmetric:", "no key 'id' .*hub.modelscope"),
        (
            "metric:",
            "submission: {form: label_lines, file: a}\nmetric:",
            "key 'form' .*did you mean 'format'",
        ),
        ("metric:", "submission: {format: label_lines, file: {}}\nmetric:", "'submission.file' .* {}"),
        ("metric:", "origin: here\nmetric:", "unknown key 'origin'"),
        ("metric:", "source: 7\nmetric:", "'source' .*string.* 7 .* quotes"),
        ("metric:", "aliases: [a, ' ']\nmetric:", "'aliases.1' .* blank.*' '"),
        ("mine.jsonl", "'t{1}.jsonl'", "'.1.' .*plain name"),
    ],
)
def test_a_faulty_file_is_refused_by_its_key(tmp_path, old, new, message):
    assert old in MINE
    with pytest.raises(ValueError, match=message) as raised:
        load_task(write(tmp_path, MINE.replace(old, new, 1)))
    assert re.search(r"mood.yaml:\d+: ", str(raised.value))


def test_unknown_names_and_missing_files_are_refused():
    with pytest.raises(ValueError, match=r"no task 'tnew'.* tnews"):
        load_task("tnew")
    with pytest.raises(ValueError, match=r"no task file nowhere.yaml\.$"):
        load_task("nowhere.yaml")


def test_aliases_stand_for_one_task_each():
    aliases = [alias for name in task_names() for alias in load_task(name).aliases]
    assert len(set(aliases)) == len(aliases) and not set(aliases) & set(task_names())
    assert load_task("eprstmt") is load_task("fewclue_eprstmt")


def test_the_files_of_the_registry_are_packaged():
    with (Path(__file__).parents[1] / "pyproject.toml").open("rb") as file:
        tomllib = pytest.importorskip("tomllib")
        settings = tomllib.load(file)
    assert "definitions/*.yaml" in settings["tool"]["setuptools"]["package-data"]["chatglm_ptuning.data.tasks"]


def test_the_command_lists_and_shows(capsys, tmp_path):
    main(["tasks"])
    listed = capsys.readouterr().out
    assert all(name in listed for name in ("tnews", "c3"))
    write(tmp_path)
    (tmp_path / "mine.jsonl").write_text('{"message": "下雨了", "mood": 0, "number": 7}\n', "utf-8")
    main(["tasks", "show", str(tmp_path / "mood.yaml"), str(tmp_path)])
    shown = capsys.readouterr().out
    assert "难过 1" in shown and "心情是" in shown and "answer: 难过" in shown
    (tmp_path / "mine.jsonl").write_text('{"message": "下雨了", "mood": 5}\n', "utf-8")
    with pytest.raises(SystemExit, match="1"):
        main(["tasks", "show", str(tmp_path / "mood.yaml"), str(tmp_path)])
    assert re.search("mine.jsonl:1: .*mood.* no label '5'", capsys.readouterr().err)


def test_the_documentation_names_every_reader_and_its_example_is_a_task(tmp_path):
    text = (Path(__file__).parents[1] / "docs" / "tasks.md").read_text("utf-8")
    block = text.split("```yaml\n")[1].split("```")[0]
    assert load_task(write(tmp_path, block)).name == yaml.safe_load(block)["name"]
    task = load_task(tmp_path / "mood.yaml")
    readers = READERS.values()
    metrics = {name for reader in readers for several in (False, True)
               for name in reader.metrics_of(replace(task, multi_label=several))}  # fmt: skip
    submissions = {name for reader in readers for name in reader.example.submissions}
    assert len(metrics) == 10 and submissions == set(FORMATS)
    assert all(f"`{name}`" in text for name in (*READERS, *metrics, *submissions))
    named = {row.split("`")[1]: row for row in text.split("| in the prompt |")[1].split("\n") if row.startswith("| `")}
    for name, reader in READERS.items():
        cell = named[name].split("|")[2]
        extra = ["text_pair"] * (name == "rows") + ["labels"] * ("labels" in reader.needs)
        assert set(re.findall(r"{(\w+)}", cell)) == {*reader.placeholders, *extra}, name


@pytest.mark.parametrize("name", ["cmrc2018", "drcd"])
def test_the_prompt_has_the_question_before_the_context(name):
    # The base reads from left to right: behind the context, all questions would find the same span.
    prompt = load_task(name).prompt
    assert prompt.index("{question}") < prompt.index("{context}")
