"""One prefix for several tasks: the mixture file, the order of rows, the model, a run and what starts from it."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import instruction_rows
import processes
import pytest
import tiny_chat_base
import torch
from accelerate.data_loader import BatchSamplerShard
from safetensors.torch import load_file, save_file
from torch.utils.data import BatchSampler

from chatglm_ptuning.command_line import parse_arguments
from chatglm_ptuning.data.collate import PaddingCollator
from chatglm_ptuning.data.tasks.heads import head_of
from chatglm_ptuning.data.tasks.mixture import read_mixture
from chatglm_ptuning.data.tasks.read import read_examples
from chatglm_ptuning.data.tasks.registry import load_task
from chatglm_ptuning.evaluation.run import main as evaluate
from chatglm_ptuning.model.loading import load_model
from chatglm_ptuning.model.modeling_heads import ChatGLMForQuestionAnswering, ChatGLMForSequenceClassification
from chatglm_ptuning.model.modeling_tasks import ChatGLMForMultipleTasks
from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer
from chatglm_ptuning.prefix.formats.kit import METADATA_FILE, WEIGHTS_FILE
from chatglm_ptuning.training.config import resolve
from chatglm_ptuning.training.run import TRAIN_FLAGS
from chatglm_ptuning.training.run import main as train
from chatglm_ptuning.training.sampler import MixtureSampler

CONFIGS = Path(__file__).resolve().parents[1] / "ds_config"

PREFIX = "transformer.prefix_encoder.embedding.weight"
COMMON = "pre_seq_len: 3\nlearning_rate: 1.0e-2\nfiles: {train: train.json, dev: dev.json}\n"
TASKS = {
    "mood": "title: moods\nreader: rows\nfields: {text: text, label: label}\nlabels: {good: 好, bad: 不}\n"
    "prompt: '{text}（{labels}）'\nmetric: accuracy\n",
    "names": "title: names\nreader: bio\nlabels: {PER: 人名}\nprompt: '{labels}：{text}'\nmetric: entity_f1\n",
    "spans": "title: answers\nreader: squad\nprompt: '问：{question}{context}'\nmetric: cmrc_f1\n",
    "reply": "title: replies\nreader: pairs\nfields: {text: text, target: reply}\nprompt: '{text}'\nmetric: rouge-l\n",
}
METRICS = {"mood": "accuracy", "names": "entity_f1", "spans": "cmrc_f1"}
HEADS = {
    "mood": "sequence_classification",
    "names": "token_classification",
    "spans": "question_answering",
    "reply": "generation",
}
MIXTURE = """
temperature: 2
tasks:
  mood: {task: mood.yaml, task_data: mood}
  names: {task: names.yaml, task_data: names, max_train_samples: 8}
  spans: {task: spans.yaml, task_data: spans}
"""


def rows_of(name: str) -> object:
    if name == "mood":
        return [{"text": "今天天气" * (i % 3 + 1), "label": ("good", "bad")[i % 2]} for i in range(6)]
    if name == "names":
        tags = ["O", "B-PER", "I-PER", "O"]
        return [{"tokens": list("你甲乙好") * (i % 2 + 1), "ner_tags": tags * (i % 2 + 1)} for i in range(12)]
    if name == "reply":
        return [{"text": "你好", "reply": "我想去"}, {"text": "今天天气很好", "reply": "你好吗"}]
    questions = [
        {"id": f"q{i}", "question": "你是谁", "answers": [{"text": "甲乙", "answer_start": 2}]} for i in range(4)
    ]
    return {"data": [{"paragraphs": [{"id": "p", "context": "我是甲乙丙丁", "qas": questions}]}]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a base, four task files with their data, and a mixture of three of them."""
    root = tmp_path_factory.mktemp("mixture")
    tiny_chat_base.write_base(root / "base")
    for name, content in TASKS.items():
        (root / f"{name}.yaml").write_text(f"name: {name}\n{content}{COMMON}", encoding="utf-8")
        (root / name).mkdir()
        content = rows_of(name)
        text = json.dumps(content) if isinstance(content, dict) else "\n".join(json.dumps(row) for row in content)
        for split in ("train", "dev"):
            (root / name / f"{split}.json").write_text(text, encoding="utf-8")
    (root / "mix.yaml").write_text(MIXTURE, encoding="utf-8")
    return root


def flags(folder: Path, output: Path, *more: str) -> list[str]:
    words = "--do_train --max_steps 6 --save_steps 3 --logging_steps 3 --learning_rate 0.05 --disable_tqdm true"
    words += " --per_device_train_batch_size 2 --per_device_eval_batch_size 3 --overwrite_output_dir --seed 5"
    return ["--model_name_or_path", str(folder / "base"), "--output_dir", str(output), *words.split(), *more]


@pytest.fixture(scope="module")
def run(folder) -> Path:
    """A run on the mixture."""
    more = "--do_eval --eval_strategy steps --eval_steps 3 --metric_for_best_model mean --pre_seq_len 3"
    train(flags(folder, folder / "run", "--task_mixture", str(folder / "mix.yaml"), *more.split()))
    return folder / "run"


def task_at(folder: Path, name: str, *more: str) -> list[str]:
    return ["--task", str(folder / f"{name}.yaml"), "--task_data", str(folder / name), *more]


# The file


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tasks: {mood: {task_data: mood}}", "no task 'mood'"),
        ("tasks: {eprstm: {task_data: x}}", "did you mean eprstmt"),
        ("tasks: {eprstmt: {}}", "no key 'task_data' .*tasks.eprstmt"),
        ("tasks: {}", "names no task"),
        ("temprature: 2\ntasks: {eprstmt: {task_data: x}}", r"'temprature' .did you mean 'temperature'"),
        ("temperature: 0\ntasks: {eprstmt: {task_data: x}}", "yaml:1: 'temperature' .*greater.* 0.* 0"),
        ("tasks: {eprstmt: {task_data: x, heads: generation}}", "'heads' .*tasks.eprstmt .did you mean 'head'"),
        (
            "tasks: {eprstmt: {task_data: x, head: token_classification}}",
            "'tasks.eprstmt.head' .*'token_",
        ),
        ("tasks: {eprstmt: {task_data: x, train_split: train_few}}", "did you mean 'train_few_all'"),
        (
            "tasks: {eprstmt: {task_data: x, max_train_samples: all}}",
            "max_train_samples' .*integer.*'all'",
        ),
        ("tasks: {eprstmt: {task_data: x, weight: 1}, bustm: {task_data: x}}", "fewclue_bustm has none"),
        ("temperature: 2\ntasks: {eprstmt: {task_data: x, weight: 1}}", "'temperature' .*'weight'"),
        ("tasks: {eprstmt: {task_data: x}, fewclue_eprstmt: {task_data: x}}", "duplicate task fewclue_eprstmt"),
        ("tasks: {eprstmt: {task_data: x}, eprstmt: {task_data: x}}", "duplicate key"),
        ("- eprstmt", "must be a mapping"),
        ("tasks: [eprstmt]", "'tasks' .*dictionary.*'eprstmt'"),
        (
            "temperature: 1\ntasks:\n  eprstmt: {task_data: x}\n  bustm: {task_data: 3}",
            "yaml:4: 'tasks.bustm.task_data'",
        ),
    ],
)
def test_wrong_files_are_refused_by_name(tmp_path, text, message):
    path = tmp_path / "wrong.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        read_mixture(path)
    assert str(path) in str(error.value)


def test_folders_are_relative_to_the_file_and_probabilities_follow_temperature_or_weights(folder, tmp_path):
    mixture = read_mixture(folder / "mix.yaml")
    assert [entry.task_data for entry in mixture.tasks] == [str(folder / name) for name in METRICS]
    assert mixture.probabilities([1, 4, 25]) == pytest.approx([1 / 8, 2 / 8, 5 / 8])
    weighted = tmp_path / "weighted.yaml"
    weighted.write_text("tasks: {eprstmt: {task_data: modelscope, weight: 1}, tnews: {task_data: /x, weight: 3}}")
    mixture = read_mixture(weighted)
    assert mixture.probabilities([7, 1000]) == [0.25, 0.75]
    assert [entry.task_data for entry in mixture.tasks] == ["modelscope", "/x"]


# The order of rows

SIZES = (10, 160)


def steps(process_count: int, accumulation: int, epoch: int = 0) -> list[list[int]]:
    """Rows of every step, as accelerate shares them among the processes."""
    lengths = [[(3 * row) % 17 + 1 for row in range(size)] for size in SIZES]
    per_device = 8 // process_count // accumulation
    sampler = MixtureSampler(lengths, [0.2, 0.8], 8, seed=3)
    sampler.set_epoch(epoch)
    batches = BatchSampler(sampler, per_device, drop_last=False)
    shares = [list(BatchSamplerShard(batches, process_count, rank)) for rank in range(process_count)]
    return [
        sorted(index for share in shares for batch in share[start : start + accumulation] for index in batch)
        for start in range(0, len(shares[0]), accumulation)
    ]


def test_every_step_is_of_one_task_and_the_same_on_any_number_of_processes():
    alone = steps(1, 1)
    assert len(alone) == 22  # 170 rows in steps of 8
    assert all(len({index < SIZES[0] for index in step}) == 1 and len(step) == 8 for step in alone)
    assert all(steps(*layout) == alone for layout in ((2, 1), (1, 4), (2, 2), (4, 2)))
    assert steps(1, 1, epoch=1) != alone


def test_tasks_are_drawn_by_their_probabilities_and_all_their_rows_come_before_any_again():
    sampler = MixtureSampler([[5] * size for size in SIZES], [0.2, 0.8], 8, seed=3)
    drawn: Counter[int] = Counter()
    for epoch in range(100):
        sampler.set_epoch(epoch)
        drawn.update(sampler.tasks_of_steps())
    assert drawn[0] / drawn.total() == pytest.approx(0.2, abs=0.03)
    small = [index for index in sampler if index < SIZES[0]]
    assert len(small) >= 16 and Counter(small[:10]) == Counter(range(10))


def test_flags_hold_for_every_task(folder, tmp_path):
    mixture = read_mixture(folder / "mix.yaml")
    asked = ["--do_train", "--task_mixture", str(folder / "mix.yaml"), "--model_name_or_path", str(folder / "base"),
             "--candidate_scores", "mean", "--max_answer_length", "7", "--output_dir", str(tmp_path)]  # fmt: skip
    config = resolve(*parse_arguments("chatglm-ptuning train", "", TRAIN_FLAGS, asked))
    for entry, task in zip(mixture.tasks, config.tasks, strict=True):
        assert (task.task.name, task.setup.head.name) == (entry.task.name, entry.head)
        assert (task.train.places, task.train.limit) == ([entry.task_data], entry.max_train_samples)
        assert task.dev is None and task.test is None
        found = task.setup.settings
        assert (found["candidate_scores"], found["max_answer_length"]) == ("mean", 7)
    assert config.base.pre_seq_len == max(entry.task.pre_seq_len for entry in mixture.tasks)


# The model


@pytest.fixture(scope="module")
def shared(folder, tmp_path_factory) -> tuple[ChatGLMForMultipleTasks, Path]:
    """A model of all four tasks whose prefix and heads have values, and its prefix checkpoint."""
    torch.manual_seed(1)
    model = ChatGLMForMultipleTasks(load_model(str(folder / "base"), pre_seq_len=3), _heads_of(folder))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape))
    model.transformer.prefix_encoder.set_key_values(model.transformer.prefix_encoder.key_values())
    path = tmp_path_factory.mktemp("shared")
    tasks = {name: load_task(folder / f"{name}.yaml") for name in TASKS}
    recorded = {name: {"head": HEADS[name], "labels": head_of(task, HEADS[name]).outputs(task)}
                for name, task in tasks.items()}  # fmt: skip
    model.save_prefix(path, tasks=recorded)
    return model, path


def batch_of(folder: Path, name: str) -> dict[str, torch.Tensor]:
    tokenizer = ChatGLMTokenizer.from_pretrained(folder / "base")
    task = load_task(folder / f"{name}.yaml")
    rows = instruction_rows.rows_of(
        head_of(task, HEADS[name])(task, tokenizer), read_examples(task, str(folder / name), "train")
    )
    return PaddingCollator(tokenizer.pad_token_id)(rows)


@pytest.mark.parametrize("name", TASKS)
def test_losses_and_gradients_are_those_of_the_class_for_one_task(folder, shared, name):
    model, path = shared
    task = load_task(folder / f"{name}.yaml")
    settings = head_of(task, HEADS[name]).model_settings(task)
    alone = load_model(str(folder / "base"), pre_seq_len=3, **settings)
    alone.load_prefix(path, task=name)
    batch = batch_of(folder, name)
    model.train()
    model.transformer.config.prefix_dropout = alone.transformer.config.prefix_dropout = 0.0
    alone.train()
    model.zero_grad()
    ours, theirs = model(task=name, **batch), alone(**batch)
    assert ours.loss.item() == pytest.approx(theirs.loss.item(), rel=1e-6) and ours.loss.item() > 0
    ours.loss.backward()
    theirs.loss.backward()
    embedding, other = (part.transformer.prefix_encoder.embedding.weight.grad for part in (model, alone))
    torch.testing.assert_close(embedding, other)
    for of_task, head in model.heads.items():
        assert bool(head.weight.grad.any()) == (of_task == name)  # there for every process, and 0 for the others
    model.eval()


def test_a_checkpoint_holds_every_head_and_says_whose(folder, shared):
    model, path = shared
    assert set(load_file(path / WEIGHTS_FILE)) == {
        PREFIX, *(f"heads.{name}.{part}" for name in METRICS for part in ("weight", "bias"))
    }  # fmt: skip
    again = ChatGLMForMultipleTasks(load_model(str(folder / "base"), pre_seq_len=3), _heads_of(folder))
    again.load_prefix(path)
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    with pytest.raises(KeyError, match="mood, names, spans, reply"):
        again.for_task("moods")
    inference = ChatGLMForMultipleTasks(load_model(str(folder / "base")), _heads_of(folder)).eval()
    inference.load_prefix(path, "shared")
    for name in TASKS:
        rows = {key: value for key, value in batch_of(folder, name).items() if key in ("input_ids", "attention_mask")}
        with torch.no_grad():
            wanted, found = model.for_task(name)(**rows), inference.for_task(name)(**rows)
            passed = inference.for_task(name)(**rows, prefix=inference.prefix_batch("shared"))
        for key in ("logits", "start_logits", "end_logits"):
            if key in wanted:
                torch.testing.assert_close(found[key], wanted[key])
                assert torch.equal(passed[key], found[key])
        inference.for_task(name).check_prefix_is_trained()
    single = load_model(str(folder / "base"), model_class=ChatGLMForSequenceClassification)
    with pytest.raises(ValueError, match=r"mood, names, spans, reply\..*task="):
        single.load_prefix(path)
    with pytest.raises(ValueError, match=r"mood, names, spans, reply, not by moods\."):
        single.load_prefix(path, task="moods")
    with pytest.raises(ValueError, match=r"head token_classification .*names"):
        single.load_prefix(path, task="names")
    with pytest.raises(ValueError, match="name 'keys'"):
        heads = {"keys": {"model_class": ChatGLMForQuestionAnswering}}
        ChatGLMForMultipleTasks(load_model(str(folder / "base")), heads)


def test_heads_leave_the_devices_of_the_base_as_they_are(folder):
    base = load_model(str(folder / "base"))
    base.transformer.encoder.layers[1].to("meta")  # simulates another device, from which nothing may be moved
    head = {"model_class": ChatGLMForSequenceClassification, "id2label": {0: "good", 1: "bad"}}
    model = ChatGLMForMultipleTasks(base, {"mood": head})
    assert {parameter.device.type for parameter in model.transformer.encoder.layers[1].parameters()} == {"meta"}
    assert model.heads["mood"].weight.device == base.device


def _heads_of(folder: Path) -> dict[str, dict]:
    tasks = {name: load_task(folder / f"{name}.yaml") for name in TASKS}
    return {name: head_of(task, HEADS[name]).model_settings(task) for name, task in tasks.items()}


# A run


def test_a_run_reports_every_task_and_the_best_by_their_mean(run):
    results = json.loads((run / "all_results.json").read_text())
    own = [results[f"eval_{name}_{metric}"] for name, metric in METRICS.items()]
    assert results["eval_mean"] == pytest.approx(sum(own) / 3)
    losses = [results[f"eval_{name}_loss"] for name in METRICS]
    assert results["eval_loss"] == pytest.approx(sum(losses) / 3)
    state = json.loads((run / "checkpoint-6" / "trainer_state.json").read_text())
    means = {entry["step"]: entry["eval_mean"] for entry in state["log_history"] if "eval_mean" in entry}
    assert means.keys() == {3, 6} and state["best_metric"] == max(means.values())
    logged = [entry for entry in state["log_history"] if "loss" in entry]
    assert any(f"loss_{name}" in entry for entry in logged for name in METRICS)


def test_every_task_has_its_own_loss_where_the_loaders_of_evaluations_are_kept(folder, run, tmp_path):
    more = f"--task_mixture {folder / 'mix.yaml'} --ptuning_checkpoint {run} --do_train false --do_eval"
    workers = "--dataloader_num_workers 1 --dataloader_persistent_workers true"
    train(flags(folder, tmp_path, *more.split(), *workers.split()))
    ours, theirs = (json.loads((path / "all_results.json").read_text()) for path in (tmp_path, run))
    losses = [f"eval_{name}_loss" for name in METRICS]
    assert [ours[name] for name in losses] == pytest.approx([theirs[name] for name in losses])


def test_a_resumed_run_ends_as_an_uninterrupted_one(folder, run, tmp_path):
    shutil.copytree(run / "checkpoint-3", tmp_path / "run" / "checkpoint-3")
    argv = flags(folder, tmp_path / "run", "--task_mixture", str(folder / "mix.yaml"), "--pre_seq_len", "3")
    train([*argv, "--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-3")])
    ours, theirs = load_file(tmp_path / "run" / WEIGHTS_FILE), load_file(run / WEIGHTS_FILE)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_only_tasks_that_had_no_step_before_a_resumption_either_are_warned_of(folder, tmp_path, caplog):
    argv = flags(folder, tmp_path, "--task_mixture", str(folder / "mix.yaml"), "--pre_seq_len", "3", "--seed", "3")
    train([*argv, "--max_steps", "3"])
    assert "No step trained" not in caplog.text  # with this seed they are of all three tasks
    train([*argv, "--max_steps", "4", "--resume_from_checkpoint", "true"])
    assert "No step trained" not in caplog.text
    train([*argv, "--max_steps", "1"])
    assert "No step trained" in caplog.text


@pytest.mark.parametrize("name", METRICS)
def test_each_task_is_evaluated_with_its_own_head(folder, run, tmp_path, name):
    argv = ["--model_name_or_path", str(folder / "base"), "--ptuning_checkpoint", str(run), "--split", "dev"]
    evaluate([*argv, *task_at(folder, name), "--output_dir", str(tmp_path)])
    found = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    results = json.loads((run / "all_results.json").read_text())
    assert found["metrics"][METRICS[name]] == pytest.approx(results[f"eval_{name}_{METRICS[name]}"])


def test_the_linear_heads_start_from_regressions_on_their_tasks_states(folder, tmp_path, capsys):
    losses = {}
    more = f"--task_mixture {folder / 'mix.yaml'} --do_eval --pre_seq_len 3 --learning_rate 1e-8 --max_steps 1"
    for init in ("probe", "random"):
        train(flags(folder, tmp_path / init, *more.split(), "--head_init", init))
        said = capsys.readouterr().out
        assert ("mood: the head starts from a logistic regression on 6 states" in said) == (init == "probe")
        assert "spans: the head starts" not in said
        losses[init] = json.loads((tmp_path / init / "all_results.json").read_text())
    for name in ("mood", "names"):
        assert losses["probe"][f"eval_{name}_loss"] < 0.9 * losses["random"][f"eval_{name}_loss"]
    assert losses["probe"]["eval_spans_loss"] == pytest.approx(losses["random"]["eval_spans_loss"], rel=1e-3)


def test_a_task_that_is_not_in_the_mixture_has_no_head_there(folder, run, tmp_path, capsys):
    other = tmp_path / "other.yaml"
    other.write_text((folder / "names.yaml").read_text(encoding="utf-8").replace("name: names", "name: other"))
    argv = ["--model_name_or_path", str(folder / "base"), "--ptuning_checkpoint", str(run), "--split", "dev"]
    with pytest.raises(SystemExit):
        evaluate([*argv, "--task", str(other), "--task_data", str(folder / "names"), "--output_dir", str(tmp_path)])
    assert re.search("no linear head .*other .*mood, names, spans", capsys.readouterr().err)


# Starting from it


def frozen(folder: Path, output: Path, *more: str) -> dict[str, torch.Tensor]:
    """What a run that learns nothing ends with: its first values."""
    train([*flags(folder, output), "--max_steps", "1", "--learning_rate", "1e-30", "--weight_decay", "0", *more])
    return load_file(output / WEIGHTS_FILE)


def test_a_single_task_starts_from_the_shared_prefix_and_its_head(folder, run, tmp_path, capsys):
    shared = load_file(run / WEIGHTS_FILE)
    start = ("--init_prefix", str(run))
    first = frozen(folder, tmp_path / "mood", *task_at(folder, "mood"), *start)
    assert torch.equal(first[PREFIX], shared[PREFIX])
    assert torch.equal(first["classifier_head.weight"], shared["heads.mood.weight"])
    assert "The prefix and the head start from" in capsys.readouterr().out
    again = frozen(folder, tmp_path / "again", *task_at(folder, "mood"), "--init_prefix", str(tmp_path / "mood"))
    assert torch.equal(again["classifier_head.weight"], shared["heads.mood.weight"])  # of a prefix of one task, too
    written = frozen(folder, tmp_path / "reply", *task_at(folder, "reply"), *start)
    assert written.keys() == {PREFIX} and torch.equal(written[PREFIX], shared[PREFIX])
    mixed = frozen(folder, tmp_path / "mix", "--task_mixture", str(folder / "mix.yaml"), *start)
    assert torch.equal(mixed[PREFIX], shared[PREFIX])
    assert json.loads((tmp_path / "mood" / METADATA_FILE).read_text())["training"]["prefix_init"] == str(run)


def test_an_official_prefix_is_a_start_as_well(folder, run, tmp_path):
    shared = load_file(run / WEIGHTS_FILE)
    save_file({PREFIX: shared[PREFIX]}, tmp_path / "model.safetensors")
    first = frozen(folder, tmp_path / "out", *task_at(folder, "names"), "--init_prefix", str(tmp_path))
    assert torch.equal(first[PREFIX], shared[PREFIX])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--pre_seq_len", "5"], r"--pre_seq_len .* 5, .*run has 3 "),
        (["--ptuning_checkpoint", "x"], "--ptuning_checkpoint.* each .*starts from"),
        (["--init_prefix_text", "你好"], "--init_prefix_text.* each .*starts from"),
        (["--do_train", "false", "--do_eval"], "it needs --do_train"),
        (["--tuning", "lora"], "--tuning ptuning_v2"),
        (["--model_name_or_path", "OTHER"], "was trained on another base"),
    ],
)
def test_what_does_not_fit_is_refused(folder, run, tmp_path, capsys, more, message):
    if "OTHER" in more:
        shutil.copytree(folder / "base", tmp_path / "base")
        tokens = load_file(folder / "base" / "model.safetensors")
        save_file({key: value * 1.5 for key, value in tokens.items()}, tmp_path / "base" / "model.safetensors")
        more = ["--model_name_or_path", str(tmp_path / "base")]
    with pytest.raises(SystemExit):
        train([*flags(folder, tmp_path / "o"), *task_at(folder, "mood"), "--init_prefix", str(run), *more])
    error = " ".join(capsys.readouterr().err.split())
    assert re.search(message, error), error


def test_a_mixture_goes_neither_with_a_task_nor_with_predictions(folder, tmp_path, capsys):
    mixture = ["--task_mixture", str(folder / "mix.yaml")]
    for more, message in ((["--do_predict"], "evaluate --task NAME"), (task_at(folder, "mood"), "its own tasks")):
        with pytest.raises(SystemExit):
            train([*flags(folder, tmp_path / "o"), *mixture, *more])
        assert message in " ".join(capsys.readouterr().err.split())


def test_zero3_is_refused(folder, tmp_path):
    argv = flags(folder, tmp_path / "run", "--task_mixture", str(folder / "mix.yaml"), "--deepspeed")
    (ended,) = processes.start([*argv, str(CONFIGS / "zero3.json")], 1, tmp_path).wait()
    assert ended.code == 1 and re.search("--task_mixture .*ZeRO-3", ended.output)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [None, 2])
def test_two_processes_train_as_one(folder, run, tmp_path, stage):
    argv = flags(folder, tmp_path / "run", "--task_mixture", str(folder / "mix.yaml"), "--pre_seq_len", "3")
    more = ["--per_device_train_batch_size", "1", "--prefix_dropout", "0", "--do_eval"]
    if stage is not None:
        more += ["--deepspeed", str(CONFIGS / f"zero{stage}.json")]
    processes.run([*argv, *more], 2, tmp_path)
    train([*flags(folder, tmp_path / "alone"), *argv[-4:], "--prefix_dropout", "0", "--do_eval"])
    ours, theirs = load_file(tmp_path / "run" / WEIGHTS_FILE), load_file(tmp_path / "alone" / WEIGHTS_FILE)
    # The bias of the spans shifts all positions alike, so its gradient is rounding alone, which AdamW makes steps of.
    for key in theirs.keys() - {"heads.spans.bias"}:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=1e-5)
    ours, theirs = (json.loads((tmp_path / name / "all_results.json").read_text()) for name in ("run", "alone"))
    for name in ("mean", "loss", "names_loss", "mood_accuracy"):
        assert ours[f"eval_{name}"] == pytest.approx(theirs[f"eval_{name}"], rel=1e-3)
