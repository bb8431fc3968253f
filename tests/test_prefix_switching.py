"""Many prefixes beside one base: switching, one per batch row, and caches that belong to one prefix."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file
from transformers import DynamicCache, StaticCache

from chatglm_ptuning.model.modeling_chatglm import ChatGLMForConditionalGeneration

ALIKE = {"rtol": 1e-4, "atol": 1e-5}
ROWS = [["a", "b", None], ["b", "b", "projected"], [None, None, "a"], [None, None, None]]
GENERATION = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "static cache": {"cache_implementation": "static"},
    "several answers of beams": {"num_beams": 4, "num_return_sequences": 2},
}


def left_padded(ids: torch.Tensor, lengths: list[int]) -> dict[str, torch.Tensor]:
    mask = (torch.arange(ids.shape[1]) >= ids.shape[1] - torch.tensor(lengths)[:, None]).long()
    rolled = torch.stack([row.roll(len(row) - length) for row, length in zip(ids, lengths, strict=True)])
    return {"input_ids": rolled * mask, "attention_mask": mask}


@pytest.fixture
def model(load, prefix_folders):
    model = load()
    for name, folder in prefix_folders.items():
        model.load_prefix(folder, name)
    return model


@torch.no_grad()
def test_names_and_selection(model, load, ids):
    assert model.prefix_names == ["a", "b", "projected"]
    assert model.selected_prefix == "projected", "loading activates"
    logits = {}
    for name in (None, "a", "b"):
        model.set_prefix(name)
        assert model.selected_prefix == name
        logits[name] = model(ids).logits
    torch.testing.assert_close(logits[None], load()(ids).logits)
    assert (logits["a"] - logits["b"]).abs().max() > 0.1
    model.set_prefix("a")
    assert torch.equal(model(ids).logits, logits["a"]), "switching back gives the same again"
    model.set_prefix(["a", None, "b"])
    assert model.selected_prefix == ("a", None, "b")


def test_what_cannot_be_selected(model):
    model.set_prefix("a")
    with pytest.raises(KeyError, match=r"'c'.*a, b, projected"):
        model.set_prefix("c")
    with pytest.raises(KeyError, match="'d'"):
        model.set_prefix(["a", "d"])
    with pytest.raises(ValueError, match="at least one entry"):
        model.set_prefix([])
    assert model.selected_prefix == "a"


def test_unloading(model, load, ids):
    model.set_prefix("a")
    model.unload_prefix("b")
    assert model.prefix_names == ["a", "projected"] and model.selected_prefix == "a"
    model.set_prefix(["a", "projected", None])
    model.unload_prefix("a")
    assert model.selected_prefix is None
    torch.testing.assert_close(model(ids).logits, load()(ids).logits)
    with pytest.raises(KeyError, match="'a'"):
        model.unload_prefix("a")
    with pytest.raises(ValueError, match="cannot be unloaded"):
        load(pre_seq_len=3).unload_prefix("default")


def test_loading_again_under_the_same_name_replaces(model, prefix_folders, ids):
    model.set_prefix("b")
    expected = model(ids).logits
    model.load_prefix(prefix_folders["b"], "a")
    assert model.prefix_names == ["b", "projected", "a"]
    assert torch.equal(model(ids).logits, expected)


def test_prefixes_follow_the_dtype_of_the_base(load, prefix_folders, ids):
    model = load()
    model.load_prefix(prefix_folders["a"])
    single = model(ids).logits
    model.to(torch.bfloat16)
    assert model(ids).logits.dtype == torch.bfloat16
    model.to(torch.float32)
    assert (model(ids).logits - single).abs().max() < 0.3


def test_a_copied_model_has_its_own_prefixes(model, ids):
    other = copy.deepcopy(model)
    other.unload_prefix("a")
    other.set_prefix(None)
    assert model.prefix_names == ["a", "b", "projected"] and model.selected_prefix == "projected"


# One prefix per row


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("names", ROWS, ids=str)
@torch.no_grad()
def test_rows_with_their_own_prefix_equal_each_row_alone(model, ids, names, attention):
    model.set_attn_implementation(attention)
    lengths = [7, 4, 5]
    model.set_prefix(names)
    batch = left_padded(ids, lengths)
    together = model(**batch).logits
    assert together.isfinite().all()
    for row, (name, length) in enumerate(zip(names, lengths, strict=True)):
        model.set_prefix(name)
        alone = model(ids[row : row + 1, :length]).logits[0]
        torch.testing.assert_close(together[row, -length:], alone, **ALIKE)


@pytest.mark.parametrize("settings", GENERATION.values(), ids=GENERATION)
@pytest.mark.parametrize("names", ROWS[:2], ids=str)
def test_rows_with_their_own_prefix_generate_as_each_alone(model, ids, names, settings):
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None} | settings
    answers, lengths = settings.get("num_return_sequences", 1), [7, 4, 5]
    model.set_prefix(names)
    together = model.generate(**left_padded(ids, lengths), **settings)[:, 7:].view(3, answers, -1)
    assert model.selected_prefix == tuple(names)
    for row, (name, length) in enumerate(zip(names, lengths, strict=True)):
        model.set_prefix(name)
        assert torch.equal(together[row], model.generate(ids[row : row + 1, :length], **settings)[:, length:])


def test_a_list_must_fit_the_batch(model, ids):
    model.set_prefix(["a", "b"])
    with pytest.raises(ValueError, match=r"\b2 rows.*\b3\b"):
        model(ids)
    doubled = torch.cat((ids, ids[:1]))
    with pytest.raises(ValueError, match=r"\b2 rows.*\b4\b"):
        model(doubled)


def test_the_trainable_prefix_in_a_list_takes_gradients(trained, prefix_folders, ids):
    model = trained().train()
    model.load_prefix(prefix_folders["a"], "a")
    encoder = model.transformer.prefix_encoder
    gradients = []
    for names in (["default", None, "default"], ["a", "a", "a"]):
        model.set_prefix(names)
        loss = model(ids, labels=ids).loss
        if names[0] == "default":
            loss.backward()
            gradients.append(encoder.embedding.weight.grad.clone())
    expected = trained().train()
    rows = ids[[0, 2]]
    (expected(rows, labels=rows).loss * 12 / 18).backward()
    torch.testing.assert_close(gradients[0], expected.transformer.prefix_encoder.embedding.weight.grad, **ALIKE)
    assert model.prefix_names == ["default", "a"]


@torch.no_grad()
def test_dropout_in_a_list_is_for_the_trainable_prefix(trained, prefix_folders, ids, prefix_in_layers):
    model = trained(prefix_dropout=0.5).train()
    model.load_prefix(prefix_folders["a"], "a")
    model.set_prefix(["a", "default", None])
    zeros = (prefix_in_layers(model, ids) == 0).float().mean(dim=(0, 2, 3, 4))
    assert zeros[0] == 0.25, "of 4 slots the shorter prefix leaves 1 empty"
    assert 0.3 < zeros[1] < 0.7
    prefix = model.prefix_batch(["a", "default", None])
    assert prefix.mask.tolist() == [[False, True, True, True], [True] * 4, [False] * 4]
    assert (prefix.lengths, prefix.length) == ((3, 4, 0), 4)


# Caches


@pytest.fixture
def cache(model, ids):
    model.set_prefix("a")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    return cache


@pytest.mark.parametrize("other", ["b", None, ["a", "b", "a"]], ids=str)
@torch.no_grad()
def test_a_cache_belongs_to_one_prefix(model, ids, cache, other):
    model.set_prefix(other)
    with pytest.raises(ValueError, match=r"prefix 'a'.*one prefix"):
        model(ids[:, :1], past_key_values=cache)
    with pytest.raises(ValueError, match="belong to one prefix"):
        model.generate(torch.cat((ids, ids), dim=1), past_key_values=cache, max_new_tokens=1)
    model.set_prefix("a")
    model(ids[:, :1], past_key_values=cache)


@torch.no_grad()
def test_a_replaced_prefix_is_another_one(model, ids, cache, prefix_folders):
    model.load_prefix(prefix_folders["projected"], "more")
    model.set_prefix("a")
    model(ids[:, :1], past_key_values=cache)  # loading another one does not matter
    model.load_prefix(prefix_folders["b"], "a")
    with pytest.raises(ValueError, match=r"earlier values.*'a'"):
        model(ids[:, :1], past_key_values=cache)


@torch.no_grad()
def test_an_emptied_cache_is_free_again(model, ids):
    cache = StaticCache(config=model.config, max_cache_len=8)
    for name in ("a", "b"):
        model.set_prefix(name)
        logits = model(ids, past_key_values=cache).logits
        torch.testing.assert_close(logits, model(ids).logits)
        cache.reset()


def test_reinitialising_invalidates_old_caches(trained, ids):
    model = trained()
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        model.init_prefix_from_ids(ids[0, :4])
        with pytest.raises(ValueError, match="belong to one prefix"):
            model(ids[:, :1], past_key_values=cache)


def test_saving_and_loading_the_base_forgets_the_bank(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert ChatGLMForConditionalGeneration.from_pretrained(tmp_path).prefix_names == []


# ---- two prefixes together ----


@pytest.fixture
def both(load, prefix_folders, tmp_path):
    """A plain base with one prefix made of the tables of "a" and "b"."""
    parts = [load_file(prefix_folders[name] / "prefix_model.safetensors") for name in ("a", "b")]
    (key,) = parts[0]
    table = torch.cat([part[key] for part in parts])
    whole = load(pre_seq_len=len(table))
    whole.transformer.prefix_encoder.set_key_values(table.view(len(table), *whole.transformer.prefix_encoder.kv_shape))
    whole.save_prefix(tmp_path / "both")
    model = load()
    model.load_prefix(tmp_path / "both", "both")
    return model


@torch.no_grad()
def test_prefixes_one_behind_the_other_equal_one_of_both_tables(model, both, ids, tmp_path):
    expected = both(ids).logits
    model.set_prefix("a+b")
    assert model.selected_prefix == "a+b"
    assert torch.equal(model(ids).logits, expected)
    model.set_prefix(None)
    assert torch.equal(model(ids, prefix="a+b").logits, expected)
    assert torch.equal(model(ids, prefix=model.prefix_batch("a+b")).logits, expected)
    rows = model(ids, prefix=["a+b", "b", None]).logits
    torch.testing.assert_close(rows[0], expected[0], **ALIKE)
    torch.testing.assert_close(rows[1], model(ids, prefix="b").logits[1], **ALIKE)
    torch.testing.assert_close(rows[2], model(ids).logits[2], **ALIKE)
    generated = model.generate(ids, prefix="a+b", max_new_tokens=5, do_sample=False)
    assert torch.equal(generated, both.generate(ids, max_new_tokens=5, do_sample=False))
    assert (model(ids, prefix="b+a").logits - expected).abs().max() < 1e-3, "keys are not rotated: order is free"
    model.set_prefix("a+b")
    model.save_prefix(tmp_path / "saved")
    model.load_prefix(tmp_path / "saved", "again")
    assert torch.equal(model(ids).logits, expected)


@torch.no_grad()
def test_the_trainable_prefix_beside_a_loaded_one(trained, prefix_folders, ids):
    model = trained().eval()
    model.load_prefix(prefix_folders["a"], "a")
    with torch.enable_grad():
        model(ids, labels=ids, prefix="default+a").loss.backward()
    assert model.transformer.prefix_encoder.embedding.weight.grad.abs().max() > 0
    before = model(ids, prefix="default+a").logits
    cache = DynamicCache()
    model(ids, prefix="default+a", past_key_values=cache, use_cache=True)
    model.load_prefix(prefix_folders["b"], "a")
    assert (model(ids, prefix="default+a").logits - before).abs().max() > 0.1
    with pytest.raises(ValueError, match="earlier values"):
        model(ids[:, :1], prefix="default+a", past_key_values=cache, use_cache=True)


def test_names_of_several_prefixes_are_unambiguous(model, prefix_folders):
    with pytest.raises(ValueError, match=r"'c\+\+'.*another name"):
        model.load_prefix(prefix_folders["a"], "c++")
    for name in ("a+c", "a+", "+"):
        with pytest.raises(KeyError):
            model.set_prefix(name)
    model.set_prefix(["a+b", None])
    with pytest.raises(KeyError, match="one by one"):
        model.unload_prefix("a+b")
    model.unload_prefix("b")
    assert model.selected_prefix is None
    with pytest.raises(KeyError, match="'b'"):
        model.set_prefix("a+b")
