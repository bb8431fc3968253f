"""Runs on tasks that resume, or that several processes share, equal an uninterrupted run of one process."""

from __future__ import annotations

import json
from pathlib import Path

import processes
import pytest
import torch
from json_lines import write_rows
from safetensors.torch import load_file
from task_runs import TASKS, evaluate, flags, read, train, write_tasks

from chatglm_ptuning.data.collate import PaddingCollator
from chatglm_ptuning.data.tasks.heads import HEADS
from chatglm_ptuning.evaluation import run as evaluation
from chatglm_ptuning.training.sampler import masked_row_like

MODEL_CLASSES = {head.name: head.model_class for head in HEADS}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("head", ["sequence_classification", "question_answering"])
def test_a_resumed_head_run_equals_one_without_interruption(base, data, head, tmp_path):
    more = ["--head", head, "--save_strategy", "steps", "--save_steps", "3", "--prefix_dropout", "0.1"]
    more += ["--lr_scheduler_type", "constant", "--per_device_train_batch_size", "2"]
    train(base, data, TASKS[head][0], tmp_path / "whole", *more, steps=5)
    train(base, data, TASKS[head][0], tmp_path / "broken", *more, steps=3)
    train(base, data, TASKS[head][0], tmp_path / "broken", *more, steps=5)
    whole, broken = (load_file(tmp_path / name / "prefix_model.safetensors") for name in ("whole", "broken"))
    assert whole.keys() == broken.keys()
    for name, value in whole.items():
        torch.testing.assert_close(broken[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("head", TASKS)
def test_padding_rows_of_a_batch_do_not_change_the_loss(head, tiny_config):
    torch.manual_seed(0)
    kind = {"problem_type": "multi_label_classification"} if head == "multi_label" else {}
    model_class = MODEL_CLASSES["sequence_classification" if kind else head]
    model = model_class(tiny_config(num_labels=3, **kind)).eval()
    labels = {"generation": [-100, 5, 6, 7], "sequence_classification": 1, "token_classification": [0, 1, 2, 1],
              "multi_label": [1.0, 0.0, 1.0]}  # fmt: skip
    row = {"input_ids": [5, 6, 7, 8]} | (
        {"labels": labels[head]} if head in labels else {"start_positions": 1, "end_positions": 2}
    )
    collate = PaddingCollator(0)
    with torch.no_grad():
        own = model(**collate([row])).loss
        filled = model(**collate([row, masked_row_like(row)])).loss
        nothing = model(**collate([masked_row_like(row)])).loss
    torch.testing.assert_close(filled, own)
    assert float(own) > 0 and float(nothing) == 0


def in_a_job(argv: list[str]) -> None:
    evaluation.main(argv)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_a_head_under_deepspeed_is_saved_and_resumed(base, data, tmp_path, stage):
    config = Path(__file__).resolve().parents[1] / "ds_config" / f"zero{stage}.json"
    argv = flags(
        base, data, TASKS["sequence_classification"][0], "--head", "sequence_classification", "--do_train",
        "--max_steps", "4", "--save_steps", "2", "--pre_seq_len", "4", "--prefix_dropout", "0",
        "--learning_rate", "1e-2", "--per_device_train_batch_size", "2", "--disable_tqdm", "true",
        "--deepspeed", config,
    )  # fmt: skip
    processes.run([*argv, "--output_dir", str(tmp_path / "run")], 2, tmp_path)
    resumed = [*argv, "--output_dir", str(tmp_path / "resumed")]
    processes.run([*resumed, "--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-2")], 2, tmp_path)
    one, two = (load_file(tmp_path / name / "prefix_model.safetensors") for name in ("run", "resumed"))
    assert "classifier_head.bias" in one
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("head", TASKS)
def test_two_processes_train_and_predict_as_one(base, data, head, tmp_path):
    own = [] if head == "multi_label" else ["--head", head]
    more = [
        "--do_train", "--do_eval", "--do_predict", "--predict_split", "dev", "--max_steps", "3", "--pre_seq_len", "4",
        "--prefix_dropout", "0", "--disable_tqdm", "true", "--save_strategy", "no", "--learning_rate", "1e-2",
        "--logging_steps", "1",
    ]  # fmt: skip
    for count, batch in ((1, 4), (2, 2)):
        argv = flags(base, data, TASKS[head][0], *own, *more, "--output_dir", tmp_path / str(count))
        processes.run([*argv, "--per_device_train_batch_size", str(batch)], count, tmp_path / f"logs{count}")
        again = flags(base, data, TASKS[head][0], "--split", "dev", "--ptuning_checkpoint", tmp_path / str(count))
        processes.Job(
            (in_a_job, ([*again, "--output_dir", str(tmp_path / f"again{count}")],)), count, tmp_path, {}
        ).wait()
    for name in ("1/predict", "2/predict", "again1", "again2"):
        one, two = (json.loads((tmp_path / place / "metrics.json").read_text("utf-8")) for place in ("1/predict", name))
        assert one["metrics"] == pytest.approx(two["metrics"])
        rows = [read(tmp_path / place / "predictions.jsonl") for place in ("1/predict", name)]
        for left, right in zip(*rows, strict=True):
            assert left["prediction"] == right["prediction"]
            assert left["confidence"] == pytest.approx(right["confidence"], abs=1e-3)
    states, results = (
        [json.loads((tmp_path / name / file).read_text("utf-8")) for name in ("1", "2")]
        for file in ("trainer_state.json", "all_results.json")
    )
    for metric in ("loss", "grad_norm"):  # the optimizer would hide another scale
        one, two = ([entry[metric] for entry in state["log_history"] if metric in entry] for state in states)
        assert len(one) == 3 and one == pytest.approx(two, rel=1e-3)
    assert results[0]["eval_loss"] == pytest.approx(results[1]["eval_loss"], rel=1e-3)


UNEVEN = """
name: pick
title: a text among several
reader: choices
fields: {context: text, question: question, candidates: answers, answer: right, id: number}
prompt: "{context}问：{question}"
metric: accuracy
pre_seq_len: 4
learning_rate: 1.0e-2
files: {train: train.jsonl, dev: dev.jsonl}
"""


def write_uneven(kind: str, folder: Path) -> str:
    """Two examples of which one takes several passes of the model where the other takes one; the task's name."""
    texts = ["今天天气很好" * 30, "甲乙丙丁戊"]
    if kind == "token_classification":
        rows = [{"text": text, "label": {"name": {text[:2]: [[0, 1]]}}} for text in texts]
        for split in ("train", "dev"):
            write_rows(folder / "cluener" / f"{split}.json", *rows)
        return "cluener"
    if kind == "question_answering":
        paragraphs = [
            {"context": text, "qas": [{"id": text, "question": "谁", "answers": [{"text": "甲", "answer_start": 0}]}]}
            for text in ("甲" + text for text in texts)
        ]
        for split in ("train", "dev"):
            content = json.dumps({"data": [{"paragraphs": paragraphs}]}, ensure_ascii=False)
            (folder / f"cmrc2018_{split}.json").write_text(content, "utf-8")
        return "cmrc2018"
    (folder / "pick.yaml").write_text(UNEVEN, "utf-8")
    answers = [[beginning + 2 * texts[0] for beginning in "甲乙丙"], ["我", "你"]]
    asked = {"text": "今天", "question": "谁", "right": 0}
    rows = [{**asked, "number": number, "answers": row} for number, row in enumerate(answers)]
    for split in ("train", "dev"):
        write_rows(folder / f"{split}.jsonl", *rows)
    return "pick.yaml"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["token_classification", "question_answering", "multiple_choice"])
def test_processes_with_a_partitioned_base_and_uneven_work_do_not_deadlock(base, tmp_path, kind):
    task = write_uneven(kind, tmp_path)
    argv = flags(
        base, tmp_path, task, "--do_train", "--do_predict", "--predict_split", "dev", "--max_steps", "1",
        "--pre_seq_len", "4", "--per_device_train_batch_size", "1", "--per_device_eval_batch_size", "1",
        "--disable_tqdm", "true", "--max_source_length", "128", "--doc_stride", "8", "--report_drift", "false",
        "--output_dir", tmp_path / "run",
    )  # fmt: skip
    config = Path(__file__).resolve().parents[1] / "ds_config" / "zero3.json"
    processes.run([*argv, "--deepspeed", str(config)], 2, tmp_path / "logs", seconds=150)
    more = ["--split", "dev", "--ptuning_checkpoint", tmp_path / "run", "--max_source_length", 128, "--doc_stride", 8]
    evaluate(base, tmp_path, task, tmp_path / "alone", *more)
    together, alone = (read(tmp_path / place / "predictions.jsonl") for place in ("run/predict", "alone"))
    assert [row["prediction"] for row in together] == [row["prediction"] for row in alone]
    assert [row["confidence"] for row in together] == pytest.approx([row["confidence"] for row in alone], abs=1e-4)
