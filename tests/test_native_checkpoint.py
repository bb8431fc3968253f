"""Checkpoints of transformers' own GlmForCausalLM: the same logits, prefixes, fingerprints; what is refused."""

from __future__ import annotations

import json

import pytest
import tiny_glm4
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GlmConfig, GlmForCausalLM

from chatglm_ptuning import ChatGLMConfig, ChatGLMForConditionalGeneration, ChatGLMForSequenceClassification
from chatglm_ptuning.model.loading import load_model, load_tokenizer

# As the published glm-4-9b-chat-hf has it, with small sizes.
CONFIG = {
    "architectures": ["GlmForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": [480, 487, 489],
    "head_dim": 8,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "max_position_embeddings": 131072,
    "model_type": "glm",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "pad_token_id": 480,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1.5625e-07,
    "rope_theta": 5000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.0.dev0",
    "use_cache": True,
    "vocab_size": 512,
}


def make(folder, shard: str = "1GB", **changes):
    """A checkpoint written by transformers itself, with the published format of config.json."""
    torch.manual_seed(0)
    config = CONFIG | changes
    model = GlmForCausalLM(GlmConfig.from_dict(config | {"torch_dtype": "float32", "initializer_range": 0.3})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.copy_(1 + 0.3 * torch.randn(parameter.shape))
    model.save_pretrained(folder, max_shard_size=shard)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return model


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    """A whole folder, and transformers' model of it."""
    folder = tmp_path_factory.mktemp("native") / "glm-4-9b-chat-hf"
    model = make(folder)
    tiny_glm4.train().save(str(folder / "tokenizer.json"))
    settings = tiny_glm4.tokenizer_config(tokenizer_class="PreTrainedTokenizer")
    del settings["auto_map"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder, model


@pytest.fixture
def batch():
    ids = torch.randint(0, 480, (2, 20), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


@pytest.mark.parametrize(
    ("shard", "changes"),
    [
        ("1GB", {}),
        ("30KB", {}),
        ("30KB", {"attention_bias": False}),
        ("1GB", {"num_key_value_heads": 4}),
        ("1GB", {"num_key_value_heads": 1, "head_dim": 16, "rope_theta": 1e8}),
    ],
)
def test_logits_are_those_of_transformers(tmp_path, batch, shard, changes):
    native = make(tmp_path, shard, **changes)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "30KB")
    model = ChatGLMForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(model(**batch).logits[real], native(**batch).logits[real], rtol=1e-5, atol=3e-5)
    assert model.generation_config.eos_token_id == CONFIG["eos_token_id"]
    assert str(ChatGLMForConditionalGeneration.from_pretrained(tmp_path, dtype="auto").dtype) == "torch.bfloat16"


def test_configuration_is_translated(native):
    config = ChatGLMConfig.from_pretrained(native[0])
    expected = {
        "num_layers": 3, "padded_vocab_size": 512, "hidden_size": 32, "ffn_hidden_size": 48, "kv_channels": 8,
        "num_attention_heads": 4, "multi_query_attention": True, "multi_query_group_num": 2, "add_qkv_bias": True,
        "layernorm_epsilon": 1.5625e-07, "rope_ratio": 500.0, "seq_length": 131072, "pad_token_id": 480,
        "eos_token_id": [480, 487, 489], "position_interpolation": False, "model_type": "chatglm",
    }  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected


def test_it_is_saved_in_the_official_layout_as_the_same_base(native, tmp_path, batch):
    model = ChatGLMForConditionalGeneration.from_pretrained(native[0], dtype=torch.float32)
    model.save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert "transformer.encoder.layers.0.self_attention.query_key_value.weight" in names
    assert not [name for name in names if "self_attn" in name or name.startswith("model.")]
    again = ChatGLMForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    prints = [each.base_fingerprint() for each in (model, again)]
    assert prints[0] == prints[1]


def test_a_prefix_trains_on_it_and_moves_to_the_official_layout(native, tmp_path, batch):
    model = load_model(str(native[0]), pre_seq_len=4, prefix_dropout=0.0, dtype="float32").train()
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == ["transformer.prefix_encoder.embedding.weight"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    model.eval().save_prefix(tmp_path / "prefix")
    model.save_pretrained(tmp_path / "official")
    for base in (native[0], tmp_path / "official"):
        other = ChatGLMForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
        other.load_prefix(tmp_path / "prefix")
        torch.testing.assert_close(other(**batch).logits, model(**batch).logits)


def test_heads_load_it(native, batch):
    model = ChatGLMForSequenceClassification.from_pretrained(native[0], num_labels=3, pre_seq_len=2)
    assert model(**batch).logits.shape == (2, 3)
    base = ChatGLMForConditionalGeneration.from_pretrained(native[0])
    assert torch.equal(
        model.transformer.encoder.layers[1].self_attention.query_key_value.weight,
        base.transformer.encoder.layers[1].self_attention.query_key_value.weight,
    )


def test_a_missing_tensor_is_named(native, tmp_path):
    from safetensors.torch import save_file

    tensors = load_file(native[0] / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((native[0] / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"not a complete base.*encoder\.layers\.1\.mlp\.dense_4h_to_h\.weight"):
        ChatGLMForConditionalGeneration.from_pretrained(tmp_path)


def test_its_tokenizer_chats(native):
    tokenizer = load_tokenizer(str(native[0]))
    model = load_model(str(native[0]))
    assert tokenizer.chat_format == "glm4"
    response, history = model.chat(tokenizer, "你好", [], max_new_tokens=4, do_sample=False)
    assert isinstance(response, str) and len(history) == 2


def test_transformers_keeps_its_own_classes_for_it(native):
    assert type(AutoModelForCausalLM.from_pretrained(native[0])) is GlmForCausalLM


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"partial_rotary_factor": 1.0}, "partial_rotary_factor 1.0.* 0.5"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'.*silu"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings True.* False"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
         "rope_type 'yarn'.*default"),
    ],
)  # fmt: skip
def test_unsupported_values_are_refused(tmp_path, changes, named):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | changes), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"config\.json has {named}"):
        ChatGLMForConditionalGeneration.from_pretrained(tmp_path)
