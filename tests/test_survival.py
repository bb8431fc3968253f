"""What ends a run at night: killed processes, SIGTERM, memory, disks, numbers that are no numbers."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import processes
import psutil
import pytest
import torch
from json_lines import write_rows
from safetensors.torch import load_file

from chatglm_ptuning.data.collate import PaddingCollator
from chatglm_ptuning.model.loading import load_model
from chatglm_ptuning.training.arguments import PrefixTrainingArguments
from chatglm_ptuning.training.callbacks import FiniteGuard, ZeroLossGuard
from chatglm_ptuning.training.checkpoints import last_checkpoint
from chatglm_ptuning.training.distributed import match_precision
from chatglm_ptuning.training.failures import AllLabelsMasked, OutOfMemory, TrainingDiverged
from chatglm_ptuning.training.preservation import Replay
from chatglm_ptuning.training.progress import failure_noted, read_progress
from chatglm_ptuning.training.run import main as train
from chatglm_ptuning.training.trainer import PrefixTrainer

ROOT = Path(__file__).resolve().parents[1]
ROWS = [
    {"content": prompt, "summary": answer}
    for prompt, answer in [("今天天气好吗", "今天有雨"), ("你是谁", "甲乙丙丁"), ("请问去公园吗", "我想散步")] * 4
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "train.json", *ROWS)


def flags(base, data, output, *more, steps=8):
    words = [
        "--do_train", "--model_name_or_path", base, "--train_file", data, "--prompt_column", "content",
        "--response_column", "summary", "--output_dir", output, "--max_source_length", "40", "--max_target_length",
        "20", "--pre_seq_len", "5", "--max_steps", steps, "--per_device_train_batch_size", "2", "--logging_steps", "1",
        "--disable_tqdm", "true", "--save_steps", "1000", "--prefix_dropout", "0", *more,
    ]  # fmt: skip
    return [str(word) for word in words]


def history(run):
    entries = json.loads((run / "trainer_state.json").read_text("utf-8"))["log_history"]
    return [entry["loss"] for entry in entries if "loss" in entry]


def wait_for(condition, seconds=600):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def has_logged_a_loss(job):
    return lambda: "'loss'" in job.logs[0].read_text("utf-8") if job.logs[0].exists() else False


# ---- signals and killed processes ----


@pytest.mark.parametrize(("count", "stage"), [(1, None), (2, 1), pytest.param(2, 3, marks=pytest.mark.slow)])
def test_sigterm_saves_and_the_run_resumes_from_there(base, data, tmp_path, count, stage):
    more = ["--deepspeed", ROOT / "ds_config" / f"zero{stage}.json"] if stage else []
    steps = 400
    job = processes.start(flags(base, data, tmp_path / "run", *more, steps=steps), count, tmp_path)
    wait_for(has_logged_a_loss(job))
    # To one process of the job alone; the others learn of it from that one.
    os.kill(job.processes[-1].pid, signal.SIGTERM)
    ended = job.wait()
    assert [process.code for process in ended] == [143] * count, ended[0].output
    checkpoint = last_checkpoint(tmp_path / "run")
    step = int(checkpoint.name.rpartition("-")[2])
    assert 0 < step < steps
    assert f"SIGTERM: stopped after step {step}" in ended[0].output and "resume_from_checkpoint true" in ended[0].output
    argv = flags(base, data, tmp_path / "run", *more, "--resume_from_checkpoint", "true", steps=steps)
    argv[argv.index("--max_steps") + 1] = str(step + 2)
    processes.run(argv, count, tmp_path)
    assert len(history(tmp_path / "run")) == step + 2


@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_when_a_process_is_killed_the_others_say_so_and_nothing_before_is_lost(base, data, tmp_path, stage):
    more = ["--deepspeed", ROOT / "ds_config" / f"zero{stage}.json", "--save_steps", "2", "--save_total_limit", "2"]
    job = processes.start(flags(base, data, tmp_path / "run", *more, steps=400), 2, tmp_path)
    wait_for(lambda: last_checkpoint(tmp_path / "run") is not None)
    job.processes[1].kill()
    first, killed = job.wait()
    assert killed.code == -signal.SIGKILL
    assert first.code == 1, first.output
    assert "has lost another process of the job" in first.output
    checkpoint = last_checkpoint(tmp_path / "run")
    step = int(checkpoint.name.rpartition("-")[2])
    assert f"The last good checkpoint is {checkpoint}" in first.output
    before = json.loads((checkpoint / "trainer_state.json").read_text("utf-8"))["log_history"]
    argv = flags(base, data, tmp_path / "run", *more, "--resume_from_checkpoint", "true", steps=step + 2)
    processes.run(argv, 2, tmp_path)
    assert history(tmp_path / "run")[:step] == [entry["loss"] for entry in before if "loss" in entry]
    assert len(history(tmp_path / "run")) == step + 2


def script(base, data, tmp_path, name="train.sh", **env):
    settings = {
        "MODEL": base, "TRAIN_FILE": data, "VALIDATION_FILE": data, "OUTPUT": tmp_path / "run", "PRE_SEQ_LEN": "5",
        "BATCH": "2", "ACCUMULATION": "1", "MAX_TARGET_LENGTH": "8", "NUM_GPUS": "2", "OMP_NUM_THREADS": "1",
        "MASTER_PORT": free_port(), "SKIP_INSTALL": "1", "VIRTUAL_ENV": sys.prefix,
        "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}", **env,
    }  # fmt: skip
    environment = os.environ | {key: str(value) for key, value in settings.items()}
    log = (tmp_path / f"{name}-{env.get('NODE_RANK', 0)}.log").open("w")
    return subprocess.Popen(
        ["bash", str(ROOT / "scripts" / name), "--disable_tqdm", "true", "--logging_steps", "1"],
        env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=tmp_path,
    )  # fmt: skip


def workers(script_process):
    """The training processes under a script."""
    found = []
    for child in psutil.Process(script_process.pid).children(recursive=True):
        command = child.cmdline()
        launches = any(word.startswith(("deepspeed.launcher", "torch.distributed")) for word in command)
        if "train" in command and "chatglm_ptuning" in command and not launches:
            found.append(child)
    return found


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.slow
def test_torchrun_starts_a_broken_job_again_by_itself(base, data, tmp_path):
    running = script(base, data, tmp_path, LAUNCHER="torchrun", MAX_RESTARTS="1", MAX_STEPS="300", SAVE_STEPS="5")
    wait_for(lambda: last_checkpoint(tmp_path / "run") is not None or running.poll() is not None)
    workers(running)[1].kill()
    log = tmp_path / "train.sh-0.log"
    assert running.wait(timeout=900) == 0, log.read_text()[-3000:]
    assert "restarted; resuming from" in log.read_text()
    assert len(history(tmp_path / "run")) == 300


@pytest.mark.slow
def test_deepspeeds_launcher_ends_a_broken_job(base, data, tmp_path):
    running = script(base, data, tmp_path, MAX_STEPS="4000", SAVE_STEPS="5")
    wait_for(lambda: last_checkpoint(tmp_path / "run") is not None or running.poll() is not None)
    workers(running)[0].kill()
    assert running.wait(timeout=600) not in (0, None)
    assert "has lost another process of the job" in (tmp_path / "train.sh-0.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_sigterm_to_the_script_reaches_all_processes(base, data, tmp_path, launcher):
    running = script(base, data, tmp_path, LAUNCHER=launcher, MAX_STEPS="4000", SAVE_STEPS="100000")
    log = tmp_path / "train.sh-0.log"
    wait_for(lambda: "'loss'" in log.read_text() or running.poll() is not None)
    running.terminate()
    assert running.wait(timeout=600) == 143, log.read_text()[-3000:]
    assert last_checkpoint(tmp_path / "run") is not None


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun", "slurm"])
def test_two_machines(base, data, tmp_path, launcher):
    """Two 'machines' are two calls of the script here, as each of two machines would make it."""
    shared = {"LAUNCHER": launcher, "NNODES": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(),
              "MAX_STEPS": "4", "SAVE_STEPS": "4"}  # fmt: skip
    nodes = []
    for node in range(2):
        env = {"NODE_RANK": node}
        if launcher == "slurm":
            env |= {"SLURM_PROCID": node, "SLURM_LOCALID": 0, "SLURM_NTASKS": 2, "SLURM_NTASKS_PER_NODE": 1}
        nodes.append(script(base, data, tmp_path, **shared, **env))
    logs = [tmp_path / f"train.sh-{node}.log" for node in range(2)]
    assert [node.wait(timeout=900) for node in nodes] == [0, 0], "".join(log.read_text()[-2000:] for log in logs)
    assert len(history(tmp_path / "run")) == 4
    random_states = len(list((tmp_path / "run" / "checkpoint-4").glob("rng_state_*.pth")))
    assert random_states == (2 if launcher == "slurm" else 4)


@pytest.mark.slow
def test_the_explicit_script_trains(base, data, tmp_path):
    running = script(base, data, tmp_path, name="ds_train.sh", DS_CONFIG=ROOT / "ds_config" / "zero3.json")
    log = tmp_path / "ds_train.sh-0.log"
    wait_for(lambda: log.read_text().count("'loss'") > 2 or running.poll() is not None)
    running.terminate()
    assert running.wait(timeout=600) == 143, log.read_text()[-3000:]
    assert last_checkpoint(tmp_path / "run") is not None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"LAUNCHER": "mpi"}, "LAUNCHER must be"),
        ({"MAX_RESTARTS": "3"}, "needs LAUNCHER=torchrun"),
        ({"NNODES": "2"}, "needs HOSTFILE, or on every machine NODE_RANK"),
        ({"LAUNCHER": "slurm"}, "scripts/slurm.sbatch"),
    ],
)
def test_wrong_settings_of_the_script_are_refused(base, data, tmp_path, settings, message):
    running = script(base, data, tmp_path, **settings)
    assert running.wait(timeout=600) == 2
    assert message in (tmp_path / "train.sh-0.log").read_text()


# ---- memory ----


@pytest.fixture(scope="module")
def long_rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "long.json"
    row = {"content": "今天天气好吗" * 30, "summary": "今天有雨"}
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for _ in range(96)) + "\n", "utf-8")
    return path


def large_batch(base, long_rows, output, *more):
    argv = flags(base, long_rows, output, "--attn_implementation", "eager", *more, steps=1)
    argv[argv.index("--max_source_length") + 1] = "200"
    argv[argv.index("--per_device_train_batch_size") + 1] = "96"
    return argv


def test_a_batch_that_does_not_fit_is_described_with_the_ways_out(base, long_rows, tmp_path):
    argv = large_batch(base, long_rows, tmp_path / "run")
    ended = processes.start(argv, 1, tmp_path, LIMIT_MEMORY_MB="150").wait()[0]
    assert ended.code == 1
    assert "Out of memory on cpu (process 0): a pass of 96 rows of 19" in ended.output
    assert "with 5 of the prefix" in ended.output
    assert re.search(r"1\. --max_tokens_per_pass 9\d{3}", ended.output)  # half of 96 rows of about 200
    for way in ("--gradient_checkpointing", "--quantization_bit"):
        assert way in ended.output
    assert "Traceback" not in ended.output
    fewer = [*argv, "--max_tokens_per_pass", "800"]
    assert processes.start(fewer, 1, tmp_path, LIMIT_MEMORY_MB="150").wait()[0].code == 0


def test_a_padded_batch_that_does_not_fit_is_described_with_a_smaller_one(base, long_rows, tmp_path):
    argv = large_batch(base, long_rows, tmp_path / "run", "--packing", "false")
    ended = processes.start(argv, 1, tmp_path, LIMIT_MEMORY_MB="150").wait()[0]
    assert ended.code == 1
    assert "a pass of 96 rows of 19" in ended.output and "padded to" in ended.output
    assert "--per_device_train_batch_size 48 --gradient_accumulation_steps 2" in ended.output


def test_a_fitting_batch_is_found(base, long_rows, tmp_path):
    argv = large_batch(base, long_rows, tmp_path / "run", "--auto_find_batch_size", "true")
    for _ in range(3):
        (ended,) = processes.start(argv, 1, tmp_path, LIMIT_MEMORY_MB="150").wait()
        if "memory for thread-local data: ABORT" not in ended.output:
            break  # else the C library was the one that ran out of memory, for a new thread, and it ends the process
    assert ended.code == 0, ended.output
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text("utf-8"))
    assert 1 <= state["train_batch_size"] < 96
    several = processes.start([*argv, "--use_cpu", "true"], 2, tmp_path).wait()
    assert all("works in one process only" in process.output for process in several)


def make_trainer(base, tmp_path, rows, replay=None, **changes):
    args = PrefixTrainingArguments(
        output_dir=str(tmp_path / "run"), per_device_train_batch_size=2, max_steps=3, report_to="none",
        disable_tqdm=True, packing=False, **changes,
    )  # fmt: skip
    model = load_model(str(base), pre_seq_len=4)
    return PrefixTrainer(model=model, args=args, train_dataset=rows, data_collator=PaddingCollator(0), replay=replay)


@pytest.mark.parametrize("general_rows", [0, 6])
def test_out_of_memory_names_rows_tokens_and_a_smaller_batch(base, tmp_path, general_rows):
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]}, {"input_ids": [5, 6], "labels": [5, 6]}]
    replay = Replay(rows, 1.0, pad_token_id=0, batch_size=general_rows) if general_rows else None
    trainer = make_trainer(base, tmp_path, rows, replay)

    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    trainer.model.transformer.encoder.forward = fail
    with pytest.raises(OutOfMemory, match=r"2 rows of 4, 2 tokens, .* 4, .* 4 .*prefix") as error:
        trainer.train()
    assert ("and 6 general rows of --preserve_base, did not fit" in str(error.value)) == bool(general_rows)
    assert ("1. --preserve_batch_size 3" in str(error.value)) == bool(general_rows)


# ---- numbers ----


def test_rows_without_a_label_stop_the_run(base, tmp_path):
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, -100, -100]}] * 4
    with pytest.raises(AllLabelsMasked, match=r"label .*step 1 .*masked"):
        make_trainer(base, tmp_path, rows).train()


def test_a_loss_that_stays_at_zero_stops_the_run(base, tmp_path):
    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}] * 4
    trainer = make_trainer(base, tmp_path, rows, logging_steps=4)
    trainer.args.max_steps = 40
    output_layer = trainer.model.transformer.output_layer
    # All the probability on the right token, as if the other logits had overflowed to minus infinity.
    output_layer.register_forward_hook(
        lambda module, inputs, logits: logits * 0 + torch.eye(logits.shape[-1])[[6, 7] * (len(logits) // 2)] * 1e6
    )
    with pytest.raises(TrainingDiverged, match=r"exactly 0 .*12 steps"):
        trainer.train()
    guard = ZeroLossGuard()
    state = trainer.state
    for step in range(1, 30):
        state.global_step = step
        guard.on_log(trainer.args, state, trainer.control, {"loss": 0.0 if step % 9 else 1e-3})


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (AllLabelsMasked(1), "stopped"),
        (torch.OutOfMemoryError("CUDA out of memory"), "stopped"),
        (torch.AcceleratorError("an illegal memory access"), "device"),
        (RuntimeError("CUDA error: an illegal memory access"), "device"),
        (FileNotFoundError("no file"), "refused"),
        (RuntimeError("anything"), "other"),
    ],
)
def test_what_ends_a_run_is_the_last_line_of_its_progress(tmp_path, error, kind):
    with pytest.raises(type(error)), failure_noted(PrefixTrainingArguments(output_dir=str(tmp_path))):
        raise error
    assert not list(tmp_path.iterdir())  # a folder without progress may be of something else
    (tmp_path / "progress.jsonl").touch()
    with pytest.raises(type(error)), failure_noted(PrefixTrainingArguments(output_dir=str(tmp_path))):
        raise error
    assert read_progress(tmp_path) == [{"failed": kind, "reason": str(error)}]


def test_a_run_that_diverges_says_so_in_its_progress(base, data, tmp_path, capsys):
    argv = flags(base, data, tmp_path, "--learning_rate", "1e38", "--max_grad_norm", "0")
    with pytest.raises(SystemExit):
        train(argv)
    *logged, last = read_progress(tmp_path)
    assert [entry["step"] for entry in logged] == list(range(1, len(logged) + 1))
    assert last["failed"] == "diverged" and last["reason"] in capsys.readouterr().err


def test_float16_may_skip_some_steps_but_not_for_ever(tmp_path):
    guard, args = FiniteGuard(), PrefixTrainingArguments(output_dir=str(tmp_path))
    args.fp16 = True
    for _ in range(3):
        for _ in range(20):
            guard.check(False, 1, args)
        guard.check(True, 1, args)
    for _ in range(20):
        guard.check(False, 1, args)
    with pytest.raises(TrainingDiverged, match="--bf16 instead of --fp16"):
        guard.check(False, 21, args)


@pytest.mark.parametrize(
    ("dtype", "rate", "warned"),
    [(torch.float16, 2e-2, True), (torch.float16, 5e-3, False), (torch.float32, 2e-2, False)],
)
def test_float16_with_the_official_learning_rate_is_warned_of(tmp_path, caplog, dtype, rate, warned):
    match_precision(PrefixTrainingArguments(output_dir=str(tmp_path), learning_rate=rate, do_train=True), dtype, None)
    assert ("often ends in a loss of 0 or NaN" in caplog.text) == warned


def test_another_learning_rate_on_resuming_is_warned_of(base, data, tmp_path):
    run = tmp_path / "run"
    processes.run(flags(base, data, run, "--learning_rate", "1e-2", "--save_steps", "2", steps=2), 1, tmp_path)
    for rate, warned in (("1e-2", False), ("1e-1", True)):
        argv = flags(
            base,
            data,
            run,
            "--learning_rate",
            rate,
            "--save_steps",
            "100",
            "--resume_from_checkpoint",
            run / "checkpoint-2",
            steps=4,
        )
        output = processes.run(argv, 1, tmp_path)[0].output
        assert ("learning_rate 0.1 is not used" in output and "learning rate of 0.01" in output) == warned


# ---- disks ----


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 4 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs the rights to do so")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("left", [600_000, 1_100_000])
def test_a_full_disk_leaves_the_checkpoint_before_and_says_how_much_was_needed(base, data, small_disk, tmp_path, left):
    run = small_disk / "run"
    argv = flags(base, data, run, "--save_steps", "1", "--save_total_limit", "1")
    argv[argv.index("--pre_seq_len") + 1] = "200"
    processes.run([*argv, "--max_steps", "1"], 1, tmp_path)
    kept = {path.name: path.read_bytes() for path in (run / "checkpoint-1").iterdir()}
    (small_disk / "other").write_bytes(b"\0" * (shutil.disk_usage(small_disk).free - left))
    ended = processes.start(argv, 1, tmp_path).wait()[0]
    assert ended.code == 1
    assert "checkpoint-2 could not be written" in ended.output and "It needs about" in ended.output
    assert f"The last good checkpoint is {run / 'checkpoint-1'}" in ended.output
    assert {path.name: path.read_bytes() for path in (run / "checkpoint-1").iterdir()} == kept
    assert not (run / ".saving").exists()


def test_the_last_good_checkpoint_outlives_the_limit(base, data, tmp_path):
    run = tmp_path / "run"
    processes.run(flags(base, data, run, "--save_steps", "1", "--save_total_limit", "1", steps=3), 1, tmp_path)
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-3"]
    assert load_file(run / "checkpoint-3" / "prefix_model.safetensors")
