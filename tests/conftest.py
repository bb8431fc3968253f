"""Fixtures that several test files share: tiny bases in the official layout, prefixes for them, and tokenizers."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable
from pathlib import Path

import bpe_vocabulary
import pytest
import tiny_tokenizer
import torch
from tiny_base import make_base

from chatglm_ptuning.model.configuration_chatglm import ChatGLMConfig
from chatglm_ptuning.model.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer

TINY = {
    "num_layers": 2,
    "padded_vocab_size": 96,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "kv_channels": 8,
    "num_attention_heads": 4,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "add_qkv_bias": True,
    "seq_length": 256,
    "initializer_range": 0.3,  # far from the usual 0.02, so that a wrong detail shows
    "pad_token_id": 0,
    "eos_token_id": 2,
}


def pytest_make_parametrize_id(val, argname):
    """Names of tests without bytes: gzip puts the time into them, and all processes must collect the same tests."""
    return argname if isinstance(val, bytes) else None


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_tests(tmp_path_factory) -> None:
    """Keeps tokenised rows out of the home of whoever runs the tests."""
    os.environ["CHATGLM_PTUNING_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def tiny_config() -> Callable[..., ChatGLMConfig]:
    """Makes the configuration of a tiny base, with the given fields changed."""
    return lambda **changes: ChatGLMConfig(**TINY | changes)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Path:
    """A tiny base of random weights, saved as one safetensors file."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base") / "tiny-base"
    ChatGLMForConditionalGeneration(ChatGLMConfig(**TINY)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A base that has learned `tiny_base.ANSWERS`, with its tokenizer; not to be changed."""
    return make_base(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="session")
def chatglm2(tmp_path_factory) -> ChatGLMTokenizer:
    """A tokenizer of few characters in ChatGLM2's chat format."""
    return tiny_tokenizer.train(tmp_path_factory.mktemp("tokenizer"), "chatglm2")


@pytest.fixture(scope="session")
def chatglm3(tmp_path_factory) -> ChatGLMTokenizer:
    """A tokenizer of few characters in ChatGLM3's chat format."""
    return tiny_tokenizer.train(tmp_path_factory.mktemp("tokenizer"), "chatglm3")


@pytest.fixture
def load(tiny_base) -> Callable[..., ChatGLMForConditionalGeneration]:
    """Loads the tiny base, with `from_pretrained`'s keyword arguments."""
    return lambda **arguments: ChatGLMForConditionalGeneration.from_pretrained(tiny_base, **arguments)


@pytest.fixture(scope="session")
def prefix_folders(tiny_base, tmp_path_factory) -> dict[str, Path]:
    """Saved prefixes of different lengths for the tiny base: "a" (3), "b" (5) and "projected" (4, with projection)."""
    folders = {}
    for name, length, projected in (("a", 3, False), ("b", 5, False), ("projected", 4, True)):
        model = ChatGLMForConditionalGeneration.from_pretrained(
            tiny_base, pre_seq_len=length, prefix_projection=projected
        )
        shape = (length, *model.transformer.prefix_encoder.kv_shape)
        values = torch.randn(shape, generator=torch.Generator().manual_seed(length))
        model.transformer.prefix_encoder.set_key_values(values)
        folders[name] = tmp_path_factory.mktemp("prefixes") / name
        model.save_prefix(folders[name], task=f"task {name}")
    return folders


@pytest.fixture
def prefix_in_layers() -> Callable[..., torch.Tensor]:
    """Gives the keys and values, `[num_layers * 2, rows, groups, length, kv_channels]`, that a forward pass puts in."""

    def seen(model, input_ids: torch.Tensor, **arguments) -> torch.Tensor:
        found: list[torch.Tensor] = []
        layers = model.transformer.encoder.layers
        hooks = [layer.register_forward_pre_hook(lambda _, inputs: found.extend(inputs[1:3])) for layer in layers]
        model(input_ids, **arguments)
        for hook in hooks:
            hook.remove()
        return torch.stack(found)

    return seen


@pytest.fixture
def ids() -> torch.Tensor:
    """Token ids `[3, 7]`, none of them special."""
    return torch.randint(3, 96, (3, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def trained(load) -> Callable[..., ChatGLMForConditionalGeneration]:
    """Loads the tiny base with a trainable prefix of length 4 that counts as trained."""

    def make(**arguments) -> ChatGLMForConditionalGeneration:
        torch.manual_seed(0)
        model = load(**{"pre_seq_len": 4, "prefix_dropout": 0.0} | arguments)
        encoder = model.transformer.prefix_encoder
        shape = (encoder.pre_seq_len, *encoder.kv_shape)
        encoder.set_key_values(torch.randn(shape, generator=torch.Generator().manual_seed(4)))
        return model

    return make


@pytest.fixture(scope="session")
def vocabulary_file(tmp_path_factory) -> Path:
    """A byte-pair `tokenizer.model` of 560 pieces."""
    return bpe_vocabulary.train(tmp_path_factory.mktemp("vocabulary") / "tokenizer.model")
