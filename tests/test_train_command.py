"""The training command as a user runs it, on a base that learns in seconds."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from json_lines import write_rows
from safetensors.torch import load_file
from transformers import TrainingArguments

from chatglm_ptuning.model.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm_ptuning.training.checkpoints import last_checkpoint
from chatglm_ptuning.training.progress import read_progress
from chatglm_ptuning.training.run import main

ROWS = [
    {"content": prompt, "summary": answer}
    for prompt, answer in [
        ("今天天气好吗", "今天有雨"),
        ("你是谁", "甲乙丙丁"),
        ("请问去公园吗", "我想散步"),
        ("天气", "很好"),
    ]
    * 3
]


@pytest.fixture(scope="module")
def train_file(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "train.json", *ROWS)


def flags(base, train_file, output, *more, steps=8):
    return [
        "--do_train", "--model_name_or_path", str(base), "--train_file", str(train_file),
        "--prompt_column", "content", "--response_column", "summary", "--output_dir", str(output),
        "--max_source_length", "40", "--max_target_length", "20", "--pre_seq_len", "6", "--max_steps", str(steps),
        "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2", "--logging_steps", "1",
        "--disable_tqdm", "true", *map(str, more),
    ]  # fmt: skip


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def losses(run: Path) -> list[float]:
    history = json.loads((run / "trainer_state.json").read_text("utf-8"))["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def test_a_run_trains_the_prefix_alone_and_leaves_its_report(base, train_file, tmp_path, capsys):
    before = digest(base)
    more = ["--do_eval", "--do_predict", "--compare_base", "--predict_with_generate", "--validation_file", train_file]
    more += ["--learning_rate", "1e-1", "--save_steps", "40"]
    main(flags(base, train_file, tmp_path / "run", *more, steps=80))
    run = tmp_path / "run"
    assert digest(base) == before
    tensors = load_file(run / "prefix_model.safetensors")
    assert {name: (tuple(value.shape), value.dtype) for name, value in tensors.items()} == {
        "transformer.prefix_encoder.embedding.weight": ((6, 2 * 2 * 2 * 16), torch.float32)
    }
    assert {path.name for path in run.iterdir()} >= {
        "checkpoint-40", "checkpoint-80", "loss.png", "trainer_state.json", "all_results.json",
        "generated_predictions.txt", "prefix_config.json", "training_arguments.json",
    }  # fmt: skip
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((run / "all_results.json").read_text("utf-8"))
    assert results["predict_exact_match"] > results["base_exact_match"]
    assert results["eval_rouge-1"] == results["predict_rouge-1"]
    answers = [json.loads(line) for line in (run / "generated_predictions.txt").read_text("utf-8").splitlines()]
    assert [answer["labels"] for answer in answers] == [row["summary"] for row in ROWS]
    shown = capsys.readouterr().out
    assert "12 rows, 12 used" in shown and "sample 3" in shown and "with prefix" in shown
    metadata = json.loads((run / "prefix_config.json").read_text("utf-8"))
    assert (metadata["pre_seq_len"], metadata["chat_format"], metadata["trained"]) == (6, "chatglm3", True)
    model = ChatGLMForConditionalGeneration.from_pretrained(base)
    for folder in (run, run / "checkpoint-80"):
        model.load_prefix(folder, name=folder.name)
    assert model.prefix_names == ["run", "checkpoint-80"]


@pytest.mark.parametrize(
    ("asked", "missing"),
    [("--do_train", "--train_file"), ("--do_eval", "--validation_file"), ("--do_predict", "--validation_file")],
)
def test_a_missing_data_file_is_named_by_its_flag(base, tmp_path, capsys, asked, missing):
    with pytest.raises(SystemExit) as stopped:
        main([asked, "--model_name_or_path", str(base), "--output_dir", str(tmp_path / "run")])
    assert stopped.value.code == 1
    message = capsys.readouterr().err
    assert f"error: {missing} is missing" in message and asked in message


def test_a_restarted_job_does_not_resume_from_what_it_was_to_overwrite(base, train_file, tmp_path, monkeypatch):
    run = tmp_path / "run"
    main(flags(base, train_file, run, "--save_steps", "2", steps=2))
    (tmp_path / "broken.json").write_text('[{"prompt": 1', "utf-8")
    again = ["--save_steps", "1", "--overwrite_output_dir"]
    with pytest.raises(SystemExit):
        main(flags(base, tmp_path / "broken.json", run, *again, steps=3))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    main(flags(base, train_file, run, *again, steps=3))
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2", "checkpoint-3"}


def test_a_killed_run_resumes_to_the_same_losses_and_weights(base, train_file, tmp_path):
    more = ["--save_steps", "3", "--save_total_limit", "2", "--prefix_projection", "true", "--logging_steps", "2"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    main(flags(base, train_file, whole, *more, steps=14))
    command = [sys.executable, "-m", "chatglm_ptuning", "train", *flags(base, train_file, killed, *more, steps=14)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 240
    while last_checkpoint(killed) is None and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()[1].decode()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "prefix_config.json").exists()
    main(flags(base, train_file, killed, *more, steps=14))
    assert losses(killed) == losses(whole)
    assert [entry["loss"] for entry in read_progress(killed) if "loss" in entry] == losses(whole)
    for name, value in load_file(whole / "prefix_model.safetensors").items():
        torch.testing.assert_close(load_file(killed / "prefix_model.safetensors")[name], value, rtol=0, atol=0)


def test_a_run_resumes_by_default_or_starts_over_on_request(base, train_file, tmp_path, capsys):
    run = tmp_path / "run"
    main(flags(base, train_file, run, "--save_steps", "2", steps=4))
    main(flags(base, train_file, run, "--save_steps", "2", steps=6))
    assert len(losses(run)) == 6 and last_checkpoint(run).name == "checkpoint-6"
    main(flags(base, train_file, run, "--save_steps", "2", "--overwrite_output_dir", steps=2))
    assert len(losses(run)) == 2 and [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-2"]
    with pytest.raises(SystemExit):
        main(flags(base, train_file, tmp_path / "new", "--resume_from_checkpoint", "true"))
    assert "holds no complete checkpoint" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(flags(base, train_file, run, "--resume_from_checkpoint", "false"))
    assert re.search("false.* checkpoint-2 .*overwrite_output_dir", capsys.readouterr().err.replace(str(run) + "/", ""))
    main(flags(base, train_file, tmp_path / "new", "--resume_from_checkpoint", "False", steps=2))
    assert len(losses(tmp_path / "new")) == 2


@pytest.mark.parametrize(("best", "evaluations"), [("false", [2, 4]), ("true", [2, 4, 4])])
def test_the_evaluation_at_the_last_step_is_not_repeated_for_the_same_model(
    base, train_file, tmp_path, best, evaluations
):
    more = ["--do_eval", "--validation_file", train_file, "--eval_strategy", "steps", "--eval_steps", 2]
    more += ["--save_steps", 2, "--load_best_model_at_end", best]
    main(flags(base, train_file, tmp_path, *more, steps=4))
    seen = [entry for entry in read_progress(tmp_path) if "eval_loss" in entry]
    assert [entry["step"] for entry in seen] == evaluations
    results = json.loads((tmp_path / "all_results.json").read_text("utf-8"))
    assert results["eval_loss"] == seen[-1]["eval_loss"]


def test_a_finished_run_is_not_trained_on(base, train_file, tmp_path, caplog):
    run = tmp_path / "run"
    command = flags(base, train_file, run, "--save_steps", "4", "--lr_scheduler_type", "constant", steps=4)
    command += ["--do_eval", "--validation_file", str(train_file)]
    main(command)
    before, results = load_file(run / "prefix_model.safetensors"), json.loads((run / "all_results.json").read_text())
    main(command)
    assert re.search("all .*4 steps", caplog.text)
    for name, value in load_file(run / "prefix_model.safetensors").items():
        assert torch.equal(value, before[name])
    again = json.loads((run / "all_results.json").read_text("utf-8"))
    timing = ("_runtime", "_per_second")
    assert {k: v for k, v in again.items() if not k.endswith(timing)} == {
        k: v for k, v in results.items() if not k.endswith(timing)
    }
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-4"]


def test_one_process_uses_one_gpu(base, train_file, tmp_path, monkeypatch, caplog):
    """Whose DataParallel would copy base and prefix to all, and give the Trainer counts of tokens for each."""
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    more = ["--do_eval", "--validation_file", train_file]
    main(flags(base, train_file, tmp_path / "run", *more, steps=2))
    assert len(losses(tmp_path / "run")) == 2
    assert re.search("1 GPUs .*idle.* NUM_GPUS", caplog.text)


@pytest.mark.parametrize("flag", ["--max_train_samples", "--max_eval_samples", "--max_predict_samples"])
def test_a_limit_of_rows_that_is_none_is_refused(base, train_file, tmp_path, capsys, flag):
    with pytest.raises(SystemExit):
        main(flags(base, train_file, tmp_path / "run", flag, "-1"))
    assert re.search(f"{flag} .*at least 1 .*leave it out.* -1", capsys.readouterr().err)


def test_losses_that_are_not_finite_stop_the_run_with_advice(base, train_file, tmp_path, capsys):
    run = tmp_path / "run"
    with pytest.raises(SystemExit) as error:
        main(
            flags(
                base, train_file, run, "--learning_rate", "1e38", "--max_grad_norm", "0", "--save_steps", "1", steps=20
            )
        )
    assert error.value.code == 1
    message = capsys.readouterr().err
    assert "training has stopped" in message and "--learning_rate (it is 1e+38" in message
    assert f"The last good checkpoint is {last_checkpoint(run)}" in message


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(base, train_file, tmp_path):
    run = tmp_path / "run"
    main(flags(base, train_file, run, "--save_steps", "2", steps=2))
    kept = digest(run / "checkpoint-2")
    limited = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))\n"  # as a full disk: larger files cannot be written
        "from chatglm_ptuning.training.run import main\n"
        "main(sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", limited, *flags(base, train_file, run, "--save_steps", "2", steps=6)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})
    assert done.returncode == 1, done.stderr
    assert re.search("checkpoint-4 .*not be written(?s:.*) needs about", done.stderr)
    assert f"The last good checkpoint is {run / 'checkpoint-2'}" in done.stderr
    assert digest(run / "checkpoint-2") == kept
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (run / ".saving").exists()


def test_a_checkpoints_size_is_read_and_a_wrong_wish_is_refused(base, train_file, tmp_path, capsys):
    main(flags(base, train_file, tmp_path / "first", steps=2))
    predict = [
        "--do_predict", "--model_name_or_path", str(base), "--test_file", str(train_file), "--prompt_column", "content",
        "--response_column", "summary", "--max_target_length", "8", "--output_dir", str(tmp_path / "predicted"),
        "--max_predict_samples", "2",
    ]  # fmt: skip
    main([*predict, "--ptuning_checkpoint", str(tmp_path / "first")])
    assert (tmp_path / "predicted" / "generated_predictions.txt").read_text("utf-8").count("\n") == 2
    for more, message in [
        (["--ptuning_checkpoint", str(tmp_path / "first"), "--pre_seq_len", "9"], "has 6 virtual tokens"),
        (["--pre_seq_len", "9"], "--pre_seq_len 9 without --do_train"),
        (["--ptuning_checkpoint", str(tmp_path / "nowhere")], "nowhere"),
    ]:
        with pytest.raises(SystemExit) as error:
            main([*predict, *more])
        assert error.value.code == 1
        assert message in capsys.readouterr().err


def test_faults_of_the_data_end_the_run_before_the_base_is_loaded(base, tmp_path, capsys):
    broken = tmp_path / "broken.json"
    broken.write_text('{"content": "问", "summary": "答"}\n{"content": \n', "utf-8")
    wrong = tmp_path / "wrong.json"
    wrong.write_text('{"question": "问", "summary": "答"}\n', "utf-8")
    for path, message in [(broken, f"{broken}:2"), (wrong, "content"), (tmp_path / "none.json", "none.json")]:
        with pytest.raises(SystemExit) as error:
            main(flags(base, path, tmp_path / "run"))
        assert error.value.code == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "prefix_config.json").exists()


def test_several_files_of_several_forms_with_bad_rows_and_a_cache(base, tmp_path, capsys):
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("question,answer\n天气,很好\n坏\n你是谁,甲乙丙丁\n", "utf-8")
    turns = [{"role": "user", "content": "天气"}, {"role": "assistant", "content": "很好"}]
    chats = tmp_path / "chats.jsonl"
    chats.write_text(json.dumps({"messages": turns}) + "\n", "utf-8")
    named = [
        "--do_train", "--do_eval", "--model_name_or_path", str(base), "--train_file", str(pairs), str(chats),
        "--train_weights", "1", "3", "--validation_file", str(chats), "--max_source_length", "40",
        "--max_target_length", "20", "--pre_seq_len", "4", "--max_steps", "2", "--disable_tqdm", "true",
        "--data_cache_dir", str(tmp_path / "cache"), "--overwrite_output_dir",
    ]  # fmt: skip
    with pytest.raises(SystemExit):
        main([*named, "--output_dir", str(tmp_path / "run")])
    assert re.search(f"{pairs}:3: 1 values.* 2 columns", capsys.readouterr().err)
    run = tmp_path / "run"
    main([*named, "--output_dir", str(run), "--skip_bad_rows", "1"])
    shown = capsys.readouterr().out
    assert "4 rows, 3 used, 3 examples" in shown
    assert re.search("1 bad rows .*skipped", shown)
    assert re.search("1 rows .*validation .*training data too", shown)
    assert json.loads((run / "all_results.json").read_text("utf-8"))["train_samples"] == 5
    first = load_file(run / "prefix_model.safetensors")
    # The validation file is one of the training files, so that it is always there.
    assert shown.count("(from the cache)") == 1
    main([*named, "--output_dir", str(run), "--skip_bad_rows", "1"])
    assert capsys.readouterr().out.count("(from the cache)") == 2
    main([*named, "--output_dir", str(run), "--skip_bad_rows", "1", "--overwrite_cache"])
    assert capsys.readouterr().out.count("(from the cache)") == 1
    for name, value in load_file(run / "prefix_model.safetensors").items():
        torch.testing.assert_close(first[name], value, rtol=0, atol=0)


def test_rows_that_are_longer_than_the_base_reads_are_named_once_and_evaluated(base, tmp_path, caplog):
    long = {"content": "天气" * 150, "summary": "很好"}
    path = write_rows(tmp_path / "long.json", long, *ROWS[:3])
    more = ["--do_eval", "--do_predict", "--predict_with_generate", "--validation_file", path]
    more += ["--max_source_length", "400"]
    main(flags(base, path, tmp_path / "run", *more, steps=1))
    rows, prompts = [message for message in caplog.messages if "seq_length" in message]
    assert re.match("2 of 8 examples .*seq_length of 256 .*longest has 31", rows)
    assert re.match("1 of 4 prompts .*seq_length of 256 .*longest has 30", prompts)
    answers = (tmp_path / "run" / "generated_predictions.txt").read_text("utf-8").splitlines()
    assert len(answers) == 4
