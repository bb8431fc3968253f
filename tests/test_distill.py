"""`chatglm-ptuning distill`: self-study, the teacher's distributions, the loss, and the prefix that is trained."""

import json
import random
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from torch.distributions import Categorical, kl_divergence

from chatglm_ptuning.cli import main as command
from chatglm_ptuning.data.cache import TokenCache
from chatglm_ptuning.data.collate import PackingCollator, pack
from chatglm_ptuning.model.losses import divergence_of_states
from chatglm_ptuning.model.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer
from chatglm_ptuning.training.distillation.documents import windows_of
from chatglm_ptuning.training.distillation.self_study import templated
from chatglm_ptuning.training.distillation.teacher import StudySettings, Teacher
from chatglm_ptuning.training.sampler import masked_row_like
from chatglm_ptuning.training.trainer import PrefixTrainer

TEXT = "今天天气很好。我想去公园散步，公园有甲乙丙丁！\n你是戊己吗？庚辛在公园。今天有雨0123。"
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture
def document(tmp_path):
    path = tmp_path / "manual.txt"
    path.write_text(TEXT, "utf-8")
    return path


@pytest.fixture
def distill(base, document, tmp_path):
    def run(output, *more):
        flags = ["--document", document, "--model_name_or_path", base, "--output_dir", tmp_path / output,
                 "--data_cache_dir", tmp_path / "cache", "--pre_seq_len", 6, "--max_row_length", 64, "--rounds", 2,
                 "--own_questions", 1, "--top_k", 5, "--max_steps", 4, "--save_steps", 2, "--logging_steps", 1,
                 "--per_device_train_batch_size", 4, "--disable_tqdm", "true", *more]  # fmt: skip
        command(["distill", *map(str, flags)])
        return tmp_path / output

    return run


@pytest.fixture
def taught(base, tmp_path):
    """Makes a model with a prefix of some length, the windows of the text, and the rows about them."""

    def make(length=6, top_k=5, most_tokens=128, own_questions=1):
        tokenizer = ChatGLMTokenizer.from_pretrained(base)
        model = ChatGLMForConditionalGeneration.from_pretrained(
            base, pre_seq_len=length, prefix_dropout=0.0, dtype=torch.float32
        )
        windows = windows_of(TEXT, tokenizer, most_tokens)
        settings = StudySettings(2, own_questions, 64, top_k, 1)
        rows = Teacher(model, tokenizer, settings, TokenCache(tmp_path / "cache"), 4).rows(windows, progress=False)
        return model, tokenizer, windows, rows

    return make


def merged(logits: torch.Tensor, ids: torch.Tensor) -> Categorical:
    """The distribution over some tokens, and all others as one class."""
    probabilities = logits.double().softmax(-1)
    chosen = probabilities.gather(-1, ids)
    return Categorical(probs=torch.cat((chosen, 1 - chosen.sum(-1, keepdim=True)), -1))


def prefix_of(folder):
    (table,) = load_file(folder / "prefix_model.safetensors").values()
    return table


# ---- the loss ----


def test_the_divergence_is_that_of_distributions_with_the_rest_as_one_class():
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(8, 20, bias=False).requires_grad_(False)
    states = torch.randn(1100, 8, generator=generator, requires_grad=True)  # more than are computed at once
    theirs = torch.randn(1100, 20, generator=generator)
    ids = theirs.topk(3).indices
    teacher = merged(theirs, ids)
    logprobs = teacher.probs.log().float()
    loss = divergence_of_states(states, layer, ids.flatten(), logprobs.flatten())
    expected = kl_divergence(teacher, merged(layer(states), ids)).mean()
    torch.testing.assert_close(loss, expected.float(), **TOLERANCE)
    (grad,) = torch.autograd.grad(loss, states)
    (expected_grad,) = torch.autograd.grad(expected, states)
    torch.testing.assert_close(grad, expected_grad.float(), rtol=1e-3, atol=1e-7)
    halved = divergence_of_states(states, layer, ids.flatten(), logprobs.flatten(), 2200)
    torch.testing.assert_close(halved * 2, loss, **TOLERANCE)


@torch.no_grad()
def test_the_teacher_is_the_base_with_the_window_in_front(taught):
    model, tokenizer, windows, rows = taught()
    assert len(windows) == 1 and windows[0].ids[:2] == tokenizer.chat.start_ids
    assert model.prefix_names == ["default"], "the window is not kept"
    for row in (rows[0], rows[len(rows) // 2], rows[-1]):
        ids = windows[0].ids + row["input_ids"]
        places = [place for place, label in enumerate(row["labels"]) if label != -100]
        logits = model(torch.tensor([ids]), prefix=model.prefix_batch(None)).logits[0]
        logits = logits[[len(windows[0].ids) + place - 1 for place in places]]
        teacher_ids = torch.tensor(row["teacher_ids"]).view(len(places), 5)
        assert torch.equal(teacher_ids, logits.topk(5).indices)
        found = torch.tensor(row["teacher_logprobs"]).view(len(places), 6).exp()
        torch.testing.assert_close(found, merged(logits, teacher_ids).probs.float(), rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_the_loss_of_packed_rows_is_the_mean_divergence_per_answer_token(taught):
    model, _, windows, rows = taught()
    model.init_prefix_from_ids(torch.tensor(windows[0].ids[:6]))
    model.eval()
    own = [rows[place] for place in range(5)]
    (batch,) = pack(PackingCollator()(own)["rows"], 10_000)
    found = model(**batch, skip_logits=True).loss
    total, count = 0.0, 0
    for row in own:
        places = [place for place, label in enumerate(row["labels"]) if label != -100]
        ids = torch.tensor(row["teacher_ids"]).view(len(places), 5)
        theirs = torch.tensor(row["teacher_logprobs"]).view(len(places), 6).double()
        ours = merged(model(torch.tensor([row["input_ids"]])).logits[0][[place - 1 for place in places]], ids)
        total += (theirs.exp() * (theirs - ours.probs.log())).sum().item()
        count += len(places)
    assert found.item() == pytest.approx(total / count, rel=1e-4)
    filling = pack(PackingCollator()([masked_row_like(rows[0])])["rows"], 1)[0]
    assert model(**filling, skip_logits=True, num_items_in_batch=7).loss.item() == 0


@torch.no_grad()
def test_a_prefix_as_long_as_the_document_equals_the_teacher(taught):
    model, tokenizer, windows, rows = taught(length=50)
    assert len(windows[0].ids) == 50
    model.init_prefix_from_ids(torch.tensor(windows[0].ids))
    prompt = torch.tensor([tokenizer.chat.start_ids + tokenizer.encode("你是谁", add_special_tokens=False)])
    whole = torch.tensor([windows[0].ids + prompt[0].tolist()])
    expected = model(whole, prefix=model.prefix_batch(None)).logits[:, len(windows[0].ids) :]
    torch.testing.assert_close(model(prompt).logits, expected, **TOLERANCE)
    (batch,) = pack(PackingCollator()([rows[0], rows[3]])["rows"], 10_000)
    assert model(**batch, skip_logits=True).loss.item() == pytest.approx(0, abs=1e-5)


# ---- self-study ----


def test_windows_hold_the_whole_document_and_fit(chatglm3):
    tokenizer = chatglm3
    for most in (200, 20, 10, 8):
        windows = windows_of(TEXT, tokenizer, most)
        assert all(len(window.ids) <= most for window in windows)
        assert "".join(tokenizer.decode(window.ids[2:]) for window in windows) == TEXT
        passages = [passage for window in windows for passage in window.passages]
        assert re.sub(r"\s", "", "".join(passages)) == re.sub(r"\s", "", TEXT)
    assert windows_of(TEXT, tokenizer, 200)[0].passages[:2] == ["今天天气很好。", "我想去公园散步，公园有甲乙丙丁！"]
    with pytest.raises(ValueError, match="no room"):
        windows_of(TEXT, tokenizer, 2)


@pytest.mark.parametrize(
    ("passages", "asked"),
    [
        (["渡口在1987年修建。", "白鹭号可以载客四十二人。"], "多少|几|____|接着写"),
        (["The ferry has two boats.", "The larger one takes 42 people."], "Continue|blank|say about|____"),
    ],
)
def test_templates_ask_about_every_passage_in_its_language(passages, asked):
    found = [pair for seed in range(20) for pair in templated(passages, random.Random(seed))]
    assert found == [pair for seed in range(20) for pair in templated(passages, random.Random(seed))]
    assert len({question for question, _ in found if re.search(asked, question)}) > 10
    assert all(answer.rstrip("。.") in "".join(passages) for _, answer in found)
    chinese = passages[0][0] == "渡"
    assert all(bool(re.search("[一-龟]", question)) == chinese for question, _ in found)


def test_the_base_writes_questions_itself(taught):
    assert len(taught(own_questions=3)[3]) > len(taught(own_questions=1)[3]) > len(taught(own_questions=0)[3])


# ---- the command ----


def test_a_document_becomes_a_prefix(distill, base, capsys):
    run = distill("run", "--max_steps", 30, "--frozen_slots", 2)
    assert "manual.txt" in capsys.readouterr().out
    record = json.loads((run / "prefix_config.json").read_text("utf-8"))
    assert record["task"] == "manual.txt" and record["pre_seq_len"] == 6
    losses = [entry["loss"] for entry in json.loads((run / "trainer_state.json").read_text())["log_history"]
              if "loss" in entry]  # fmt: skip
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    model = ChatGLMForConditionalGeneration.from_pretrained(base, pre_seq_len=6, dtype=torch.float32)
    tokenizer = ChatGLMTokenizer.from_pretrained(base)
    model.init_prefix_from_ids(torch.tensor(windows_of(TEXT, tokenizer, 128)[0].ids[:6]))
    first = model.transformer.prefix_encoder.embedding.weight.detach()
    assert torch.equal(prefix_of(run)[:2], first[:2]), "frozen slots keep their first values"
    assert ((prefix_of(run) - first)[2:].abs().amax(-1) > 1e-3).all()
    plain = ChatGLMForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    plain.load_prefix(run, "manual")
    answer, history = plain.chat(tokenizer, "你是谁", do_sample=False)
    assert isinstance(answer, str) and history


class Killed(BaseException):
    """As a signal that nothing catches."""


def test_a_killed_run_that_is_started_again_equals_an_uninterrupted_one(distill, tmp_path, monkeypatch):
    whole = prefix_of(distill("whole"))
    shutil.rmtree(tmp_path / "cache")
    write, calls = Teacher._write, []

    def dies_in_the_second_round(self, *arguments):
        calls.append(1)
        if len(calls) == 2:
            raise Killed
        return write(self, *arguments)

    monkeypatch.setattr(Teacher, "_write", dies_in_the_second_round)
    with pytest.raises(Killed):
        distill("killed")
    step = PrefixTrainer.training_step

    def dies_in_the_third_step(self, *arguments):
        if self.state.global_step == 2:
            raise Killed
        return step(self, *arguments)

    monkeypatch.setattr(PrefixTrainer, "training_step", dies_in_the_third_step)
    with pytest.raises(Killed):
        distill("killed")
    assert len(calls) == 3, "the first round was on disk"
    monkeypatch.setattr(PrefixTrainer, "training_step", step)
    assert torch.equal(prefix_of(distill("killed")), whole)
    assert len(calls) == 3


@pytest.mark.slow
def test_sigkill_at_any_time_changes_nothing(distill, base, document, tmp_path):
    flags = ["--max_steps", 20, "--save_steps", 10]
    whole = prefix_of(distill("whole", *flags))
    more = ["--document", document, "--model_name_or_path", base, "--output_dir", tmp_path / "killed",
            "--data_cache_dir", tmp_path / "other", "--pre_seq_len", 6, "--max_row_length", 64, "--rounds", 2,
            "--top_k", 5, "--per_device_train_batch_size", 4, "--logging_steps", 1, "--disable_tqdm",
            "true", *flags]  # fmt: skip
    words = [sys.executable, "-m", "chatglm_ptuning", "distill", *map(str, more)]
    kills = 0

    def files():
        found = (path for name in ("other", "killed") for path in (tmp_path / name).glob("[!.]*"))
        return {path for path in found if path.suffix not in (".lock", ".jsonl")}

    for _ in range(100):
        job = subprocess.Popen(words, stdout=subprocess.DEVNULL)
        seen = files()
        while job.poll() is None and not files() - seen:  # until it has written something new
            time.sleep(0.01)
        time.sleep(0.3)
        if job.poll() is not None:
            break
        job.kill()
        job.wait()
        kills += 1
    assert job.returncode == 0 and kills > 3
    assert torch.equal(prefix_of(tmp_path / "killed"), whole)


def test_rows_of_other_documents_and_settings_are_not_used(distill, document, tmp_path, monkeypatch, capsys):
    distill("first")
    made = []
    write = Teacher._write
    monkeypatch.setattr(Teacher, "_write", lambda self, *rest: made.append(1) or write(self, *rest))
    distill("second", "--pre_seq_len", 4, "--learning_rate", 1e-3)
    assert made == [], "the length of the prefix and the training do not matter"
    for changed in (["--top_k", 4], ["--seed", 7], ["--max_row_length", 50]):
        made.clear()
        distill(f"third{changed[1]}", *changed)
        assert len(made) == 2, changed
    document.write_text(TEXT + "你好！", "utf-8")
    with pytest.raises(SystemExit):
        distill("first", "--max_steps", 6)
    assert re.search(r"checkpoint-4.*documents.*--overwrite_output_dir", capsys.readouterr().err)
    made.clear()
    distill("first", "--overwrite_output_dir", "true")
    assert len(made) == 2


def test_long_and_several_documents_become_one_prefix(distill, document, tmp_path, capsys):
    other = tmp_path / "other.txt"
    other.write_text("abc def. xyz is here. " * 12, "utf-8")
    run = distill("run", "--document", document, other, "--max_row_length", 200)
    printed = capsys.readouterr().out
    windows = int(re.search(r"in (\d+) windows", printed)[1])
    assert windows > 2, "the context of 256 tokens has room for 56"
    assert json.loads((run / "prefix_config.json").read_text("utf-8"))["task"] == "manual.txt, other.txt"


@pytest.mark.parametrize(
    ("content", "more", "named"),
    [
        (b" \n\t ", [], r"manual\.txt has no text"),
        ("渡口".encode("gbk"), [], r"manual\.txt.*GB18030"),
        (b"%PDF-1.7 ...", [], r"manual\.txt.*PDF"),
        (b"\x00\x01\x02\x00\x9f" * 99, [], r"manual\.txt.*binary"),
        (None, ["--document", "nowhere.txt"], r"nowhere\.txt does not exist"),
        (None, ["--pre_seq_len", 500], r"--pre_seq_len 500 .* 50 tokens"),
        (None, ["--pre_seq_len", 0], "--pre_seq_len must be at least 1, got 0"),
        (None, ["--frozen_slots", 6], "--frozen_slots .*--pre_seq_len 6, got 6"),
        (None, ["--max_row_length", 256], "--max_row_length 256 leaves no room .*256"),
        (None, ["--max_row_length", 8], "--max_row_length must be at least 32, got 8"),
        (None, ["--top_k", 100_000], r"--top_k must be below the vocabulary of \d+, got 100000"),
        (None, ["--rounds", 0], "--rounds must be at least 1, got 0"),
        (None, ["--do_eval", "true"], "--do_eval does not work with distill"),
        (None, ["--tuning", "lora"], "--tuning lora"),
        (None, ["--packing", "false"], "--packing false"),
        (None, ["--weight_decay", 0.1], "--weight_decay 0.1"),
    ],
)
def test_errors_name_file_and_value(distill, document, content, more, named, capsys):
    if content is not None:
        document.write_bytes(content)
    with pytest.raises(SystemExit) as ended:
        distill("run", *more)
    assert ended.value.code in (1, 2)
    assert re.search(named, capsys.readouterr().err)


def test_a_base_that_answers_no_questions_is_refused(distill, base, tmp_path, capsys):
    plain = shutil.copytree(base, tmp_path / "plain")
    settings = json.loads((plain / "tokenizer_config.json").read_text("utf-8"))
    (plain / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_format": "base"}), "utf-8")
    with pytest.raises(SystemExit):
        distill("run", "--model_name_or_path", plain)
    assert re.search("chat format base.*--model_name_or_path", capsys.readouterr().err)
