"""Folders with the files of the official repositories, at small sizes: the whole family is recognised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_glm4
import tiny_tokenizer
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoProcessor,
    AutoTokenizer,
    pipeline,
)

from chatglm_ptuning import ChatGLMForConditionalGeneration, ChatGLMTokenizer
from chatglm_ptuning.model.loading import load_tokenizer

TINY_SIZES = {"ffn_hidden_size": 48, "hidden_size": 32, "kv_channels": 8, "num_attention_heads": 4, "num_layers": 2}
COMMON = {
    "architectures": ["ChatGLMModel"],
    "auto_map": {
        "AutoConfig": "configuration_chatglm.ChatGLMConfig",
        "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
        "AutoModelForCausalLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
        "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    },
    "model_type": "chatglm",
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "fp32_residual_connection": False,
    "hidden_dropout": 0.0,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "original_rope": True,
    "post_layer_norm": True,
    "rmsnorm": True,
    "use_cache": True,
    "tie_word_embeddings": False,
    **TINY_SIZES,
}
SECOND = COMMON | {"layernorm_epsilon": 1e-05, "torch_dtype": "float16", "eos_token_id": 2, "pad_token_id": 0}
THIRD = SECOND | {"classifier_dropout": None, "pre_seq_len": None, "prefix_projection": False, "quantization_bit": 0}
FOURTH = COMMON | {
    "classifier_dropout": None,
    "layernorm_epsilon": 1.5625e-07,
    "torch_dtype": "bfloat16",
    "num_hidden_layers": 2,
    "eos_token_id": [480, 487, 489],
    "pad_token_id": 480,
    "padded_vocab_size": 512,
}
GENERATION = {"eos_token_id": [480, 487, 489], "pad_token_id": 480, "do_sample": True, "temperature": 0.7,
              "max_length": 128000, "top_p": 0.6, "transformers_version": "4.38.2"}  # fmt: skip

# Name -> config.json, the tokenizer_config.json where it matters, chat format, rotary base, what divides positions.
FOLDERS: dict[str, tuple[dict[str, Any], dict[str, Any], str, float, float]] = {
    "chatglm2-6b": (SECOND | {"seq_length": 32768}, {}, "chatglm2", 1e4, 1),
    "chatglm2-6b-32k": (SECOND | {"seq_length": 32768, "rope_ratio": 4}, {}, "chatglm2", 1e4, 4),
    "codegeex2-6b": (SECOND | {"seq_length": 32768, "torch_dtype": "bfloat16"}, {}, "base", 1e4, 1),
    "chatglm3-6b": (THIRD | {"seq_length": 8192}, {}, "chatglm3", 1e4, 1),
    "chatglm3-6b-base": (THIRD | {"seq_length": 32768}, {}, "base", 1e4, 1),
    "chatglm3-6b-32k": (THIRD | {"seq_length": 32768, "rope_ratio": 50}, {}, "chatglm3", 5e5, 1),
    "chatglm3-6b-128k": (THIRD | {"seq_length": 131072, "rope_ratio": 500}, {}, "chatglm3", 5e6, 1),
    "glm-4-9b": (FOURTH | {"seq_length": 8192, "rope_ratio": 1}, {"chat_template": None}, "base", 1e4, 1),
    "glm-4-9b-chat": (FOURTH | {"seq_length": 131072, "rope_ratio": 500}, {}, "glm4", 5e6, 1),
    "glm-4-9b-chat-1m": (
        FOURTH | {"seq_length": 1048576, "rope_ratio": 10000, "multi_query_group_num": 4}, {}, "glm4", 1e8, 1,
    ),
    "codegeex4-all-9b": (FOURTH | {"seq_length": 131072, "rope_ratio": 500}, {}, "glm4", 5e6, 1),
}  # fmt: skip


@pytest.fixture(scope="module")
def pieces(tmp_path_factory) -> Path:
    """A sentencepiece vocabulary."""
    folder = tmp_path_factory.mktemp("pieces")
    tiny_tokenizer.train(folder, "chatglm3")
    return folder / "chatglm3_True" / "tokenizer.model"


def write(folder: Path, name: str, pieces: Path) -> Path:
    """Writes an official folder under its own name: ChatGLM2's and 3's weights in several .bin, GLM-4's safetensors."""
    fields, tokenizer_config, *_ = FOLDERS[name]
    target = folder / name
    is_fourth = fields["layernorm_epsilon"] == 1.5625e-07
    if is_fourth:
        tiny_glm4.write_tokenizer(target, **tokenizer_config)
        (target / "generation_config.json").write_text(json.dumps(GENERATION), encoding="utf-8")
    else:
        target.mkdir()
        (target / "tokenizer.model").write_bytes(pieces.read_bytes())
        fields = fields | {"_name_or_path": f"THUDM/{name}", "padded_vocab_size": 512}
        settings = {
            "name_or_path": f"THUDM/{name}",
            "remove_space": False,
            "do_lower_case": False,
            "tokenizer_class": "ChatGLMTokenizer",
            "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
        }
        (target / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    torch.manual_seed(0)
    known = {field: value for field, value in fields.items() if field not in ("auto_map", "architectures")}
    model = ChatGLMForConditionalGeneration(AutoConfig.for_model(**known)).half()
    if is_fourth:
        model.save_pretrained(target)
    else:
        parameters = {key: value.contiguous() for key, value in model.state_dict().items()}
        parameters["transformer.rotary_pos_emb.inv_freq"] = torch.ones(2, dtype=torch.float16)
        names = sorted(parameters)
        shards = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
        for file, keys in shards.items():
            torch.save({key: parameters[key] for key in keys}, target / file)
        index = {"metadata": {"total_size": 1}, "weight_map": {key: f for f, keys in shards.items() for key in keys}}
        (target / "pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")
    (target / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    for part in ("configuration", "modeling", "tokenization"):
        (target / f"{part}_chatglm.py").write_text("raise SystemExit('remote code was run')", encoding="utf-8")
    if is_fourth:
        (target / "generation_config.json").write_text(json.dumps(GENERATION), encoding="utf-8")
    return target


@pytest.mark.parametrize("name", FOLDERS)
def test_everything_is_chosen_by_the_folders_files(tmp_path, pieces, name):
    folder = write(tmp_path, name, pieces)
    fields, _, chat_format, rotary_base, divisor = FOLDERS[name]
    tokenizer = ChatGLMTokenizer.from_pretrained(folder)
    auto = AutoTokenizer.from_pretrained(folder)
    assert isinstance(auto, ChatGLMTokenizer)
    assert tokenizer.chat_format == auto.chat_format == chat_format
    assert auto("你好 abc")["input_ids"] == tokenizer("你好 abc")["input_ids"]
    model = ChatGLMForConditionalGeneration.from_pretrained(folder).eval()
    other = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(other) is type(AutoModel.from_pretrained(folder)) is ChatGLMForConditionalGeneration
    inputs = tokenizer("你好", return_tensors="pt")
    assert torch.equal(model(**inputs).logits, other(**inputs).logits)
    rotary = model.transformer.rotary_pos_emb
    assert (rotary.base, rotary.position_scale) == (rotary_base, divisor)
    assert model.config.seq_length == fields["seq_length"]
    roles = [] if chat_format in ("base", "chatglm2") else ["<|user|>", "<|observation|>"]
    assert tokenizer.chat.stop_ids == [tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(roles)]
    assert tokenizer.pad_token_id == fields["pad_token_id"]
    assert model.generation_config.eos_token_id == fields["eos_token_id"]
    if fields["pad_token_id"]:
        assert (model.generation_config.temperature, model.generation_config.top_p) == (0.7, 0.6)
    response, _ = model.float().chat(tokenizer, "你好", [], max_new_tokens=3)
    assert isinstance(response, str)


@pytest.mark.parametrize("arguments", [{}, {"use_fast": False}, {"use_fast": True}])
@pytest.mark.parametrize("name", ["chatglm3-6b", "glm-4-9b-chat"])
def test_no_remote_code_is_run_where_it_is_trusted(tmp_path, pieces, name, arguments):
    folder = write(tmp_path, name, pieces)
    for auto_class in (AutoTokenizer, AutoProcessor):
        tokenizer = auto_class.from_pretrained(folder, trust_remote_code=True, **arguments)
        assert isinstance(tokenizer, ChatGLMTokenizer)
        assert tokenizer.chat_format == FOLDERS[name][2]
    for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM):
        model = auto_class.from_pretrained(folder, trust_remote_code=True)
        assert type(model) is ChatGLMForConditionalGeneration
    chat = pipeline("text-generation", model=str(folder), trust_remote_code=True)
    assert isinstance(chat.tokenizer, ChatGLMTokenizer)


def test_a_tokenizer_is_recognised_by_the_configuration_alone(tmp_path, pieces):
    folder = write(tmp_path, "chatglm2-6b", pieces)
    settings = {"auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    for arguments in ({}, {"config": config}):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True, **arguments)
        assert type(tokenizer) is ChatGLMTokenizer


def test_remote_code_of_other_families_is_left_to_transformers(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}), encoding="utf-8")
    settings = {"auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (tmp_path / "tokenization_own.py").write_text("raise SystemExit('remote code was run')", encoding="utf-8")
    with pytest.raises(SystemExit, match="remote code was run"):
        AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)


def test_chatglm2_32k_interpolates_positions_and_says_so_when_saved(tmp_path, pieces):
    """Official files: of ChatGLM2-6B-32K `rope_ratio` divides the positions, of ChatGLM3-6B-32K it scales the base."""
    folder = write(tmp_path, "chatglm2-6b-32k", pieces)
    model = ChatGLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    positions = torch.tensor([[0, 4, 10]])
    cos, sin = model.transformer.rotary_pos_emb(positions, torch.float32)
    theta = 1 / 10000 ** (torch.arange(0, 4, 2) / 4)
    expected = torch.outer(torch.tensor([0.0, 1.0, 2.5]), theta)
    torch.testing.assert_close(cos[0, 0], expected.cos())
    torch.testing.assert_close(sin[0, 0], expected.sin())
    model.save_pretrained(tmp_path / "renamed")
    fields = json.loads((tmp_path / "renamed" / "config.json").read_text(encoding="utf-8"))
    assert fields["position_interpolation"] is True
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "renamed")
    assert again.transformer.rotary_pos_emb.position_scale == 4


REFUSED = {
    "chatglm-6b": ({"model_type": "chatglm", "position_encoding_2d": True}, "first ChatGLM-6B"),
    "glm-4v-9b": (FOURTH | {"vision_config": {"hidden_size": 8}}, r"it has vision_config"),
    "GLM-4-9B-0414": ({"model_type": "glm4"}, r"GLM-4-0414 or GLM-Z1.*\(model_type 'glm4'\)"),
    "GLM-4.5-Air": ({"model_type": "glm4_moe"}, r"GLM-4\.5 or later, a mixture of experts"),
    "GLM-4.1V-9B-Thinking": ({"model_type": "glm4v", "text_config": {}}, r"GLM-4\.1V"),
    "llama": ({"model_type": "llama"}, "model_type 'llama', which is not of this family"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_architectures_are_refused_with_what_to_use(tmp_path, name):
    fields, named = REFUSED[name]
    tiny_glm4.write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    for load in (ChatGLMForConditionalGeneration.from_pretrained, lambda path: load_tokenizer(str(path))):
        with pytest.raises(ValueError, match=named) as error:
            load(tmp_path)
        assert str(tmp_path / "config.json") in str(error.value)
        assert "Use " in str(error.value) or "Load the base" in str(error.value)
    if fields["model_type"] == "chatglm":
        (tmp_path / "tokenization_chatglm.py").write_text("raise SystemExit('remote code was run')", encoding="utf-8")
        for load in (AutoConfig.from_pretrained, AutoTokenizer.from_pretrained):
            with pytest.raises(ValueError, match=named):
                load(tmp_path, trust_remote_code=True)
