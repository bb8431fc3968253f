"""Texts that are read twice (echo): the ids, what the second copy decides, and the setting from flag to checkpoint."""

from __future__ import annotations

import itertools
import json
import random
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_glm4
import tiny_tokenizer
import torch
import yaml
from instruction_rows import rows_of
from task_runs import evaluate, flags, train, write_tasks

from chatglm_ptuning.cli import main as command
from chatglm_ptuning.data.tasks.examples import Answer, QuestionExample, TokenExample
from chatglm_ptuning.data.tasks.heads import HEADS
from chatglm_ptuning.data.tasks.heads.head import Head
from chatglm_ptuning.data.tasks.heads.spans import QuestionAnswering
from chatglm_ptuning.data.tasks.heads.tags import TokenClassification, labels_of, tags_of
from chatglm_ptuning.data.tasks.registry import load_task
from chatglm_ptuning.evaluation.inference import InferenceSettings, predict
from chatglm_ptuning.experiments.plan import Plan, check_plan
from chatglm_ptuning.model.configuration_chatglm import ChatGLMConfig
from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer
from chatglm_ptuning.prefix.formats.kit import METADATA_FILE

MODEL_CLASSES = {head.name: head.model_class for head in HEADS}
FORMATS = ("chatglm2", "chatglm3", "base", "glm4")
TEXT = list("今天天气很好，龘我想去公園散步 abc\n１２岁")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    made = {name: tiny_tokenizer.train(folder, name) for name in FORMATS[:3]}
    return made | {"glm4": ChatGLMTokenizer.from_pretrained(tiny_glm4.write_tokenizer(folder / "glm4"))}


def tagger(tokenizer, unit="pieces", room=400, prompt="找：{text}\n完") -> Head:
    task = replace(load_task("entities"), prompt=prompt)
    return TokenClassification(task, tokenizer, room, doc_stride=4, token_unit=unit, echo=True)


def searcher(tokenizer, room=400) -> Head:
    task = replace(load_task("cmrc2018"), prompt="问：{question}\n{context}答")
    return QuestionAnswering(task, tokenizer, room, doc_stride=4, echo=True)


def between(tokenizer) -> list[int]:
    return tokenizer.vocabulary.encode("\n")


def copies(input_ids, frame, tokenizer) -> tuple[list[int], list[int]]:
    """The two copies of the text in a row, without the prompt around them and the line feed between them."""
    before, behind = frame
    inside = input_ids[len(before) : len(input_ids) - len(behind)]
    assert input_ids == [*before, *inside, *behind]
    line = between(tokenizer)
    length = (len(inside) - len(line)) // 2
    assert inside[length : length + len(line)] == line
    return inside[:length], inside[length + len(line) :]


def frame_of(tokenizer, before, behind) -> tuple[list[int], list[int]]:
    encode = tokenizer.vocabulary.encode
    return [*tokenizer.build_inputs_with_special_tokens([]), *encode(before)], encode(behind)


# Rows of ids


@pytest.mark.parametrize("chat_format", FORMATS)
@pytest.mark.parametrize("unit", ["pieces", "characters"])
def test_a_text_to_tag_stands_twice_and_labels_on_the_second_copy_alone(tokenizers, chat_format, unit):
    tokenizer = tokenizers[chat_format]
    encoder = tagger(tokenizer, unit)
    tags = tuple(random.Random(0).choices(["O", "B-PER", "B-LOC"], k=len(TEXT)))
    example = TokenExample(id=0, tokens=tuple(TEXT), tags=tags)
    (once,) = rows_of(replace(encoder, echo=False), [example])
    (row,) = rows_of(encoder, [example])
    frame = frame_of(tokenizer, "找：", "\n完")
    first, second = copies(row["input_ids"], frame, tokenizer)
    assert first == second == once["input_ids"][len(frame[0]) : len(once["input_ids"]) - len(frame[1])]
    if unit == "pieces":
        assert first == tokenizer.vocabulary.encode("".join(TEXT))
    start = len(frame[0]) + len(first) + len(between(tokenizer))
    assert row["labels"][:start] == [-100] * start
    assert row["labels"][start:] == once["labels"][len(frame[0]) :]
    assert len(row["labels"]) == len(row["input_ids"])


@pytest.mark.parametrize("chat_format", ["chatglm3", "glm4"])
@pytest.mark.parametrize("unit", ["pieces", "characters"])
def test_both_copies_of_a_window_to_tag_fit_and_tags_come_back(tokenizers, chat_format, unit):
    tokenizer = tokenizers[chat_format]
    frame = frame_of(tokenizer, "找：", "\n完")
    fixed = sum(map(len, frame)) + len(between(tokenizer))
    for room in (8, 9):
        encoder = tagger(tokenizer, unit, fixed + 2 * room + 1)  # one more is not enough for both copies
        tokens = tuple(TEXT * 3)
        example = TokenExample(id=0, tokens=tokens, tags=("B-LOC", "I-LOC", "O") * len(TEXT))
        windows = encoder.windows(example)
        assert len(windows) > 3
        for window in windows:
            first, second = copies(window.input_ids, frame, tokenizer)
            assert first == second and len(first) == room
            assert window.spans[: -len(frame[1]) - room] == [None] * (len(window.spans) - len(frame[1]) - room)
        decided = sorted(place for window in windows for span in window.spans if span for place in range(*span))
        assert decided == list(range(len(tokens)))
        names = encoder.task.tags
        rows = [labels_of(window, example, names) for window in windows]
        found = tags_of(windows, [["B-ORG" if x == -100 else names[x] for x in row] for row in rows], len(tokens))
        if unit == "characters":
            assert found == list(example.tags)


@pytest.mark.parametrize("chat_format", FORMATS)
@pytest.mark.parametrize("room", [100, 9])
def test_a_context_stands_twice_and_answers_on_the_second_copy_alone(tokenizers, chat_format, room):
    tokenizer = tokenizers[chat_format]
    context = "".join(TEXT)
    frame = frame_of(tokenizer, "问：去哪？\n", "答")
    fixed = sum(map(len, frame)) + len(between(tokenizer))
    encoder = searcher(tokenizer, fixed + 2 * room)
    answer = Answer("想去", context.index("想去"))
    example = QuestionExample(id=0, context=context, question="去哪？", answers=(answer,))
    windows = encoder.windows(example)
    assert (len(windows) == 1) == (room == 100)
    found = 0
    for window, row in zip(windows, rows_of(encoder, [example]), strict=True):
        first, second = copies(window.input_ids, frame, tokenizer)
        assert first == second and len(first) <= room and row["input_ids"] == window.input_ids
        begin = len(frame[0]) + len(first) + len(between(tokenizer))
        assert window.spans[:begin] == [None] * begin
        start, end = row["start_positions"], row["end_positions"]
        if start:
            assert begin <= start <= end < begin + len(second)
            assert answer.text in context[window.spans[start][0] : window.spans[end][1]]
            found += 1
    assert found
    covered = {place for window in windows for span in window.spans if span for place in range(*span)}
    assert covered == set(range(len(context)))


def test_a_prompt_without_room_for_two_copies_is_refused(tokenizers):
    tokenizer = tokenizers["chatglm3"]
    fixed = sum(map(len, frame_of(tokenizer, "找：", "\n完"))) + len(between(tokenizer))
    example = TokenExample(id=0, tokens=("甲",), where="a.json:3")
    with pytest.raises(ValueError, match=r"a.json:3: .*twice.* max_source_length"):
        tagger(tokenizer, room=fixed + 1).windows(example)
    assert tagger(tokenizer, room=fixed + 2).windows(example)


# Predictions


@pytest.fixture(scope="module")
def model_of(tokenizers):
    def make(head: str, num_labels: int):
        torch.manual_seed(0)
        model = MODEL_CLASSES[head](
            ChatGLMConfig(
                num_layers=2, hidden_size=32, ffn_hidden_size=48, kv_channels=8, num_attention_heads=4,
                multi_query_attention=True, multi_query_group_num=2, seq_length=512, num_labels=num_labels,
                padded_vocab_size=len(tokenizers["chatglm3"]), initializer_range=0.3, pre_seq_len=3,
            )
        ).eval()  # fmt: skip
        for parameter in (*model.transformer.prefix_encoder.parameters(), *model._heads().values()):
            parameter.data.copy_(torch.randn(parameter.shape))
        return model

    return make


@torch.no_grad()
def test_the_second_copy_has_seen_what_follows(tokenizers, model_of):
    tokenizer = tokenizers["chatglm3"]
    encoder = tagger(tokenizer, "characters")
    model = model_of("token_classification", len(encoder.task.tags))
    for echo in (False, True):
        logits = []
        for text in ("我想去", "我想吗"):
            example = TokenExample(id=0, tokens=tuple(text))
            (window,) = replace(encoder, echo=echo).windows(example)
            first = window.spans.index((0, 1))
            logits.append(model(torch.tensor([window.input_ids])).logits[0, first])
        assert torch.allclose(*logits) != echo


@pytest.mark.parametrize("room", [400, 31])
def test_a_model_that_knows_tags_in_the_second_copy_alone_is_read_there(tokenizers, model_of, monkeypatch, room):
    """The model tags every character by itself, but only in the second copy; in the first, all are ORG."""
    tokenizer = tokenizers["chatglm3"]
    encoder = tagger(tokenizer, "characters", room)
    model = model_of("token_classification", len(encoder.task.tags))
    kinds = {"我": "B-PER", "公": "B-LOC", "园": "I-LOC"}
    tag_of = {tokenizer.vocabulary.encode("\n" + key)[-1]: encoder.task.tags.index(tag) for key, tag in kinds.items()}
    organisation = encoder.task.tags.index("B-ORG")

    def forward(input_ids, **others):
        logits = torch.zeros(*input_ids.shape, len(encoder.task.tags))
        for row, ids in enumerate(input_ids.tolist()):
            for place, index in enumerate(ids):
                seen = index in ids[:place]
                logits[row, place, tag_of.get(index, 0) if seen else organisation] = 5.0
        return SimpleNamespace(logits=logits)

    monkeypatch.setattr(model, "forward", forward)
    texts = ["我想去公园散步", "公园", "今天天气很好，请问你我想去公园散步吗"]
    examples = [TokenExample(id=number, tokens=tuple(text)) for number, text in enumerate(texts)]
    found = predict(model, encoder, examples, InferenceSettings(2))
    for text, prediction in zip(texts, found, strict=True):
        assert prediction.value == [kinds.get(character, "O") for character in text]


@pytest.mark.parametrize("room", [400, 36])
def test_spans_of_the_first_copy_are_never_taken(tokenizers, model_of, monkeypatch, room):
    """The model points at 今 in the first copy most of all, and at 公园 in the second one after that."""
    tokenizer = tokenizers["chatglm3"]
    encoder = searcher(tokenizer, room)
    model = model_of("question_answering", 2)
    today, park, garden = (tokenizer.vocabulary.encode("\n" + character)[-1] for character in "今公园")

    def forward(input_ids, **others):
        starts, ends = torch.zeros(input_ids.shape), torch.zeros(input_ids.shape)
        for row, ids in enumerate(input_ids.tolist()):
            for place, index in enumerate(ids):
                second = index in ids[:place]
                if index == today and not second:
                    starts[row, place] = ends[row, place] = 9.0
                starts[row, place] += 8.0 * (index == park and second)
                ends[row, place] += 8.0 * (index == garden and second)
        return SimpleNamespace(start_logits=starts, end_logits=ends)

    monkeypatch.setattr(model, "forward", forward)
    example = QuestionExample(id=0, context="今天天气很好，请问你我想去公园散步吗", question="哪？")
    assert (len(encoder.windows(example)) > 1) == (room == 36)
    (found,) = predict(model, encoder, [example], InferenceSettings(2))
    assert found.value == "公园"


# The setting


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The tasks of `task_runs`, and a tagging task of its own whose file says that its text is read once."""
    folder = write_tasks(tmp_path_factory.mktemp("data"))
    own = yaml.safe_load(Path(load_task("cluener").origin).read_text("utf-8"))
    own |= {"name": "people", "echo": False, "folders": ["cluener"], "aliases": [], "hub": {}}
    (folder / "people.yaml").write_text(yaml.safe_dump(own, allow_unicode=True), "utf-8")
    return folder


def recorded(run: Path) -> dict:
    return json.loads((run / METADATA_FILE).read_text("utf-8"))["training"]["echo"]


def used(report: Path) -> bool:
    return json.loads((report / "metrics.json").read_text("utf-8"))["settings"]["echo"]


def refused(capsys, run, *arguments) -> str:
    with pytest.raises(SystemExit):
        run(*arguments)
    return " ".join(capsys.readouterr().err.split())


def test_the_measured_default_of_each_head():
    assert {head.name: head.echo for head in HEADS if head.echoes} == {
        "token_classification": True,
        "question_answering": False,
    }
    assert not any(head.echo for head in HEADS if not head.echoes)


@pytest.mark.parametrize(
    ("task", "head", "default"), [("cluener", [], True), ("cmrc2018", ["--head", "question_answering"], False)]
)
def test_what_a_prefix_was_trained_with_is_recorded_and_used(base, data, tmp_path, capsys, task, head, default):
    for echo in (True, False):
        run, other = tmp_path / str(echo), str(not echo).lower()
        asked = [] if echo == default else ["--echo", str(echo).lower()]
        train(base, data, task, run, *head, *asked, "--do_predict", "--predict_split", "dev", steps=1)
        assert recorded(run) == {task: echo} and used(run / "predict") is echo
        scored = ["--split", "dev", "--ptuning_checkpoint", run]
        evaluate(base, data, task, tmp_path / "report", *scored)
        assert used(tmp_path / "report") is echo
        predictions = [folder / "predictions.jsonl" for folder in (run / "predict", tmp_path / "report")]
        assert predictions[0].read_text("utf-8") == predictions[1].read_text("utf-8")
        said = refused(capsys, evaluate, base, data, task, tmp_path / "no", *scored, "--echo", other)
        assert re.search(f"--echo is {other}.*{run}.* {str(echo).lower()}", said)
        said = refused(
            capsys, train, base, data, task, tmp_path / "no", "--ptuning_checkpoint", run, "--echo", other
        )  # fmt: skip
        assert re.search(f"--echo is {other}.*{run}.* {str(echo).lower()}", said)


def test_the_task_file_is_the_default_and_the_flag_overrides_it(base, data, tmp_path):
    train(base, data, "people.yaml", tmp_path / "own", steps=1)
    assert recorded(tmp_path / "own") == {"people": False}
    train(base, data, "people.yaml", tmp_path / "flag", "--echo", "true", steps=1)
    assert recorded(tmp_path / "flag") == {"people": True}
    # The checkpoint says how it was trained, whatever the task's file says now; and for another task, too.
    for run, task, echo in itertools.product(("own", "flag"), ("people.yaml", "cluener"), (True, False)):
        if echo == (run == "flag"):
            evaluate(base, data, task, tmp_path / "r", "--split", "dev", "--ptuning_checkpoint", tmp_path / run)
            assert used(tmp_path / "r") is echo


def test_a_prefix_of_before_reads_texts_once(base, data, tmp_path, capsys):
    train(base, data, "cluener", tmp_path / "run", "--echo", "false", steps=1)
    description = tmp_path / "run" / METADATA_FILE
    content = json.loads(description.read_text("utf-8"))
    del content["training"]["echo"]
    description.write_text(json.dumps(content), "utf-8")
    scored = ["--split", "dev", "--ptuning_checkpoint", tmp_path / "run"]
    evaluate(base, data, "cluener", tmp_path / "report", *scored)
    assert used(tmp_path / "report") is False
    said = refused(capsys, evaluate, base, data, "cluener", tmp_path / "no", *scored, "--echo", "true")
    assert "--echo is true" in said and "trained with false" in said


def test_other_methods_record_it_as_well(base, data, tmp_path):
    train(base, data, "cluener", tmp_path / "run", "--tuning", "lora", "--echo", "true", steps=1)
    evaluate(base, data, "cluener", tmp_path / "r", "--split", "dev", "--ptuning_checkpoint", tmp_path / "run")
    assert used(tmp_path / "r") is True


def test_a_run_resumes_only_with_its_own_setting(base, data, tmp_path, capsys):
    saving = ["--save_strategy", "steps", "--save_steps", "1"]
    train(base, data, "cluener", tmp_path / "run", "--echo", "false", *saving, steps=1)
    said = refused(capsys, train, base, data, "cluener", tmp_path / "run", *saving)
    assert "echo true" in said and "echo false" in said and "--overwrite_output_dir" in said


def test_heads_that_read_no_text_twice_refuse_it(base, data, tmp_path, capsys):
    for task, head in (("mood.yaml", "sequence_classification"), ("cmrc2018", "generation")):
        said = refused(
            capsys, train, base, data, task, tmp_path / "no", "--head", head, "--echo", "true"
        )  # fmt: skip
        assert "--echo true is for the heads token_classification and question_answering" in said and head in said
    files = ["train", "--model_name_or_path", str(base), "--train_file", str(data / "train.jsonl"), "--do_train"]
    assert "--echo belongs to a --task" in refused(capsys, command, [*files, "--echo", "true"])
    scored = ["evaluate", "--model_name_or_path", str(base), "--echo", "true"]
    assert "--echo belongs to a --task" in refused(capsys, command, scored)
    search = ["search", *flags(base, data, "mood.yaml"), "--head", "sequence_classification", "--echo", "true"]
    said = refused(capsys, command, [*search, "--output_dir", str(tmp_path / "search")])
    assert "--echo true is for the heads" in said and not (tmp_path / "search").exists()
    plan = Plan(
        str(base), {"tags": {"task": "cluener"}, "moods": {"task": str(data / "mood.yaml")}}, {"prefix": {}},
        common={"task_data": str(data), "head": "linear", "echo": True, "predict_split": "dev"},
    )  # fmt: skip
    with pytest.raises(ValueError, match="moods by prefix: --echo true is for the heads"):
        check_plan(plan, list(plan.tasks), list(plan.methods))
    assert check_plan(plan, ["tags"], list(plan.methods)).cells[0].flags["echo"] is True


def test_tasks_that_share_a_prefix_each_have_their_own(base, data, tmp_path, capsys):
    (tmp_path / "mix.yaml").write_text(
        f"tasks:\n  mood: {{task: {data}/mood.yaml, task_data: {data}, head: sequence_classification}}\n"
        f"  people: {{task: {data}/people.yaml, task_data: {data}}}\n  cluener: {{task_data: {data}}}\n",
        "utf-8",
    )
    words = ["train", "--task_mixture", str(tmp_path / "mix.yaml"), "--model_name_or_path", str(base), "--do_train",
             "--max_steps", "1", "--pre_seq_len", "2", "--disable_tqdm", "true"]  # fmt: skip
    command([*words, "--output_dir", str(tmp_path / "own")])
    assert recorded(tmp_path / "own") == {"people": False, "cluener": True}
    for task, echo in (("people.yaml", False), ("cluener", True)):
        evaluate(base, data, task, tmp_path / "r", "--split", "dev", "--ptuning_checkpoint", tmp_path / "own")
        assert used(tmp_path / "r") is echo
    command([*words, "--output_dir", str(tmp_path / "flag"), "--echo", "true"])
    assert recorded(tmp_path / "flag") == {"people": True, "cluener": True}
    further = [*words, "--output_dir", str(tmp_path / "no"), "--ptuning_checkpoint", str(tmp_path / "own")]
    said = refused(capsys, command, [*further, "--echo", "true"])
    assert re.search("--echo is true.*trained with false", said)
    (tmp_path / "mix.yaml").write_text(
        f"tasks: {{mood: {{task: {data}/mood.yaml, task_data: {data}, head: sequence_classification}}}}", "utf-8"
    )
    said = refused(capsys, command, [*words, "--output_dir", str(tmp_path / "no"), "--echo", "true"])
    assert "--echo true is for the heads" in said and "mix.yaml" in said
