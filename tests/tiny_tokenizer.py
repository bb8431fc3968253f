"""ChatGLM tokenizers small enough to write their tokens down by hand: every character of a few sentences is a piece."""

from __future__ import annotations

from pathlib import Path

import sentencepiece

from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer

_SENTENCES = [
    "今天天气很好，我想去公园散步。今天有雨！",
    "你好吗？请问你是谁？问：答：[Round 0123456789]",
    "甲乙丙丁戊己庚辛壬癸",
    "abcdefghijklmnopqrstuvwxyzA <|_>/{}\"'()=,.:`-",
]


def train(folder: Path, chat_format: str, byte_fallback: bool = True) -> ChatGLMTokenizer:
    """A tokenizer of one piece per character, as ChatGLM's own in all else.

    Args:
        byte_fallback: as ChatGLM has it; without it, a character that is not in the sentences is `<unk>`.
    """
    options = {"byte_fallback": True} if byte_fallback else {"user_defined_symbols": ["\n"]}
    path = folder / f"{chat_format}_{byte_fallback}"
    path.mkdir()
    with (path / "tokenizer.model").open("wb") as writer:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(_SENTENCES),
            model_writer=writer,
            model_type="char",
            vocab_size=1000,
            hard_vocab_limit=False,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            character_coverage=1.0,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
            **options,
        )
    return ChatGLMTokenizer(str(path / "tokenizer.model"), chat_format=chat_format)


def spell(tokenizer: ChatGLMTokenizer, ids: list[int]) -> str:
    """The tokens of the ids with nothing between them, a line feed as `\\n`."""
    return "".join(tokenizer.convert_ids_to_tokens(ids)).replace("<0x0A>", "\n")


def spell_marked(tokenizer: ChatGLMTokenizer, ids: list[int], mask: list[bool]) -> str:
    """As `spell`, with every run of tokens to be learned in 【】."""
    text, inside = "", False
    for index, learned in zip(ids, mask, strict=True):
        if learned != inside:
            text += "【" if learned else "】"
            inside = learned
        text += spell(tokenizer, [index])
    return text + ("】" if inside else "")
