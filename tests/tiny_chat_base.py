"""A tiny random base, prefixes for it, and forced answers, for the tests of chat."""

from __future__ import annotations

from pathlib import Path

import tiny_tokenizer
import torch
from conftest import TINY
from transformers import LogitsProcessor, LogitsProcessorList

from chatglm_ptuning.model.configuration_chatglm import ChatGLMConfig
from chatglm_ptuning.model.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer


def make_model(vocab_size: int, seed: int = 0, **settings) -> ChatGLMForConditionalGeneration:
    torch.manual_seed(seed)
    config = ChatGLMConfig(**TINY | {"padded_vocab_size": vocab_size, "seq_length": 512} | settings)
    return ChatGLMForConditionalGeneration(config).eval()


def write_base(folder: Path) -> Path:
    """Writes a whole base, weights and tokenizer."""
    folder.mkdir()
    tokenizer = tiny_tokenizer.train(folder.parent, "chatglm3")
    tokenizer.save_pretrained(folder)
    make_model(len(tokenizer)).save_pretrained(folder)
    return folder


def write_prefix(base: Path, folder: Path, seed: int) -> Path:
    """Writes a prefix of 4 virtual tokens for the base, far enough from nothing to change its answers."""
    model = ChatGLMForConditionalGeneration.from_pretrained(base, pre_seq_len=4)
    encoder = model.transformer.prefix_encoder
    generator = torch.Generator().manual_seed(seed)
    encoder.load_state_dict({"embedding.weight": torch.randn(encoder.embedding.weight.shape, generator=generator)})
    model.save_prefix(folder)
    return folder


class Say(LogitsProcessor):
    """Makes the model say these ids, one after the other, whatever it computes."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids
        self.step = 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores = torch.full_like(scores, -torch.inf)
        scores[:, self.ids[self.step]] = 0.0
        self.step += 1
        return scores


def say(tokenizer: ChatGLMTokenizer, *parts: str | int) -> LogitsProcessorList:
    """A `logits_processor` that makes the model say texts and special tokens' ids."""
    ids = [
        index for part in parts for index in ([part] if isinstance(part, int) else tokenizer.vocabulary.encode(part))
    ]
    return LogitsProcessorList([Say(ids)])
