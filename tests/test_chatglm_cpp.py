"""chatglm.cpp converts the kit's objects and computes the same tokens. It is built here, which takes minutes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_glm4
import tiny_tokenizer
import torch
from safetensors.torch import load_file

from chatglm_ptuning import ChatGLMConfig, ChatGLMForConditionalGeneration, ChatGLMTokenizer
from chatglm_ptuning.cli import main
from chatglm_ptuning.prefix.checkpoint import prefix_parameters

pytestmark = pytest.mark.slow

TEXTS = ("今天天气很好", "请问你是谁？abc")
NEW_TOKENS = 16
TIE = 0.02


@pytest.fixture(scope="module")
def chatglm_cpp(tmp_path_factory):
    """The package, built into a folder of its own."""
    folder = tmp_path_factory.mktemp("chatglm_cpp")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(folder)]
    # Its parts ask for versions of CMake that CMake 4 refuses without this.
    settings = os.environ | {"CMAKE_POLICY_VERSION_MINIMUM": "3.5"}
    done = subprocess.run(
        [*command, "chatglm_cpp==0.4.2", "tabulate"], env=settings, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    sys.path.append(str(folder))
    yield pytest.importorskip("chatglm_cpp")
    sys.path.remove(str(folder))


@pytest.fixture(scope="module", params=["chatglm2", "chatglm3", "glm4"])
def chat_format(request) -> str:
    return request.param


def make_base(folder: Path, chat_format: str, **changes) -> Path:
    torch.manual_seed(5)
    if chat_format == "glm4":
        tokenizer = ChatGLMTokenizer.from_pretrained(tiny_glm4.write_tokenizer(folder / "tokenizer"))
    else:
        tokenizer = tiny_tokenizer.train(folder, chat_format)
    sizes = {
        "num_layers": 2, "padded_vocab_size": len(tokenizer), "hidden_size": 128, "ffn_hidden_size": 96,
        "kv_channels": 32, "num_attention_heads": 4, "multi_query_attention": True, "multi_query_group_num": 2,
        "add_qkv_bias": True, "seq_length": 256, "initializer_range": 0.2, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    model = ChatGLMForConditionalGeneration(ChatGLMConfig(**sizes | changes))
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return folder / "base"


def make_prefix(base: Path, folder: Path, length: int, projection: bool) -> Path:
    model = ChatGLMForConditionalGeneration.from_pretrained(base, pre_seq_len=length, prefix_projection=projection)
    encoder = model.transformer.prefix_encoder
    shape = (length, *encoder.kv_shape)
    encoder.set_key_values(3 * torch.randn(shape, generator=torch.Generator().manual_seed(length)))
    model.save_prefix(folder)
    return folder


def their_tokens(chatglm_cpp, model, tokenizer, chat_format: str, file: Path) -> list[list[int]]:
    """What chatglm.cpp generates greedily after each of TEXTS."""
    from chatglm_cpp import _C, convert

    kinds = {"chatglm2": convert.ChatGLM2Converter, "chatglm3": convert.ChatGLM3Converter}
    kind = kinds.get(chat_format, convert.ChatGLM4Converter)
    with file.open("wb") as writer:
        kind.convert(writer, model, tokenizer, convert.GGMLType.F32)
    pipeline = chatglm_cpp.Pipeline(str(file))
    settings = _C.GenerationConfig(max_length=200, max_new_tokens=NEW_TOKENS, do_sample=False)
    rows = []
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert pipeline.tokenizer.encode(text, 200) == ids
        rows.append(pipeline._sync_generate_ids(ids, None, settings))
    return rows


@torch.no_grad()
def our_tokens(model, tokenizer) -> list[list[int]]:
    """What this kit generates, up to the first token that another one equals in score: chatglm.cpp rounds prefixes."""
    rows = []
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        output = model.generate(
            ids, max_new_tokens=NEW_TOKENS, do_sample=False, output_scores=True, return_dict_in_generate=True
        )
        margins = [float(-step[0].topk(2).values.diff()) for step in output.scores]
        sure = next((place for place, margin in enumerate(margins) if margin < TIE), NEW_TOKENS)
        rows.append(output.sequences[0, ids.shape[1] :][:sure].tolist())
    return rows


@pytest.mark.parametrize(
    ("length", "projection", "changes"),
    [
        (1, False, {}),
        (7, True, {"multi_query_group_num": 1}),
        (33, False, {"multi_query_group_num": 4, "rope_ratio": 50.0}),
    ],
)
def test_it_generates_the_same_tokens(chatglm_cpp, chat_format, tmp_path, length, projection, changes):
    base = make_base(tmp_path, chat_format, **changes)
    prefix = make_prefix(base, tmp_path / "prefix", length, projection)
    load = ChatGLMForConditionalGeneration.from_pretrained
    plain, prefixed = load(base), load(base, pre_seq_len=1)
    prefixed.load_prefix(prefix)
    tokenizer = ChatGLMTokenizer.from_pretrained(base)
    found = {}
    for name, model in (("plain", plain), ("prefixed", prefixed)):
        found[name] = their_tokens(chatglm_cpp, model, tokenizer, chat_format, tmp_path / f"{name}.bin")
        ours = our_tokens(model, tokenizer)
        assert [row[: len(own)] for row, own in zip(found[name], ours, strict=True)] == ours, name
        assert sum(map(len, ours)) > 8
    assert found["plain"] != found["prefixed"]
    # The merged folder, loaded as the official code does it.
    flags = ["--model_name_or_path", str(base), "--ptuning_checkpoint", str(prefix)]
    main(["export", "--to", "official-merged", *flags, "--output_dir", str(tmp_path / "merged")])
    merged = load(tmp_path / "merged", pre_seq_len=length, prefix_projection=projection)
    parameters = prefix_parameters(load_file(tmp_path / "merged" / "model.safetensors"))
    merged.transformer.prefix_encoder.load_state_dict(parameters)
    again = their_tokens(chatglm_cpp, merged, tokenizer, chat_format, tmp_path / "merged.bin")
    assert again == found["prefixed"]


def test_its_converter_does_not_take_a_prefix_for_a_base(chatglm_cpp, tmp_path):
    from chatglm_cpp.convert import convert

    base = make_base(tmp_path, "chatglm3")
    flags = ["--model_name_or_path", str(base), "--ptuning_checkpoint"]
    flags.append(str(make_prefix(base, tmp_path / "prefix", 4, projection=False)))
    main(["export", "--to", "official", *flags, "--output_dir", str(tmp_path / "official")])
    with (tmp_path / "model.bin").open("wb") as writer, pytest.raises((OSError, ValueError)):
        convert(writer, str(tmp_path / "official"), dtype="f32")
