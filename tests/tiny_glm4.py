"""A small vocabulary of GLM-4's form, trained here, and folders with the files that the official ones publish."""

from __future__ import annotations

import base64
import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

# Written down again from the published file, so that a wrong character in the kit's pattern shows.
PATTERN = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|"
    "\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
SPECIAL_TOKENS = [
    "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>", "<|assistant|>",
    "<|observation|>", "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>",
]  # fmt: skip
# The published template of glm-4-9b-chat without its built-in tools (python, simple_browser, cogview).
TEMPLATE = (
    "[gMASK]<sop>{% for item in messages %}{% if item['tools'] is defined %}<|system|>\n你是一个名为 ChatGLM 的"
    "人工智能助手。你是基于智谱AI训练的语言模型 GLM-4 模型开发的，你的任务是针对用户的问题和要求提供适当的答复和支持。"
    "\n\n# 可用工具{% set tools = item['tools'] %}{% for tool in tools %}{% if tool['type'] == 'function' %}\n\n## "
    "{{ tool['function']['name'] }}\n\n{{ tool['function'] | tojson(indent=4) }}\n在调用上述函数时，"
    "请使用 Json 格式表示调用的参数。{% endif %}"
    "{% endfor %}{% endif %}{% if item['content'] %}<|{{ item['role'] }}|>{{ item['metadata'] }}\n{{ item['content'] }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEXTS = """
春天来了，河边的柳树发了芽，孩子们在草地上放风筝。春天来了，柳树发了芽。
这家店的面条很好吃，老板也热情，下次还会再来。这家店很好。
请把下面的句子翻译成英文：今天的天气真不错。今天的天气很好，今天不冷。
The weather is fine today, so we walked along the river to the old bridge. It's the old river, and we've walked there.
def add(a, b):
    return a + b  # 12 + 345 = 357

她每天早上六点起床，先跑步，再读半个小时的书。你好，你是谁？你好！
<|user|>
""".strip().splitlines(keepends=True)


@cache
def train() -> Tokenizer:
    """The vocabulary as transformers' GLM-4 folders have it, as a tokenizer.json: bytes, merges, special tokens."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=480, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


@cache
def ranks() -> dict[bytes, int]:
    """Token bytes to ranks, from the bytes behind the characters of the tokenizer.json (GPT-2's table, by its rule)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
    vocabulary = train().get_vocab(with_added_tokens=False)
    return {bytes(byte_of[character] for character in token): index for token, index in vocabulary.items()}


def write_tokenizer_model(path: Path) -> Path:
    """Writes the vocabulary in tiktoken's form, as official GLM-4 folders have it."""
    lines = [
        f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in sorted(ranks().items(), key=lambda x: x[1])
    ]
    path.write_text("".join(lines), encoding="ascii")
    return path


def tokenizer_config(**changes: Any) -> dict[str, Any]:
    """What the official tokenizer_config.json holds."""
    start = len(ranks())
    added = {
        str(start + index): {"content": token, "lstrip": False, "normalized": False, "rstrip": False,
                             "single_word": False, "special": True}
        for index, token in enumerate(SPECIAL_TOKENS)
    }  # fmt: skip
    return {
        "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLM4Tokenizer", None]},
        "added_tokens_decoder": added,
        "additional_special_tokens": SPECIAL_TOKENS,
        "clean_up_tokenization_spaces": False,
        "chat_template": TEMPLATE,
        "do_lower_case": False,
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 128000,
        "padding_side": "left",
        "remove_space": False,
        "tokenizer_class": "ChatGLM4Tokenizer",
    } | changes


def write_tokenizer(folder: Path, **changes: Any) -> Path:
    """Writes the tokenizer's files of an official folder; a change to None leaves a setting out."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer_model(folder / "tokenizer.model")
    settings = {name: value for name, value in tokenizer_config(**changes).items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")
    return folder
