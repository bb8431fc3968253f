"""The prefix as an argument of forward passes, `generate` and `chat`, whatever is selected."""

from __future__ import annotations

import pytest
import torch
from test_prefix_switching import left_padded
from transformers import DynamicCache

from chatglm_ptuning.prefix.batch import PrefixBatch

ALIKE = {"rtol": 1e-4, "atol": 1e-5}
LENGTHS = [7, 4, 5]
ROWS = ["a", None, "b"]
MODES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampled answers": {"do_sample": True, "num_return_sequences": 3, "top_k": 4},
    "several answers of beams": {"num_beams": 4, "num_return_sequences": 2},
    "beams that are sampled": {"num_beams": 2, "do_sample": True},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "guidance": {"guidance_scale": 1.5},
    "prefill in chunks": {"prefill_chunk_size": 2},
}


@pytest.fixture
def model(load, prefix_folders):
    model = load()
    for name, folder in prefix_folders.items():
        model.load_prefix(folder, name)
    model.set_prefix("projected")
    return model


def generate(model, batch, **settings):
    torch.manual_seed(0)
    return model.generate(**batch, max_new_tokens=5, eos_token_id=None, **({"do_sample": False} | settings))


@torch.no_grad()
def test_the_argument_is_what_set_prefix_selects(model, load, ids):
    base = load()(ids).logits
    selected = model(ids).logits
    for name in ("a", "b", None, ["a", None, "b"], ["b", "b", "b"], [None, None, None]):
        batch = model.prefix_batch(name)
        assert isinstance(batch, PrefixBatch)
        passed = model(ids, prefix=batch).logits
        if name is not None:
            assert torch.equal(model(ids, prefix=name).logits, passed)
        states = model.transformer(ids, prefix=batch).last_hidden_state
        assert torch.equal(model.transformer.output_layer(states), passed)
        model.set_prefix(name)
        assert torch.equal(model(ids).logits, passed)
        model.set_prefix("projected")
        assert torch.equal(model(ids, prefix=None).logits, selected), "None means the selected prefix"
    assert torch.equal(model(ids, prefix=model.prefix_batch(None)).logits, base)
    assert torch.equal(model(ids, prefix=PrefixBatch()).logits, base)
    assert model.selected_prefix == "projected"


@pytest.mark.parametrize("settings", MODES.values(), ids=MODES)
@pytest.mark.parametrize("prefix", ["a", None, ROWS], ids=str)
def test_generate_takes_it_in_every_mode(model, ids, prefix, settings):
    batch = left_padded(ids, LENGTHS)
    passed = generate(model, batch, prefix=model.prefix_batch(prefix), **settings)
    if prefix is not None:
        assert torch.equal(generate(model, batch, prefix=prefix, **settings), passed)
    other = generate(model, batch, **settings)
    assert model.selected_prefix == "projected"
    model.set_prefix(prefix)
    assert torch.equal(generate(model, batch, **settings), passed)
    assert not torch.equal(other, passed)


def test_an_assistant_has_a_prefix_of_its_own(model, load, prefix_folders, ids):
    assistant = load()
    assistant.load_prefix(prefix_folders["b"], "b")
    one = {"input_ids": ids[:1]}
    for prefix in ("a", ["a"]):
        expected = generate(model, one, prefix=prefix)
        assert torch.equal(generate(model, one, prefix=prefix, assistant_model=assistant), expected)
        assert torch.equal(generate(model, one, prefix=prefix, prompt_lookup_num_tokens=2), expected)


@torch.no_grad()
def test_candidates_of_a_row_share_its_prefix(model, ids):
    """As contrastive search computes several continuations of every row at once."""
    prefix = model.prefix_batch(ROWS)
    inputs = model.prepare_inputs_for_generation(ids.repeat_interleave(2, dim=0), prefix=prefix)
    expected = model(ids, prefix=prefix).logits
    torch.testing.assert_close(model(**inputs).logits, expected.repeat_interleave(2, dim=0), **ALIKE)


@torch.no_grad()
def test_rows_may_be_selected_and_repeated(model, ids):
    whole = model.prefix_batch(["a", None, "b", "a"])
    part = whole.select([3, 2, 1])
    assert (part.rows, part.lengths, part.names) == (3, (3, 5, 0), ["a", "b"])
    torch.testing.assert_close(model(ids, prefix=part).logits, model(ids, prefix=["a", "b", None]).logits, **ALIKE)
    twice = part.for_rows(6)
    assert twice.lengths == (3, 3, 5, 5, 0, 0)
    for_all = model.prefix_batch("a")
    assert for_all.select([5, 6]) is for_all and for_all.for_rows(9) is for_all


def test_what_is_refused(model, ids):
    with pytest.raises(KeyError, match=r"'c'.*a, b, projected"):
        model(ids, prefix="c")
    with pytest.raises(KeyError, match="'d'"):
        model.prefix_batch(["a", "d"])
    with pytest.raises(ValueError, match="at least one entry"):
        model.generate(ids, prefix=[])
    for prefix in (["a", "b"], model.prefix_batch(["a", "b"]), [None, None]):
        for call in (model, model.generate):
            with pytest.raises(ValueError, match=r"\b2 rows.*\b3\b"):
                call(ids, prefix=prefix)
    with pytest.raises(ValueError, match=r"\b2 rows.*\b4\b"):
        model(torch.cat((ids, ids[:1])), prefix=["a", "b"])
    with pytest.raises(ValueError, match="paged"):
        model.generate(ids, prefix="a", cache_implementation="paged")


def test_an_untrained_prefix_is_refused_where_it_is_used(load, prefix_folders, ids):
    model = load(pre_seq_len=4)
    model.load_prefix(prefix_folders["a"], "a")
    for prefix in ("default", model.prefix_batch("default"), ["a", "default", None]):
        with pytest.raises(ValueError, match="pre_seq_len=4 is untrained"):
            model.generate(ids, prefix=prefix, max_new_tokens=1)
    model.set_prefix("default")
    for prefix in ("a", model.prefix_batch(None)):
        model.generate(ids, prefix=prefix, max_new_tokens=1)


@torch.no_grad()
def test_a_batch_outlives_what_it_was_made_of(model, ids, prefix_folders):
    batch = model.prefix_batch("a")
    expected = model(ids, prefix=batch).logits
    model.load_prefix(prefix_folders["b"], "a")
    assert torch.equal(model(ids, prefix=batch).logits, expected)
    assert not torch.equal(model(ids, prefix="a").logits, expected)
    model.unload_prefix("a")
    assert torch.equal(model(ids, prefix=batch).logits, expected)
    model.check_prefix_is_trained(batch)


@torch.no_grad()
def test_a_cache_belongs_to_the_argument(model, ids):
    cache = DynamicCache(config=model.config)
    batch = model.prefix_batch("a")
    model(ids, past_key_values=cache, prefix=batch)
    with pytest.raises(ValueError, match=r"'a'.*'projected'"):
        model(ids[:, :1], past_key_values=cache)
    with pytest.raises(ValueError, match=r"'a'.*None"):
        model(ids[:, :1], past_key_values=cache, prefix=model.prefix_batch(None))
    for same in (batch, "a", model.prefix_batch("a")):
        model(ids[:, :1], past_key_values=cache, prefix=same)


@pytest.mark.parametrize("checkpointing", [False, True, "reentrant"])
def test_gradients_flow_through_a_batch(trained, ids, checkpointing):
    gradients = []
    for prefix in (None, "default", ["default"] * 3, "batch"):
        model = trained().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        batch = model.prefix_batch("default") if prefix == "batch" else prefix
        model(ids, labels=ids, prefix=batch).loss.backward()
        gradients.append(model.transformer.prefix_encoder.embedding.weight.grad)
    assert gradients[0].abs().sum() > 0
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0])


def test_in_training_the_trainable_prefix_needs_no_argument(trained, prefix_folders, ids):
    model = trained().train()
    model.load_prefix(prefix_folders["a"], "a")
    model.set_prefix("default")
    loss = model(ids, labels=ids).loss
    assert loss.requires_grad and torch.equal(loss, model(ids, labels=ids, prefix="default").loss)
    assert not model(ids, labels=ids, prefix="a").loss.requires_grad


@pytest.mark.parametrize("prefix", ["a", None, ROWS], ids=str)
@torch.no_grad()
def test_a_compiled_forward_pass_takes_it(model, ids, prefix):
    torch.compiler.reset()
    batch = model.prefix_batch(prefix)
    compiled = torch.compile(model.forward, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids, prefix=batch).logits, model(ids, prefix=batch).logits)
    torch.compiler.reset()


def test_a_prefix_batch_follows_the_dtype_of_the_base(model, ids):
    model.to(torch.bfloat16)
    batch = model.prefix_batch(ROWS)
    assert {entry.dtype for entry in batch.key_values} == {torch.bfloat16}
    assert model(ids, prefix=batch).logits.dtype == torch.bfloat16
