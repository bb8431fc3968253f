"""Prompt tuning as a prefix, against PEFT's own forward pass with the embeddings in front of every row."""

import pytest
import torch
from peft import PeftModel, PromptEncoderConfig, PromptTuningConfig, get_peft_model

from chatglm_ptuning import (
    ChatGLMForConditionalGeneration,
    ChatGLMForQuestionAnswering,
    ChatGLMForSequenceClassification,
    ChatGLMForTokenClassification,
)
from chatglm_ptuning.tuning.load import load_tuned, prepare_tuning
from chatglm_ptuning.tuning.methods import PromptSettings

LENGTH = 5
MASK = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7, [0, 1, 1, 1, 1, 1, 1]])
SETTINGS = {
    "prompt": PromptSettings(LENGTH),
    "p_tuning": PromptSettings(LENGTH, encoder_hidden_size=24),
    "lstm": PromptSettings(LENGTH, encoder="lstm", encoder_hidden_size=24),
}


def load(base, cls, **arguments):
    torch.manual_seed(3)  # the head
    return cls.from_pretrained(base, num_labels=4, **arguments).eval()


def prepare(model, name):
    torch.manual_seed(7)
    return prepare_tuning(model, "prompt" if name == "prompt" else "p_tuning", prompt=SETTINGS[name])


def by_peft(model, name, tuning):
    """PEFT's own model around another copy of the base, with the same prompt."""
    config = model.config
    shared = {"task_type": "CAUSAL_LM", "num_virtual_tokens": LENGTH, "token_dim": config.hidden_size,
              "num_layers": config.num_layers, "num_attention_heads": config.num_attention_heads,
              "num_transformer_submodules": 1}  # fmt: skip
    if not isinstance(model, ChatGLMForConditionalGeneration):
        shared["task_type"] = "SEQ_CLS"
    if name == "prompt":
        settings = PromptTuningConfig(**shared)
    else:
        kind = "LSTM" if name == "lstm" else "MLP"
        settings = PromptEncoderConfig(encoder_reparameterization_type=kind, encoder_hidden_size=24, **shared)
    theirs = get_peft_model(model, settings)
    theirs.prompt_encoder["default"].load_state_dict(tuning.tokens.prompt_encoder.state_dict())
    return theirs


@pytest.mark.parametrize("name", list(SETTINGS))
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_and_gradients_are_those_of_peft(tiny_base, ids, name, attention):
    ours = load(tiny_base, ChatGLMForConditionalGeneration, attn_implementation=attention)
    tuning = prepare(ours, name)
    theirs = by_peft(load(tiny_base, ChatGLMForConditionalGeneration, attn_implementation=attention), name, tuning)
    labels = ids.clone()
    labels[:, :4] = -100  # a row's first token, which PEFT lets the prompt predict, is never learned here
    mine = ours(input_ids=ids, attention_mask=MASK, labels=labels, use_cache=False)
    expected = theirs(input_ids=ids, attention_mask=MASK, labels=labels, use_cache=False)
    real = MASK.bool()
    torch.testing.assert_close(mine.logits[real], expected.logits[:, LENGTH:][real], rtol=1e-4, atol=1e-4)
    mine.loss.backward()
    expected.loss.backward()
    trained = dict(tuning.tokens.prompt_encoder.named_parameters())
    for key, value in theirs.prompt_encoder["default"].named_parameters():
        torch.testing.assert_close(trained[key].grad, value.grad, rtol=1e-3, atol=1e-5)
    assert trained["embedding.weight"].grad.abs().max() > 1e-3
    assert {key for key, value in ours.named_parameters() if value.grad is not None} == {
        f"transformer.prefix_encoder.prompt_encoder.{key}" for key in trained
    }


def test_a_classifier_with_a_prompt_is_that_of_peft(tiny_base, ids):
    ours = load(tiny_base, ChatGLMForSequenceClassification)
    tuning = prepare(ours, "prompt")
    theirs = by_peft(load(tiny_base, ChatGLMForSequenceClassification), "prompt", tuning)
    expected = theirs(input_ids=ids, attention_mask=MASK).logits
    torch.testing.assert_close(ours(input_ids=ids, attention_mask=MASK).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cls", [ChatGLMForTokenClassification, ChatGLMForQuestionAnswering])
def test_heads_on_tokens_see_the_prompt_and_keep_their_positions(tiny_base, ids, cls):
    """Against the base with the embeddings put in front by hand; under PEFT these positions would be the input's."""
    ours = load(tiny_base, cls)
    tuning = prepare(ours, "p_tuning")
    plain = load(tiny_base, cls)
    words = plain.transformer.embedding(ids)
    front = tuning.tokens().detach().expand(3, -1, -1)
    mask = torch.cat((torch.ones(3, LENGTH, dtype=torch.long), MASK), dim=1)
    expected = plain(inputs_embeds=torch.cat((front, words), dim=1), attention_mask=mask)
    mine = ours(input_ids=ids, attention_mask=MASK)
    for key in ("logits", "start_logits", "end_logits"):
        if key in mine:
            assert mine[key].shape[1] == ids.shape[1]
            torch.testing.assert_close(
                mine[key][MASK.bool()], expected[key][:, LENGTH:][MASK.bool()], rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_gradient(tiny_base, ids, reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = load(tiny_base, ChatGLMForConditionalGeneration).train()
        tuning = prepare(model, "prompt")
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        output = model(input_ids=ids, attention_mask=MASK, labels=ids, output_hidden_states=not checkpointing)
        output.loss.backward()
        gradients.append(tuning.tokens.prompt_encoder.embedding.weight.grad)
        assert model.transformer.encoder.layers[0].training
        assert checkpointing or len(output.hidden_states) == model.config.num_layers + 1
    torch.testing.assert_close(*gradients)


def test_values_follow_the_parameters_where_no_gradient_is_wanted(tiny_base, ids):
    model = load(tiny_base, ChatGLMForConditionalGeneration)
    tuning = prepare(model, "prompt")
    optimizer = torch.optim.AdamW(tuning.tokens.parameters(), lr=0.5, fused=True)  # raises no tensor's version
    with torch.no_grad():
        before = model(ids).logits
        assert torch.equal(model(ids).logits, before)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    with torch.no_grad():
        after = model(ids).logits
    assert not torch.allclose(after, before)
    torch.testing.assert_close(model(ids).logits, after)  # with a gradient it is computed again


def test_a_saved_prompt_is_a_prefix_and_an_adapter_of_peft(tiny_base, ids, tmp_path):
    model = load(tiny_base, ChatGLMForConditionalGeneration)
    prepare(model, "p_tuning").save(tmp_path / "prompt", {"task": "t"})
    expected = model(ids).logits
    loaded = load_tuned(load(tiny_base, ChatGLMForConditionalGeneration), tmp_path / "prompt")
    torch.testing.assert_close(loaded.model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    theirs = PeftModel.from_pretrained(load(tiny_base, ChatGLMForConditionalGeneration), tmp_path / "prompt")
    torch.testing.assert_close(theirs(ids).logits[:, LENGTH:], expected, rtol=1e-4, atol=1e-4)
    generated = loaded.model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None), generated)
