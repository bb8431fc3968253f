"""The flags of transformers' TrainingArguments: each does what it says, or is refused with what to use instead."""

import dataclasses
import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import get_args

import processes
import pytest
import task_runs
import torch
from accelerate.optimizer import AcceleratedOptimizer
from json_lines import write_rows
from safetensors.torch import load_file
from torch.nn import functional
from transformers import Seq2SeqTrainingArguments

from chatglm_ptuning.data.collate import PaddingCollator
from chatglm_ptuning.experiments.compare import main as compare
from chatglm_ptuning.experiments.search import main as search
from chatglm_ptuning.model.loading import load_model
from chatglm_ptuning.model.modeling_heads import (
    ChatGLMForSequenceClassification,
    ChatGLMForTokenClassification,
)
from chatglm_ptuning.training.arguments import RETIRED_FLAGS, PrefixTrainingArguments
from chatglm_ptuning.training.run import main
from chatglm_ptuning.training.trainer import PrefixTrainer
from chatglm_ptuning.training.trainer_flags import REFUSED, Optimizer

PAGE = Path(__file__).resolve().parents[1] / "docs" / "training_flags.md"
ROWS = [
    {"prompt": prompt, "response": answer}
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


def flags(base, train_file, output, *more, steps=3):
    return [
        "--do_train", "--model_name_or_path", str(base), "--train_file", str(train_file), "--output_dir", str(output),
        "--max_source_length", "40", "--max_target_length", "20", "--pre_seq_len", "6", "--max_steps", str(steps),
        "--per_device_train_batch_size", "2", "--prefix_dropout", "0", "--logging_steps", "1", "--disable_tqdm", "true",
        "--report_drift", "false", *map(str, more),
    ]  # fmt: skip


def history(run: Path, key: str) -> list[float]:
    entries = json.loads((run / "trainer_state.json").read_text("utf-8"))["log_history"]
    return [entry[key] for entry in entries if key in entry]


def prefix(run: Path) -> torch.Tensor:
    (values,) = load_file(run / "prefix_model.safetensors").values()
    return values


def refusal(argv, capsys) -> str:
    with pytest.raises(SystemExit) as error:
        main(argv)
    assert error.value.code in (1, 2)
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def plain(base, train_file, tmp_path_factory) -> Path:
    """A run without further flags."""
    run = tmp_path_factory.mktemp("plain")
    main(flags(base, train_file, run))
    return run


# ---- the table ----


def test_the_page_lists_every_flag_once_with_what_holds_here():
    rows = re.findall(r"^\| `--(\w+)` \| (\w+) \|", PAGE.read_text("utf-8"), re.MULTILINE)
    names = [field.name for field in dataclasses.fields(Seq2SeqTrainingArguments)]
    assert sorted(name for name, _ in rows) == sorted(names)
    status = dict(rows)
    assert set(status.values()) == {"works", "ignored", "refused"}
    assert {name for name in names if status[name] == "refused"} == set(REFUSED)
    assert {name for name in names if status[name] == "ignored"} == set(RETIRED_FLAGS) & set(names)


GIVEN = {
    "average_tokens_across_devices": "false", "eval_do_concat_batches": "false", "dataloader_in_order": "false",
    "hub_strategy": "end", "accelerator_config": '{"split_batches": true}', "generation_max_length": "9",
}  # fmt: skip
"""Values of refused flags that are not `true`."""


@pytest.mark.parametrize("flag", sorted(REFUSED))
def test_a_refused_flag_says_what_to_use_instead(base, tmp_path, capsys, flag):
    message = refusal(
        flags(base, tmp_path / "none.json", tmp_path / "run", f"--{flag}", GIVEN.get(flag, "true")), capsys
    )
    assert f"--{flag} " in message and REFUSED[flag] in message
    assert not (tmp_path / "run").exists()


def test_an_evaluation_at_the_start_needs_rows(base, train_file, tmp_path, capsys):
    message = refusal(flags(base, train_file, tmp_path, "--eval_on_start", "true"), capsys)
    assert "--eval_on_start" in message and "--do_eval" in message


def test_a_refused_flag_with_its_default_is_accepted(tmp_path):
    fields = {field.name: field for field in dataclasses.fields(Seq2SeqTrainingArguments)}
    defaults = {name: fields[name].default for name in REFUSED if fields[name].default is not dataclasses.MISSING}
    PrefixTrainingArguments(output_dir=str(tmp_path), **defaults)
    PrefixTrainingArguments(output_dir=str(tmp_path), fsdp="", push_to_hub=False, include_for_metrics=[])


def test_flags_in_a_file_of_a_search_and_of_a_comparison_are_refused_too(base, train_file, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("generation_max_length: 64\n", "utf-8")
    message = refusal(flags(base, train_file, tmp_path / "run", "--config", tmp_path / "run.yaml"), capsys)
    assert "--val_max_target_length" in message
    with pytest.raises(SystemExit):
        search(["--model_name_or_path", str(base), "--train_file", str(train_file), "--validation_file",
                str(train_file), "--output_dir", str(tmp_path), "--generation_max_length", "64"])  # fmt: skip
    assert "--val_max_target_length" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        compare(["--model_name_or_path", str(base), "--methods", "ptuning_v2", "--tasks", str(tmp_path / "mood.yaml"),
                 "--task_data", str(task_runs.write_tasks(tmp_path)), "--output_dir", str(tmp_path / "compare"), "--",
                 "--generation_max_length", "64"])  # fmt: skip
    assert "--val_max_target_length" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--max_steps 0", "--max_steps .*at least 1, got 0.* --num_train_epochs"),
        ("--max_steps -7", "--max_steps .*at least 1, got -7"),
        ("--max_steps -1 --num_train_epochs 0", "--num_train_epochs .*above 0 and finite, got 0"),
        ("--max_steps -1 --num_train_epochs -2.5", "--num_train_epochs .*above 0 and finite, got -2.5"),
        ("--label_smoothing_factor 1", "--label_smoothing_factor .*below 1, got 1"),
        ("--label_smoothing_factor -0.1", "--label_smoothing_factor .*got -0.1"),
        ("--max_steps -1 --num_train_epochs inf", "--num_train_epochs .*finite, got inf"),
        ("--learning_rate nan", "--learning_rate .*at least 0 and finite, got nan"),
        ("--weight_decay -0.1", "--weight_decay .*at least 0 .*got -0.1"),
        ("--adam_beta1 1", "--adam_beta1 .*below 1, got 1"),
        ("--adam_epsilon 0", "--adam_epsilon .*above 0, got 0"),
        ("--dataloader_num_workers -1", "--dataloader_num_workers .*got -1"),
        ("--optim lomo", "--optim .*adafactor.* got 'lomo'"),
        ("--lr_scheduler_type warmup_stable_decay", "--lr_scheduler_kwargs .*num_decay_steps"),
        ("--lr_scheduler_type cosine_with_min_lr", "--lr_scheduler_kwargs .*min_lr"),
        ('--lr_scheduler_type cosine --lr_scheduler_kwargs {"cycles":2}', "--lr_scheduler_kwargs .*cycles"),
        ("--include_num_input_tokens_seen some", "--include_num_input_tokens_seen .*non_padding, got some"),
        ('--lr_scheduler_type polynomial --learning_rate 0.1 --lr_scheduler_kwargs {"lr_end":0.5}',
         "--lr_scheduler_type polynomial .*lr_end.* --learning_rate 0.1"),
        ("--lr_scheduler_kwargs {min_lr", "--lr_scheduler_kwargs .*JSON.* got {min_lr"),
        ("--activation_checkpointing_kwargs [1]", r"--activation_checkpointing_kwargs .*JSON.* got \[1\]"),
        ("--gradient_accumulation_steps 0", "--gradient_accumulation_steps .*at least 1, got 0"),
        ("--per_device_train_batch_size 0", "--per_device_train_batch_size .*at least 1, got 0"),
        ("--per_device_eval_batch_size -2", "--per_device_eval_batch_size .*at least 1, got -2"),
        ("--seed -1", "--seed .*at least 0.*got -1"),
        ("--data_seed -1", "--data_seed .*at least 0.*got -1"),
        ("--trackio_space_id mine", "--trackio_space_id .*--report_to trackio"),
        ("--ddp_backend gloo", "--ddp_backend gloo .*scripts/launch.sh"),
        ("--debug tpu_metrics_debug", "--debug tpu_metrics_debug"),
        ("--neftune_noise_alpha 5 --preserve_base 0.3", "--preserve_base .*--neftune_noise_alpha"),
        ("--load_best_model_at_end true --eval_strategy epoch --save_strategy epoch --metric_for_best_model rouge-l",
         "--metric_for_best_model rouge-l .*--predict_with_generate"),
    ],
)  # fmt: skip
def test_a_value_that_cannot_work_is_refused_before_data_are_read(base, tmp_path, capsys, given, message):
    argv = flags(base, tmp_path / "none.json", tmp_path / "run", "--validation_file", tmp_path / "none.json")
    found = refusal([*argv, *given.split()], capsys)
    assert re.search(message, found) and "none.json" not in found


@pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without a GPU")
def test_fp16_needs_a_gpu(base, train_file, tmp_path, capsys):
    assert "--fp16 needs a GPU" in refusal(flags(base, train_file, tmp_path, "--fp16", "true"), capsys)


def test_the_cpu_of_a_machine_with_a_gpu_is_chosen_by_the_environment(base, train_file, tmp_path, capsys, monkeypatch):
    argv = flags(base, train_file, tmp_path, "--use_cpu", "true")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert "CUDA_VISIBLE_DEVICES=" in refusal(argv, capsys)


# ---- experiment trackers ----

PACKAGES = {
    "tensorboard": "tensorboard", "wandb": "wandb", "comet_ml": "comet-ml", "mlflow": "mlflow", "swanlab": "swanlab",
    "clearml": "clearml", "azure_ml": "azureml-sdk", "trackio": "trackio", "codecarbon": "codecarbon",
}  # fmt: skip


@pytest.mark.parametrize("name", PACKAGES)
def test_the_missing_package_of_a_tracker_is_named_before_data_are_read(base, tmp_path, capsys, name):
    if importlib.util.find_spec(PACKAGES[name].replace("-", "_")) is not None:
        pytest.skip(f"{name} is installed")
    message = refusal(flags(base, tmp_path / "none.json", tmp_path / "run", "--report_to", name), capsys)
    assert f"--report_to {name} " in message and f"pip install {PACKAGES[name]}" in message
    assert "none.json" not in message


def test_an_unknown_tracker_is_refused_with_those_there_are(base, train_file, tmp_path, capsys):
    for given in (["wanbd"], ["none", "wanbd"]):
        message = refusal(flags(base, train_file, tmp_path, "--report_to", *given), capsys)
        assert "--report_to" in message and "wandb" in message and "tensorboard" in message


def test_a_tracker_that_is_installed_gets_the_losses(base, train_file, plain, tmp_path, monkeypatch):
    (tmp_path / "tensorboardX.py").write_text(
        "written = []\n"
        "class SummaryWriter:\n"
        "    def __init__(self, log_dir=None, **kwargs): pass\n"
        "    def add_scalar(self, name, value, step): written.append((name, value, step))\n"
        "    def __getattr__(self, name): return lambda *args, **kwargs: None\n",
        "utf-8",
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    main(flags(base, train_file, tmp_path / "run", "--report_to", "tensorboard"))
    written = sys.modules.pop("tensorboardX").written
    assert [value for name, value, _ in written if name == "train/loss"] == history(plain, "loss")


@pytest.mark.parametrize("given", ["all", "none"])
def test_all_trackers_are_those_that_are_installed(base, train_file, plain, tmp_path, given):
    if any(importlib.util.find_spec(name) for name in ("tensorboard", "wandb", "mlflow")):
        pytest.skip("a tracker is installed")
    main(flags(base, train_file, tmp_path, "--report_to", given))
    assert history(tmp_path, "loss") == history(plain, "loss")


# ---- flags that change nothing but speed, memory or files ----


@pytest.mark.parametrize(
    "given",
    [
        '--activation_checkpointing true --activation_checkpointing_kwargs {"use_reentrant":true}',
        "--gradient_checkpointing true --torch_empty_cache_steps 1 --debug underflow_overflow",
        "--torch_compile_backend eager",
        "--dataloader_num_workers 1 --dataloader_persistent_workers true --dataloader_prefetch_factor 2",
        "--remove_unused_columns true --eval_accumulation_steps 1 --logging_nan_inf_filter true --local_rank 0",
        "--skip_memory_metrics false --auto_find_batch_size true",
        "--optim adamw_torch --data_seed 42 --max_grad_norm 1000",
        "--log_level info --logging_first_step true --report_to none --run_name first --project mine",
    ],
)
def test_the_losses_stay_the_same(base, train_file, plain, tmp_path, given):
    main(flags(base, train_file, tmp_path, *given.split()))
    torch.testing.assert_close(
        torch.tensor(history(tmp_path, "loss")), torch.tensor(history(plain, "loss")), rtol=1e-4, atol=1e-5
    )


def test_full_determinism_uses_deterministic_algorithms(base, train_file, plain, tmp_path, monkeypatch):
    for name in ("CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG", "ASCEND_LAUNCH_BLOCKING", "HCCL_DETERMINISTIC",
                 "FLASH_ATTENTION_DETERMINISTIC"):  # fmt: skip
        monkeypatch.setenv(name, "")  # which the flag sets for the whole process
    try:
        main(flags(base, train_file, tmp_path, "--full_determinism", "true"))
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert history(tmp_path, "loss") == history(plain, "loss")


def test_flags_of_ddp_do_not_change_the_losses(base, train_file, plain, tmp_path):
    more = "--per_device_train_batch_size 1 --ddp_backend gloo --ddp_timeout 300 --ddp_bucket_cap_mb 1"
    more += " --ddp_broadcast_buffers false --ddp_find_unused_parameters true --ddp_static_graph true"
    more += " --log_level_replica error --log_on_each_node false"
    processes.run(flags(base, train_file, tmp_path / "run", *more.split()), 2, tmp_path / "logs")
    assert history(tmp_path / "run", "loss") == pytest.approx(history(plain, "loss"), rel=1e-3)


# ---- flags that change the training ----

SMOOTHING = 0.2


def smoothed(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean cross entropy with the target 1 - s + s / classes on the label and s / classes on all others."""
    log_likelihoods = logits.float().log_softmax(-1)[labels != -100]
    classes = log_likelihoods.shape[-1]
    targets = torch.full_like(log_likelihoods, SMOOTHING / classes)
    targets += (1 - SMOOTHING) * functional.one_hot(labels[labels != -100], classes)
    return -(targets * log_likelihoods).sum(-1).mean()


def smoothing_trainer(model, tmp_path) -> PrefixTrainer:
    args = PrefixTrainingArguments(
        output_dir=str(tmp_path), label_smoothing_factor=SMOOTHING, report_to=["none"], use_cpu=True
    )
    return PrefixTrainer(model=model, args=args, data_collator=PaddingCollator(0))


def check_smoothing(model, batch, logits, labels, tmp_path) -> None:
    trainer = smoothing_trainer(model, tmp_path)
    torch.testing.assert_close(trainer.compute_loss(model.train(), dict(batch)), smoothed(logits, labels))
    plain = functional.cross_entropy(logits.float().flatten(0, -2), labels.flatten())
    torch.testing.assert_close(trainer.compute_loss(model.eval(), dict(batch)), plain)


def test_labels_of_answers_are_smoothed_at_the_next_token(base, tmp_path):
    model = load_model(str(base), pre_seq_len=4, prefix_dropout=0.0)
    ids = torch.tensor([[5, 9, 7, 8, 6], [4, 9, 3, 5, 7]])
    labels = ids.masked_fill(torch.tensor([[1, 1, 0, 0, 0], [1, 0, 0, 0, 1]]).bool(), -100)
    logits = model(ids).logits
    check_smoothing(model, {"input_ids": ids, "labels": labels}, logits[:, :-1], labels[:, 1:], tmp_path)


@pytest.mark.parametrize("kind", [ChatGLMForSequenceClassification, ChatGLMForTokenClassification])
def test_labels_of_linear_heads_are_smoothed_where_they_are(base, tmp_path, kind):
    model = load_model(str(base), model_class=kind, num_labels=3, pre_seq_len=4, prefix_dropout=0.0)
    ids = torch.tensor([[5, 9, 7], [4, 9, 3]])
    labels = torch.tensor([2, 0]) if kind is ChatGLMForSequenceClassification else torch.tensor([[2, 0, -100]] * 2)
    check_smoothing(model, {"input_ids": ids, "labels": labels}, model(ids).logits, labels, tmp_path)


@pytest.mark.parametrize(
    ("task", "head"), [("moods.yaml", "sequence_classification"), ("cmrc2018", "question_answering")]
)
def test_label_smoothing_is_refused_where_no_one_label_is_right(base, tmp_path, capsys, task, head):
    argv = task_runs.flags(base, task_runs.write_tasks(tmp_path), task, "--do_train", "--output_dir", tmp_path / "run")
    message = refusal([*argv, "--label_smoothing_factor", "0.1"], capsys)
    assert re.search(f"--label_smoothing_factor 0.1 .*{task.removesuffix('.yaml')} .*{head}, .*Leave it out", message)


def test_label_smoothing_still_learns_the_answers(base, train_file, tmp_path):
    more = ["--validation_file", train_file, "--eval_strategy", "steps", "--eval_steps", 40, "--eval_on_start", "true"]
    more += ["--label_smoothing_factor", "0.1", "--learning_rate", 0.1, "--per_device_train_batch_size", 4]
    main(flags(base, train_file, tmp_path, *more, steps=40))
    before, after = history(tmp_path, "eval_loss")
    assert after < before - 1


def test_neftune_adds_noise_in_training_alone(base, train_file, plain, tmp_path):
    more = ["--validation_file", train_file, "--eval_strategy", "steps", "--eval_steps", 3, "--eval_on_start", "true"]
    for alpha in ("5", "10"):
        main(flags(base, train_file, tmp_path / alpha, *more, "--neftune_noise_alpha", alpha))
    five, ten = (history(tmp_path / alpha, "loss")[0] for alpha in ("5", "10"))
    assert len({five, ten, history(plain, "loss")[0]}) == 3
    assert history(tmp_path / "5", "eval_loss")[0] == history(tmp_path / "10", "eval_loss")[0]


@pytest.fixture(scope="module")
def sgd_step(base, train_file, plain, tmp_path_factory):
    """Takes one step of SGD with a learning rate of 0.5 from the plain run's prefix; returns how the prefix changed."""

    def change(*more) -> torch.Tensor:
        run = tmp_path_factory.mktemp("sgd")
        own = ["--optim", "sgd", "--learning_rate", "0.5", "--lr_scheduler_type", "constant", *more]
        main(flags(base, train_file, run, "--ptuning_checkpoint", plain, *own, steps=1))
        return prefix(run) - prefix(plain)

    return change


def test_weight_decay_shrinks_the_prefix(sgd_step, plain):
    without = sgd_step("--max_grad_norm", 0)
    with_decay = sgd_step("--max_grad_norm", 0, "--weight_decay", 0.4)
    torch.testing.assert_close(with_decay - without, -0.5 * 0.4 * prefix(plain), rtol=1e-3, atol=1e-5)


def test_the_gradient_is_clipped_to_its_maximum(sgd_step):
    free, clipped = sgd_step("--max_grad_norm", 0), sgd_step("--max_grad_norm", 1e-3)
    assert free.norm() > 2 * 0.5e-3
    torch.testing.assert_close(clipped.norm(), torch.tensor(0.5e-3), rtol=1e-2, atol=0)


FAST_OPTIMIZERS = ("adafactor", "sgd", "adagrad", "rmsprop", "adamw_8bit", "ademamix", "lion_8bit", "rmsprop_bnb")


@pytest.mark.parametrize(
    "name",
    [name if name in FAST_OPTIMIZERS else pytest.param(name, marks=pytest.mark.slow) for name in get_args(Optimizer)],
)
def test_every_accepted_optimizer_trains_and_resumes(base, train_file, tmp_path, name):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    more = ["--optim", name, "--lr_scheduler_type", "constant", "--save_steps", "1", "--learning_rate", "1e-2"]
    main(flags(base, train_file, whole, *more, steps=2))
    main(flags(base, train_file, stopped, *more, steps=1))
    assert not torch.equal(prefix(stopped), prefix(whole))
    main(flags(base, train_file, stopped, *more, steps=2))
    torch.testing.assert_close(prefix(stopped), prefix(whole), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("given", "rates"),
    [
        ("--lr_scheduler_type linear", [1, 2 / 3, 1 / 3]),
        ("--lr_scheduler_type constant_with_warmup --warmup_steps 0.5", [0, 1 / 2, 1]),
        ('--lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs {"min_lr":0.04}', [1, 0.85, 0.55]),
        ('--lr_scheduler_type warmup_stable_decay --lr_scheduler_kwargs {"num_decay_steps":1}', [1, 1, 1]),
        ("--lr_scheduler_type polynomial", [1, 2 / 3, 1 / 3]),
    ],
)
def test_the_learning_rate_follows_its_schedule(base, train_file, tmp_path, given, rates):
    main(flags(base, train_file, tmp_path, "--learning_rate", 0.1, *given.split()))
    assert history(tmp_path, "learning_rate") == pytest.approx([0.1 * rate for rate in rates], abs=1e-6)


@pytest.mark.parametrize("name", ["reduce_lr_on_plateau", "greedy"])
def test_a_schedule_by_evaluations_trains(base, train_file, tmp_path, name):
    more = ["--lr_scheduler_type", name, "--eval_strategy", "steps", "--eval_steps", 1, "--validation_file", train_file]
    main(flags(base, train_file, tmp_path, *more))
    assert len(history(tmp_path, "eval_loss")) == 3


def test_tokens_are_counted_with_or_without_padding(base, train_file, tmp_path):
    seen = {}
    for given in ("all", "non_padding", "no"):
        run = tmp_path / given
        main(flags(base, train_file, run, "--include_num_input_tokens_seen", given, "--train_sampling_strategy",
                   "sequential", "--packing", "false"))  # fmt: skip
        seen[given] = json.loads((run / "trainer_state.json").read_text("utf-8"))["num_input_tokens_seen"]
    assert seen["all"] > seen["non_padding"] > seen["no"] == 0
    packed = tmp_path / "packed"
    main(flags(base, train_file, packed, "--include_num_input_tokens_seen", "--train_sampling_strategy", "sequential"))
    packed_tokens = json.loads((packed / "trainer_state.json").read_text("utf-8"))["num_input_tokens_seen"]
    assert packed_tokens == seen["non_padding"]


def test_the_data_seed_alone_orders_the_rows(base, train_file, plain, tmp_path):
    main(flags(base, train_file, tmp_path / "data", "--data_seed", 7))
    main(flags(base, train_file, tmp_path / "both", "--data_seed", 7, "--seed", 7))
    assert history(tmp_path / "data", "loss") != history(plain, "loss")
    main(flags(base, train_file, tmp_path / "seed", "--seed", 7))
    assert history(tmp_path / "both", "loss") == history(tmp_path / "seed", "loss")


# ---- evaluation and checkpoints ----


def test_an_evaluation_uses_every_row_though_training_drops_the_last(base, train_file, tmp_path):
    losses = []
    for drop in ("false", "true"):
        more = ["--do_eval", "--validation_file", train_file, "--per_device_eval_batch_size", 5]
        main(flags(base, train_file, tmp_path / drop, *more, "--dataloader_drop_last", drop))
        losses.append(json.loads((tmp_path / drop / "all_results.json").read_text("utf-8"))["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_best_metric_that_no_evaluation_has_is_named_with_those_it_has(base, train_file, tmp_path, capsys):
    more = ["--validation_file", train_file, "--eval_strategy", "steps", "--eval_steps", 1, "--save_steps", 1]
    more += ["--load_best_model_at_end", "true", "--predict_with_generate", "--metric_for_best_model", "f1"]
    message = refusal(flags(base, train_file, tmp_path, *more, "--max_eval_samples", 2), capsys)
    assert re.search("metric_for_best_model f1 .*rouge-l", message)


def test_the_best_strategy_saves_when_the_loss_falls(base, train_file, tmp_path):
    more = ["--validation_file", train_file, "--eval_strategy", "steps", "--eval_steps", 1, "--save_strategy", "best"]
    main(flags(base, train_file, tmp_path, *more, "--metric_for_best_model", "loss"))
    losses = history(tmp_path, "eval_loss")
    best = [step for step, loss in enumerate(losses, 1) if loss == min(losses[:step])]
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in best}


def test_logs_evaluations_and_checkpoints_at_the_ends_of_epochs(base, train_file, tmp_path):
    more = "--logging_strategy epoch --eval_strategy epoch --eval_delay 1 --save_strategy epoch --num_train_epochs 3 "
    more += "--save_total_limit 1 --load_best_model_at_end true --metric_for_best_model loss --greater_is_better true"
    main(flags(base, train_file, tmp_path, *more.split(), "--validation_file", train_file, steps=-1))
    losses = history(tmp_path, "eval_loss")
    assert len(history(tmp_path, "loss")) == 3 and len(losses) == 3
    (kept,) = tmp_path.glob("checkpoint-*")
    assert kept.name == f"checkpoint-{6 * (1 + losses.index(max(losses)))}"
    assert torch.equal(prefix(tmp_path), prefix(kept))


def test_predictions_search_as_many_beams_as_the_official_flag_says(base, train_file, tmp_path):
    more = ["--do_predict", "--validation_file", train_file, "--generation_num_beams", 2, "--max_predict_samples", 2]
    main(flags(base, train_file, tmp_path, *more))
    settings = json.loads((tmp_path / "predict" / "metrics.json").read_text("utf-8"))["settings"]
    assert (settings["num_beams"], settings["batch_size"]) == (2, 8)


def test_no_run_resumes_from_a_checkpoint_without_optimizer_state(base, train_file, tmp_path, capsys):
    more = ["--save_only_model", "true", "--save_steps", 2]
    main(flags(base, train_file, tmp_path, *more, steps=2))
    assert not (tmp_path / "checkpoint-2" / "optimizer.pt").exists()
    for wanted in ([], ["--resume_from_checkpoint", "true"], ["--resume_from_checkpoint", tmp_path / "checkpoint-2"]):
        message = refusal(flags(base, train_file, tmp_path, *more, *wanted, steps=4), capsys)
        assert re.search("checkpoint-2 .*save_only_model.* overwrite_output_dir .*ptuning_checkpoint", message)
    load_model(str(base)).load_prefix(tmp_path / "checkpoint-2")


# ---- runs that train nothing ----


@pytest.mark.parametrize("tuning", ["ptuning_v2", "prompt", "lora", "full"])
def test_too_few_rows_for_a_batch_train_nothing(base, train_file, tmp_path, capsys, tuning):
    more = ["--per_device_train_batch_size", 50, "--dataloader_drop_last", "true", "--tuning", tuning]
    message = refusal(flags(base, train_file, tmp_path, *more), capsys)
    assert re.search(
        "12 training rows .*batch of 50.* --dataloader_drop_last .*--per_device_train_batch_size .*12", message
    )
    assert not list(tmp_path.glob("*config.json")) and not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("given", "steps"), [("--warmup_steps 9", 1), ("--learning_rate 0", 2), ("--learning_rate 0 --tuning lora", 2)]
)
def test_steps_that_change_nothing_train_nothing(base, train_file, tmp_path, capsys, given, steps):
    argv = flags(base, train_file, tmp_path, *given.split(), "--save_steps", 1, steps=steps)
    for _ in range(2):  # the second run finds no checkpoint to resume from
        message = refusal(argv, capsys)
        assert re.search(f"none of the {steps} steps .*--learning_rate .*--warmup_steps", message)
    assert not list(tmp_path.glob("checkpoint-*")) and not list(tmp_path.glob("*.safetensors"))


def test_an_epoch_without_a_batch_trains_nothing(base, train_file, tmp_path, capsys):
    more = ["--per_device_train_batch_size", 50, "--dataloader_drop_last", "true", "--num_train_epochs", 2]
    message = refusal(flags(base, train_file, tmp_path, *more, steps=-1), capsys)
    assert re.search("12 training rows .*batch of 50.* --dataloader_drop_last", message)


def test_steps_that_are_all_skipped_train_nothing(base, train_file, tmp_path, capsys, monkeypatch):
    """As with float16 gradients that overflow in every step."""
    monkeypatch.setattr(AcceleratedOptimizer, "step_was_skipped", property(lambda self: True))
    assert "none of the 2 steps" in refusal(flags(base, train_file, tmp_path, steps=2), capsys)
    assert not (tmp_path / "prefix_config.json").exists()


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_finished_run_is_trained_though_nothing_is_left_to_do(base, train_file, tmp_path, caplog, tuning):
    argv = flags(base, train_file, tmp_path, "--tuning", tuning, "--save_steps", 2, steps=2)
    main(argv)
    main(argv)
    assert "nothing was left to train" in caplog.text and (tmp_path / "tuning.json").exists()


def test_rows_without_a_learned_answer_train_nothing(base, tmp_path, capsys):
    turns = [{"role": "user", "content": "天气"}, {"role": "assistant", "content": "很好", "loss": False}]
    rows = write_rows(tmp_path / "rows.jsonl", *[{"messages": turns}] * 4)
    refusal(flags(base, rows, tmp_path / "run"), capsys)
    assert not (tmp_path / "run" / "prefix_config.json").exists()


def test_a_checkpoint_is_written_from_the_first_step_that_learns(base, train_file, tmp_path):
    main(flags(base, train_file, tmp_path, "--warmup_steps", 2, "--save_steps", 1, "--learning_rate", 0.1))
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-3"}
