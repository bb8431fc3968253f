"""ChatGLMConfig: official files unchanged, clear refusals."""

from __future__ import annotations

import json

import pytest
from transformers import AutoConfig

import chatglm_ptuning  # noqa: F401  (registers the Auto classes)
from chatglm_ptuning.model.configuration_chatglm import ChatGLMConfig
from chatglm_ptuning.model.modeling_chatglm import ChatGLMForConditionalGeneration

CHATGLM3_6B = {
    "_name_or_path": "THUDM/chatglm3-6b",
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "auto_map": {
        "AutoConfig": "configuration_chatglm.ChatGLMConfig",
        "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
    },
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "ffn_hidden_size": 13696,
    "fp32_residual_connection": False,
    "hidden_dropout": 0.0,
    "hidden_size": 4096,
    "kv_channels": 128,
    "layernorm_epsilon": 1e-05,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 32,
    "num_layers": 28,
    "original_rope": True,
    "padded_vocab_size": 65024,
    "post_layer_norm": True,
    "pre_seq_len": None,
    "prefix_projection": False,
    "quantization_bit": 0,
    "rmsnorm": True,
    "seq_length": 8192,
    "use_cache": True,
    "torch_dtype": "float16",
    "transformers_version": "4.30.2",
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GLM4_9B = CHATGLM3_6B | {
    "num_layers": 40,
    "padded_vocab_size": 151552,
    "rope_ratio": 500,
    "layernorm_epsilon": 1.5625e-07,
    "seq_length": 131072,
    "classifier_dropout": None,
    "eos_token_id": [151329, 151336, 151338],
    "pad_token_id": 151329,
    "torch_dtype": "bfloat16",
}


def save(content: dict, folder):
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.mark.parametrize("official", [CHATGLM3_6B, GLM4_9B], ids=["ChatGLM3-6B", "GLM-4-9B"])
def test_official_files_unchanged(official, tmp_path):
    config = AutoConfig.from_pretrained(save(official, tmp_path))
    assert type(config) is ChatGLMConfig
    known = {name: value for name, value in official.items() if name in ChatGLMConfig.__dataclass_fields__}
    del known["transformers_version"]
    assert {name: getattr(config, name) for name in known} == known
    assert str(config.dtype).removeprefix("torch.") == official["torch_dtype"]
    config.save_pretrained(tmp_path / "saved")
    again = ChatGLMConfig.from_pretrained(tmp_path / "saved")
    assert {name: getattr(again, name) for name in known} == known
    assert again.auto_map == official["auto_map"]


def test_standard_names_stand_for_the_official_ones():
    config = ChatGLMConfig(**CHATGLM3_6B)
    assert (config.num_hidden_layers, config.vocab_size, config.intermediate_size) == (28, 65024, 13696)
    assert (config.head_dim, config.num_key_value_heads, config.max_position_embeddings) == (128, 2, 8192)
    assert config.rms_norm_eps == 1e-5
    assert config.prefix_shape.kv_size == 28 * 2 * 2 * 128 == 14336
    config.num_hidden_layers = 4
    assert config.num_layers == 4
    assert ChatGLMConfig(num_hidden_layers=3).num_layers == 3


def test_vocabulary_size():
    assert ChatGLMConfig().padded_vocab_size == 65024
    assert ChatGLMConfig(vocab_size=300).padded_vocab_size == 300
    assert ChatGLMConfig(vocab_size=64794, padded_vocab_size=65024).vocab_size == 65024


def test_groups_without_multi_query_attention():
    config = ChatGLMConfig(multi_query_attention=False, num_attention_heads=8, multi_query_group_num=8, pre_seq_len=2)
    assert config.num_key_value_heads == 8


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"pre_seq_len": -1}, ["pre_seq_len", "-1"]),
        ({"pre_seq_len": 2.5}, ["pre_seq_len", "2.5"]),
        ({"pre_seq_len": "8"}, ["pre_seq_len", "'8'"]),
        ({"pre_seq_len": True}, ["pre_seq_len", "True"]),
        ({"prefix_projection": True}, ["prefix_projection", "True", "pre_seq_len", "None"]),
        ({"prefix_projection": True, "pre_seq_len": 0}, ["prefix_projection", "True", "pre_seq_len", "0"]),
        ({"prefix_projection": "yes", "pre_seq_len": 8}, ["prefix_projection", "'yes'"]),
        ({"prefix_dropout": 1.0}, ["prefix_dropout", "1.0"]),
        ({"multi_query_group_num": 0}, ["multi_query_group_num", "0"]),
        ({"multi_query_group_num": 3}, ["multi_query_group_num", "3", "num_attention_heads", "4"]),
        (
            {"multi_query_attention": False, "pre_seq_len": 4},
            ["multi_query_attention", "False", "multi_query_group_num", "2", "num_attention_heads", "4", "pre_seq_len"],
        ),
        ({"num_key_value_heads": 4}, ["num_key_value_heads", "4", "multi_query_group_num", "2"]),
        ({"kv_channels": 6}, ["kv_channels", "6"]),
        ({"num_layers": 0}, ["num_layers", "0"]),
        ({"hidden_size": 8.5}, ["hidden_size", "8.5"]),
        ({"rope_ratio": 0}, ["rope_ratio", "0"]),
        ({"layernorm_epsilon": "small"}, ["layernorm_epsilon", "'small'"]),
        ({"classifier_dropout": -0.1}, ["classifier_dropout", "-0.1"]),
    ],
)
def test_refuses_what_does_not_fit_together(tiny_config, fields, named):
    with pytest.raises(ValueError) as error:
        tiny_config(**fields)
    assert all(part in str(error.value) for part in named), error.value


def test_fields_set_later_are_checked_by_the_model(tiny_config, load):
    config = tiny_config()
    config.prefix_projection = True
    with pytest.raises(ValueError, match=r"prefix_projection=True.*pre_seq_len.*None"):
        ChatGLMForConditionalGeneration(config)
    with pytest.raises(ValueError, match=r"pre_seq_len must be .* got -3"):
        load(pre_seq_len=-3)


@pytest.mark.parametrize(
    "field", [{"position_encoding_2d": True}, {"inner_hidden_size": 16384}, {"max_sequence_length": 2048}]
)
def test_the_first_chatglm_is_refused(field, tmp_path):
    save({"model_type": "chatglm", "hidden_size": 4096, "num_layers": 28, "vocab_size": 130528} | field, tmp_path)
    with pytest.raises(ValueError, match=f"first ChatGLM-6B.*{next(iter(field))}"):
        AutoConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="first ChatGLM-6B"):
        ChatGLMForConditionalGeneration.from_pretrained(tmp_path)


def test_a_bidirectional_base_is_refused(tmp_path):
    save({"model_type": "chatglm", "source_attention": "bidirectional"}, tmp_path)
    with pytest.raises(ValueError, match=r"source_attention 'bidirectional'.*version 0\.1\.0.*train") as error:
        ChatGLMForConditionalGeneration.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_glm4_generates_until_any_of_its_end_tokens(tiny_config, ids):
    model = ChatGLMForConditionalGeneration(tiny_config(rope_ratio=500, eos_token_id=[90, 91, 92])).eval()
    assert model.generation_config.eos_token_id == [90, 91, 92]
    free = model.generate(ids[:1], max_new_tokens=8, do_sample=False, eos_token_id=None)[0, 7:].tolist()
    never = next(token for token in range(3, 96) if token not in free)
    model.generation_config.eos_token_id = [never, free[3]]
    stopped = model.generate(ids[:1], max_new_tokens=8, do_sample=False)[0, 7:].tolist()
    assert stopped == free[: free.index(free[3]) + 1]
