"""Attention over the source that is not causal: against dense masks written out, and wherever prompts are read."""

from __future__ import annotations

import json

import pytest
import tiny_base
import tiny_tokenizer
import torch
from conftest import TINY
from transformers import AttentionInterface, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from chatglm_ptuning import (
    ChatGLMConfig,
    ChatGLMForConditionalGeneration,
    ChatGLMForQuestionAnswering,
    ChatGLMForSequenceClassification,
    ChatGLMForTokenClassification,
    ChatGLMTokenizer,
)
from chatglm_ptuning.data.collate import PaddingCollator, prompt_length, row_length
from chatglm_ptuning.data.forms import Columns
from chatglm_ptuning.data.preprocess import Preprocessor
from chatglm_ptuning.evaluation.candidates import score_candidates
from chatglm_ptuning.evaluation.generate import generate_answers
from chatglm_ptuning.model.chat_turn import source_length
from chatglm_ptuning.prefix.checkpoint import METADATA_FILE
from chatglm_ptuning.training.run import main

ALIKE = {"rtol": 1e-4, "atol": 1e-5}
LENGTHS, SOURCES = [7, 5, 6], [4, 5, 0]  # of the three rows of `ids`: a part, all, and nothing is source
CHATS = [
    [{"role": "user", "content": "你是谁"}, {"role": "assistant", "content": "我是甲"},
     {"role": "user", "content": "天气"}, {"role": "assistant", "content": "有雨"}],
    [{"role": "user", "content": "散步"}, {"role": "assistant", "content": "好吗"}],
]  # fmt: skip


def batch_of(ids, side, lengths=LENGTHS, sources=SOURCES):
    rows = [{"input_ids": row[:length].tolist(), "s": s} for row, length, s in zip(ids, lengths, sources, strict=True)]
    return PaddingCollator(0, side, source_length=lambda row: row["s"])(rows)


def written_out(length: int, source: int) -> torch.Tensor:
    """Who sees whom in one row without padding, in plain loops: `[1, 1, length, length]`."""
    sees = [[key <= query or max(key, query) < source for key in range(length)] for query in range(length)]
    return torch.tensor(sees)[None, None]


def dense_logits(model, row: torch.Tensor, source: int) -> torch.Tensor:
    """`[length, vocabulary]` of one row by a ready-made mask over all pairs."""
    return model(row[None], attention_mask=written_out(len(row), source)).logits[0]


@pytest.fixture(params=["without a prefix", "with a prefix", "a prefix per row"])
def either(request, load, prefix_folders, trained):
    """Makes a model; and selects the prefix of one row of `ids`, for passes of a row alone."""

    def make(**arguments):
        if request.param != "a prefix per row":
            model = (load if request.param == "without a prefix" else trained)(**arguments)
            return model.eval(), lambda row: None
        model = load(**arguments).eval()
        names = ["a", None, "b"]
        for name in ("a", "b"):
            model.load_prefix(prefix_folders[name], name=name)
        model.set_prefix(names)
        return model, lambda row: model.set_prefix(names if row is None else names[row])

    return make


# The forward pass


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_rows_equal_dense_masks_of_rows_alone(either, ids, attention, side):
    model, _ = either(attn_implementation=attention)
    reference, select_alone = either(attn_implementation="eager")
    logits = model(**batch_of(ids, side)).logits
    for row, (length, source) in enumerate(zip(LENGTHS, SOURCES, strict=True)):
        place = slice(7 - length, 7) if side == "left" else slice(0, length)
        select_alone(row)
        torch.testing.assert_close(logits[row, place], dense_logits(reference, ids[row, :length], source), **ALIKE)


@torch.no_grad()
def test_flex_attention_gets_the_same_mask(trained, ids):
    masks, original = [], ALL_ATTENTION_FUNCTIONS["flex_attention"]

    def recording(module, query, key, value, attention_mask, **kwargs):
        masks.append(attention_mask)
        return torch.zeros_like(query).transpose(1, 2), None

    AttentionInterface.register("flex_attention", recording)
    try:
        with torch.compiler.set_stance("force_eager"):
            trained(attn_implementation="flex_attention")(**batch_of(ids, "right"))
    finally:
        AttentionInterface.register("flex_attention", original)
    where = torch.meshgrid(torch.arange(3), torch.arange(7), torch.arange(4 + 7), indexing="ij")
    seen = masks[0].mask_mod(where[0], torch.zeros((), dtype=torch.long), where[1], where[2])
    for row, (length, source) in enumerate(zip(LENGTHS, SOURCES, strict=True)):
        assert seen[row, :, :4].all(), "the prefix"
        assert torch.equal(seen[row, :length, 4 : 4 + length], written_out(length, source)[0, 0])
        assert not seen[row, :length, 4 + length :].any()


@torch.no_grad()
def test_a_token_of_the_source_reaches_earlier_ones_and_no_other_token_does(trained, ids):
    model = trained().eval()
    changed = ids.clone()
    changed[:, 3] = changed[:, 3] % 90 + 3
    behind = ids.clone()
    behind[:, 5] = behind[:, 5] % 90 + 3
    source = torch.tensor([[1, 1, 1, 1, 0, 0, 0]]).expand(3, -1)

    def states(tokens, **arguments):
        return model.transformer(tokens, **arguments).last_hidden_state

    def moved(tokens, **arguments):
        return (states(tokens, **arguments) - states(ids, **arguments)).abs().amax(-1).gt(1e-4).all(0).tolist()

    assert moved(changed) == [False] * 3 + [True] * 4
    assert moved(changed, source_mask=source) == [True] * 7
    assert moved(behind, source_mask=source) == [False] * 5 + [True] * 2
    nothing = torch.zeros_like(source)
    torch.testing.assert_close(states(ids, source_mask=nothing), states(ids), **ALIKE)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(trained, ids, reentrant):
    batch = batch_of(ids, "right")
    labels = ids.masked_fill(batch["attention_mask"] == 0, -100)
    gradients = []
    for checkpointing in (False, True):
        model = trained().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(**batch, labels=labels).loss.backward()
        gradients.append(model.transformer.prefix_encoder.embedding.weight.grad)
    torch.testing.assert_close(*gradients, **ALIKE)


def test_what_cannot_be_followed_is_refused(trained, ids, monkeypatch):
    model = trained().eval()
    source = torch.ones_like(ids)
    with pytest.raises(ValueError, match=r"shape \(3, 6\)"):
        model(ids, source_mask=source[:, 1:])
    late = torch.tensor([[1, 1, 0, 0, 0, 0, 0], [1, 0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 1]])
    with pytest.raises(ValueError, match=r"rows \[1, 2\]"):
        model(ids, source_mask=late)
    with pytest.raises(ValueError, match="ready made"):
        model(ids, source_mask=source, attention_mask=torch.ones(3, 1, 7, 7, dtype=torch.bool))
    with pytest.raises(ValueError, match="packed"):
        model(ids, source_mask=source, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3]]), use_cache=False)
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="filled cache"):
        model(ids, source_mask=source, past_key_values=cache)
    model.config._attn_implementation_internal = "flash_attention_2"
    for prefix in ("default", None):
        model.set_prefix(prefix)
        with pytest.raises(ValueError, match=r"'flash_attention_2' is.*sdpa, eager, flex_attention"):
            model(ids, source_mask=source)


# Caches and generation


@pytest.mark.parametrize("make_cache", [lambda config: None, lambda config: StaticCache(config, max_cache_len=9)])
@torch.no_grad()
def test_steps_on_a_cache_equal_one_pass(either, ids, make_cache):
    model, _ = either()
    source = (torch.arange(7) < torch.tensor([4, 3, 1])[:, None]).long()
    whole = model(ids, source_mask=source).logits
    first = model(ids[:, :4], source_mask=source[:, :4], past_key_values=make_cache(model.config), use_cache=True)
    second = model(ids[:, 4:6], past_key_values=first.past_key_values)
    third = model(ids[:, 6:], source_mask=source[:, 6:], past_key_values=second.past_key_values)
    torch.testing.assert_close(torch.cat((first.logits, second.logits, third.logits), dim=1), whole, **ALIKE)


GENERATION = {
    "greedy": {},
    "no cache": {"use_cache": False},
    "beams": {"num_beams": 3},
    "static cache": {"cache_implementation": "static"},
    "beams, static cache": {"num_beams": 2, "cache_implementation": "static"},
    "looked up in the prompt": {"prompt_lookup_num_tokens": 2},
}


@pytest.mark.parametrize("settings", GENERATION.values(), ids=GENERATION.keys())
@torch.no_grad()
def test_generation_equals_passes_over_everything(either, ids, settings):
    rows = 1 if "prompt_lookup_num_tokens" in settings else 3
    model, select = either()
    if rows == 1:
        select(0)
    batch = batch_of(ids[:rows], "left", LENGTHS[:rows], [4, 5, 6][:rows])
    del batch["position_ids"]
    output = model.generate(**batch, **settings, max_new_tokens=4, do_sample=False, eos_token_id=None)
    if rows == 3:
        causal = {name: value for name, value in batch.items() if name != "source_mask"}
        other = model.generate(**causal, **settings, max_new_tokens=4, do_sample=False, eos_token_id=None)
        assert not torch.equal(output, other), "the mask matters"
    if "num_beams" in settings:
        expected = model.generate(
            **batch, num_beams=settings["num_beams"], use_cache=False, max_new_tokens=4, do_sample=False,
            eos_token_id=None,
        )  # fmt: skip
        assert torch.equal(output, expected)
        return
    reference, select = either(attn_implementation="eager")
    for row, (length, source) in enumerate(zip(LENGTHS[:rows], [4, 5, 6], strict=False)):
        select(row)
        answer = ids[row, :length]
        for _ in range(4):
            answer = torch.cat((answer, dense_logits(reference, answer, source)[-1:].argmax(-1)))
        assert output[row, -4:].tolist() == answer[-4:].tolist()


@torch.no_grad()
def test_a_source_in_pieces_is_refused_by_generate(trained, ids):
    with pytest.raises(ValueError, match="in one call"):
        trained().generate(ids, source_mask=torch.ones_like(ids), prefill_chunk_size=3, max_new_tokens=2)


@torch.no_grad()
def test_candidates_equal_passes_one_by_one(load, prefix_folders):
    prompts, candidates = [[5, 6, 7], [9, 8, 7, 6, 5, 4], [20, 21]], [[40, 2], [40, 41, 2], [51], [51, 52, 53, 2]]
    model = load().eval()
    reference = load(attn_implementation="eager").eval()
    for name in ("a", "b"):
        for each in (model, reference):
            each.load_prefix(prefix_folders[name], name=name)
    model.set_prefix(["a", None, "b"])
    scores = score_candidates(model, prompts, candidates, batch_size=2, chunk_size=2, source_attention="bidirectional")
    for prompt, prefix, row in zip(prompts, ["a", None, "b"], scores, strict=True):
        reference.set_prefix(prefix)
        for candidate, score in zip(candidates, row, strict=True):
            logits = dense_logits(reference, torch.tensor(prompt + candidate), len(prompt))[len(prompt) - 1 : -1]
            alone = logits.log_softmax(-1)[range(len(candidate)), candidate].sum()
            torch.testing.assert_close(score, alone, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="source_attention must be one of causal, bidirectional, got 'both'"):
        score_candidates(model, prompts, candidates, source_attention="both")


# Heads


@pytest.mark.parametrize(
    "head", [ChatGLMForSequenceClassification, ChatGLMForTokenClassification, ChatGLMForQuestionAnswering]
)
@torch.no_grad()
def test_heads_read_whole_rows(tiny_base, ids, head):
    model = head.from_pretrained(tiny_base, attn_implementation="eager").eval()
    examples = [{"input_ids": row[:length].tolist()} for row, length in zip(ids, LENGTHS, strict=True)]
    batch = PaddingCollator(0, source_length=row_length)(examples)
    assert torch.equal(batch["source_mask"], batch["attention_mask"])
    output = model(**batch)
    for row, length in enumerate(LENGTHS):
        tokens = ids[row : row + 1, :length]
        alone = model(tokens, attention_mask=torch.ones(1, 1, length, length, dtype=torch.bool))
        for name, values in alone.items():
            if name != "past_key_values":
                together = (
                    output[name][row, :length] if head is not ChatGLMForSequenceClassification else output[name][row]
                )
                torch.testing.assert_close(together, values[0], **ALIKE)


# What is source


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of random bases with a tokenizer, by chat format."""
    folders = {}
    for chat_format in ("chatglm2", "chatglm3"):
        folders[chat_format] = tmp_path_factory.mktemp(chat_format) / "base"
        tokenizer = tiny_tokenizer.train(folders[chat_format].parent, chat_format)
        torch.manual_seed(0)
        config = ChatGLMConfig(**TINY | {"padded_vocab_size": len(tokenizer) + 8})
        ChatGLMForConditionalGeneration(config).save_pretrained(folders[chat_format])
        tokenizer.save_pretrained(folders[chat_format])
    return folders


def test_no_source_token_is_ever_learned(bases):
    for chat_format, base in bases.items():
        tokenizer = ChatGLMTokenizer.from_pretrained(base)
        rows = [{"messages": chat} for chat in CHATS]
        examples, _ = Preprocessor(tokenizer, Columns(), 64, 32).for_training(rows)
        examples.append({"input_ids": [5, 6], "labels": [-100, -100]})  # what fills batches up
        examples.append({"input_ids": [3, 4, 5], "labels": [-100, -100, 5]})  # a plain text
        batch = PaddingCollator(0, source_length=prompt_length(tokenizer))(examples)
        source, learned = batch["source_mask"].bool(), batch["labels"] != -100
        assert not (source & learned).any()
        for example, row in zip(examples, source.tolist(), strict=True):
            ids, end = example["input_ids"], sum(row)
            assert row[:end] == [True] * end
            if len(ids) > 3:
                text = tokenizer.decode(ids[:end])
                assert "你是谁" in text or "散步" in text
                if chat_format == "chatglm3":  # the first prompt of a conversation, whatever is learned of it
                    assert ids[end - 1] == tokenizer.convert_tokens_to_ids("<|assistant|>")
                    assert ids[:end].count(ids[end - 1]) == 1
                else:  # all in front of the answer
                    assert example["labels"][end] != -100


def test_the_source_of_a_prompt_is_that_of_the_row_it_was_trained_as(bases):
    tokenizer = ChatGLMTokenizer.from_pretrained(bases["chatglm3"])
    preprocessor = Preprocessor(tokenizer, Columns(), 64, 32)
    for chat in CHATS:
        (row,), _ = preprocessor.for_training([{"messages": chat}])
        (prompt,), _ = preprocessor.for_generation([{"messages": chat}])
        assert source_length(tokenizer, prompt["input_ids"]) == source_length(
            tokenizer, row["input_ids"], row["labels"]
        )


# The record


def test_a_prefix_remembers_how_it_was_trained(load, trained, tmp_path, ids):
    model = trained(source_attention="bidirectional")
    assert model.source_attention_of_row() == "bidirectional"
    model.save_prefix(tmp_path / "both")
    trained().save_prefix(tmp_path / "causal")
    model.set_prefix(None)
    assert model.source_attention_of_row() == "causal"
    plain = load()
    assert plain.source_attention_of_row() == "causal"
    for name in ("both", "causal"):
        plain.load_prefix(tmp_path / name, name=name)
    plain.set_prefix(["both", "causal", None])
    assert [plain.source_attention_of_row(row) for row in range(3)] == ["bidirectional", "causal", "causal"]
    plain.set_prefix("both")
    plain.save_prefix(tmp_path / "again")
    going_on = load(pre_seq_len=2)
    going_on.load_prefix(tmp_path / "again")
    assert going_on.config.source_attention == "bidirectional"
    description = tmp_path / "causal" / METADATA_FILE
    fields = json.loads(description.read_text("utf-8"))
    description.write_text(json.dumps(fields | {"source_attention": "backwards"}), "utf-8")
    with pytest.raises(ValueError, match="source_attention must be one of causal, bidirectional, got 'backwards'"):
        plain.load_prefix(tmp_path / "causal")
    del fields["source_attention"]  # of an earlier version
    description.write_text(json.dumps(fields), "utf-8")
    plain.load_prefix(tmp_path / "causal", name="old")
    assert plain.source_attention_of_row() == "causal"


def test_the_configuration_has_it_only_where_it_is_set(tiny_config, tmp_path):
    tiny_config().save_pretrained(tmp_path)
    assert "source_attention" not in (tmp_path / "config.json").read_text("utf-8")
    tiny_config(source_attention="bidirectional").save_pretrained(tmp_path)
    assert ChatGLMConfig.from_pretrained(tmp_path).source_attention == "bidirectional"
    with pytest.raises(ValueError, match="source_attention must be one of causal, bidirectional, got 'full'"):
        tiny_config(source_attention="full")


@torch.no_grad()
def test_evaluation_and_chat_follow_the_record(bases, tmp_path):
    base = bases["chatglm3"]
    tokenizer = ChatGLMTokenizer.from_pretrained(base)
    tiny_base.make_prefix(base, tmp_path / "causal", "今天有雨")
    fields = json.loads((tmp_path / "causal" / METADATA_FILE).read_text("utf-8"))
    (tmp_path / "both").mkdir()
    (tmp_path / "both" / "prefix_model.safetensors").write_bytes(
        (tmp_path / "causal" / "prefix_model.safetensors").read_bytes()
    )
    (tmp_path / "both" / METADATA_FILE).write_text(json.dumps(fields | {"source_attention": "bidirectional"}), "utf-8")
    model = ChatGLMForConditionalGeneration.from_pretrained(base, dtype=torch.float32).eval()
    for name in ("causal", "both"):
        model.load_prefix(tmp_path / name, name=name)
    prompts = [tokenizer.build_chat_input(prompt, [])["input_ids"][0].tolist() for prompt in tiny_base.ANSWERS]
    examples = [{"input_ids": prompt} for prompt in prompts]
    seen = []
    model.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("source_mask")), with_kwargs=True
    )
    settings = {"batch_size": 4, "max_new_tokens": 8, "progress": False}
    answers, scores = {}, {}
    for name in ("causal", "both"):
        model.set_prefix(name)
        answers[name] = generate_answers(model, tokenizer, examples, **settings)
        scores[name] = torch.stack(score_candidates(model, prompts, [[40, 2], [41]]))
        assert any(mask is not None for mask in seen) == (name == "both")
        seen.clear()
        other = "causal" if name == "both" else "bidirectional"
        generate_answers(model, tokenizer, examples, source_attention=other, **settings)
        assert any(mask is not None for mask in seen) == (name == "causal")
        seen.clear()
    assert answers["both"] != answers["causal"]
    assert (scores["both"] - scores["causal"]).abs().max() > 1e-3
    model.set_prefix(["both", "causal"] * 3)
    mixed = generate_answers(model, tokenizer, examples, **settings)
    assert mixed == [answers[("both", "causal")[row % 2]][row] for row in range(6)]


@torch.no_grad()
def test_a_chat_keeps_the_cache_of_its_first_prompt(bases):
    base = bases["chatglm3"]
    tokenizer = ChatGLMTokenizer.from_pretrained(base)
    model = ChatGLMForConditionalGeneration.from_pretrained(
        base, dtype=torch.float32, source_attention="bidirectional"
    ).eval()
    history, cache = [], None
    for query in ("你是谁", "天气很好"):
        ids = tokenizer.build_chat_input(query, history)["input_ids"][0]
        source = source_length(tokenizer, ids.tolist())
        assert (source < len(ids)) == bool(history)
        greedy = {"do_sample": False, "max_new_tokens": 6}
        with_cache = list(
            model.stream_chat(
                tokenizer, query, history, past_key_values=cache, return_past_key_values=True, **greedy
            )
        )  # fmt: skip
        response, after, cache = with_cache[-1]
        assert model.chat(tokenizer, query, history, **greedy) == (response, after)
        for token in cache.cached_ids[len(ids) :]:
            mask = (torch.arange(len(ids)) < source)[None]
            logits = model(ids[None], source_mask=mask).logits[0, -1]
            assert token == logits.argmax()
            ids = torch.cat((ids, torch.tensor([token])))
        assert cache.cached_ids == ids.tolist()
        history = after
    # The next turn keeps it, another first prompt keeps nothing of its source.
    longer = tokenizer.build_chat_input("雨", history)["input_ids"][0].tolist()
    assert int(model._reusable_part(cache, longer, source).get_seq_length()) > source
    other = tokenizer.build_chat_input("你是甲", [])["input_ids"][0].tolist()
    assert model._reusable_part(cache, other, len(other)) is None


# Training


def test_training_records_it_and_resuming_otherwise_is_refused(bases, tmp_path, capsys):
    rows = [{"prompt": prompt, "response": answer} for prompt, answer in tiny_base.ANSWERS.items()]
    data = tmp_path / "rows.json"
    data.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8")
    flags = [
        "--model_name_or_path", str(bases["chatglm3"]), "--train_file", str(data), "--validation_file", str(data),
        "--do_train", "--do_eval", "--do_predict", "--pre_seq_len", "4", "--per_device_train_batch_size", "3",
        "--max_source_length", "48", "--max_target_length", "16", "--output_dir", str(tmp_path / "run"),
        "--dtype", "float32", "--report_to", "none", "--save_steps", "2",
    ]  # fmt: skip
    main([*flags, "--max_steps", "4", "--source_attention", "bidirectional"])
    for folder in ("run", "run/checkpoint-2"):
        fields = json.loads((tmp_path / folder / METADATA_FILE).read_text("utf-8"))
        assert fields["source_attention"] == "bidirectional"
    loss = json.loads((tmp_path / "run" / "eval_results.json").read_text("utf-8"))["eval_loss"]

    # The loss on the validation rows is that of dense masks, one row at a time.
    model = ChatGLMForConditionalGeneration.from_pretrained(
        bases["chatglm3"], dtype=torch.float32, attn_implementation="eager"
    ).eval()
    model.load_prefix(tmp_path / "run")
    tokenizer = ChatGLMTokenizer.from_pretrained(bases["chatglm3"])
    total = count = 0
    for example in Preprocessor(tokenizer, Columns(), 48, 16).for_training(rows)[0]:
        ids, labels = torch.tensor(example["input_ids"]), torch.tensor(example["labels"])
        source = int((labels != -100).long().argmax())
        losses = torch.nn.functional.cross_entropy(
            dense_logits(model, ids, source)[:-1].detach(), labels[1:], reduction="none"
        )
        total, count = total + losses.sum().item(), count + int((labels != -100).sum())
    assert loss == pytest.approx(total / count, rel=1e-4)

    with pytest.raises(SystemExit):
        main([*flags, "--max_steps", "6"])
    assert "was trained with --source_attention bidirectional, this run has causal" in capsys.readouterr().err
    evaluated = [flag for flag in flags if flag not in ("--do_train", "--pre_seq_len", "4")]
    evaluated += ["--ptuning_checkpoint", str(tmp_path / "run"), "--overwrite_output_dir"]
    with pytest.raises(SystemExit):
        main([*evaluated, "--source_attention", "causal"])
    assert "was trained with bidirectional" in capsys.readouterr().err
