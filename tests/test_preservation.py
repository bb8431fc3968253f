"""`--preserve_base`: the divergence, what it trains, what a run reports, and the picture over its weight."""

import json
import math
import re
import shutil
from pathlib import Path

import processes
import pytest
import tiny_base
import torch
from json_lines import write_rows
from safetensors.torch import load_file
from torch.distributions import Categorical, kl_divergence

from chatglm_ptuning.cli import main as command
from chatglm_ptuning.evaluation.drift import kl_from_base, measure_drift
from chatglm_ptuning.experiments.tradeoff import read_points
from chatglm_ptuning.model.modeling_heads import ChatGLMForSequenceClassification
from chatglm_ptuning.training.preservation import Replay
from chatglm_ptuning.training.run import main

CONFIGS = Path(__file__).resolve().parents[1] / "ds_config"
TOLERANCE = {"rtol": 5e-4, "atol": 5e-5}
ROWS = [{"content": "今天天气好吗", "summary": "甲乙丙丁"}, {"content": "你是谁", "summary": "戊己"},
        {"content": "天气", "summary": "很好，我想去公园散步"}, {"content": "甲乙", "summary": "丙"}] * 2  # fmt: skip
GENERAL = [{"prompt": prompt, "response": answer} for prompt, answer in tiny_base.ANSWERS.items()]
HELD_OUT = [{"prompt": "今天有雨吗", "response": "今天有雨"}, {"text": "我想去公园散步，天气很好"},
            {"prompt": "请问你好吗", "response": "你好"}]  # fmt: skip


def batch_of(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    length = max(map(len, rows))
    return {
        "input_ids": torch.tensor([row + [0] * (length - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows]),
        "position_ids": torch.arange(length).expand(len(rows), -1),
    }


@pytest.fixture
def batch():
    return batch_of([[5, 9, 33, 8, 40, 7], [11, 4, 60]])


def rows_by_torch(model, ids: list[list[int]]) -> list[torch.Tensor]:
    """KL(base || tuned) at every position of every row, each row alone, by torch.distributions."""
    model.eval()
    selected, values = model.selected_prefix, []
    with torch.no_grad():
        for row in ids:
            tuned = Categorical(logits=model(torch.tensor([row])).logits[0])
            model.set_prefix(None)
            base = Categorical(logits=model(torch.tensor([row])).logits[0])
            model.set_prefix(selected)
            values.append(kl_divergence(base, tuned))
    return values


def test_the_divergence_is_that_of_torch_distributions(trained, batch):
    model = trained(prefix_dropout=0.5).train()
    found = kl_from_base(model, batch)
    assert model.training and model.base_model.training and model.selected_prefix == "default"
    expected = torch.cat(rows_by_torch(model, [[5, 9, 33, 8, 40, 7], [11, 4, 60]])).sum()
    assert expected > 0.1
    torch.testing.assert_close(found.detach(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_the_next_token_can_be_left_out_of_the_divergence(trained, batch, packed):
    model = trained()
    rows = [[5, 9, 33, 8, 40, 7], [11, 4, 60]]
    if packed:
        batch = {"input_ids": torch.tensor([rows[0] + rows[1]]), "sequence_lengths": [6, 3]}
    found = kl_from_base(model, batch, mask_target=True)
    expected = 0.0
    with torch.no_grad():
        for row in rows:
            ours, theirs = (model(torch.tensor([row]), prefix=model.prefix_batch(name)).logits[0].double()
                            for name in ("default", None))  # fmt: skip
            for place in range(len(row)):
                others = [index for index in range(ours.shape[1]) if index != (row[place + 1 :] or [None])[0]]
                expected += kl_divergence(
                    Categorical(logits=theirs[place, others]), Categorical(logits=ours[place, others])
                )
    torch.testing.assert_close(found.detach(), expected.float(), rtol=1e-4, atol=1e-5)
    found.backward()
    assert torch.isfinite(model.transformer.prefix_encoder.embedding.weight.grad).all()


def test_leaving_the_target_out_needs_a_divergence(capsys):
    with pytest.raises(SystemExit):
        command(["train", "--do_train", "--preserve_mask_target", "true"])
    assert re.search("--preserve_mask_target.*--preserve_base", capsys.readouterr().err)


def test_chunks_of_positions_change_nothing(trained, batch, monkeypatch):
    model = trained()
    whole = kl_from_base(model, batch)
    whole.backward()
    gradient = model.transformer.prefix_encoder.embedding.weight.grad.clone()
    model.zero_grad()
    monkeypatch.setattr("chatglm_ptuning.evaluation.drift._POSITIONS_AT_ONCE", 2)
    chunked = kl_from_base(model, batch)
    chunked.backward()
    torch.testing.assert_close(chunked, whole)
    torch.testing.assert_close(model.transformer.prefix_encoder.embedding.weight.grad, gradient)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_the_prefix_alone(trained, batch, checkpointing):
    model = trained(prefix_dropout=0.5).train()
    expected = None
    for on in {False, checkpointing}:
        if on:
            model.activation_checkpointing_enable()
        model.zero_grad()
        kl_from_base(model, batch).backward()
        reached = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
        assert set(reached) == {"transformer.prefix_encoder.embedding.weight"}
        gradient = reached.popitem()[1]
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, gradient if expected is None else expected)
        expected = gradient.clone()


def test_an_untouched_base_has_moved_nowhere(trained, batch):
    model = trained()
    model.set_prefix(None)
    assert kl_from_base(model, batch).item() == 0
    examples = [{"input_ids": [5, 9, 33], "labels": [-100, 9, 33]}]
    drift = measure_drift(model, examples, 0, 2)
    assert drift["kl"] == 0 and drift["perplexity"] == drift["perplexity_base"]


def test_a_model_with_a_head_is_measured_by_its_language_model(tiny_base, trained, batch):
    model = trained()
    head = ChatGLMForSequenceClassification.from_pretrained(tiny_base, pre_seq_len=4, num_labels=3).train()
    values = model.transformer.prefix_encoder.state_dict()
    head.transformer.prefix_encoder.load_state_dict(values)
    loss = head(**batch, labels=torch.tensor([0, 2])).loss
    divergence = kl_from_base(head, batch)
    (loss + divergence).backward()  # in one backward pass, so nothing that the first needs may have changed
    torch.testing.assert_close(divergence, kl_from_base(model, batch))
    assert head.classifier_head.weight.grad.abs().max() > 0


def test_drift_is_the_loss_and_divergence_of_the_model(trained):
    model = trained()
    ids = [[5, 9, 33, 8, 40, 7], [11, 4, 60], [8, 8, 9, 10]]
    examples = [{"input_ids": row, "labels": [-100, -100, *row[2:]]} for row in ids]
    found = measure_drift(model, examples, 0, 2)
    divergences = torch.cat(rows_by_torch(model, ids))
    assert found["kl"] == pytest.approx(divergences.mean().item(), rel=1e-4)
    assert found["tokens"] == 13
    for selected, name in (("default", "perplexity"), (None, "perplexity_base")):
        model.set_prefix(selected)
        with torch.no_grad():
            losses = [model(torch.tensor([e["input_ids"]]), labels=torch.tensor([e["labels"]])).loss for e in examples]
        mean = sum(loss * n for loss, n in zip(losses, (4, 1, 2), strict=True)) / 7
        assert found[name] == pytest.approx(math.exp(mean), rel=1e-4)


def test_steps_replay_defined_rows_however_they_are_shared(trained):
    rows = [{"input_ids": list(range(3, 5 + length))} for length in range(7)]
    replay = Replay(rows, 1.0, 0, seed=3)
    epoch = [row for step in range(7) for row in replay.rows_of_step(step, 2)]
    assert sorted(epoch[:7]) == sorted(epoch[7:]) == list(range(7)) and epoch[:7] != epoch[7:]
    assert Replay(rows, 1.0, 0, seed=4).rows_of_step(0, 7) != epoch[:7]
    # A step that the end of an epoch cuts short does not shift those that follow.
    assert replay.rows_of_step(1, 2, step_rows=4) == replay.rows_of_step(1, 4)[:2]
    model = trained()
    (whole,) = replay.divergences(model, 2, 4)
    shared = replay.divergences(model, 2, 1, own=range(4), parts=4)
    torch.testing.assert_close(sum(shared), whole)
    packed = Replay(rows, 1.0, 0, seed=3, max_tokens=9)
    for own in ((range(4),), ((0, 2), (3, 1))):
        summands = [list(packed.divergences(model, 2, 1, own=parts, parts=4)) for parts in own]
        assert len(summands[0]) > 1
        torch.testing.assert_close(sum(map(sum, summands)), whole)
    chosen = [rows[place]["input_ids"] for place in replay.rows_of_step(2, 4)]
    torch.testing.assert_close(whole.detach(), torch.cat(rows_by_torch(model, chosen)).mean(), rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, rows in (("train", ROWS), ("general", GENERAL), ("held_out", HELD_OUT)):
        write_rows(folder / f"{name}.json", *rows)
    return folder


def flags(base, files, output, weight, *more, steps=12, batch=2, accumulation=2):
    return [
        "--do_train", "--model_name_or_path", str(base), "--train_file", str(files / "train.json"),
        "--output_dir", str(output), "--max_source_length", "40", "--max_target_length", "20", "--pre_seq_len", "6",
        "--max_steps", str(steps), "--per_device_train_batch_size", str(batch), "--logging_steps", "1",
        "--gradient_accumulation_steps", str(accumulation), "--disable_tqdm", "true", "--learning_rate", "0.1",
        "--preserve_file", str(files / "general.json"), "--preserve_eval_file", str(files / "held_out.json"),
        "--preserve_base", str(weight), "--prefix_dropout", "0", "--save_steps", "6", *map(str, more),
    ]  # fmt: skip


def results(run):
    return json.loads((run / "all_results.json").read_text("utf-8"))


def history(run, key):
    entries = json.loads((run / "trainer_state.json").read_text("utf-8"))["log_history"]
    return [entry[key] for entry in entries if key in entry]


@pytest.fixture(scope="module")
def runs(base, files, tmp_path_factory):
    """The same training with and without the term, in one process."""
    folder = tmp_path_factory.mktemp("runs")
    for weight in (0, 1):
        processes.run(flags(base, files, folder / f"w{weight}", weight), 1, folder)
    return folder


def test_the_term_keeps_the_model_near_its_base(runs):
    free, held = results(runs / "w0"), results(runs / "w1")
    assert held["general_kl"] < 0.8 * free["general_kl"]
    assert held["general_perplexity_base"] == pytest.approx(free["general_perplexity_base"])
    assert (free["preserve_base"], held["preserve_base"]) == (0, 1)
    assert not history(runs / "w0", "preserve_kl")
    logged = history(runs / "w1", "preserve_kl")
    assert len(logged) == 12 and all(value > 0 for value in logged)
    # Both begin from the same prefix: the first losses differ by the term alone.
    extra = history(runs / "w1", "loss")[0] - history(runs / "w0", "loss")[0]
    assert extra == pytest.approx(logged[0], rel=1e-3)


def assert_same(run, other):
    for key in ("loss", "preserve_kl"):
        torch.testing.assert_close(torch.tensor(history(run, key)), torch.tensor(history(other, key)), **TOLERANCE)
    for name, value in load_file(other / "prefix_model.safetensors").items():
        torch.testing.assert_close(load_file(run / "prefix_model.safetensors")[name], value, **TOLERANCE)
    for name in ("general_kl", "general_perplexity", "general_perplexity_base", "general_tokens"):
        assert results(run)[name] == pytest.approx(results(other)[name], rel=1e-3)


def test_a_resumed_run_replays_the_same_rows(base, files, runs, tmp_path):
    shutil.copytree(runs / "w1", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-12")
    argv = [*flags(base, files, tmp_path / "run", 1), "--resume_from_checkpoint", "true"]
    processes.run(argv, 1, tmp_path)
    assert_same(tmp_path / "run", runs / "w1")


@pytest.mark.parametrize("stage", [None, 1, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 2))])
def test_two_processes_replay_as_one(base, files, runs, tmp_path, stage):
    more = [] if stage is None else ["--deepspeed", CONFIGS / f"zero{stage}.json"]
    processes.run(flags(base, files, tmp_path / "run", 1, *more, accumulation=1), 2, tmp_path)
    assert_same(tmp_path / "run", runs / "w1")


def test_zero3_is_refused(base, files, tmp_path):
    more = ["--deepspeed", CONFIGS / "zero3.json"]
    (ended,) = processes.start(flags(base, files, tmp_path / "run", 1, *more), 1, tmp_path).wait()
    assert ended.code == 1 and re.search("--preserve_base .*ZeRO-3", ended.output)


def test_a_run_can_do_without_the_report_and_without_columns_of_its_general_rows(base, files, tmp_path):
    noted = write_rows(tmp_path / "noted.json", {"prompt": "你好", "response": "好", "notes": "很长的注释"})
    more = ["--report_drift", "false", "--preserve_file", str(noted), "--ignored_columns", "notes"]
    main([*flags(base, files, tmp_path / "run", 0.5, steps=1), *more])
    assert not [name for name in results(tmp_path / "run") if name.startswith("general_")]


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        (["--preserve_base", "-0.5"], 2, "--preserve_base .*0 or .*positive.* -0.5"),
        (["--preserve_base", "nan"], 2, "--preserve_base .*0 or .*positive.* nan"),
        (["--preserve_batch_size", "0"], 2, "--preserve_batch_size .*at least 1.* 0"),
        (["--preserve_max_length", "8"], 2, "--preserve_max_length .*at least 64.* 8"),
        (["--preserve_file", "missing.json"], 1, "missing.json does not exist"),
        (["--preserve_eval_file", "GENERAL"], 1, "6 rows .*preserve_eval_file .*preserve_file"),
        (["--preserve_file", "BROKEN"], 1, "broken.json:2"),
        (["--preserve_file", "BROKEN", "--skip_bad_rows", "1"], 1, "broken.json:2"),
        (["--preserve_file", "NOTED"], 1, "noted.json:1: .*'notes'.*ignored_columns"),
    ],
)
def test_what_is_wrong_is_named(base, files, tmp_path, capsys, change, code, said):
    broken = tmp_path / "broken.json"
    broken.write_text('{"text": "一"}\n{"text": \n', "utf-8")
    noted = write_rows(tmp_path / "noted.json", {"prompt": "你好", "response": "好", "notes": "很长的注释"})
    names = {"GENERAL": str(files / "general.json"), "BROKEN": str(broken), "NOTED": str(noted)}
    with pytest.raises(SystemExit) as stopped:
        main([*flags(base, files, tmp_path / "run", 1), *(names.get(word, word) for word in change)])
    assert stopped.value.code == code
    assert re.search(said, capsys.readouterr().err)


FINGERPRINT = {"shape": {"num_layers": 2}, "sample": {"w": [1.0, -2.0]}, "sample_sha256": "a", "quantized": []}


def make_run(folder, name, told=None, **numbers):
    (folder / name).mkdir()
    (folder / name / "all_results.json").write_text(json.dumps(numbers), "utf-8")
    of_rows = {"task": "train", "head": None, "base_fingerprint": FINGERPRINT}
    (folder / name / "prefix_config.json").write_text(json.dumps(of_rows | (told or {})), "utf-8")
    return str(folder / name)


def numbers(weight, score):
    return {"preserve_base": weight, "general_kl": 1 / (1 + weight), "general_perplexity": 5.0,
            "general_perplexity_base": 4.0, "predict_rouge-l": score, "eval_loss": 2.0}  # fmt: skip


def test_the_tradeoff_is_drawn_by_weight(tmp_path, capsys):
    names = [make_run(tmp_path, f"w{weight}", **numbers(weight, 50 - weight)) for weight in (3, 0, 0.5)]
    command(["tradeoff", *names, "--output", str(tmp_path / "out" / "t.png")])
    assert (tmp_path / "out" / "t.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((tmp_path / "out" / "t.json").read_text("utf-8"))
    assert written["score"] == "predict_rouge-l"
    assert [(p["preserve_base"], p["score"], p["general_kl"]) for p in written["points"]] == [
        (0, 50, 1.0), (0.5, 49.5, 1 / 1.5), (3, 47, 0.25),
    ]  # fmt: skip
    assert "W" in capsys.readouterr().out
    assert read_points(names, "eval_loss")[0] == "eval_loss"


def test_runs_of_one_weight_are_drawn_as_their_mean_with_its_deviation(tmp_path, capsys):
    names = [make_run(tmp_path, f"w{w}-{s}", **numbers(w, 50 - w + s)) for w in (1, 0) for s in (0, 3, 6)]
    command(["tradeoff", *names, make_run(tmp_path, "w2", **numbers(2, 40)), "--output", str(tmp_path / "t.png")])
    means = json.loads((tmp_path / "t.json").read_text("utf-8"))["means"]
    assert [(mean["preserve_base"], mean["runs"], mean["score"], mean["score_deviation"]) for mean in means] == [
        (0, 3, 53, 3), (1, 3, 52, 3), (2, 1, 40, 0),
    ]  # fmt: skip
    assert [(mean["general_kl"], mean["general_kl_deviation"]) for mean in means[:2]] == [(1.0, 0), (0.5, 0)]
    said = capsys.readouterr().out
    assert "W 1, 3 runs: predict_rouge-l 52 ± 3" in said and "W 2" not in said


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"task": "tnews"}, "/a and .*/b .*task mood and tnews"),
        ({"head": "generation"}, "head sequence_classification and generation"),
        ({"base_fingerprint": FINGERPRINT | {"shape": {"num_layers": 3}}}, r"base \(num_layers .*3, not 2\)"),
    ],
)
def test_runs_of_different_trainings_are_not_drawn_together(tmp_path, other, message):
    told = {"task": "mood", "head": "sequence_classification"}
    names = [make_run(tmp_path, "a", told, **numbers(1, 40)), make_run(tmp_path, "b", told | other, **numbers(1, 60))]
    with pytest.raises(ValueError, match=message):
        read_points(names)


def test_runs_on_files_and_on_a_quantised_form_of_the_base_are_drawn_together(tmp_path):
    quantised = {"base_fingerprint": FINGERPRINT | {"sample_sha256": "b", "quantized": ["w"]}, "task": "train_1"}
    names = [make_run(tmp_path, "a", **numbers(1, 40)), make_run(tmp_path, "b", quantised, **numbers(1, 60)),
             make_run(tmp_path, "c", {"base_fingerprint": None}, **numbers(2, 60))]  # fmt: skip
    assert len(read_points(names)[1]) == 3


@pytest.mark.parametrize(
    ("task", "more", "score"),
    [
        ("adgen", {"predict_rouge-l": 50.0, "predict_bleu-4": 60.0}, "predict_bleu-4"),
        ("tnews", {"eval_accuracy": 50.0}, "eval_accuracy"),
        ("my_moods", {"predict_micro_f1": 50.0, "eval_micro_f1": 40.0}, "predict_micro_f1"),
        ("my_moods", {}, "eval_loss"),
    ],
)
def test_the_tradeoff_goes_by_the_task_s_own_metric(tmp_path, task, more, score):
    kept = {name: value for name, value in numbers(1, 40).items() if name != "predict_rouge-l"}
    assert read_points([make_run(tmp_path, "run", {"task": task}, **kept, **more)])[0] == score


def test_runs_without_the_numbers_are_named(tmp_path, capsys):
    whole = make_run(tmp_path, "whole", **numbers(1, 40))
    old = make_run(tmp_path, "old", **{"predict_rouge-l": 30.0, "general_kl": float("nan")})
    with pytest.raises(SystemExit) as stopped:
        command(["tradeoff", whole, old, "--output", str(tmp_path / "t.png")])
    assert stopped.value.code == 1
    said = capsys.readouterr().err
    assert f"{old} has no preserve_base, general_kl" in said and whole not in said
    assert not (tmp_path / "t.png").exists()
    with pytest.raises(ValueError, match=r"whole .*no predict_f1 .*eval_loss"):
        read_points([whole], "predict_f1")
    with pytest.raises(ValueError, match="is no finished run"):
        read_points([str(tmp_path)])
