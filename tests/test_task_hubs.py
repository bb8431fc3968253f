"""Tasks read from a hub, which here is a folder in a hub's form."""

import pyarrow
import pyarrow.parquet
import pytest

from chatglm_ptuning.data.tasks import load_task, read_examples


def test_a_hub_dataset_is_read_by_its_columns(tmp_path):
    datasets = pytest.importorskip("datasets")
    names = ["100", "102"]
    features = datasets.Features(
        {
            "sentence": datasets.Value("string"),
            "label": datasets.ClassLabel(names=names),
            "idx": datasets.Value("int32"),
        }
    )
    rows = {"sentence": ["甲", "乙"], "label": [1, 0], "idx": [5, 6]}
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "train.parquet")
    examples = read_examples(load_task("tnews"), f"huggingface:{tmp_path}", "train")
    assert [(example.id, example.label) for example in examples] == [(5, "102"), (6, "100")]
    tags = datasets.Sequence(datasets.ClassLabel(names=["O", "B-PER", "I-PER"]))
    features = datasets.Features({"tokens": datasets.Sequence(datasets.Value("string")), "ner_tags": tags})
    folder = tmp_path / "ner"
    folder.mkdir()
    datasets.Dataset.from_dict({"tokens": [["王", "宁"]], "ner_tags": [[1, 2]]}, features).to_parquet(
        folder / "train.parquet"
    )
    (example,) = read_examples(load_task("msra_ner"), f"huggingface:{folder}", "train")
    assert example.tags == ("B-PER", "I-PER")


def test_a_local_copy_of_a_hub_repository_is_read_like_the_known_one(tmp_path):
    datasets = pytest.importorskip("datasets")
    card = "configs:\n"
    for config, text in (("afqmc", "不"), ("tnews", "甲")):
        card += f"- config_name: {config}\n  data_files:\n  - {{split: validation, path: {config}/validation-*}}\n"
        for folder, column, number in ((tmp_path, "idx", 8), (tmp_path / "another", "id", 77)):
            (folder / config).mkdir(parents=True)
            rows = {"sentence": [text], "label": ["100"], column: [number]}
            datasets.Dataset.from_dict(rows).to_parquet(folder / config / "validation-00000-of-00001.parquet")
    for folder in (tmp_path, tmp_path / "another"):
        (folder / "README.md").write_text(f"---\n{card}---\n", "utf-8")
    (example,) = read_examples(load_task("tnews"), f"huggingface:{tmp_path}", "dev")
    assert (example.id, example.text, example.label) == (8, "甲", "100")
    (example,) = read_examples(load_task("tnews"), f"huggingface:{tmp_path / 'another'}", "dev")
    assert example.id == 77
    with pytest.raises(ValueError, match=f"repository by huggingface:{tmp_path}"):
        read_examples(load_task("tnews"), tmp_path, "dev")


def test_other_kinds_of_files_and_patterns_are_read_too(tmp_path):
    for number in (0, 1):
        table = pyarrow.Table.from_pylist([{"sentence": f"甲{number}", "label": "100"}])
        pyarrow.parquet.write_table(table, tmp_path / f"train-{number}.parquet")
    found = read_examples(load_task("tnews"), f"{tmp_path}/train-*.parquet", "train")
    assert [(example.text, example.id, example.where) for example in found] == [
        (f"甲{number}", number, f"{tmp_path}/train-{number}.parquet row 1") for number in (0, 1)
    ]


@pytest.mark.parametrize("name", ["cmrc2018", "chid", "c3"])
def test_flat_rows_of_a_hub(tmp_path, name):
    datasets = pytest.importorskip("datasets")
    rows = {
        "cmrc2018": {"id": "Q0", "context": "他来", "question": "谁？",
                     "answers": {"text": ["他"], "answer_start": [0]}},
        "chid": {"idx": 0, "candidates": ["甲", "乙"], "content": ["a#idiom1#", "b#idiom2#"],
                 "answers": {"text": ["乙", "甲"], "candidate_id": [1, 0]}},
        "c3": {"id": 4, "context": ["他来"], "question": "谁？", "choice": ["他", "她"], "answer": "她"},
    }  # fmt: skip
    datasets.Dataset.from_list([rows[name]]).to_parquet(tmp_path / "train.parquet")
    examples = read_examples(load_task(name), f"huggingface:{tmp_path}", "train")
    found = [example.answer_text(load_task(name)) for example in examples]
    assert found == {"cmrc2018": ["他"], "chid": ["乙", "甲"], "c3": ["她"]}[name]


def test_a_hub_dataset_without_subjects_is_not_read_once_for_each_subject(tmp_path):
    datasets = pytest.importorskip("datasets")
    row = {"id": 3, "question": "几？", "A": "一", "B": "二", "C": "三", "D": "四", "answer": "B"}
    datasets.Dataset.from_list([row]).to_parquet(tmp_path / "val.parquet")
    task, source = load_task("ceval"), f"huggingface:{tmp_path}"
    (example,) = read_examples(task, source, "val", subjects=["law"])
    assert example.answer == 1
    with pytest.raises(ValueError, match=r"rows .*one subject, choose"):
        read_examples(task, source, "val")


def test_an_unreachable_hub_is_an_error_with_a_way_out(monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"huggingface:clue/clue .*name their folder"):
        read_examples(load_task("tnews"), "huggingface", "train")
    with pytest.raises(ValueError, match=r"sentiment .*no dataset on modelscope.*modelscope:OWNER/NAME"):
        read_examples(load_task("sentiment"), "modelscope", "train")
