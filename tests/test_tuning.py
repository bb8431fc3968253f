"""Every tuning method by the command: what it trains and leaves frozen, resuming, and evaluation."""

import json
import re
import shutil

import processes
import pytest
import tiny_base
import torch
from json_lines import write_rows
from peft import PeftModel
from safetensors.torch import load_file
from test_train_command import digest, flags, losses

from chatglm_ptuning.evaluation.run import main as evaluate
from chatglm_ptuning.model.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm_ptuning.training.checkpoints import last_checkpoint
from chatglm_ptuning.training.run import main
from chatglm_ptuning.tuning.load import load_tuned
from chatglm_ptuning.tuning.methods import LEARNING_RATES

ROWS = [
    {"content": "今天天气好吗", "summary": "今天有雨"},
    {"content": "你是谁", "summary": "甲乙丙丁"},
    {"content": "请问去公园吗", "summary": "我想散步"},
    {"content": "天气", "summary": "很好"},
]
RATES = {"ptuning_v2": 1e-1, "prompt": 3e-1, "p_tuning": 1e-2, "lora": 1e-2, "full": 5e-3}
SAVED = {
    "ptuning_v2": {"prefix_config.json", "prefix_model.safetensors"},
    "prompt": {"prefix_config.json", "prefix_model.safetensors", "adapter_config.json", "adapter_model.safetensors",
               "prompt_encoder.safetensors", "tuning.json"},
    "lora": {"adapter_config.json", "adapter_model.safetensors", "tuning.json"},
    "full": {"config.json", "generation_config.json", "model.safetensors", "tokenizer.model", "tokenizer_config.json",
             "chat_template.jinja", "tuning.json"},
}  # fmt: skip
SAVED["p_tuning"] = SAVED["prompt"]
OF_A_RUN = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_arguments.json"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_base.make_base(tmp_path_factory.mktemp("base"), steps=60)


@pytest.fixture(scope="module")
def train_file(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "train.json", *ROWS * 2)


def answers(base, checkpoint, train_file, folder, *more):
    evaluate(
        ["--model_name_or_path", str(base), "--ptuning_checkpoint", str(checkpoint), "--test_file", str(train_file),
         "--prompt_column", "content", "--response_column", "summary", "--max_target_length", "20",
         "--max_predict_samples", "4", "--output_dir", str(folder), *more]
    )  # fmt: skip
    lines = (folder / "predictions.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def tensors(folder):
    return {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}


@pytest.mark.parametrize("method", list(RATES))
def test_a_run_is_saved_resumed_exactly_and_evaluated(base, train_file, tmp_path, method):
    before, run, again = digest(base), tmp_path / "run", tmp_path / "again"
    more = ["--tuning", method, "--learning_rate", RATES[method], "--save_steps", "10", "--num_train_epochs", "99"]
    compare = [] if method == "full" else ["--compare_base"]
    predict = ["--do_predict", "--test_file", train_file, "--max_predict_samples", "4", *compare]
    main(flags(base, train_file, run, *more, *predict, steps=20))
    assert digest(base) == before
    assert {path.name for path in (run / "checkpoint-20").iterdir()} == SAVED[method] | OF_A_RUN
    assert {path.name for path in run.iterdir() if path.is_file()} >= SAVED[method]
    assert losses(run)[-1] < 0.8 * losses(run)[0]
    results = json.loads((run / "all_results.json").read_text("utf-8"))
    model = ChatGLMForConditionalGeneration.from_pretrained(base)
    size = model.num_parameters()
    trained = {
        "ptuning_v2": 6 * 2 * 2 * 2 * 16,
        "prompt": 6 * 64,
        "p_tuning": 6 * 64 + 3 * (64 * 64 + 64),
        "lora": 2 * 8 * (64 + (4 + 2 * 2) * 16),
        "full": size,
    }[method]
    assert results["train_trainable_parameters"] == trained
    assert results["train_trainable_share"] == pytest.approx(
        trained / (size + (trained if method != "full" else 0)), rel=1e-6
    )
    assert results["train_peak_memory_bytes"] > 5e7
    assert results["train_peak_memory_of"] == "resident set of the process"
    shutil.copytree(run / "checkpoint-10", again / "checkpoint-10")
    main(flags(base, train_file, again, *more, steps=20))
    assert losses(again) == losses(run)
    torch.testing.assert_close(tensors(again), tensors(run), rtol=0, atol=0)
    rows = answers(base, run, train_file, tmp_path / "scores", *compare)
    predicted = [json.loads(line) for line in (run / "generated_predictions.txt").read_text("utf-8").splitlines()]
    assert [row["prediction"] for row in rows] == [line["predict"] for line in predicted]
    if compare:
        plain = answers(base, "none", train_file, tmp_path / "plain")
        assert [row["base_prediction"] for row in rows] == [row["prediction"] for row in plain]
        assert [row["prediction"] for row in rows] != [row["prediction"] for row in plain]
    else:  # the checkpoint is a base, too
        as_base = answers(run / "checkpoint-20", "none", train_file, tmp_path / "plain")
        assert [row["prediction"] for row in as_base] == [row["prediction"] for row in rows]


def test_an_adapter_is_one_of_peft_with_or_without_the_record(base, train_file, tmp_path, capsys):
    run = tmp_path / "run"
    targets = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
    more = ["--tuning", "lora", "--lora_rank", "2", "--lora_alpha", "4", "--lora_target", *targets]
    main(flags(base, train_file, run, *more, "--learning_rate", "1e-2", steps=4))
    ids = torch.arange(3, 12)[None]
    plain = ChatGLMForConditionalGeneration.from_pretrained(base)
    expected = PeftModel.from_pretrained(ChatGLMForConditionalGeneration.from_pretrained(base), run)(ids).logits
    assert not torch.allclose(expected, plain(ids).logits, atol=1e-3)
    torch.testing.assert_close(load_tuned(base, run).model(ids).logits, expected)
    record = json.loads((run / "tuning.json").read_text("utf-8"))
    assert record["settings"] == {"rank": 2, "alpha": 4.0, "dropout": 0.1, "targets": sorted(targets)}
    assert record["details"]["chat_format"] == "chatglm3"
    (run / "tuning.json").unlink()
    torch.testing.assert_close(load_tuned(base, run).model(ids).logits, expected)
    hidden = load_tuned(base, run)
    with hidden.plain_base():
        torch.testing.assert_close(hidden.model.transformer(ids)[0], plain.transformer(ids)[0])


def test_another_base_and_another_method_are_refused(base, train_file, tmp_path, capsys):
    torch.manual_seed(5)
    other = tmp_path / "other"
    shutil.copytree(base, other)
    model = ChatGLMForConditionalGeneration.from_pretrained(base)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(other)
    for method in ("lora", "prompt", "full"):
        main(flags(base, train_file, tmp_path / method, "--tuning", method, steps=1))
        with pytest.raises(ValueError, match=r"another base: on .*base, .*other"):
            load_tuned(other, tmp_path / method)
        with pytest.raises(SystemExit):
            main(
                flags(base, train_file, tmp_path / "new", "--tuning", "p_tuning", "--ptuning_checkpoint",
                      tmp_path / method, steps=1)
            )  # fmt: skip
        assert re.search(f"trained by .*{method}, not p_tuning", capsys.readouterr().err)
    (tmp_path / "lora" / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"incomplete: adapter_model.safetensors is missing"):
        load_tuned(base, tmp_path / "lora")
    (tmp_path / "lora" / "tuning.json").write_text('{"tuning": "lora"}', "utf-8")
    with pytest.raises(ValueError, match=r"tuning.json is damaged"):
        load_tuned(base, tmp_path / "lora")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tuning", "none"], "--tuning none trains nothing"),
        (["--tuning", "lara"], "--tuning .*ptuning_v2.*'lara'"),
        (["--tuning", "head_only"], "generation has none"),
        (["--tuning", "lora", "--lora_target", "q_proj"], "--lora_target .*query_key_value.*q_proj"),
        (["--tuning", "lora", "--deepspeed", "ds_config/zero1.json"], "--deepspeed .*--tuning ptuning_v2"),
        (["--tuning", "p_tuning", "--prompt_encoder", "gru"], "--prompt_encoder .*mlp, lstm.*'gru'"),
        (["--tuning", "full", "--compare_base"], "--compare_base .*plain base"),
    ],
)
def test_what_cannot_be_trained_is_refused(base, train_file, tmp_path, capsys, more, message):
    with pytest.raises(SystemExit):
        main(flags(base, train_file, tmp_path / "run", *more))
    assert re.search(message, capsys.readouterr().err)
    assert last_checkpoint(tmp_path / "run") is None


def test_a_run_replaces_the_files_of_another_method(base, train_file, tmp_path):
    run = tmp_path / "run"
    for method in ("prompt", "lora", "ptuning_v2", "full"):
        main(flags(base, train_file, run, "--tuning", method, "--overwrite_output_dir", steps=1))
        others = set().union(*SAVED.values()) - SAVED[method]
        assert not others & {path.name for path in run.iterdir()}
        assert load_tuned(base, run).method == {"prompt": "ptuning_v2"}.get(method, method)


def test_the_base_itself_is_not_overwritten(base, train_file, tmp_path, capsys):
    own = tmp_path / "own"
    shutil.copytree(base, own)
    before = digest(own)
    with pytest.raises(SystemExit):
        main(flags(own, train_file, own, "--tuning", "full", steps=1))
    assert "holds the base" in capsys.readouterr().err
    assert digest(own) == before


def test_learning_rates_are_those_of_the_method_unless_given(base, train_file, tmp_path):
    for method in ("ptuning_v2", "prompt", "lora", "full"):
        main(flags(base, train_file, tmp_path / method, "--tuning", method, steps=1))
        saved = json.loads((tmp_path / method / "training_arguments.json").read_text("utf-8"))
        assert saved["learning_rate"] == LEARNING_RATES[method] and saved["tuning"] == method


@pytest.mark.parametrize("method", [pytest.param("lora", marks=pytest.mark.slow), "full"])
def test_two_processes_train_as_one(base, train_file, tmp_path, method):
    more = ["--tuning", method, "--lora_dropout", "0", "--learning_rate", "5e-3", "--save_steps", "2"]
    processes.run(flags(base, train_file, tmp_path / "two", *more, steps=4), 2, tmp_path / "logs")
    alone = [*more, "--gradient_accumulation_steps", "4"]
    processes.run(flags(base, train_file, tmp_path / "one", *alone, steps=4), 1, tmp_path / "logs")
    torch.testing.assert_close(
        torch.tensor(losses(tmp_path / "two")), torch.tensor(losses(tmp_path / "one")), rtol=1e-3, atol=1e-4
    )
    assert (tmp_path / "two" / "checkpoint-4" / "rng_state_1.pth").exists()
    torch.testing.assert_close(tensors(tmp_path / "two"), tensors(tmp_path / "one"), rtol=2e-2, atol=2e-3)
