"""Classification and question answering heads: pooling, losses, freezing, and heads inside prefix checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoModelForSequenceClassification, PreTrainedModel

import chatglm_ptuning  # noqa: F401  (registers the Auto classes)
from chatglm_ptuning.model.modeling_chatglm import ChatGLMForConditionalGeneration, ChatGLMModel
from chatglm_ptuning.model.modeling_heads import (
    ChatGLMForQuestionAnswering,
    ChatGLMForSequenceClassification,
    ChatGLMForTokenClassification,
)
from chatglm_ptuning.prefix.formats.kit import WEIGHTS_FILE

CLASSES = (ChatGLMForSequenceClassification, ChatGLMForTokenClassification, ChatGLMForQuestionAnswering)
HEADS = {
    ChatGLMForSequenceClassification: "classifier_head",
    ChatGLMForTokenClassification: "classifier_head",
    ChatGLMForQuestionAnswering: "qa_outputs",
}
ALIKE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture
def make(tiny_base) -> Callable[..., PreTrainedModel]:
    """Loads the tiny base with a head; the same head every time."""

    def load(cls=ChatGLMForSequenceClassification, **arguments):
        torch.manual_seed(5)
        return cls.from_pretrained(tiny_base, **arguments)

    return load


def with_prefix(model: PreTrainedModel, seed: int = 4) -> PreTrainedModel:
    """Gives the prefix, and the head, values that count as trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def head_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if "transformer." not in name}


# Parameters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cls", CLASSES)
def test_prefix_and_head_are_trainable_and_in_float32(make, ids, cls, dtype):
    model = make(cls, pre_seq_len=4, dtype=dtype)
    head = HEADS[cls]
    trainable = {name: value.dtype for name, value in model.named_parameters() if value.requires_grad}
    names = ("transformer.prefix_encoder.embedding.weight", f"{head}.weight", f"{head}.bias")
    assert trainable == dict.fromkeys(names, torch.float32)
    assert {value.dtype for value in model.parameters() if not value.requires_grad} == {dtype}
    model.half()
    assert getattr(model, head).weight.dtype == torch.float32
    assert all(value.requires_grad for value in make(cls).parameters()), "without a prefix nothing is frozen"


@pytest.mark.parametrize("cls", CLASSES)
def test_plain_construction(tiny_config, cls):
    model = cls(tiny_config(pre_seq_len=3, num_labels=2))
    trainable = {name.split(".")[0] for name, value in model.named_parameters() if value.requires_grad}
    assert trainable == {"transformer", HEADS[cls]}
    assert not model.transformer.embedding.word_embeddings.weight.requires_grad


def test_auto_class(tiny_base):
    model = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=3)
    assert type(model) is ChatGLMForSequenceClassification and model.classifier_head.weight.shape == (3, 32)


def test_a_whole_classifier_saves_and_loads(make, tmp_path, ids):
    model = make(num_labels=3)
    model.save_pretrained(tmp_path)
    assert {"classifier_head.weight", "classifier_head.bias"} < set(load_file(tmp_path / "model.safetensors"))
    again = ChatGLMForSequenceClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(again(ids).logits, model(ids).logits)
    # The base inside is the base, for a language model too.
    assert ChatGLMForConditionalGeneration.from_pretrained(tmp_path).generate(ids, max_new_tokens=1).shape == (3, 8)


# Sequence classification


@pytest.mark.parametrize("prefix", [None, 4])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_pools_the_last_real_token_after_the_norm(make, tiny_base, ids, side, prefix):
    model = with_prefix(make(num_labels=3, pre_seq_len=prefix)) if prefix else make(num_labels=3)
    lengths = [7, 4, 1]
    width = torch.arange(7)
    real = torch.stack([width >= 7 - length if side == "left" else width < length for length in lengths])
    rows = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        rows[row, real[row]] = ids[row, :length]
    logits = model(rows, attention_mask=real.long()).logits
    assert logits.shape == (3, 3)
    for row, length in enumerate(lengths):
        states = model.transformer(ids[row : row + 1, :length]).last_hidden_state[0, -1]
        torch.testing.assert_close(logits[row], model.classifier_head(states), **ALIKE)
    if side == "right":  # without a mask the pads are found by their id
        torch.testing.assert_close(model(rows).logits, logits, **ALIKE)
    if prefix is None:
        base = ChatGLMModel.from_pretrained(tiny_base)
        assert torch.equal(base(ids).last_hidden_state, model.transformer(ids).last_hidden_state)


@torch.no_grad()
def test_a_pad_id_inside_a_row_is_a_token(make, ids):
    model = make()
    ids[0, 3] = 0
    states = model.transformer(ids).last_hidden_state[:, -1]
    torch.testing.assert_close(model(ids).logits, model.classifier_head(states))
    ids[0, 6] = 0
    masked = model(ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(masked, model.classifier_head(model.transformer(ids).last_hidden_state[:, -1]))
    embeddings = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeddings).logits, masked)


def test_rows_without_a_token_are_refused(make, ids):
    mask = torch.ones_like(ids)
    mask[1] = 0
    with pytest.raises(ValueError, match=r"Rows \[1\] .*no real token"):
        make()(ids, attention_mask=mask)


@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification", "regression", None])
def test_losses_of_sequence_classification(make, ids, problem):
    model = make(num_labels=3, problem_type=problem)
    logits = model(ids).logits
    single, several = torch.tensor([2, 0, 1]), torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1]])
    expected = {
        "single_label_classification": (single, functional.cross_entropy(logits, single)),
        "multi_label_classification": (several, functional.binary_cross_entropy_with_logits(logits, several)),
        "regression": (several, functional.mse_loss(logits, several)),
    }
    kinds = [problem] if problem else ["single_label_classification", "multi_label_classification"]
    for kind in kinds:
        labels, loss = expected[kind]
        torch.testing.assert_close(model(ids, labels=labels).loss, loss)
        shared = model(ids, labels=labels, num_items_in_batch=torch.tensor(4 * labels.numel())).loss
        torch.testing.assert_close(shared, loss / 4)
    assert model.config.problem_type == problem, "one batch must not decide for the next"


def test_one_label_means_regression(make, ids):
    model = make(num_labels=1)
    labels = torch.tensor([0.5, -1.0, 2.0])
    torch.testing.assert_close(
        model(ids, labels=labels).loss, functional.mse_loss(model(ids).logits.squeeze(-1), labels)
    )


def test_classifier_dropout(make, ids):
    model = make(classifier_dropout=0.5)
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)
    assert make().train().dropout.p == 0.0


# Tokens and spans


def test_token_classification(make, ids):
    model = make(ChatGLMForTokenClassification, num_labels=4)
    output = model(ids, output_hidden_states=True)
    assert output.logits.shape == (3, 7, 4) and len(output.hidden_states) == 3
    torch.testing.assert_close(output.logits, model.classifier_head(model.transformer(ids).last_hidden_state))
    labels = ids % 4
    labels[0] = -100
    expected = functional.cross_entropy(output.logits[1:].flatten(0, 1), labels[1:].flatten())
    torch.testing.assert_close(model(ids, labels=labels).loss, expected)
    torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=28).loss, expected / 2)
    assert model(ids, labels=torch.full_like(ids, -100)).loss == 0


def test_question_answering(make, ids):
    model = make(ChatGLMForQuestionAnswering)
    output = model(ids)
    assert output.start_logits.shape == output.end_logits.shape == (3, 7)
    starts, ends = torch.tensor([0, 2, 6]), torch.tensor([1, 6, 6])
    expected = (
        functional.cross_entropy(output.start_logits, starts) + functional.cross_entropy(output.end_logits, ends)
    ) / 2
    torch.testing.assert_close(model(ids, start_positions=starts, end_positions=ends).loss, expected)
    torch.testing.assert_close(model(ids, start_positions=starts[:, None], end_positions=ends[:, None]).loss, expected)
    # A window without the answer teaches nothing, and no loss is NaN.
    outside = {"start_positions": torch.tensor([0, -1, 7]), "end_positions": torch.tensor([1, -1, 9])}
    alone = model(ids[:1], start_positions=starts[:1], end_positions=ends[:1]).loss
    torch.testing.assert_close(model(ids, **outside).loss, alone)
    assert model(ids[1:], **{name: value[1:] for name, value in outside.items()}).loss == 0


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_reach_prefix_and_head_with_checkpointing(make, ids, cls, reentrant):
    labels = {
        ChatGLMForSequenceClassification: {"labels": torch.tensor([0, 1, 1])},
        ChatGLMForTokenClassification: {"labels": ids % 2},
        ChatGLMForQuestionAnswering: {"start_positions": ids[:, 0] % 7, "end_positions": ids[:, 1] % 7},
    }[cls]
    gradients = []
    for checkpointing in (False, True):
        model = with_prefix(make(cls, pre_seq_len=4, prefix_dropout=0.0, dtype=torch.float32)).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(ids, **labels).loss.backward()
        gradients.append({name: value.grad for name, value in model.named_parameters() if value.grad is not None})
    assert len(gradients[0]) == 3 and gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, gradients[1][name])


def test_a_base_in_bfloat16(make, ids):
    model = make(pre_seq_len=4, dtype=torch.bfloat16).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(ids, labels=torch.tensor([0, 1, 0]))
    assert output.logits.dtype == output.loss.dtype == torch.float32
    output.loss.backward()


# Heads in prefix checkpoints


@pytest.mark.parametrize("start", [{}, {"pre_seq_len": 4}, {"pre_seq_len": 9}], ids=str)
@pytest.mark.parametrize("cls", CLASSES)
def test_a_head_travels_with_its_prefix(make, tmp_path, ids, cls, start):
    model = with_prefix(make(cls, pre_seq_len=4))
    model.save_prefix(tmp_path)
    head = HEADS[cls]
    prefix = "transformer.prefix_encoder.embedding.weight"
    assert set(load_file(tmp_path / WEIGHTS_FILE)) == {prefix, f"{head}.weight", f"{head}.bias"}
    other = make(cls, **start)
    other.load_prefix(tmp_path)
    if start:  # its own head is the trainable prefix's; else the loaded one stays with the loaded prefix
        assert all(torch.equal(value, head_of(model)[name]) for name, value in head_of(other).items())
    other.check_prefix_is_trained()
    other.save_prefix(tmp_path / "again")
    for name, value in load_file(tmp_path / "again" / WEIGHTS_FILE).items():
        assert torch.equal(value, load_file(tmp_path / WEIGHTS_FILE)[name])
    for ours, theirs in zip(other(ids).to_tuple(), model(ids).to_tuple(), strict=False):
        if isinstance(ours, torch.Tensor):
            torch.testing.assert_close(ours, theirs)


@pytest.fixture
def folders(make, tmp_path) -> dict[str, Path]:
    """Two tasks for one base: prefixes with heads of their own."""
    found = {}
    for seed, name in enumerate(("mood", "topic")):
        found[name] = tmp_path / name
        with_prefix(make(pre_seq_len=3 + seed), seed).save_prefix(found[name])
    return found


@torch.no_grad()
def test_heads_switch_with_prefixes(make, folders, ids):
    alone = {}
    for name, folder in folders.items():
        model = make()
        model.load_prefix(folder)
        alone[name] = model(ids).logits
    model = with_prefix(make(pre_seq_len=2), 8)
    alone["default"] = model(ids).logits
    for name, folder in folders.items():
        model.load_prefix(folder, name)
    for name in ("mood", "default", "topic", "default", "mood"):
        model.set_prefix(name)
        torch.testing.assert_close(model(ids).logits, alone[name])
    model.set_prefix(["mood", "mood", None])
    torch.testing.assert_close(model(ids).logits[:2], alone["mood"][:2], **ALIKE)
    for refuse in (model.set_prefix, model.prefix_batch, lambda names: model(ids, prefix=names)):
        with pytest.raises(ValueError, match=r"one prefix .* mood, topic"):
            refuse(["mood", "topic", None])


@torch.no_grad()
def test_a_head_is_passed_with_its_prefix(make, folders, ids):
    model = with_prefix(make(pre_seq_len=2), 8)
    own = {None: model(ids, prefix=model.prefix_batch(None)).logits, "default": model(ids).logits}
    before = head_of(model)
    for name, folder in folders.items():
        model.load_prefix(folder, name)
    logits = {}
    for name in folders:
        model.set_prefix(name)
        logits[name] = model(ids).logits
    for selected in (None, "topic", "mood"):
        model.set_prefix(selected)
        for name in folders:
            for prefix in (name, [name] * 3, [name, None, name], model.prefix_batch(name)):
                torch.testing.assert_close(model(ids, prefix=prefix).logits[::2], logits[name][::2], **ALIKE)
        assert torch.equal(model(ids, prefix="default").logits, own["default"])
        assert torch.equal(model(ids, prefix=model.prefix_batch(None)).logits, own[None])
        assert model.selected_prefix == selected
    assert all(torch.equal(value, before[name]) for name, value in head_of(model).items())


def test_without_its_prefix_an_untrained_head_is_refused(make, folders):
    model = make()
    model.load_prefix(folders["mood"], "mood")
    model.check_prefix_is_trained()
    for plain in (model.prefix_batch(None), model.base_model.prefix_batch(None)):
        with pytest.raises(ValueError, match=r"classifier_head .*ChatGLMForSequenceClassification .*untrained"):
            model.check_prefix_is_trained(plain)
    model.check_prefix_is_trained(model.prefix_batch("mood"))


def test_a_missing_or_other_head_is_refused(make, folders, prefix_folders, tmp_path):
    three = make(num_labels=3)
    before = head_of(three)
    with pytest.raises(ValueError, match=r"classifier_head\.weight .*\(2, 32\), .*\(3, 32\)"):
        three.load_prefix(folders["mood"])
    with pytest.raises(ValueError, match=r"has no classifier_head\.weight, classifier_head\.bias"):
        three.load_prefix(prefix_folders["a"])
    with pytest.raises(ValueError, match=r"has no qa_outputs\.weight"):
        make(ChatGLMForQuestionAnswering).load_prefix(folders["mood"])
    # Heads for texts and for tokens have one name and one shape.
    tagger = with_prefix(make(ChatGLMForTokenClassification, pre_seq_len=3))
    tagger.save_prefix(tmp_path / "tags", head="token_classification", labels=["O", "B-PER"], task="names")
    with pytest.raises(ValueError, match=r"head token_classification .* sequence_class"):
        make().load_prefix(tmp_path / "tags")
    damaged = Path(shutil.copytree(folders["mood"], tmp_path / "damaged"))
    tensors = load_file(damaged / WEIGHTS_FILE)
    del tensors["classifier_head.bias"]
    save_file(tensors, damaged / WEIGHTS_FILE)
    with pytest.raises(ValueError, match=r"has no classifier_head\.bias"):
        make().load_prefix(damaged)
    assert three.prefix_names == [] and three.selected_prefix is None
    assert all(torch.equal(value, before[name]) for name, value in head_of(three).items())


def test_a_prefix_without_a_head_can_start_a_new_task(make, prefix_folders, ids):
    model = make(pre_seq_len=3)
    before = head_of(model)
    model.transformer.load_prefix(prefix_folders["a"])
    assert all(torch.equal(value, before[name]) for name, value in head_of(model).items())
    assert not model.transformer.prefix_encoder.is_untrained
    model(ids, labels=torch.tensor([0, 1, 1])).loss.backward()


def test_a_language_model_says_that_it_has_no_use_for_a_head(load, folders, caplog):
    load().load_prefix(folders["mood"])
    assert "classifier_head.weight" in caplog.text and "does not use" in caplog.text


def test_the_number_of_labels_is_part_of_the_saved_configuration(make, tmp_path):
    make(num_labels=5).config.save_pretrained(tmp_path)
    assert len(json.loads((tmp_path / "config.json").read_text())["id2label"]) == 5


def test_pads_are_no_places_for_an_answer(make, ids):
    model = make(ChatGLMForQuestionAnswering).eval()
    places = {"start_positions": torch.tensor([1]), "end_positions": torch.tensor([2])}
    alone = model(ids[:1, :4], **places).loss
    mask = (torch.arange(7) < 4).long()[None]
    torch.testing.assert_close(model(ids[:1], attention_mask=mask, **places).loss, alone)
