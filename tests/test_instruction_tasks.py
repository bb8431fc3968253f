"""Instruction files as tasks, alone and in a mixture; and what other tasks share with them: cache and report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_chat_base
from json_lines import write_rows
from task_runs import read

from chatglm_ptuning.data.cache import TokenCache
from chatglm_ptuning.data.dataset import Loader, Split
from chatglm_ptuning.data.tasks import load_task, read_examples
from chatglm_ptuning.data.tasks.heads import head_of
from chatglm_ptuning.evaluation.run import main as evaluate
from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer
from chatglm_ptuning.training.run import main as train

CHAT = """
name: chat
title: my chats
reader: conversations
metric: rouge-l
pre_seq_len: 3
learning_rate: 1.0e-2
files: {train: train.jsonl, dev: dev.jsonl}
"""
MOOD = """
name: mood
title: moods
reader: rows
fields: {text: text, label: label}
labels: {good: 好, bad: 不}
prompt: "{text}"
metric: accuracy
pre_seq_len: 3
learning_rate: 1.0e-2
files: {train: mood.jsonl, dev: mood.jsonl}
"""
ROWS = [{"q": "你好", "a": "我想去"}, {"q": "今天天气很好", "a": "你好吗"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("instructions")
    tiny_chat_base.write_base(root / "base")
    (root / "chat.yaml").write_text(CHAT + "fields: {prompt: q, response: a}\n", "utf-8")
    (root / "mood.yaml").write_text(MOOD, "utf-8")
    write_rows(root / "train.jsonl", *ROWS)
    write_rows(root / "dev.jsonl", *ROWS)
    write_rows(
        root / "mood.jsonl", *[{"text": "今天天气" * (i % 3 + 1), "label": ("good", "bad")[i % 2]} for i in range(6)]
    )
    return root


def flags(folder: Path, *more: object) -> list[str]:
    words = ["--max_source_length", "64", "--max_target_length", "16"]
    return ["--model_name_or_path", str(folder / "base"), *words, *map(str, more)]


def run(folder: Path, output: Path, *more: object) -> list[dict]:
    words = "--do_train --max_steps 4 --logging_steps 1 --learning_rate 0.05 --pre_seq_len 3 --seed 5"
    words += " --save_strategy no --per_device_train_batch_size 2 --disable_tqdm true --report_drift false"
    train(flags(folder, "--output_dir", output, *words.split(), *more))
    history = json.loads((output / "trainer_state.json").read_text("utf-8"))["log_history"]
    return [entry for entry in history if "loss" in entry]


def test_a_task_of_conversations_learns_what_its_files_teach(folder, tmp_path):
    by_flags = ["--train_file", folder / "train.jsonl", "--prompt_column", "q", "--response_column", "a"]
    by_task = ["--task", folder / "chat.yaml", "--task_data", folder, "--do_eval", "--do_predict"]
    expected = run(folder, tmp_path / "files", *by_flags)
    found = run(folder, tmp_path / "task", *by_task)
    assert [entry["loss"] for entry in found] == [entry["loss"] for entry in expected]
    results = json.loads((tmp_path / "task" / "all_results.json").read_text("utf-8"))
    assert {"eval_rouge-l", "eval_loss", "predict_bleu-4"} <= results.keys()
    again = ["--task", folder / "chat.yaml", "--task_data", folder, "--output_dir", tmp_path / "again"]
    evaluate(flags(folder, *again, "--ptuning_checkpoint", tmp_path / "task"))
    rows = read(tmp_path / "again" / "predictions.jsonl")
    assert [row["gold"] for row in rows] == [row["a"] for row in ROWS]


def test_a_mixture_takes_conversations_beside_labels(folder, tmp_path, capsys):
    (folder / "mix.yaml").write_text(
        "tasks:\n  chat: {task: chat.yaml, task_data: .}\n  mood: {task: mood.yaml, task_data: .}\n", "utf-8"
    )
    run(folder, tmp_path / "run", "--task_mixture", folder / "mix.yaml", "--do_eval", "--max_steps", 8)
    results = json.loads((tmp_path / "run" / "all_results.json").read_text("utf-8"))
    assert {"eval_chat_rouge-l", "eval_mood_accuracy", "eval_mean"} <= results.keys()
    shown = capsys.readouterr().out
    assert "2 rows, 2 used, 2 examples" in shown and "6 rows, 6 used, 6 examples" in shown


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("prompt: '{text}'\n", "'conversations' .*no 'prompt'"),
        ("dataset_format: csv\n", "dataset_format 'csv'"),
        ("labels: {a: b}\n", "'labels' .*readers"),
        ("fields: {text: q}\n", "'text'"),
    ],
)
def test_a_task_file_of_conversations_is_checked(tmp_path, more, message):
    (tmp_path / "chat.yaml").write_text(CHAT + more, "utf-8")
    with pytest.raises(ValueError, match=message):
        load_task(tmp_path / "chat.yaml")


def test_a_dataset_format_and_a_source_prefix_of_a_task(folder, tmp_path):
    (tmp_path / "chat.yaml").write_text(CHAT + "dataset_format: alpaca\nsource_prefix: 你好\n", "utf-8")
    write_rows(tmp_path / "train.jsonl", {"instruction": "今天", "output": "天气", "prompt": "甲", "response": "乙"})
    task = load_task(tmp_path / "chat.yaml")
    (example,) = read_examples(task, tmp_path, "train")
    assert (example.dataset_format, example.content.messages[0].content) == ("alpaca", "今天")
    tokenizer = ChatGLMTokenizer.from_pretrained(folder / "base")
    (row,) = head_of(task, None)(task, tokenizer).learn(example).rows
    assert "你好今天" in tokenizer.decode(row["input_ids"])


def test_rows_of_tasks_are_kept_and_reported(folder, tmp_path):
    task = load_task(folder / "mood.yaml")
    rows = [{"text": "甲" * 90, "label": "good"}, {"text": "乙", "label": "?"}, {"text": "乙", "label": "bad"}] * 2
    write_rows(tmp_path / "mood.jsonl", *rows)
    head = head_of(task, "sequence_classification")(
        task, ChatGLMTokenizer.from_pretrained(folder / "base"), max_source_length=40
    )
    made, kept = (
        Loader(TokenCache(tmp_path / "cache"), skip_bad_rows=2, progress=False).rows(head, Split([str(tmp_path)]))
        for _ in range(2)
    )
    assert (made.reused, kept.reused) == (False, True)
    assert made.rows[:] == kept.rows[:] and made.rows["labels"][:] == [0, 1, 0, 1]
    for found in (made, kept):
        assert (found.report.rows, found.report.bad, found.report.source_cut) == (6, 2, 2)
        summary = found.summary()
        assert f"2 without the middle of the source (max_source_length) (first: {tmp_path}/mood.jsonl:1)" in summary
        assert f"2 rows that repeat an earlier row word for word: {tmp_path}/mood.jsonl:4" in summary
        assert f"2 bad rows were skipped, the first:\n{tmp_path}/mood.jsonl:2: the task mood has no label" in summary
    with pytest.raises(ValueError, match=r"mood.jsonl:2: .*mood .*no label '\?'"):
        Loader(TokenCache(tmp_path / "cache"), progress=False).rows(head, Split([str(tmp_path)]))


@pytest.mark.parametrize("limit", [None, 2])
def test_rows_with_a_dropped_label_are_reported_from_the_cache_too(folder, tmp_path, limit):
    text = (folder / "mood.yaml").read_text("utf-8")
    (tmp_path / "mood.yaml").write_text(text + "drop_labels: ['-']\n", "utf-8")
    write_rows(tmp_path / "mood.jsonl", *({"text": "乙", "label": label} for label in ("good", "-", "bad", "good")))
    task = load_task(tmp_path / "mood.yaml")
    head = head_of(task, "sequence_classification")(task, ChatGLMTokenizer.from_pretrained(folder / "base"))
    loader, split = Loader(TokenCache(tmp_path / "cache"), progress=False), Split([str(tmp_path)], limit=limit)
    made, kept = loader.rows(head, split), loader.rows(head, split)
    assert (made.reused, kept.reused) == (False, True) and made.rows["labels"][:] == [0, 1, 0][:limit]
    for found in (made, kept):
        assert f"rows of mood, split train, are labelled - (first: {tmp_path}/mood.jsonl:2)" in found.summary()
