"""The rows and configurations that the repository ships are what their README says."""

import json
from collections import Counter
from pathlib import Path

import pytest

from chatglm_ptuning.data.formats.registry import Columns, read_row
from chatglm_ptuning.data.sources.files import iterate_rows

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "data"
COLUMNS = {
    "advertisement": Columns("content", "summary"),
    "chat": Columns("prompt", "response", "history"),
    "sentiment": Columns("text", "label"),
    "news_topic": Columns("text", "label"),
    "conversations": Columns(),
}
LABELS = {"sentiment": 2, "news_topic": 10, "inference": 3}


@pytest.mark.parametrize("name", sorted(COLUMNS))
def test_every_row_is_a_conversation_with_an_answer(name):
    for split in ("train", "dev"):
        for row in iterate_rows([DATA / name / f"{split}.json"]):
            assert read_row(row, COLUMNS[name])[1].missing_side() is None, row.where


@pytest.mark.parametrize("name", [*sorted(COLUMNS), "inference", "entities"])
def test_train_and_dev_are_apart_and_no_row_repeats(name):
    train, dev = (
        [json.dumps(row, ensure_ascii=False, sort_keys=True) for row in iterate_rows([DATA / name / f"{split}.json"])]
        for split in ("train", "dev")
    )
    assert len(set(train)) == len(train) and len(set(dev)) == len(dev)
    assert not set(train) & set(dev)


def test_general_rows_are_understood_and_those_to_measure_on_are_apart():
    replayed, held_out = (
        list(iterate_rows([DATA / "general_prompts" / f"{split}.json"])) for split in ("train", "held_out")
    )
    texts = [[row.get("text") or row["prompt"] for row in rows] for rows in (replayed, held_out)]
    assert len({*texts[0], *texts[1]}) == len(replayed) + len(held_out) == 192
    for row in (*replayed, *held_out):
        assert read_row(row, Columns())[1].missing_side() is None, row.where


@pytest.mark.parametrize("name", sorted(LABELS))
def test_labels_are_balanced(name):
    for split in ("train", "dev"):
        counts = Counter(row["label"] for row in iterate_rows([DATA / name / f"{split}.json"]))
        assert len(counts) == LABELS[name]
        assert max(counts.values()) - min(counts.values()) <= 0.1 * sum(counts.values())


def test_entity_tags_are_valid():
    for split in ("train", "dev"):
        for row in iterate_rows([DATA / "entities" / f"{split}.json"]):
            assert len(row["tokens"]) == len(row["ner_tags"]), row.where
            assert all(len(token) == 1 for token in row["tokens"]), row.where
            for before, tag in zip(["O", *row["ner_tags"]], row["ner_tags"], strict=False):
                kind, _, entity = tag.partition("-")
                assert (kind, entity) == ("O", "") or (kind in "BI" and entity in ("PER", "LOC", "ORG")), row.where
                assert kind != "I" or before in (f"B-{entity}", f"I-{entity}"), row.where


@pytest.mark.parametrize("path", sorted((ROOT / "ds_config").glob("*.json")), ids=lambda path: path.name)
def test_deepspeed_takes_every_configuration(path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    deepspeed_config = pytest.importorskip("deepspeed.runtime.config")
    config = json.loads(path.read_text("utf-8"))
    filled = {**config, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2, "train_batch_size": 2}
    filled |= {"bf16": {"enabled": False}, "fp16": {"enabled": False}, "gradient_clipping": 1.0}
    assert deepspeed_config.DeepSpeedConfig(filled).train_batch_size == 2


def test_both_readmes_show_the_same_commands():
    def blocks(name):
        parts = (ROOT / name).read_text("utf-8").split("```")[1::2]
        return ["\n".join(line.partition("#")[0].rstrip() for line in part.splitlines()) for part in parts]

    assert blocks("README.md") == blocks("README_zh.md")
    for heading_level in ("## ", "| "):
        english, chinese = (
            sum(line.startswith(heading_level) for line in (ROOT / name).read_text("utf-8").splitlines())
            for name in ("README.md", "README_zh.md")
        )
        assert english == chinese
