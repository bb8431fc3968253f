"""Tiny tasks in published form, and the commands on them, for the tests of `train --task` and `evaluate --task`."""

from __future__ import annotations

import json
from pathlib import Path

from json_lines import write_rows

from chatglm_ptuning.evaluation import run as evaluation
from chatglm_ptuning.training import run as training

MOODS = """
name: mood
title: moods
reader: rows
fields: {text: message, label: mood, id: number}
labels: {happy: 很好, sad: 有雨}
prompt: "问：{text}答："
metric: accuracy
pre_seq_len: 4
learning_rate: 1.0e-2
files: {train: train.jsonl, dev: dev.jsonl, test: test.jsonl}
submission: {format: label_lines, file: mood_predict.json}
"""
TEXTS = ["今天天气", "我想去公园", "请问你是谁", "甲乙丙", "散步", "戊己庚辛"]


def write_tasks(folder: Path) -> Path:
    """Files of every kind of task; the labelled splits are the training split."""
    folder.mkdir(exist_ok=True)
    (folder / "mood.yaml").write_text(MOODS, "utf-8")
    multi = MOODS.replace("name: mood", "name: moods\nmulti_label: true\nlabel_separator: /").replace(
        "accuracy", "micro_f1"
    )
    (folder / "moods.yaml").write_text(
        multi.replace("mood, id", "all, id").replace(".jsonl", "_all.jsonl").replace("mood_predict", "moods_predict"),
        "utf-8",
    )
    moods = [{"number": 10 + i, "message": text, "mood": ["happy", "sad"][i % 2]} for i, text in enumerate(TEXTS)]
    sets = ["", "happy", "sad/happy", "sad", "happy", "sad/happy"]
    for split in ("train", "dev"):
        write_rows(folder / f"{split}.jsonl", *moods)
        write_rows(
            folder / f"{split}_all.jsonl", *[{**row, "all": several} for row, several in zip(moods, sets, strict=True)]
        )
    write_rows(folder / "test.jsonl", *({name: row[name] for name in ("number", "message")} for row in moods))
    write_rows(folder / "test_all.jsonl", *({name: row[name] for name in ("number", "message")} for row in moods))
    people = [{"text": "我想去公园散步", "label": {"address": {"公园": [[3, 4]]}}},
              {"text": "甲乙丙是谁", "label": {"name": {"甲乙": [[0, 1]]}}},
              {"text": "今天有雨", "label": {}}]  # fmt: skip
    for split in ("train", "dev"):
        write_rows(folder / "cluener" / f"{split}.json", *people)
    write_rows(folder / "cluener" / "test.json", *({"id": i, "text": row["text"]} for i, row in enumerate(people)))
    context = "今天天气很好，我想去公园散步。"
    asked = {"你是谁": "我", "去": "公园散步", "天气好吗": "天气很好"}
    qas = [
        {"id": f"Q{i}", "question": question, "answers": [{"text": text, "answer_start": context.index(text)}]}
        for i, (question, text) in enumerate(asked.items())
    ]
    for split in ("train", "dev"):
        (folder / f"cmrc2018_{split}.json").write_text(
            json.dumps({"data": [{"paragraphs": [{"context": context, "qas": qas}]}]}, ensure_ascii=False), "utf-8"
        )
    return folder


TASKS = {
    "generation": ("mood.yaml", "accuracy", None),  # the tiny base learns to say the labels, not which one
    "sequence_classification": ("mood.yaml", "accuracy", 100),
    "token_classification": ("cluener", "entity_f1", 100),
    "question_answering": ("cmrc2018", "cmrc_em", 100),
    "multi_label": ("moods.yaml", "subset_accuracy", 100),
}


def flags(base, data, task, *more) -> list[str]:
    name = str(data / task) if task.endswith(".yaml") else task
    return ["--task", name, "--task_data", str(data), "--model_name_or_path", str(base), "--max_source_length", "256",
            "--max_target_length", "12", *map(str, more)]  # fmt: skip


def train(base, data, task, output, *more, steps=60) -> dict:
    training.main([
        *flags(base, data, task), "--do_train", "--output_dir", str(output), "--max_steps", str(steps),
        "--pre_seq_len", "6", "--learning_rate", "3e-2", "--prefix_dropout", "0", "--logging_steps", "5",
        "--per_device_train_batch_size", "6", "--disable_tqdm", "true", "--save_strategy", "no", *map(str, more),
    ])  # fmt: skip
    return json.loads((output / "all_results.json").read_text("utf-8"))


def evaluate(base, data, task, output, *more) -> None:
    evaluation.main(flags(base, data, task, "--output_dir", output, *more))


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
