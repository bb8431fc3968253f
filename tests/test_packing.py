"""`--packing`: a step on packed rows has the losses and gradients of padded ones, however it is divided into passes."""

from __future__ import annotations

import itertools
import json
import random
import re
from pathlib import Path

import processes
import pytest
import torch
from json_lines import write_rows
from safetensors.torch import load_file
from task_runs import TASKS, train, write_tasks

from chatglm_ptuning.data.collate import PackingCollator, fit, pack
from chatglm_ptuning.training.run import main

CONFIGS = Path(__file__).resolve().parents[1] / "ds_config"
ALIKE = {"rtol": 1e-3, "atol": 1e-5}
TEXTS = ["今天天气", "我想去公园散步", "请问你是谁", "甲乙丙", "散步", "戊己庚辛壬癸，今天天气很好", "你好"]


# ---- batches ----


def test_rows_lie_one_after_the_other():
    rows = PackingCollator()([
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
        {"input_ids": [8, 9], "labels": [8, 9], "reference": "八"},
        {"input_ids": [4], "labels": [-100]},
    ])["rows"]  # fmt: skip
    first, second = pack(rows, 4)
    assert first["sequence_lengths"] == [3, 1] and second["sequence_lengths"] == [2]
    assert first["input_ids"].tolist() == [[5, 6, 7, 4]] and second["input_ids"].tolist() == [[8, 9]]
    assert first["labels"].tolist() == [[-100, 6, 7, -100]]
    assert second["labels"].tolist() == [[-100, 9]]
    assert first["supervised_positions"].tolist() == [1, 2]
    assert second["supervised_positions"].tolist() == [1]  # no position predicts the first token of a row


def test_labels_of_rows_stay_labels_of_rows():
    (batch,) = pack(PackingCollator()([{"input_ids": [5], "labels": 1}, {"input_ids": [6, 7], "labels": 0}])["rows"], 9)
    assert batch["labels"].tolist() == [0, 1] and batch["sequence_lengths"] == [2, 1]
    several = [{"input_ids": [5], "labels": [1.0, 0.0]}, {"input_ids": [6], "labels": [0.0, 1.0]}]
    (batch,) = pack(PackingCollator()(several)["rows"], 9)
    assert batch["labels"].tolist() == [[1.0, 0.0], [0.0, 1.0]]
    spans = [{"input_ids": [5, 6], "start_positions": 0, "end_positions": 1}] * 2
    (batch,) = pack(PackingCollator()(spans)["rows"], 9)
    assert batch["start_positions"].tolist() == [0, 0] and batch["end_positions"].tolist() == [1, 1]


def test_another_number_of_labels_than_of_ids_is_refused():
    with pytest.raises(ValueError, match=r"example 1 .*2 ids.*1 labels"):
        PackingCollator()([{"input_ids": [5], "labels": [5]}, {"input_ids": [5, 6], "labels": [5]}])


@pytest.mark.parametrize("seed", range(20))
def test_few_bins_hold_every_item_once(seed):
    draw = random.Random(seed)
    lengths = [draw.randint(1, 60) for _ in range(draw.randint(1, 40))]
    bins = fit(lengths, 50)
    assert sorted(itertools.chain.from_iterable(bins)) == list(range(len(lengths)))
    sizes = [sum(lengths[place] for place in own) for own in bins]
    assert all(size <= 50 or len(own) == 1 for size, own in zip(sizes, bins, strict=True))
    # Best fit decreasing needs at most 11/9 of the fewest bins, and 4 (Johnson 1973).
    fewest = sum(length > 50 for length in lengths) + -(-sum(length for length in lengths if length <= 50) // 50)
    assert len(bins) <= 11 / 9 * fewest + 4


# ---- training ----


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    pairs = itertools.product(TEXTS, repeat=2)
    write_rows(folder / "train.json", *({"content": ask, "summary": say} for ask, say in itertools.islice(pairs, 14)))
    return folder / "train.json"


def flags(base, rows, output, *more, batch=2, accumulation=3, steps=4):
    return [
        "--do_train", "--do_eval", "--model_name_or_path", str(base), "--train_file", str(rows), "--validation_file",
        str(rows), "--output_dir", str(output), "--pre_seq_len", "6", "--max_steps", str(steps), "--logging_steps", "1",
        "--per_device_train_batch_size", str(batch), "--gradient_accumulation_steps", str(accumulation),
        "--prefix_dropout", "0", "--report_drift", "false", "--learning_rate", "0.05", "--disable_tqdm", "true",
        *map(str, more),
    ]  # fmt: skip


def history(run, key="loss"):
    entries = json.loads((run / "trainer_state.json").read_text("utf-8"))["log_history"]
    return torch.tensor([entry[key] for entry in entries if key in entry])


def evaluation_loss(run):
    return json.loads((run / "all_results.json").read_text("utf-8"))["eval_loss"]


def assert_same(run, other, weights="prefix_model.safetensors"):
    torch.testing.assert_close(history(run), history(other), **ALIKE)
    if len(norms := history(run, "grad_norm")):  # not given by DeepSpeed without ZeRO
        torch.testing.assert_close(norms, history(other, "grad_norm"), **ALIKE)
    for name, value in load_file(other / weights).items():
        torch.testing.assert_close(load_file(run / weights)[name], value, rtol=1e-2, atol=1e-3)


@pytest.fixture(scope="module")
def padded(base, rows, tmp_path_factory) -> Path:
    """A run on padded rows."""
    run = tmp_path_factory.mktemp("runs") / "padded"
    main(flags(base, rows, run, "--packing", "false"))
    return run


@pytest.mark.parametrize("more", [[], ["--max_tokens_per_pass", 30], ["--max_tokens_per_pass", 1]])
def test_a_run_on_packed_rows_equals_one_on_padded_rows(base, rows, padded, tmp_path, more):
    main(flags(base, rows, tmp_path, *more))
    assert len(history(tmp_path)) == 4  # the steps are the same, whatever number of passes each has
    assert_same(tmp_path, padded)
    assert evaluation_loss(tmp_path) == pytest.approx(evaluation_loss(padded), rel=1e-4)


@pytest.mark.parametrize("more", [["--attn_implementation", "eager"], ["--gradient_checkpointing", "true"]])
def test_other_ways_of_computing_give_the_same(base, rows, padded, tmp_path, more):
    main(flags(base, rows, tmp_path, *more))
    assert_same(tmp_path, padded)


@pytest.mark.parametrize(
    ("more", "weights"),
    [
        (["--tuning", "lora", "--lora_dropout", "0"], "adapter_model.safetensors"),
        (["--tuning", "full", "--learning_rate", "1e-3"], "model.safetensors"),
        (["--tuning", "prompt"], "prefix_model.safetensors"),
        (["--preserve_base", "1"], "prefix_model.safetensors"),
    ],
    ids=lambda value: None if isinstance(value, str) else value[1],
)
def test_other_methods_are_packed_too(base, rows, tmp_path, more, weights):
    main(flags(base, rows, tmp_path / "padded", *more, "--packing", "false", steps=2))
    main(flags(base, rows, tmp_path / "packed", *more, "--max_tokens_per_pass", 40, steps=2))
    assert_same(tmp_path / "packed", tmp_path / "padded", weights)
    if "--preserve_base" in more:
        kl = [history(tmp_path / name, "preserve_kl") for name in ("packed", "padded")]
        torch.testing.assert_close(*kl, **ALIKE)


@pytest.mark.parametrize("head", TASKS)
def test_the_heads_of_tasks_are_packed_too(base, tmp_path, head):
    data = write_tasks(tmp_path / "data")
    task, *_ = TASKS[head]
    more = ["--gradient_accumulation_steps", 2, "--per_device_train_batch_size", 2, "--prefix_dropout", 0]
    more += [] if head == "multi_label" else ["--head", head]
    train(base, data, task, tmp_path / "padded", *more, "--packing", "false", steps=3)
    train(base, data, task, tmp_path / "packed", *more, "--max_tokens_per_pass", 60, steps=3)
    torch.testing.assert_close(history(tmp_path / "packed"), history(tmp_path / "padded"), **ALIKE)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--packing", "true", "--torch_compile", "true"], "--packing: --torch_compile"),
        (["--packing", "true", "--neftune_noise_alpha", "5"], "--packing: --neftune_noise_alpha"),
        (["--packing", "false", "--max_tokens_per_pass", "9"], "--max_tokens_per_pass .*--packing"),
        (["--max_tokens_per_pass", "0"], "--max_tokens_per_pass .*at least 1, got 0"),
    ],
)
def test_flags_that_contradict_packing_are_refused(base, rows, tmp_path, capsys, more, message):
    with pytest.raises(SystemExit) as stopped:
        main(flags(base, rows, tmp_path, *more))
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("stage", [None, 2, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 1, 3))])
def test_processes_with_different_numbers_of_passes_train_as_one(base, rows, padded, tmp_path, stage):
    more = [] if stage is None else ["--deepspeed", CONFIGS / f"zero{stage}.json"]
    # 3 rows of a process have up to 3 passes, others fewer.
    argv = flags(base, rows, tmp_path / "run", "--max_tokens_per_pass", 25, *more, batch=1)
    processes.run(argv, 2, tmp_path)
    assert_same(tmp_path / "run", padded)
