"""The search for prompt length and learning rate, on a base that learns in seconds."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean, stdev

import forked_runs
import pytest
import torch

pytest.importorskip("optuna")

import optuna

from chatglm_ptuning.cli import main as command
from chatglm_ptuning.command_line import parse_arguments
from chatglm_ptuning.experiments import runner
from chatglm_ptuning.experiments.proposals import lost_rung
from chatglm_ptuning.experiments.run import Ending, Evaluation, Run
from chatglm_ptuning.experiments.search import Search, SearchEnded, _parse
from chatglm_ptuning.experiments.search_arguments import SearchArguments
from chatglm_ptuning.model.loading import load_model, load_tokenizer
from chatglm_ptuning.model.modeling_heads import ChatGLMForSequenceClassification
from chatglm_ptuning.training.config import resolve
from chatglm_ptuning.training.failures import TrainingStopped
from chatglm_ptuning.training.progress import failure_noted
from chatglm_ptuning.training.run import TRAIN_FLAGS, load_base, load_data

ORIGINAL_PROCESS = runner._process
ROOT = Path(__file__).resolve().parents[1]
TASK = """
name: weather
title: whether a row is about the weather
reader: rows
fields: {text: text, label: label}
labels: {yes: 好, no: 你}
prompt: "{text}"
metric: accuracy
pre_seq_len: 4
learning_rate: 1.0e-2
settings_from: "measured: nowhere"
files: {train: train.json, dev: dev.json}
""".replace("{yes:", "{'yes':").replace("no:", "'no':")
TEXTS = {"yes": ["今天天气好", "今天有雨", "天气很好", "有雨"], "no": ["你是谁", "甲乙丙丁", "公园散步", "请问你"]}


@pytest.fixture(autouse=True)
def forked(monkeypatch):
    monkeypatch.setattr(runner, "_process", forked_runs.starting())


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    (folder / "weather.yaml").write_text(TASK, "utf-8")
    rows = [json.dumps({"text": text, "label": label}) for label, texts in TEXTS.items() for text in texts]
    for split in ("train", "dev"):
        (folder / f"{split}.json").write_text("\n".join(rows) + "\n", "utf-8")
    return folder / "weather.yaml"


def flags(base, task, output, *more):
    return [
        "search", "--task", str(task), "--task_data", str(task.parent), "--model_name_or_path", str(base),
        "--output_dir", str(output), "--max_source_length", "24", "--per_device_train_batch_size", "4",
        "--max_steps", "4", "--eval_steps", "2", "--pruner", "none", "--pre_seq_len", "2", "--learning_rate", "1e-2",
        *map(str, more),
    ]  # fmt: skip


def report(folder):
    return json.loads((folder / "search.json").read_text("utf-8"))


def settings(folder, state="complete"):
    return [
        (row["setting"]["pre_seq_len"], row["setting"]["learning_rate"])
        for row in report(folder)["trials"]
        if row["state"] == state
    ]


def refusal(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        command(arguments)
    return error.value.code, capsys.readouterr().err


def test_every_setting_is_tried_with_every_seed_and_the_best_command_repeats_the_best(
    base, task, tmp_path, monkeypatch
):
    out = tmp_path / "search"
    command(flags(base, task, out, "--pre_seq_len", 2, 5, "--learning_rate", "1e-3", "1e-1", "--seeds", 1, 2))
    found = report(out)
    assert settings(out) == [(length, rate) for length in (2, 5) for rate in (1e-3, 1e-1)]
    for row in found["trials"]:
        scores = [seed["score"] for seed in row["seeds"].values()]
        assert list(row["seeds"]) == ["1", "2"] and row["mean"] == pytest.approx(fmean(scores))
        assert row["deviation"] == pytest.approx(stdev(scores))
        assert [point[0] for point in row["seeds"]["2"]["points"]] == [2, 4]
    assert found["best"]["mean"] == max(row["mean"] for row in found["trials"])
    assert [row["setting"]["pre_seq_len"] for row in found["by_length"]] == [2, 5]
    for row in found["by_length"]:
        length = row["setting"]["pre_seq_len"]
        same = [other["mean"] for other in found["trials"] if other["setting"]["pre_seq_len"] == length]
        assert len(same) == 2 and row["mean"] == max(same)
    assert not list(out.rglob("*.safetensors"))
    for name in ("score_by_length.png", "score_by_learning_rate.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert "| trial | pre_seq_len | learning_rate | projection |" in (out / "search.md").read_text("utf-8")
    monkeypatch.chdir(tmp_path)
    lines = (out / "best_command.sh").read_text("utf-8").splitlines()[1:]
    for seed, line in zip(("1", "2"), lines, strict=True):
        program, arguments = shlex.split(line)[:3], shlex.split(line)[3:]
        assert program == ["python", "-m", "chatglm_ptuning"]
        command(arguments)
        results = json.loads((tmp_path / "output" / f"best-{seed}" / "all_results.json").read_text("utf-8"))
        points = found["best"]["seeds"][seed]["points"]
        assert results["eval_accuracy"] == found["best"]["seeds"][seed]["score"]
        assert results["eval_loss"] == points[-1][2]


def test_flags_of_deepspeed_do_not_prepare_the_search_itself(base, task, tmp_path, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)  # runs that inherited them would wait for the search as their peer
    asked = flags(base, task, tmp_path, "--deepspeed", ROOT / "ds_config" / "zero1.json")
    _, common, _ = _parse(asked[1:])
    assert "--deepspeed" in common and not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"} & os.environ.keys()


@pytest.mark.parametrize("metric", [None, "loss"])
def test_instruction_files_are_searched_by_their_answers_or_their_loss(base, tmp_path, metric):
    rows = [{"prompt": text, "response": answer} for answer, texts in (("好", TEXTS["yes"]), ("你", TEXTS["no"]))
            for text in texts]  # fmt: skip
    file, out = tmp_path / "rows.json", tmp_path / "search"
    file.write_text(json.dumps(rows), "utf-8")
    arguments = [word for word in flags(base, file, out) if word not in ("--task", str(file))]
    place = arguments.index("--task_data")
    arguments[place : place + 2] = ["--train_file", str(file), "--validation_file", str(file)]
    command([*arguments, "--max_target_length", "4", *(["--metric", metric] if metric else [])])
    found = report(out)
    results = json.loads((out / "runs/trial-0/seed-42/all_results.json").read_text("utf-8"))
    assert found["best"]["seeds"]["42"]["score"] == results[f"eval_{metric or 'rouge-l'}"]
    assert ("eval_rouge-l" in results) == (metric is None)


def test_a_run_from_init_prefix_text_starts_as_the_base_with_that_text_in_front(base, task, tmp_path):
    text = "请问今天天气"
    tokenizer = load_tokenizer(str(base))
    front = tokenizer.encode(text, add_special_tokens=False)
    searched = SearchArguments(str(tmp_path), [len(front)], [1e-2], prefix_init=["text"], init_prefix_text=text)
    common = ["--task", str(task), "--task_data", str(task.parent), "--model_name_or_path", str(base)]
    asked = [*searched.train_arguments(common, searched.grid()[0], seed=1), "--output_dir", str(tmp_path)]
    config = resolve(*parse_arguments("chatglm-ptuning train", "", TRAIN_FLAGS, asked))
    model = load_base(config, load_data(config, tokenizer), tokenizer).model.eval()
    plain = load_model(str(base), model_class=ChatGLMForSequenceClassification)
    plain.classifier_head.load_state_dict(model.classifier_head.state_dict())
    row = tokenizer.encode("天气很好")
    with torch.no_grad():
        expected = plain(torch.tensor([front + row])).logits
        assert (plain(torch.tensor([row])).logits - expected).abs().max() > 1e-2
        torch.testing.assert_close(model(torch.tensor([row])).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_grid_is_every_combination_once():
    searched = SearchArguments(
        pre_seq_len=[4, 8, 4], learning_rate=[1e-2, 3e-2], prefix_projection="both", prefix_init=["data", "small"]
    )
    tried = [tuple(setting.values()) for setting in searched.grid()]
    assert len(tried) == len(set(tried)) == 16 and (8, 3e-2, True, "small") in tried


def test_a_search_resumes_with_longer_lists_and_refuses_other_settings(base, task, tmp_path, capsys):
    command(flags(base, task, tmp_path))
    first = report(tmp_path)["trials"][0]
    command(flags(base, task, tmp_path, "--pre_seq_len", 2, 3))
    assert settings(tmp_path) == [(2, 0.01), (3, 0.01)]
    assert report(tmp_path)["trials"][0] == first
    code, message = refusal(flags(base, task, tmp_path, "--max_steps", 6), capsys)
    assert code == 1 and "max_steps: 4 there, 6 here" in message and "another --output_dir" in message
    code, message = refusal(flags(base, task, tmp_path, "--weight_decay", 0.1), capsys)
    assert code == 1 and "flags of train" in message


def test_halving_prunes_the_worse_runs_at_their_first_evaluation(base, task, tmp_path):
    command(flags(base, task, tmp_path, "--learning_rate", "1e-2", "1e-9", "1e-8", "--pruner", "halving",
                  "--metric", "loss", "--max_steps", 8, "--eval_steps", 4, "--head_init", "random"))  # fmt: skip
    found = report(tmp_path)
    assert settings(tmp_path) == [(2, 1e-2)] and settings(tmp_path, "pruned") == [(2, 1e-9), (2, 1e-8)]
    pruned = found["trials"][1]["seeds"]["42"]
    assert [point[0] for point in pruned["points"]] == [4] and "score" not in pruned
    assert "stopped at step 4" in (tmp_path / "search.md").read_text("utf-8")


@pytest.mark.parametrize("lower_is_better", [False, True])
def test_halving_decides_as_optuna_does(tmp_path, monkeypatch, lower_is_better):
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    for first, factor, every in ((2, 2, 2), (1, 2, 3), (3, 3, 2), (4, 4, 3)):
        args = SearchArguments(
            str(tmp_path), max_steps=24, eval_steps=every, min_resource=first, reduction_factor=factor
        )
        study = optuna.create_study(
            direction="minimize" if lower_is_better else "maximize",
            pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=first, reduction_factor=factor),
        )
        courses, endings = {}, {}
        monkeypatch.setattr(Run, "evaluations", lambda run: courses[run.name])  # noqa: B023
        monkeypatch.setattr(Run, "ending", lambda run: endings.get(run.name))  # noqa: B023
        draw = random.Random(first)
        runs = []
        for number in range(24):
            trial, points = study.ask(), []
            others = list(runs)
            runs.append(Run(str(number), 1, [], tmp_path, ""))
            courses[str(number)] = points
            for step in range(every, 24, every):
                points.append(Evaluation(step, draw.choice([draw.random(), 0.5, float("nan")][: 2 + (step > 6)]), 0.0))
                trial.report(points[-1].score, step)
                rung = lost_rung(points, others, args, lower_is_better)
                assert (rung is not None) == trial.should_prune(), (number, step, points)
                if rung is not None:
                    endings[str(number)] = Ending(rung=rung, evaluations=len(points))
                    break
            study.tell(trial, 0.0)
        assert 5 < len(endings) < 24


def test_a_trial_that_diverges_is_recorded_and_the_search_continues(base, task, tmp_path, capsys):
    asked = flags(base, task, tmp_path, "--learning_rate", "1e38", "1e-2", "--max_grad_norm", 0, "--max_steps", 8)
    command(asked)
    assert settings(tmp_path, "failed") == [(2, 1e38)] and settings(tmp_path) == [(2, 1e-2)]
    assert "seed 42: The" in report(tmp_path)["trials"][0]["error"]
    assert "failed: seed 42" in (tmp_path / "search.md").read_text("utf-8")
    assert "trial 0, seed 42" in capsys.readouterr().out
    command(asked)
    assert ", seed 42" not in capsys.readouterr().out and len(report(tmp_path)["trials"]) == 2


def failing_at(length, error):
    """Runs of a search that learn nothing: those of one prefix length fail."""

    def train(words):
        given = dict(zip(words[::2], words[1::2], strict=True))
        folder = Path(given["--output_dir"])
        with failure_noted(argparse.Namespace(should_save=True, output_dir=folder)):
            if given["--pre_seq_len"] == str(length):
                raise error
        (folder / "progress.jsonl").write_text('{"step": 4, "eval_loss": 1.0, "eval_accuracy": 50.0}\n', "utf-8")
        (folder / "all_results.json").write_text('{"eval_loss": 1.0, "eval_accuracy": 50.0}', "utf-8")

    return forked_runs.starting(train)


def test_a_run_out_of_memory_is_repeated_by_the_next_start(task, tmp_path, monkeypatch):
    asked = flags("no/base", task, tmp_path, "--pre_seq_len", 2, 3)
    monkeypatch.setattr(runner, "_process", failing_at(3, torch.OutOfMemoryError("CUDA out of memory")))
    command(asked)
    assert settings(tmp_path) == [(2, 0.01)] and settings(tmp_path, "failed") == [(3, 0.01)]
    assert "chatglm_ptuning train" in (tmp_path / "best_command.sh").read_text("utf-8")
    for _ in range(2):
        command(asked)
        assert settings(tmp_path, "failed") == [(3, 0.01)] and len(report(tmp_path)["trials"]) == 2
    monkeypatch.setattr(runner, "_process", failing_at(None, None))
    command(asked)
    assert settings(tmp_path) == [(2, 0.01), (3, 0.01)] and len(report(tmp_path)["trials"]) == 2


def test_a_gpu_failure_ends_the_process_and_its_trial_is_repeated(task, tmp_path, monkeypatch, capsys):
    asked = flags("no/base", task, tmp_path, "--pre_seq_len", 2, 3, 4)
    error = RuntimeError("CUDA error: an illegal memory access")
    monkeypatch.setattr(runner, "_process", failing_at(3, error))
    code, shown = refusal(asked, capsys)
    assert code == 1 and "illegal memory access" in shown and "pending again" in shown
    assert settings(tmp_path) == [(2, 0.01)]
    monkeypatch.setattr(runner, "_process", failing_at(None, None))
    command(asked)
    assert sorted(settings(tmp_path)) == [(2, 0.01), (3, 0.01), (4, 0.01)] and not settings(tmp_path, "failed")


def test_a_failed_first_run_is_recorded(task, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "_process", failing_at(2, TrainingStopped("out of memory")))
    command(flags("no/base", task, tmp_path, "--pre_seq_len", 2, 3, "--seeds", 1, 2))
    assert settings(tmp_path) == [(3, 0.01)] and settings(tmp_path, "failed") == [(2, 0.01)]
    assert report(tmp_path)["trials"][0]["error"] == "seed 1: out of memory"


def test_pictures_are_announced_only_if_there_are_some(task, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner, "_process", failing_at(2, torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(SystemExit):
        command(flags("no/base", task, tmp_path))
    said = capsys.readouterr().out
    assert "search.md." in said and "pictures beside" not in said and not list(tmp_path.glob("*.png"))


def test_a_trial_is_run_by_one_worker_and_after_a_kill_by_another(tmp_path):
    args = SearchArguments(output_dir=str(tmp_path), pre_seq_len=[2, 3], learning_rate=[1e-2])
    one, other = Search(args, [], "loss"), Search(args, [], "loss")
    taken = runner._take(one.pending())
    taken.prepare()
    assert report(tmp_path)["trials"][0]["state"] == "waiting"  # of when the search began
    assert [trial.row()["state"] for trial in other.trials()] == ["running", "waiting"]
    second = runner._take(other.pending())
    assert (taken.folder.parent.name, second.folder.parent.name) == ("trial-0", "trial-1")
    assert runner._take(Search(args, [], "loss").pending()) is None
    taken.lock.release()  # as the system does where a process is killed
    assert runner._take(other.pending()).arguments == taken.arguments


def test_sigterm_stops_the_run_and_the_next_start_repeats_it(task, tmp_path, monkeypatch):
    asked = flags("no/base", task, tmp_path)
    monkeypatch.setattr(runner, "_process", ORIGINAL_PROCESS)
    monkeypatch.setattr(Run, "command", ["sh", "-c", "sleep 1; echo $$; exec sleep 300"])
    search = multiprocessing.get_context("fork").Process(target=command, args=(asked,))
    search.start()
    log = tmp_path / "runs" / "trial-0" / "seed-42" / "log.txt"
    while not (log.exists() and log.read_text()):
        assert search.is_alive()
        time.sleep(0.05)
    search.terminate()
    search.join()
    assert search.exitcode == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text()), 0)
    monkeypatch.undo()
    monkeypatch.setattr(runner, "_process", failing_at(None, None))
    command(asked)
    assert settings(tmp_path) == [(2, 0.01)]


def test_the_next_seeds_of_a_setting_follow_its_first(tmp_path):
    args = SearchArguments(str(tmp_path), [2], [1e-2], seeds=[1, 2, 3])
    (trial,) = Search(args, [], "loss").trials()
    assert [run.seed for run in trial.to_run()] == [1]
    trial.runs[0].prepare()
    (trial.runs[0].folder / "all_results.json").write_text('{"eval_loss": 1.0}', "utf-8")
    assert [run.seed for run in trial.to_run()] == [2, 3]
    trial.runs[0].end(Ending(rung=0, evaluations=0))
    assert trial.to_run() == []


def test_an_error_of_every_trial_ends_the_search_and_it_can_be_resumed(base, task, tmp_path, capsys):
    out = tmp_path / "search"
    dev = task.parent / "dev.json"
    content = dev.read_bytes()
    dev.unlink()
    try:
        code, message = refusal(flags(base, task, out), capsys)
    finally:
        dev.write_bytes(content)
    assert code == 1 and "dev" in message
    command(flags(base, task, out))
    assert settings(out) == [(2, 0.01)] and len(report(out)["trials"]) == 1


def test_a_task_of_label_sets_is_not_searched_by_accuracy(tmp_path, capsys):
    sets = tmp_path / "sets.yaml"
    sets.write_text(TASK.replace("metric: accuracy", "metric: micro_f1\nmulti_label: true"), "utf-8")
    code, shown = refusal(flags("no/base", sets, tmp_path / "search", "--metric", "accuracy"), capsys)
    assert code == 1 and "got 'accuracy'" in shown
    assert all(metric in shown for metric in ("--metric", "macro_f1", "micro_f1", "subset_accuracy", "loss"))


def test_a_run_without_the_metric_names_it(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "_process", failing_at(None, None))
    args = SearchArguments(str(tmp_path), [2], [1e-2], max_steps=4)
    with pytest.raises(SearchEnded, match=r"eval_micro_f1.*--metric"):
        Search(args, [], "micro_f1").work()


def test_initial_values_are_compared_over_steps(base, task, tmp_path):
    command(flags(base, task, tmp_path, "--prefix_init", "data", "text", "small", "--init_prefix_text", "请问今天天气"))
    by_init = report(tmp_path)["by_init"]
    assert set(by_init["courses"]) == {"data", "text", "small"} and by_init["settings"] == 1
    trials = {row["setting"]["prefix_init"]: row["seeds"]["42"]["points"] for row in report(tmp_path)["trials"]}
    slowest = max(points[-1][2] for points in trials.values())
    for start, points in trials.items():
        course = by_init["courses"][start]
        assert [[point["step"], point["score"], point["loss"]] for point in course] == points
        assert by_init["steps_to_loss"][start] == next(step for step, _, loss in points if loss <= slowest)
    assert "steps to a loss of" in (tmp_path / "search.md").read_text("utf-8")
    assert (tmp_path / "course_by_init.png").exists()
    text = next(row for row in report(tmp_path)["trials"] if row["setting"]["prefix_init"] == "text")
    assert text["seeds"]["42"]["points"] != trials["data"]


def test_tpe_draws_from_a_range_and_repeats_itself(task, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "_process", failing_at(None, None))
    base = "no/base"
    more = ["--learning_rate", "1e-3", "1e-1", "--learning_rate_scale", "log", "--pre_seq_len", 2, 3]
    for name in ("a", "b"):
        command(flags(base, task, tmp_path / name, *more, "--trials", 2))
    assert settings(tmp_path / "a") == settings(tmp_path / "b")
    rates = [rate for _, rate in settings(tmp_path / "a")]
    assert len(set(rates)) == 2 and all(1e-3 <= rate <= 1e-1 for rate in rates)
    command(flags(base, task, tmp_path / "a", *more, "--trials", 3))
    assert settings(tmp_path / "a")[:2] == settings(tmp_path / "b") and len(settings(tmp_path / "a")) == 3


def worker(arguments):
    """The command in a process, as a user starts it."""
    words = [sys.executable, "-m", "chatglm_ptuning", *arguments]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_two_workers_share_the_trials_and_take_over_those_of_a_killed_one(base, task, tmp_path):
    lengths = [2, 3, 4, 5]
    arguments = flags(base, task, tmp_path, "--pre_seq_len", *lengths, "--max_steps", 8)
    killed = worker(arguments)
    first = tmp_path / "runs" / "trial-0" / "seed-42"
    deadline = time.monotonic() + 300
    while not (first / "log.txt").exists() and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL and not (first / "all_results.json").exists()
    both = [worker(arguments) for _ in range(2)]
    said = [one.communicate()[0] for one in both]
    assert [one.returncode for one in both] == [0, 0], said
    assert sorted(length for length, _ in settings(tmp_path)) == lengths
    # The run of the killed one has come to its end by itself, or was started again; no run was started twice.
    ended = [line.split(",")[0] for text in said for line in text.splitlines() if line.startswith("trial ")]
    assert {"trial 1", "trial 2", "trial 3"} <= set(ended) and len(ended) == len(set(ended))
    study = optuna.load_study(study_name="search", storage=f"sqlite:///{tmp_path / 'study.db'}")
    assert sorted(trial.params["pre_seq_len"] for trial in study.trials) == lengths


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--trails 3", "--trails .did you mean --trials"),
        ("--seed 3", "--seed .did you mean --seeds"),
        ("--learning_rates 1", "--learning_rates .did you mean --learning_rate"),
        ("--weight_decay_ 1", "--weight_decay_ .did you mean --weight_decay"),
        ("--prefix_projection maybe", "--prefix_projection .*false, true, both.*'maybe'"),
        ("--pre_seq_len 0", "--pre_seq_len .* above 0.* 0"),
        ("--learning_rate 1e-3 1e-2 --learning_rate_scale log", "learning rates .*--trials"),
        ("--learning_rate_scale log --trials 2", "--learning_rate_scale log .*--learning_rate LOW HIGH"),
        ("--prefix_init data text", "--prefix_init text .*--init_prefix_text TEXT"),
        ("--prefix_init warm", "--prefix_init .*data, text, small, official.*'warm'"),
        ("--eval_steps 9", "--eval_steps 9 .*--max_steps 4"),
        ("--metric micro_f1", "--metric .*weather .*accuracy, macro_f1, loss.*'micro_f1'"),
        ("--eval_split test", "--eval_split test"),
        ("--max_source_length 1", "--max_source_length .*at least 2.* 1"),
    ],
)
def test_wrong_flags_are_refused(more, message, base, task, tmp_path, capsys):
    code, shown = refusal(flags(base, task, tmp_path / "search", *more.split()), capsys)
    assert code in (1, 2) and re.search(message, shown)
    assert not (tmp_path / "search").exists()
