"""Batched generation with a tiny base that has learned a few answers by heart."""

from __future__ import annotations

import gc
import weakref

import instruction_rows
import pytest
import torch
from tiny_base import ANSWERS, make_base, make_prefix

from chatglm_ptuning.data.formats.registry import Columns
from chatglm_ptuning.evaluation import generate
from chatglm_ptuning.evaluation.generate import generate_answers
from chatglm_ptuning.model.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer
from chatglm_ptuning.serving.engine import offline
from chatglm_ptuning.serving.engine.passes import make_cache
from chatglm_ptuning.serving.engine.prefixes import RowPrefix

ROWS = [{"content": prompt, "summary": answer} for prompt, answer in ANSWERS.items()]


@pytest.fixture(scope="module", params=["chatglm3", "chatglm2"])
def folder(request, tmp_path_factory):
    return make_base(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return ChatGLMTokenizer.from_pretrained(folder)


@pytest.fixture
def model(folder):
    return ChatGLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def examples(tokenizer):
    return instruction_rows.prompts(tokenizer, ROWS, 64, 32, Columns("content", "summary"))[0]


def answers_of(model, tokenizer, examples, **changes):
    settings = {"batch_size": 3, "max_new_tokens": 24, "progress": False} | changes
    return generate_answers(model, tokenizer, [example["input_ids"] for example in examples], **settings)


def test_sampling_is_reproducible_by_seed_and_not_greedy(model, tokenizer, examples):
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(answers_of(model, tokenizer, examples, do_sample=True, temperature=8.0, top_p=0.95))
    assert drawn[0] == drawn[1] != drawn[2]
    with pytest.raises(ValueError, match=r"temperature=8.0 .* do_sample=True"):
        answers_of(model, tokenizer, examples, temperature=8.0)


def load(model, folder, name, text):
    model.load_prefix(make_prefix(folder, folder / f"prefix-{name}", text), name)


def test_answers_come_whole_and_in_order(model, tokenizer, examples):
    lengths = [len(example["input_ids"]) for example in examples]
    assert lengths != sorted(lengths) and lengths != sorted(lengths, reverse=True)
    assert answers_of(model, tokenizer, examples) == list(ANSWERS.values())


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("prefix", [None, "a"])
def test_a_batch_gives_what_single_rows_give(model, tokenizer, examples, folder, prefix, num_beams):
    load(model, folder, "a", "你好吗？我想去公园散步。")
    model.set_prefix(prefix)
    single = [answers_of(model, tokenizer, [example], num_beams=num_beams)[0] for example in examples]
    assert answers_of(model, tokenizer, examples, batch_size=4, num_beams=num_beams) == single
    assert answers_of(model, tokenizer, examples, batch_size=100, num_beams=num_beams) == single
    assert model.selected_prefix == prefix


def test_an_unknown_token_of_a_prompt_is_no_padding(model, tokenizer, examples, monkeypatch):
    """Both have the id 0, and `generate` guesses a mask from the ids unless it is given one."""
    start, rest = examples[0]["input_ids"][:3], examples[0]["input_ids"][3:]
    unknown = {"input_ids": [*start, tokenizer.unk_token_id, *rest]}
    given, original = [], model.generate
    monkeypatch.setattr(model, "generate", lambda **inputs: given.append(inputs) or original(**inputs))
    answers_of(model, tokenizer, [unknown, examples[2]], num_beams=2)
    missing = len(unknown["input_ids"]) - len(examples[2]["input_ids"])
    assert missing > 0
    assert given[0]["attention_mask"].tolist() == [
        [1] * len(unknown["input_ids"]),
        [0] * missing + [1] * len(examples[2]["input_ids"]),
    ]


def test_one_prefix_per_example_follows_the_order_of_the_examples(model, tokenizer, examples, folder):
    load(model, folder, "a", "你好吗？我想去公园散步。")
    load(model, folder, "b", "甲乙丙丁")
    names = [("a", "b", None)[index % 3] for index in range(len(examples))]
    expected = []
    for name, example in zip(names, examples, strict=True):
        model.set_prefix(name)
        expected += answers_of(model, tokenizer, [example])
    # Otherwise a mix-up would not show.
    for name in ("a", "b", None):
        model.set_prefix(name)
        assert answers_of(model, tokenizer, examples) != expected
    model.set_prefix(names)
    assert answers_of(model, tokenizer, examples, batch_size=2) == expected
    assert model.selected_prefix == tuple(names)
    model.set_prefix("a")
    for prefix in (names, model.prefix_batch(names)):
        assert answers_of(model, tokenizer, examples, batch_size=2, prefix=prefix) == expected
    plain = answers_of(model, tokenizer, examples, prefix=model.prefix_batch(None))
    assert plain == list(ANSWERS.values()) and model.selected_prefix == "a"
    model.set_prefix(names)
    with pytest.raises(ValueError, match=r"each of 6 rows, .* 1\."):
        answers_of(model, tokenizer, examples[:1])


def test_the_generation_settings_of_the_base_are_ignored(model, tokenizer, examples):
    model.generation_config.update(
        do_sample=True, temperature=5.0, top_p=0.9, top_k=50, max_length=12, repetition_penalty=3.0, min_new_tokens=20
    )
    before = model.generation_config
    assert answers_of(model, tokenizer, examples) == list(ANSWERS.values())
    assert model.generation_config is before and before.max_length == 12


def test_the_answer_has_at_most_max_new_tokens_whatever_the_prompt(model, tokenizer, examples):
    short = answers_of(model, tokenizer, examples, max_new_tokens=5)
    for text, whole in zip(short, ANSWERS.values(), strict=True):
        assert whole.startswith(text) and len(text) <= 5
    assert any(text != whole for text, whole in zip(short, ANSWERS.values(), strict=True))


def test_mode_gradients_and_random_state_are_as_before(model, tokenizer, examples):
    model.train()
    model.transformer.embedding.eval()
    state = torch.get_rng_state()
    first = answers_of(model, tokenizer, examples)
    assert model.training and model.transformer.encoder.training and not model.transformer.embedding.training
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled() and first == list(ANSWERS.values())


def test_the_state_is_restored_after_a_failure(model, tokenizer, examples, monkeypatch):
    model.train()
    settings = model.generation_config

    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(model, "generate", fail)
    monkeypatch.setattr(model.transformer.encoder.layers[-1].mlp, "forward", fail)
    for num_beams in (1, 2):
        with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
            answers_of(model, tokenizer, examples, num_beams=num_beams)
        assert model.training and model.generation_config is settings


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_the_engine_answers_as_generate(model, tokenizer, examples, folder, monkeypatch, penalty):
    load(model, folder, "a", "你好吗？我想去公园散步。")
    load(model, folder, "b", "甲乙丙丁")
    many = [{"input_ids": one["input_ids"][: len(one["input_ids"]) - cut]} for cut in range(3) for one in examples]
    prefix = [("a", "b", None)[index % 3] for index in range(len(many))]
    found = []
    for reason in (None, "so that generate answers"):
        monkeypatch.setattr(generate, "obstacle", lambda model, reason=reason: reason)
        found.append(answers_of(model, tokenizer, many, prefix=prefix, repetition_penalty=penalty))
    assert found[0] == found[1] and len(set(found[0])) > len(many) // 3


def test_a_prefix_of_many_prompts_is_copied_once(model, tokenizer, examples, folder, monkeypatch):
    load(model, folder, "a", "你好吗？我想去公园散步。")
    made = []

    class Counted(RowPrefix):
        @classmethod
        def of(cls, batch):
            made.append(batch.names)
            return RowPrefix.of(batch)

    monkeypatch.setattr(generate, "RowPrefix", Counted)
    prefix = [("a", None)[index % 2] for index in range(len(examples))]
    answers_of(model, tokenizer, examples, prefix=prefix, max_new_tokens=2)
    assert sorted(made) == [[], ["a"]]


def test_prompts_may_be_longer_than_seq_length(model, tokenizer, examples, monkeypatch):
    whole = answers_of(model, tokenizer, examples)
    monkeypatch.setattr(model.config, "seq_length", 8)
    assert answers_of(model, tokenizer, examples) == whole


def test_the_memory_of_the_answers_is_freed_at_once(model, tokenizer, examples, monkeypatch):
    made = []

    def make(*given):
        cache = make_cache(*given)
        made.append(weakref.ref(cache))
        return cache

    monkeypatch.setattr(offline, "make_cache", make)
    gc.disable()
    try:
        answers_of(model, tokenizer, examples)
        assert [cache() for cache in made] == [None]
    finally:
        gc.enable()


def test_answers_end_where_scores_are_not_finite(model, tokenizer, examples, monkeypatch):
    warnings = []
    monkeypatch.setattr(offline.logger, "warning_once", warnings.append)
    forward, steps = model.transformer.forward, []

    def broken(**given):
        steps.append(1)
        out = forward(**given)
        if len(steps) > 4:
            out.last_hidden_state[:1] = torch.nan  # of the first row
        return out

    whole = answers_of(model, tokenizer, examples)
    monkeypatch.setattr(model.transformer, "forward", broken)
    found = answers_of(model, tokenizer, examples, batch_size=len(examples))
    assert found != whole and any(text in whole for text in found)
    assert all(own.startswith(text) for own, text in zip(whole, found, strict=True))
    assert len(warnings) >= sum(own != text for own, text in zip(whole, found, strict=True))  # some lack the end alone
    assert all("NaN" in warning for warning in warnings)


def test_training_continues_as_without_answers_between_its_steps(folder, tokenizer, examples):
    """The answers are those of the prefix as it is now; modes, gradients and random numbers are left alone."""
    ids = torch.tensor([examples[0]["input_ids"]])
    found, answers = [], []
    for with_answers in (False, True):
        torch.manual_seed(0)
        model = ChatGLMForConditionalGeneration.from_pretrained(folder, pre_seq_len=4, dtype=torch.float32).train()
        model.gradient_checkpointing_enable()
        model.load_prefix(make_prefix(folder, folder / "start", "甲乙丙丁"))
        trainable = {name for name, value in model.named_parameters() if value.requires_grad}
        assert trainable and all("prefix_encoder" in name for name in trainable)
        optimizer = torch.optim.AdamW(model.transformer.prefix_encoder.parameters(), lr=0.5)
        for _ in range(3):
            loss = model(ids, labels=ids).loss
            if with_answers:  # between forward and backward pass, too
                answers.append(answers_of(model, tokenizer, examples))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if with_answers:
                answers.append(answers_of(model, tokenizer, examples))
        assert trainable == {name for name, value in model.named_parameters() if value.requires_grad}
        assert all(module.training for module in model.modules())
        found.append({name: value.detach().clone() for name, value in model.named_parameters()})
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    assert answers[1] == answers[2] != answers[-1]


def test_an_untrained_prefix_is_refused(folder, tokenizer, examples):
    model = ChatGLMForConditionalGeneration.from_pretrained(folder, pre_seq_len=4, dtype=torch.float32)
    with pytest.raises(ValueError, match="untrained"):
        answers_of(model, tokenizer, examples)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size .*at least 1.* 0"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"num_beams": 0}, "num_beams"),
    ],
)
def test_wrong_settings_are_refused(model, tokenizer, examples, changes, message):
    with pytest.raises(ValueError, match=message):
        answers_of(model, tokenizer, examples, **changes)


def test_an_empty_prompt_is_refused_and_no_examples_are_no_answers(model, tokenizer, examples):
    with pytest.raises(ValueError, match="Prompt 1 "):
        answers_of(model, tokenizer, [examples[0], {"input_ids": []}])
    assert answers_of(model, tokenizer, []) == []


@pytest.mark.parametrize(
    ("metadata", "content"), [("", "你好吗？"), ("", "一\n\n二"), ("", " 你好 "), ("getTemp", "tool_call(a='b')")]
)
def test_answer_text_reads_what_the_chat_format_writes(tokenizer, metadata, content):
    """What `for_generation` gives as reference, when the model answers exactly as the row does."""
    if tokenizer.chat_format == "chatglm2" and metadata:
        pytest.skip("ChatGLM2's format has no tools")
    turns = [{"role": "user", "content": "请问"}, {"role": "assistant", "metadata": metadata, "content": content}]
    rows = [{"conversations": turns}]
    prompt = instruction_rows.prompts(tokenizer, rows, 64, 64)[0][0]
    learned = instruction_rows.training_rows(tokenizer, rows, 64, 64)[0][0]["input_ids"]
    said = learned[len(prompt["input_ids"]) :]
    assert said[-1] == tokenizer.eos_token_id
    answer_text, padding = tokenizer.chat.answer_text, [tokenizer.pad_token_id] * 3
    assert answer_text(said + padding) == prompt["reference"].strip()
    for stop in tokenizer.chat.stop_ids:
        assert answer_text([*said[:-1], stop, *said]) == prompt["reference"].strip()
    assert answer_text(said[:-1]) == prompt["reference"].strip()
