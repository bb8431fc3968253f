"""A base so small that it learns a few answers by heart in seconds, in a folder as a user has one, and prefixes."""

from __future__ import annotations

from pathlib import Path

import instruction_rows
import tiny_tokenizer
import torch

from chatglm_ptuning.data.collate import PaddingCollator
from chatglm_ptuning.data.formats.registry import Columns
from chatglm_ptuning.model.configuration_chatglm import ChatGLMConfig
from chatglm_ptuning.model.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer

ANSWERS = {
    "今天有雨": "今天天气好吗？",
    "我想去公园散步。你好吗？": "你好！",
    "问": "请问你是谁？我是甲乙丙丁",
    "天气很好，请问你今天想去公园散步吗": "我想去",
    "甲乙丙丁戊己": "庚辛壬癸",
    "你是谁": "我是 abc",
}
"""Prompts, in no order of length, and what the base answers."""


def make_base(folder: Path, chat_format: str = "chatglm3", steps: int = 120) -> Path:
    """Trains a base on `ANSWERS` and saves it with its tokenizer as `folder / "base"`."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer.train(folder, chat_format)
    config = ChatGLMConfig(
        num_layers=2, padded_vocab_size=len(tokenizer) + 8, hidden_size=64, ffn_hidden_size=128, kv_channels=16,
        num_attention_heads=4, multi_query_attention=True, multi_query_group_num=2, seq_length=256, add_qkv_bias=True,
    )  # fmt: skip
    model = ChatGLMForConditionalGeneration(config).train()
    rows = [{"content": prompt, "summary": answer} for prompt, answer in ANSWERS.items()]
    examples, _ = instruction_rows.training_rows(tokenizer, rows, 64, 32, columns=Columns("content", "summary"))
    batch = PaddingCollator(tokenizer.pad_token_id, "right")(examples)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.05
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return folder / "base"


def make_prefix(base: Path, folder: Path, text: str) -> Path:
    """A prefix of as many virtual tokens as the text has: its keys and values, with enough noise to change answers."""
    ids = ChatGLMTokenizer.from_pretrained(base)(text, return_tensors="pt")["input_ids"][0]
    model = ChatGLMForConditionalGeneration.from_pretrained(base, pre_seq_len=len(ids), dtype=torch.float32)
    model.init_prefix_from_ids(ids)
    encoder = model.transformer.prefix_encoder
    noise = torch.randn(encoder.key_values().shape, generator=torch.Generator().manual_seed(len(ids)))
    encoder.set_key_values(encoder.key_values() + 3 * noise)
    model.save_prefix(folder)
    return folder
