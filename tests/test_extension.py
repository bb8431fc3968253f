"""The head, the reader and the dataset format that docs/architecture.md adds by one file each and one entry."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_tokenizer
from instruction_rows import rows_of

from chatglm_ptuning.data.formats import registry
from chatglm_ptuning.data.sources.rows import Row
from chatglm_ptuning.data.tasks import heads, load_task, read_examples, readers
from chatglm_ptuning.data.tasks.heads.head import Prediction
from chatglm_ptuning.evaluation.report import score_task

PAGE = Path(__file__).parents[1] / "docs" / "architecture.md"

MINE = """
name: mine
title: lines of label and text
reader: fasttext
head: written_label
labels: {good: 好评, bad: 差评}
prompt: "{text}（{labels}）："
metric: accuracy
pre_seq_len: 4
learning_rate: 1.0e-2
files: {train: train.txt}
"""


def defined_in_docs(name: str) -> type:
    """The class that a code block of the page defines."""
    made: dict = {}
    exec(block_of(f"class {name}("), made)
    return made[name]


def block_of(beginning: str) -> str:
    blocks = PAGE.read_text("utf-8").split("```python\n")[1:]
    (block,) = (text.split("```")[0] for text in blocks if beginning in text)
    assert block.count("\n") <= 30
    return block


class Writer:
    """A stub of a model that writes the same answer to every prompt."""

    def answers(self, prompts):
        return ["好评"] * (len(prompts) - 1) + ["不知道"]


def test_a_head_and_a_reader_are_a_class_and_a_line_each(tmp_path, monkeypatch):
    reader = defined_in_docs("FastTextReader")()
    monkeypatch.setitem(readers.READERS, reader.name, reader)
    monkeypatch.setattr(heads, "HEADS", (*heads.HEADS, defined_in_docs("WrittenLabel")))
    (tmp_path / "mine.yaml").write_text(MINE, "utf-8")
    (tmp_path / "train.txt").write_text("__label__good 我想去\n__label__bad 今天有雨\n__label__good 公园\n", "utf-8")
    task = load_task(tmp_path / "mine.yaml")
    assert "written_label" in heads.heads_of(task)
    examples = read_examples(task, tmp_path, "train")
    assert [(example.text, example.label) for example in examples] == [
        ("我想去", "good"), ("今天有雨", "bad"), ("公园", "good"),
    ]  # fmt: skip
    tokenizer = tiny_tokenizer.train(tmp_path, "chatglm3")
    head = heads.head_of(task, None)(task, tokenizer)
    assert head.name == "written_label" and len(rows_of(head, examples)) == 3
    found = head.predict(examples, Writer())
    assert found == [Prediction("good"), Prediction("good"), Prediction("不知道")]
    assert score_task(task, examples, found).metrics["accuracy"] == pytest.approx(100 / 3)
    (tmp_path / "train.txt").write_text("__label__goood 我想去\n", "utf-8")
    with pytest.raises(ValueError, match=r"train.txt:1: .*mine .*no label 'goood'"):
        read_examples(task, tmp_path, "train")


def test_a_dataset_format_is_a_function_and_an_entry(monkeypatch):
    made: dict = {"DatasetFormat": registry.DatasetFormat}
    exec(block_of("def dialogue("), made)
    monkeypatch.setitem(registry.FORMATS, *eval(f"{{{block_of('DatasetFormat(')}}}", made).popitem())
    row = Row({"dialogue": "问：几点\n答：三点"}, "rows.json", 4)
    name, content, _ = registry.read_row(row, registry.Columns())
    assert (name, [message.content for message in content.messages]) == ("dialogue", ["几点", "三点"])
    with pytest.raises(ValueError, match=r"rows.json:4: .*'dialogue' .*问： or 答：.*'三点'"):
        registry.read_row(Row({"dialogue": "三点"}, "rows.json", 4), registry.Columns(dataset_format="dialogue"))
