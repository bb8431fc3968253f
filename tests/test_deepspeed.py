"""Two processes under every ZeRO stage against one process: losses, prefix, scores, checkpoints."""

import json
import shutil
from pathlib import Path

import processes
import pytest
import torch
from json_lines import write_rows
from safetensors.torch import load_file

from chatglm_ptuning.model.modeling_chatglm import ChatGLMForConditionalGeneration

CONFIGS = Path(__file__).resolve().parents[1] / "ds_config"
ROWS = [
    {"content": "今天天气好吗", "summary": "今天有雨"},
    {"content": "你是谁", "summary": "甲乙丙丁戊己庚辛"},
    {"content": "请问去公园吗", "summary": "我"},
    {"content": "天气", "summary": "很好，我想去公园散步"},
] * 3
ROWS = ROWS[:11]  # which neither batches nor processes divide
SLOW_STAGES = [pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 2)]
# Sums in another order: float32 keeps about seven digits, of which a few steps of Adam lose two.
TOLERANCE = {"rtol": 2e-4, "atol": 2e-5}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "train.json", *ROWS)


def flags(base, data, output, *more, steps=6, accumulation=2, stage=None):
    words = [
        "--do_train", "--do_eval", "--do_predict", "--model_name_or_path", base, "--train_file", data,
        "--validation_file", data, "--prompt_column", "content", "--response_column", "summary",
        "--output_dir", output, "--max_source_length", "40", "--max_target_length", "20", "--pre_seq_len", "5",
        "--max_steps", steps, "--per_device_train_batch_size", "2", "--per_device_eval_batch_size", "2",
        "--gradient_accumulation_steps", accumulation, "--logging_steps", "1", "--disable_tqdm", "true",
        "--prefix_dropout", "0", "--learning_rate", "1e-1", "--save_steps", "3", *more,
    ]  # fmt: skip
    if stage is not None:
        words += ["--deepspeed", CONFIGS / f"zero{stage}.json"]
    return [str(word) for word in words]


@pytest.fixture(scope="module")
def alone(base, data, tmp_path_factory):
    """The same training in one process, without DeepSpeed."""
    folder = tmp_path_factory.mktemp("alone")
    processes.run(flags(base, data, folder / "run", accumulation=4), 1, folder)
    return folder / "run"


def history(run, key="loss"):
    entries = json.loads((run / "trainer_state.json").read_text("utf-8"))["log_history"]
    return [entry[key] for entry in entries if key in entry]


def grad_norms(run):
    entries = json.loads((run / "trainer_state.json").read_text("utf-8"))["log_history"]
    return {entry["step"]: entry["grad_norm"] for entry in entries if "grad_norm" in entry}


def prefix(folder):
    return load_file(folder / "prefix_model.safetensors")


def assert_same_run(run, other):
    torch.testing.assert_close(torch.tensor(history(run)), torch.tensor(history(other)), **TOLERANCE)
    norms, expected = grad_norms(run), grad_norms(other)
    for step in norms:  # DeepSpeed does not tell them without ZeRO
        assert norms[step] == pytest.approx(expected[step], rel=1e-3, abs=1e-4)
    for name, value in prefix(other).items():
        torch.testing.assert_close(prefix(run)[name], value, **TOLERANCE)


@pytest.mark.parametrize("stage", [None, 1, 3, *SLOW_STAGES])
def test_two_processes_train_and_score_as_one(base, data, alone, tmp_path, stage):
    processes.run(flags(base, data, tmp_path / "run", stage=stage), 2, tmp_path)
    run = tmp_path / "run"
    assert_same_run(run, alone)
    results, expected = (json.loads((folder / "all_results.json").read_text("utf-8")) for folder in (run, alone))
    scores = [name for name in expected if name.startswith(("eval_loss", "predict_"))]
    assert len(scores) > 5
    assert {name: results[name] for name in scores} == pytest.approx(
        {name: expected[name] for name in scores}, rel=1e-4
    )
    answers = "generated_predictions.txt"
    assert (run / answers).read_text("utf-8") == (alone / answers).read_text("utf-8")
    # One process wrote, in the form of a run without DeepSpeed, and nothing of the base.
    names = {path.name for path in (run / "checkpoint-6").rglob("*") if path.is_file()}
    assert names == {
        "optimizer.pt", "prefix_config.json", "prefix_model.safetensors", "rng_state_0.pth", "rng_state_1.pth",
        "scheduler.pt", "trainer_state.json", "training_args.bin", "training_arguments.json",
    } - {"training_args.bin"}  # fmt: skip
    model = ChatGLMForConditionalGeneration.from_pretrained(base)
    model.load_prefix(run)
    assert json.loads((run / "prefix_config.json").read_text("utf-8"))["trained"]


def resumable(base, data, output, **changes):
    return [word for word in flags(base, data, output, **changes) if word not in ("--do_eval", "--do_predict")]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, 1), (1, None)),
        ((1, None), (2, 3)),
        pytest.param((2, 3), (2, 3), marks=pytest.mark.slow),
        pytest.param((2, 3), (1, 1), marks=pytest.mark.slow),
        pytest.param((2, 0), (2, 2), marks=pytest.mark.slow),
        pytest.param((2, None), (2, 1), marks=pytest.mark.slow),
        pytest.param((2, 2), (2, 0), marks=pytest.mark.slow),
    ],
)
def test_a_run_resumes_under_other_processes_and_stages(base, data, alone, tmp_path, before, after):
    run = tmp_path / "run"
    count, stage = before
    processes.run(resumable(base, data, run, stage=stage, accumulation=4 // count), count, tmp_path)
    shutil.rmtree(run / "checkpoint-6")
    count, stage = after
    more = ["--resume_from_checkpoint", "true"]
    processes.run([*resumable(base, data, run, stage=stage, accumulation=4 // count), *more], count, tmp_path)
    assert len(history(run)) == 6
    assert_same_run(run, alone)


def test_an_optimizer_of_another_size_is_refused(base, data, tmp_path):
    processes.run([*resumable(base, data, tmp_path / "run", steps=1), "--save_steps", "1"], 1, tmp_path)
    checkpoint = tmp_path / "run" / "checkpoint-1" / "optimizer.pt"
    saved = torch.load(checkpoint, weights_only=True)
    saved["state"][0]["exp_avg"] = torch.zeros(3, 4)
    torch.save(saved, checkpoint)
    argv = [*resumable(base, data, tmp_path / "run", stage=1), "--resume_from_checkpoint", "true"]
    ended = processes.start(argv, 1, tmp_path).wait()
    assert ended[0].code == 1
    assert "exp_avg of size (3, 4)" in ended[0].output and "another run" in ended[0].output


def test_bfloat16_bases_keep_a_float32_prefix(base, data, tmp_path):
    for stage in (1, 3):
        more = ["--dtype", "bfloat16", "--max_train_samples", "2", "--save_steps", "1", "--learning_rate", "1e-3"]
        argv = [*resumable(base, data, tmp_path / f"run{stage}", steps=2, stage=stage, accumulation=1), *more]
        processes.run(argv, 2, tmp_path)
        tensor = prefix(tmp_path / f"run{stage}")["transformer.prefix_encoder.embedding.weight"]
        assert tensor.dtype == torch.float32
        # Values that went through bfloat16 would all be representable in it.
        assert not torch.equal(tensor, tensor.bfloat16().float())
        moved = prefix(tmp_path / f"run{stage}" / "checkpoint-1")["transformer.prefix_encoder.embedding.weight"]
        assert (tensor - moved).abs().max() > 0


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_evaluation_alone_works_too(base, data, alone, tmp_path, stage):
    argv = [word for word in flags(base, data, tmp_path / "run", stage=stage) if word != "--do_train"]
    processes.run([*argv, "--ptuning_checkpoint", str(alone), "--compare_base"], 2, tmp_path)
    results, expected = (
        json.loads((folder / "all_results.json").read_text("utf-8")) for folder in (tmp_path / "run", alone)
    )
    for name in ("eval_loss", "predict_rouge-l"):
        assert results[name] == pytest.approx(expected[name], rel=1e-4)


@pytest.mark.slow
def test_the_best_checkpoint_is_loaded_at_the_end(base, data, tmp_path):
    more = ["--eval_strategy", "steps", "--eval_steps", "3", "--load_best_model_at_end", "true",
            "--metric_for_best_model",
            "loss", "--learning_rate", "3"]  # fmt: skip
    for stage in (1, 3):
        run = tmp_path / f"run{stage}"
        processes.run([*flags(base, data, run, stage=stage), *more], 2, tmp_path)
        best = json.loads((run / "trainer_state.json").read_text("utf-8"))["best_model_checkpoint"]
        for name, value in prefix(run).items():
            torch.testing.assert_close(prefix(Path(best))[name], value, rtol=0, atol=0)
