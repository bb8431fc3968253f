"""Pre-training of a small base: what it reads, how samples become rows, and a run that is killed and resumes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from chatglm_ptuning import ChatGLMForConditionalGeneration, ChatGLMTokenizer
from chatglm_ptuning.data.sources.files import iterate_rows
from chatglm_ptuning.model.vocabulary import SentencePieceVocabulary
from pretraining.corpus import read_corpus
from pretraining.instructions import blank_opinion, judgements, opinion, praise_or_blame
from pretraining.measure import held_out_loss, loss_by_position
from pretraining.muon import orthogonalise
from pretraining.samples import PackedRows, SampleEncoder, check_samples, pack, write_samples
from pretraining.train import compute_dtype, learning_rate_factor, main, packed_labels, packed_mask

ROOT = Path(__file__).resolve().parents[1]
GENERAL = ROOT / "data" / "general_prompts" / "train.json"


def test_a_word_that_a_negation_turns_round_is_no_judgement():
    words = [match.group() for match in judgements("不喜欢颜色，不是很好，谁会推荐？但是客服让人满意")]
    assert words == ["不喜欢", "满意"]


@pytest.mark.parametrize(
    ("text", "answers"),
    [
        ("房间干净，下次还来", {"喜欢", "夸奖", "正面", "值得买", "高兴"}),
        ("用了两天就坏，太差了", {"不喜欢", "抱怨", "负面", "不值得买", "生气"}),
    ],
)
def test_a_text_that_points_one_way_is_praise_or_blame(text, answers):
    given = [praise_or_blame(text, random.Random(seed), "") for seed in range(60)]
    assert {answer for _, answer in given} == answers
    assert all(answer in question.replace(text, "") for question, answer in given)


def test_a_text_that_points_both_ways_is_neither():
    assert praise_or_blame("房间干净，早餐太差", random.Random(0), "") is None


def test_the_answer_is_not_left_in_the_question():
    text = "房间干净，早餐太差，离地铁近"
    question, answer = blank_opinion(text, random.Random(0), "")
    assert answer == "干净" and "房间____，早餐____，离地铁近" in question
    for seed in range(20):
        question, answer = opinion(text, random.Random(seed), "")
        assert answer in ("干净", "太差", "房间干净，", "早餐太差，")
        assert answer not in question


def test_a_sample_sees_itself_alone_and_predicts_no_other():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0]])
    seen = packed_mask(positions)[0, 0]
    assert seen.tolist() == [
        [row >= column and (row < 3) == (column < 3) and (row == 5) == (column == 5) for column in range(6)]
        for row in range(6)
    ]
    assert packed_labels(torch.tensor([[7, 8, 9, 7, 8, 0]]), positions).tolist() == [[-100, 8, 9, -100, 8, -100]]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def corpus(tmp_path):
    """A folder of text in the documented layout, of sentences that the repository has."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    rows = list(iterate_rows([GENERAL]))
    texts = [row.get("text") or row["response"] for row in rows]
    write_jsonl(folder / "some_documents.jsonl", [{"text": text} for text in texts])
    pairs = [row for row in rows if "prompt" in row]
    write_jsonl(
        folder / "some_instructions.jsonl",
        [
            {"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["response"]}]}
            for r in pairs
        ],
    )
    write_jsonl(folder / "reviews_test.jsonl", [{"text": texts[0]}, {"tokens": list(texts[1][2:])}])
    write_jsonl(folder / "reviews_train.jsonl", [{"text": texts[5]}])
    return folder


def test_texts_of_dev_and_test_splits_are_left_out(corpus):
    texts = [json.loads(line)["text"] for line in (corpus / "some_documents.jsonl").read_text("utf-8").splitlines()]
    read = read_corpus([corpus])
    kept = {*read.documents, *read.held_out}
    assert kept == set(texts) - {texts[0], texts[1]}
    assert not set(read.documents) & set(read.held_out) and len(read.held_out) == len(kept) // 10
    assert read.plain == {texts[5]} and read.labelled == {} and len(read.conversations) > 50


@pytest.mark.parametrize(
    ("name", "row", "parts"),
    [
        ("more_documents.jsonl", {"content": "一"}, ("more_documents.jsonl:1", '"text"', "content")),
        ("more_instructions.jsonl", {"messages": [{"role": "bot", "content": "一"}]}, (":1", "assistant", "bot")),
    ],
)
def test_a_row_without_its_field_is_named(corpus, name, row, parts):
    write_jsonl(corpus / name, [row])
    with pytest.raises(ValueError) as raised:
        read_corpus([corpus])
    assert all(part in str(raised.value) for part in parts)
    with pytest.raises(FileNotFoundError, match=r"documents\.jsonl"):
        read_corpus([corpus.parent])


def test_samples_keep_everything_and_end_where_their_text_ends(vocabulary_file):
    vocabulary = SentencePieceVocabulary(vocabulary_file)
    encoder = SampleEncoder(vocabulary, 12)
    text = "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。"
    samples = encoder.document(text)
    assert all(len(sample) <= 12 and sample[:2] == encoder.start for sample in samples)
    assert [index for sample in samples for index in sample[2:]] == [*vocabulary.encode(text), 2]
    (echo,) = encoder.echo(text)
    assert len(echo) <= 12 and echo[2:5] == echo[-4:-1]
    turns = [{"role": role, "content": content} for role, content in (("user", "甲"), ("assistant", "乙"))]
    (short,) = SampleEncoder(vocabulary, 64).conversation([*turns, {"role": "user", "content": text}])
    tokenizer = ChatGLMTokenizer(str(vocabulary_file), chat_format="chatglm3")
    rendered = tokenizer.apply_chat_template(turns, add_generation_prompt=False)["input_ids"]
    assert short == [*rendered, 2]
    assert SampleEncoder(vocabulary, 4).conversation(turns) == []


def test_rows_hold_every_sample_once_and_whole(tmp_path):
    lengths = np.random.default_rng(0).integers(1, 33, 500)
    rows = pack(lengths, 32, np.random.default_rng(1))
    assert sorted(sample for row in rows for sample in row) == list(range(500))
    assert all(lengths[row].sum() <= 32 for row in rows)
    assert lengths.sum() > 0.9 * 32 * len(rows)
    ids = np.repeat(np.arange(500), lengths).astype(np.uint16)
    np.save(tmp_path / "ids.npy", ids)
    np.save(tmp_path / "lengths.npy", lengths)
    batches = PackedRows(tmp_path, 32, 3).batches(4)
    seen = [next(batches) for _ in range(200)]
    for _, row_ids, positions in seen:
        for row, places in zip(row_ids, positions, strict=True):
            for sample in set(row.tolist()) - {0}:
                assert places[row == sample].tolist() == list(range(lengths[sample]))
    assert seen[-1][0] > seen[0][0]  # the epochs differ
    _, skipped, _ = next(PackedRows(tmp_path, 32, 3).batches(4, skip=150))
    assert np.array_equal(skipped, seen[150][1])


def test_a_corpus_becomes_samples_of_every_kind(corpus, vocabulary_file, tmp_path):
    read = read_corpus([corpus])
    write_samples(read, vocabulary_file, tmp_path / "samples", 64, variants=1, echo_share=0.5, seed=1)
    counts = json.loads((tmp_path / "samples" / "samples.json").read_text("utf-8"))["counts"]
    assert counts.keys() == {"documents", "made instructions", "conversations", "echo"}
    assert sum(kind["tokens"] for kind in counts.values()) == len(np.load(tmp_path / "samples" / "ids.npy"))
    assert check_samples(tmp_path / "samples", row_length=64, seed=1) and not check_samples(tmp_path, row_length=64)
    with pytest.raises(ValueError, match=r"samples.*row_length 64, not 32.*--output"):
        check_samples(tmp_path / "samples", row_length=32)


def test_orthogonalised_matrices_have_singular_values_near_one():
    matrices = torch.randn(3, 8, 20, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrices))
    assert values.min() > 0.6 and values.max() < 1.3


def test_the_learning_rate_rises_stays_and_falls_to_zero():
    factors = [learning_rate_factor(step, step / 100, 10, 0.5) for step in range(101)]
    assert factors[0] == 0.1 and factors[9:51] == [1.0] * 42
    assert factors[75] == 0.5 and factors[100] == 0.0


def test_bfloat16_is_chosen_where_there_is_arithmetic_for_it(monkeypatch):
    cpu = torch.device("cpu")
    for capabilities, dtype in (({"avx512_bf16": True}, torch.bfloat16), ({"avx2": True}, torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        assert compute_dtype("auto", cpu) == dtype
    assert compute_dtype("float32", cpu) == torch.float32


def command(corpus, output, *flags):
    sizes = "--vocabulary 1500 --layers 2 --hidden 64 --ffn 96 --row_length 32 --batch 8 --micro_batch 4 --warmup 2"
    return [
        sys.executable, "-m", "pretraining.train", "--corpus", str(corpus), "--output", str(output), *sizes.split(),
        "--dtype", "float32", "--no-compile", "--log_steps", "1", *flags,
    ]  # fmt: skip


def run_command(argv, kill_at=None):
    """Runs it to its end, or kills it once log.jsonl has that step."""
    paths = os.pathsep.join((str(ROOT), str(ROOT / "scripts")))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if kill_at is not None and line.startswith("{") and json.loads(line)["step"] >= kill_at:
            process.send_signal(signal.SIGKILL)
            break
    _, errors = process.communicate(timeout=300)
    if kill_at is None:
        assert process.returncode == 0, errors
    else:
        assert process.returncode == -signal.SIGKILL


def test_a_killed_run_resumes_and_ends_with_the_same_weights(corpus, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    length = ("--tokens", str(12 * 8 * 32), "--save_steps", "4")
    run_command(command(corpus, whole, *length))
    run_command(command(corpus, killed, *length), kill_at=6)
    assert not (killed / "model").exists()
    run_command(command(corpus, killed, *length))
    models = [ChatGLMForConditionalGeneration.from_pretrained(folder / "model") for folder in (whole, killed)]
    for (name, weight), other in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        assert torch.equal(weight, other), name
    log = [json.loads(line) for line in (killed / "log.jsonl").read_text("utf-8").splitlines()]
    starts = [record["step"] for record in log if record.get("event") == "start"]
    assert starts[0] == 0 and starts[1] in (4, 8)
    losses = [record["loss"] for record in log if "loss" in record]
    assert losses[-1] < losses[0] - 0.5
    model, tokenizer = models[0].eval(), ChatGLMTokenizer.from_pretrained(whole / "model")
    assert model.generation_config.eos_token_id == [
        2, *(tokenizer.convert_tokens_to_ids(token) for token in ("<|user|>", "<|observation|>"))
    ]  # fmt: skip
    texts = read_corpus([corpus]).held_out
    (last,) = [record["held_out"] for record in log if record.get("held_out") and record["step"] == 12]
    assert last["per_token"] == pytest.approx(
        held_out_loss(model.float(), tokenizer.vocabulary, texts, 32).per_token, abs=0.01
    )
    loss = held_out_loss(model, tokenizer.vocabulary, texts[:1], 10_000)
    scored = len(tokenizer.vocabulary.encode(texts[0])) + 2  # with sop and the end, without [gMASK]
    assert loss.per_token * scored == pytest.approx(loss.per_character * len(texts[0]))
    assert loss_by_position(model, tokenizer.vocabulary, texts, (0, 4, 16))["documents"] == len(texts)


def test_a_run_that_cannot_start_says_why(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train", "--corpus", str(tmp_path), "--output", str(tmp_path / "run")])
    with pytest.raises(SystemExit, match=rf"error: No \*documents.*{tmp_path}"):
        main()


def test_a_run_ends_after_its_seconds_and_continues_another_base(corpus, tmp_path):
    begun = time.monotonic()
    tokens = 500_000
    run_command(command(corpus, tmp_path / "first", "--seconds", "3", "--tokens", str(tokens)))
    log = [json.loads(line) for line in (tmp_path / "first" / "log.jsonl").read_text("utf-8").splitlines()]
    assert 3 <= log[-1]["seconds"] < time.monotonic() - begun
    assert log[-1]["step"] * 8 * 32 < tokens
    base = tmp_path / "first" / "model"
    run_command(command(corpus, tmp_path / "second", "--initial_model", str(base), "--tokens", "1", "--other_lr", "0"))
    embeddings = [
        ChatGLMForConditionalGeneration.from_pretrained(folder).get_input_embeddings().weight
        for folder in (base, tmp_path / "second" / "model")
    ]
    assert torch.equal(*embeddings)
