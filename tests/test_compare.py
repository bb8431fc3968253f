"""The comparison of tuning methods: its plan, its runs, its table."""

import csv
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny_base
import yaml
from filelock import FileLock

from chatglm_ptuning.cli import main
from chatglm_ptuning.experiments.comparison import MAJORITY, make_rows, runs_of, write_comparison
from chatglm_ptuning.experiments.plan import Plan, check_plan, read_plan
from chatglm_ptuning.experiments.run import Run

TASK = {
    "name": "weather",
    "title": "weather or greeting",
    "reader": "rows",
    "fields": {"text": "text", "label": "label"},
    "labels": {"w": "天气", "g": "问候"},
    "prompt": "{text}？",
    "metric": "accuracy",
    "pre_seq_len": 2,
    "learning_rate": 0.01,
    "files": {"train": "train.jsonl", "test": "test.jsonl", "unlabeled": "unlabeled.jsonl"},
}
TRAIN = [("今天有雨", "w"), ("天气很好", "w"), ("今天天气", "w"), ("你好吗", "g"), ("你是谁", "g")]
TEST = [("有雨", "w"), ("你好", "g"), ("请问你", "g"), ("天气好", "w"), ("问你好", "g")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A task of a handful of rows."""
    folder = tmp_path_factory.mktemp("task")
    (folder / "weather.yaml").write_text(yaml.safe_dump(TASK, allow_unicode=True), encoding="utf-8")
    for name, rows in (("train", TRAIN), ("test", TEST)):
        lines = [json.dumps({"text": text, "label": label}, ensure_ascii=False) for text, label in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "unlabeled.jsonl").write_text('{"text": "你好"}\n', encoding="utf-8")
    return folder


@pytest.fixture
def content(folder):
    """A plan, as its file holds it."""
    return {
        "base": "no/base/is/loaded",
        "seeds": [1, 2, 3],
        "common": {"task_data": str(folder), "per_device_train_batch_size": 4, "max_steps": 1},
        "tasks": {"weather": {"task": str(folder / "weather.yaml")}},
        "methods": {"prefix": {"tuning": "ptuning_v2", "head": "linear"}, "whole": {"tuning": "full"}},
    }


def read(content, tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    return read_plan(path)


def checked(plan):
    return check_plan(plan)


# ---- the plan ----


def test_a_specific_flag_overrides_a_general_one():
    plan = Plan(
        "base", common={"a": 1, "b": 1, "c": 1, "d": 1, "e": 1, "f": 1}, methods={"m": {"c": 3, "d": 3, "e": 3}},
        tasks={"t": {"b": 2, "c": 2, "d": 2, "e": 2, "methods": {"m": {"d": 4, "e": 4, "f": None}}}}, last={"e": 5},
    )  # fmt: skip
    flags = plan.flags_of("t", "m")
    assert {name: flags.get(name) for name in "abcdef"} == {"a": 1, "b": 2, "c": 3, "d": 4, "e": 5, "f": None}
    assert flags["task"] == "t" and "f" not in flags


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metods": {}}, "key 'metods' .did you mean 'methods'"),
        ({"methods": {}}, "plan.yaml:6: 'methods' .* {}"),
        ({"seeds": [1, 1]}, "'seeds' names 1 twice"),
        ({"seeds": [1, "two"]}, "'seeds.1' .*integer.*'two'"),
        ({"methods": ["lora", "lora"]}, "'methods' names lora twice"),
        ({"tasks": {"weather": {"methods": {"prefx": {}}}}}, "tasks.weather.methods.*'prefx' .did you mean"),
        ({"base": None}, "'base' .*string.* None"),
        ({"common": 5}, "'common' .*dictionary.* 5"),
    ],
)  # fmt: skip
def test_a_malformed_plan_is_refused_with_file_and_line(content, tmp_path, change, message):
    with pytest.raises(ValueError, match=message) as caught:
        read(content | change, tmp_path)
    assert "plan.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"lerning_rate": 1}, "methods.prefix: .*--lerning_rate .did you mean --learning_rate"),
        ({"seed": 1}, "methods.prefix: --seed .*comparison"),
        ({"learning_rate": "much"}, "weather by prefix: .*float.*'much'"),
        ({"tuning": "loraa"}, "weather by prefix: --tuning .*ptuning_v2.*'loraa'"),
        ({"head": "multiple_choice"}, "weather by prefix: .*head multiple_choice .*weather"),
        ({"predict_split": "unlabeled"}, "weather by prefix: .*split unlabeled .*no labels"),
        ({"train_split": "trian"}, "weather by prefix: .*trian"),
    ],
)
def test_wrong_flags_are_refused_before_any_run(content, tmp_path, flags, message):
    content["methods"]["prefix"] = flags
    with pytest.raises(ValueError, match=rf"plan.yaml:\d+: {message}"):
        checked(read(content, tmp_path))


def test_a_missing_key_is_named(content, tmp_path):
    del content["methods"]
    with pytest.raises(ValueError, match=r"plan.yaml:1: .*no key 'methods'.*docs/compare.md"):
        read(content, tmp_path)


def test_methods_that_would_share_a_folder_are_refused(content, tmp_path):
    content["methods"] = {"a b": {}, "a/b": {}}
    with pytest.raises(ValueError, match=r"'a b' and 'a/b' .*folder a-b"):
        checked(read(content, tmp_path))


def test_a_number_that_yaml_reads_as_text_is_accepted(content, tmp_path):
    content["methods"] = {"prefix": {"learning_rate": "3e-2"}}
    (run,) = runs_of(checked(read(content, tmp_path)).cells[0], (1,), "base", tmp_path)
    assert run.command[run.command.index("--learning_rate") + 1] == "3e-2"


def test_head_words_and_cells_that_cannot_be_run(content, tmp_path):
    content["methods"] = {
        "linear": {"head": "linear"},
        "verbaliser": {"head": "verbaliser"},
        "base": {"tuning": "none"},
        "linear base": {"tuning": "none", "head": "linear"},
        "head of answers": {"tuning": "head_only", "head": "verbaliser"},
        "not wanted": {},
    }
    content["tasks"]["weather"]["methods"] = {"not wanted": None}
    found = checked(read(content, tmp_path))
    heads = {cell.method: cell.head for cell in found.cells}
    assert heads == {"linear": "sequence_classification", "verbaliser": "generation", "base": "generation"}
    assert {method for _, method in found.left_out} == {"linear base", "head of answers", "not wanted"}
    (base,) = runs_of(next(cell for cell in found.cells if cell.method == "base"), (1,), "base", tmp_path)
    assert "--do_train" not in base.command and "--do_predict" in base.command


def test_the_majority_is_that_of_the_training_rows(content, tmp_path):
    (found,) = checked(read(content, tmp_path)).majority.values()
    assert found[0] == "test" and found[1]["accuracy"] == 40.0  # "w": 3 of 5 training rows, but 2 of 5 test rows


def test_label_sets_have_no_majority(content, folder, tmp_path):
    sets = TASK | {"name": "sets", "metric": "micro_f1", "multi_label": True}
    (tmp_path / "sets.yaml").write_text(yaml.safe_dump(sets, allow_unicode=True), encoding="utf-8")
    content["tasks"] = {"sets": {"task": str(tmp_path / "sets.yaml")}}
    found = checked(read(content, tmp_path))
    assert found.majority == {} and {cell.task for cell in found.cells} == {"sets"}


# ---- the table ----


SCORES = {"prefix": {1: 60.0, 2: 80.0, 3: 100.0}, "whole": {1: 80.0, 3: 40.0}}
HITS = {60.0: [1, 1, 1, 0, 0], 80.0: [1, 1, 1, 1, 0], 100.0: [1, 1, 1, 1, 1], 40.0: [0, 0, 1, 1, 0]}


def finish(run, score):
    """Leaves what a run of that score leaves."""
    run.prepare()
    results = {"predict_accuracy": score, "predict_samples": 5, "train_runtime": 10.0 + run.seed,
               "train_trainable_parameters": 512, "train_trainable_share": 0.25,
               "train_peak_memory_bytes": 2**30 + run.seed}  # fmt: skip
    (run.folder / "predict").mkdir()
    lines = [json.dumps({"score": hit}) for hit in HITS[score]]
    (run.folder / "predict" / "predictions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (run.folder / "all_results.json").write_text(json.dumps(results), encoding="utf-8")


def all_runs(plan, output):
    return {(cell.task, cell.method): runs_of(cell, (1, 2, 3), "base", output) for cell in plan.cells}


@pytest.fixture
def finished(content, tmp_path):
    plan = checked(read(content, tmp_path))
    runs = all_runs(plan, tmp_path)
    for (_, method), of_cell in runs.items():
        for run in of_cell:
            if run.seed in SCORES[method]:
                finish(run, SCORES[method][run.seed])
    return plan, runs


def test_means_deviations_and_differences_are_those_of_numpy(finished):
    majority, prefix, whole = make_rows(*finished, "whole")
    assert (majority.method, majority.mean, majority.seeds) == (MAJORITY, 40.0, ())
    assert prefix.mean == pytest.approx(np.mean([60, 80, 100]))
    assert prefix.deviation == pytest.approx(np.std([60, 80, 100], ddof=1))
    assert whole.mean == 60.0 and whole.deviation == pytest.approx(np.std([80, 40], ddof=1))
    assert (prefix.missing, whole.missing, whole.seeds) == (0, 1, (1, 3))
    # Seeds 1 and 3 are those that both have.
    assert prefix.difference == pytest.approx(np.mean([60 - 80, 100 - 40]))
    assert prefix.difference_deviation == pytest.approx(np.std([-20, 60], ddof=1))
    each = 50 * (np.array(HITS[60.0]) + HITS[100.0] - np.array(HITS[80.0]) - HITS[40.0])
    assert each.mean() == prefix.difference
    assert each.min() <= prefix.difference_low < prefix.difference < prefix.difference_high <= each.max()
    assert whole.difference is None
    assert prefix.train_seconds == 12.0 and prefix.peak_memory_bytes == 2**30 + 3
    assert (prefix.trainable_parameters, prefix.trainable_share, prefix.examples) == (512, 0.25, 5)


def test_the_files_hold_the_table(finished, tmp_path):
    plan, runs = finished
    rows = make_rows(plan, runs, "whole")
    write_comparison(tmp_path, rows, base="base", reference="whole", checked=plan)
    with (tmp_path / "comparison.csv").open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["method"] for row in table] == [MAJORITY, "prefix", "whole"]
    assert table[1]["scores"] == "60.0 80.0 100.0" and float(table[1]["mean"]) == 80.0
    content = json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8"))
    assert content["rows"][1]["flags"]["head"] == "sequence_classification"
    text = (tmp_path / "comparison.md").read_text(encoding="utf-8")
    assert "| method | score | n | to whole | trained | share | time | memory |" in text
    assert "| prefix | 80.00 ± 20.00 | 3 | +20.00 [" in text and "| 512 | 25.00 % | 12.0 s | 1.00 GiB |" in text
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_run_counts_only_with_its_own_flags(content, finished, tmp_path):
    content["methods"]["prefix"]["learning_rate"] = 0.5
    runs = all_runs(checked(read(content, tmp_path)), tmp_path)
    assert [method for (_, method), of_cell in runs.items() if any(run.results() for run in of_cell)] == ["whole"]
    stale = runs["weather", "prefix"][0]
    stale.prepare()
    assert not (stale.folder / "all_results.json").exists()


def test_a_run_without_its_predictions_is_not_finished(finished):
    plan, runs = finished
    run = runs["weather", "prefix"][0]
    (run.folder / "predict" / "predictions.jsonl").unlink()
    assert not run.results() and run.is_pending()
    prefix = make_rows(plan, runs, "whole")[1]
    assert prefix.missing == 1 and 1 not in prefix.seeds


def test_a_folder_with_other_files_is_never_emptied(finished):
    run = finished[1]["weather", "prefix"][0]
    (run.folder / "run.json").unlink()
    with pytest.raises(ValueError, match="no run of an experiment"):
        run.prepare()
    assert (run.folder / "all_results.json").exists()


# ---- the command ----


def command(path, output, *more):
    """The command in a process, as a user runs it."""
    words = ["compare", "--plan", str(path), "--output_dir", str(output), *more]
    root = Path(__file__).parent.parent
    return subprocess.run([sys.executable, "-m", "chatglm_ptuning", *words], capture_output=True, text=True, cwd=root)


def times(output):
    return {path.parent.name: path.stat().st_mtime_ns for path in output.glob("runs/*/prefix/*/all_results.json")}


@pytest.mark.slow
def test_runs_are_real_resumed_and_may_fail(folder, content, tmp_path):
    content["base"] = str(tiny_base.make_base(tmp_path))
    content["seeds"] = [1, 2]
    content["methods"] = {"prefix": {}, "fails": {"ptuning_checkpoint": "no/such/prefix"}}
    path, output = tmp_path / "plan.yaml", tmp_path / "output"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")

    first = command(path, output, "--workers", "2")
    assert first.returncode == 1, first.stderr
    assert "weather / fails / seed 1" in first.stdout and "no/such/prefix" in first.stdout
    rows = {row["method"]: row for row in json.loads((output / "comparison.json").read_text("utf-8"))["rows"]}
    assert rows["prefix"]["seeds"] == [1, 2] and rows["fails"]["missing"] == 2
    for seed, score in zip((1, 2), rows["prefix"]["scores"], strict=True):
        run = output / "runs" / "weather" / "prefix" / f"seed-{seed}"
        assert json.loads((run / "predict" / "metrics.json").read_text("utf-8"))["metrics"]["accuracy"] == score
    shape = 2 * 2 * 2 * 2 * 16  # tokens, layers, keys and values, groups, channels
    assert rows["prefix"]["trainable_parameters"] == shape + 2 * 64 + 2  # and the linear head
    assert rows["prefix"]["peak_memory_bytes"] > 2**20

    before = times(output)
    (output / "runs" / "weather" / "prefix" / "seed-2" / "all_results.json").unlink()
    second = command(path, output, "--methods", "prefix")
    assert second.returncode == 0, second.stderr
    assert re.search("1 of 2 runs .*finished", second.stdout)
    after = times(output)
    assert after["seed-1"] == before["seed-1"] and after["seed-2"] > before["seed-2"]
    again = json.loads((output / "comparison.json").read_text("utf-8"))["rows"]
    assert next(row for row in again if row["method"] == "prefix")["scores"] == rows["prefix"]["scores"]


def test_instruction_files_are_compared(content, tmp_path):
    rows = [{"prompt": text, "response": "好"} for text, _ in TEST]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    content["base"] = str(tiny_base.make_base(tmp_path))
    content["seeds"] = [1]
    content["common"] |= {"max_target_length": 4}
    content["tasks"] = {"answers": dict.fromkeys(("train_file", "validation_file"), str(tmp_path / "rows.json"))}
    content["methods"] = {"prefix": {}, "plain base": {"tuning": "none"}, "linear": {"head": "linear"}}
    path, output = tmp_path / "plan.yaml", tmp_path / "output"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    refused = command(path, output)
    assert refused.returncode == 1 and re.search("answers by linear: rows .*no linear head", refused.stderr)
    done = command(path, output, "--methods", "prefix", "plain base")
    assert done.returncode == 0, done.stderr
    found = json.loads((output / "comparison.json").read_text("utf-8"))["rows"]
    found = {row["method"]: row for row in found}
    assert {(name, row["metric"], row["split"]) for name, row in found.items()} == {
        ("prefix", "rouge-l", "rows.json"),
        ("plain base", "rouge-l", "rows.json"),
    }
    results = json.loads((output / "runs/answers/prefix/seed-1/all_results.json").read_text("utf-8"))
    assert found["prefix"]["scores"] == [results["predict_rouge-l"]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "prefx"], "method 'prefx' .did you mean 'prefix'"),
        (["--reference", "none"], "reference 'none'"),
        (["--", "--max_step", "3"], "behind --: .*--max_step .did you mean --max_steps"),
        (["--", "3"], "behind -- are flags"),
    ],
)
def test_wrong_words_are_refused(content, tmp_path, capsys, words, message):
    read(content, tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["compare", "--plan", str(tmp_path / "plan.yaml"), "--output_dir", str(tmp_path / "output"), *words])
    assert stop.value.code == 1 and re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "output").exists()


def test_two_comparisons_in_one_folder_are_refused(content, tmp_path, capsys):
    read(content, tmp_path)
    with FileLock(tmp_path / ".lock"), pytest.raises(SystemExit):
        main(["compare", "--plan", str(tmp_path / "plan.yaml"), "--output_dir", str(tmp_path)])
    assert "Another comparison" in capsys.readouterr().err


def test_a_run_that_a_killed_comparison_left_behind_keeps_its_folder(content, tmp_path, monkeypatch, capsys):
    read(content, tmp_path)
    words = ["compare", "--plan", str(tmp_path / "plan.yaml"), "--output_dir", str(tmp_path)]
    monkeypatch.setattr(Run, "command", ["sh", "-c", "echo $$; exec sleep 300"])
    comparison = multiprocessing.get_context("fork").Process(target=main, args=(words,))
    comparison.start()
    log = tmp_path / "runs" / "weather" / "prefix" / "seed-1" / "log.txt"
    while not (log.exists() and log.read_text()):
        assert comparison.is_alive()
        time.sleep(0.05)
    left_behind = int(log.read_text())
    try:
        comparison.kill()
        comparison.join()
        monkeypatch.setattr(Run, "command", ["true"])
        with pytest.raises(SystemExit):
            main(words)
        assert "killed comparison" in capsys.readouterr().err
        assert int(log.read_text()) == left_behind
    finally:
        os.kill(left_behind, signal.SIGKILL)
    with FileLock(tmp_path / ".lock", timeout=30):
        pass


def test_a_dry_run_prints_commands_of_flags_alone(folder, tmp_path, capsys):
    words = ["--model_name_or_path", "base", "--methods", "lora", "none", "--tasks", str(folder / "weather.yaml")]
    words += ["--task_data", str(folder), "--seeds", "7", "--dry_run", "--output_dir", str(tmp_path / "output")]
    main(["compare", *words, "--", "--bf16", "--lora_target", "dense", "query_key_value"])
    lora, none = [line for line in capsys.readouterr().out.splitlines() if " train " in line]
    assert "--tuning lora" in lora and "--seed 7" in lora and "--do_train True" in lora
    assert "--lora_target dense query_key_value" in lora and "--bf16 True" in lora
    assert "--tuning none" in none and "--do_train" not in none and "--head generation" in none
    assert not (tmp_path / "output").exists()
