"""Documents as the passages and windows that self-study is about."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from chatglm_ptuning.data.sources.text import read_text
from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer

_SENTENCE = re.compile(r".+?(?:[。！？!?…]+[”’」』）)]*\s*|\.[”\")]*\s+|\n\s*|$)", re.DOTALL)


@dataclass(frozen=True)
class Window:
    """A part of a document that fits into the context of the teacher.

    Attributes:
        ids: its tokens, after the start tokens.
        passages: its sentences, without white space at both ends.
    """

    ids: list[int]
    passages: list[str]


def read_document(path: Path) -> str:
    """The text of a document.

    Raises:
        ValueError: naming the file, if it is missing, not UTF-8 text, or empty.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name the files in it, each by --document.")
    text = read_text(path)
    if not text.strip():
        raise ValueError(f"{path} has no text: there is nothing to distil.")
    return text.strip()


def windows_of(text: str, tokenizer: ChatGLMTokenizer, most_tokens: int) -> list[Window]:
    """Splits a document between sentences into few windows of about equal size.

    Args:
        most_tokens: of a window, start tokens included. A longer sentence is split.

    Raises:
        ValueError: if `most_tokens` leaves no room for a text.
    """
    start = tokenizer.chat.start_ids
    room = most_tokens - len(start)
    if room < 1:
        raise ValueError(f"A window of {most_tokens} tokens has no room for text behind {len(start)} start tokens.")

    def encode(part: str) -> list[int]:
        return tokenizer.encode(part, add_special_tokens=False)

    def split(sentences: Sequence[str]) -> Iterator[Window]:
        ids = encode("".join(sentences))
        if len(ids) <= room:
            yield Window(start + ids, [sentence.strip() for sentence in sentences if sentence.strip()])
            return
        if len(sentences) == 1:
            (sentence,) = sentences
            half = len(sentence) // 2
            sentences = [part for part in (sentence[:half], sentence[half:]) if part]
            if len(sentences) == 1:
                raise ValueError(f"A window of {most_tokens} tokens has no room for the character {sentence!r}.")
        sizes = [max(1, len(encode(sentence))) for sentence in sentences]
        parts = max(2, -(-sum(sizes) // room))
        groups: list[list[str]] = [[] for _ in range(parts)]
        before = 0
        for sentence, size in zip(sentences, sizes, strict=True):
            groups[min(parts - 1, (before + size // 2) * parts // sum(sizes))].append(sentence)
            before += size
        for group in groups:
            if group:
                yield from split(group)

    return list(split(_SENTENCE.findall(text)))


def first_ids_of(windows: Sequence[Window], start: Sequence[int], length: int) -> list[int]:
    """The start tokens and the first tokens of the documents, `length` of them.

    Raises:
        ValueError: if the documents have fewer.
    """
    ids = list(start) + [index for window in windows for index in window.ids[len(start) :]]
    if length > len(ids):
        raise ValueError(
            f"--pre_seq_len {length} is more than the {len(ids)} tokens of the documents: the prefix would take more "
            f"memory than they do. Set it to {len(ids)} at most; a twentieth of the tokens is {max(1, len(ids) // 20)}."
        )
    return ids[:length]
