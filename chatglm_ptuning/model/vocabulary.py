"""The sentencepiece vocabulary of ChatGLM2 and ChatGLM3 with the special tokens behind its pieces."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from sentencepiece import SentencePieceProcessor

ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
SPECIAL_TOKENS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", *ROLE_TOKENS)
"""In the order of their ids, which follow the last piece (official file: tokenization_chatglm.py of ChatGLM3-6B)."""

_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")


class SentencePieceVocabulary:
    """Text to ids and back; text never becomes a special token.

    Args:
        path: a `tokenizer.model`.

    Raises:
        ValueError: if the file is missing or not a sentencepiece model, saying what it is instead where that shows.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.processor = SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError, TypeError) as error:
            raise ValueError(_why_unreadable(self.path, error)) from error
        self.pieces = self.processor.vocab_size()
        self.special_ids = {token: self.pieces + index for index, token in enumerate(SPECIAL_TOKENS)}
        self.special_tokens = {index: token for token, index in self.special_ids.items()}

    def __len__(self) -> int:
        return self.pieces + len(SPECIAL_TOKENS)

    def __contains__(self, token: str) -> bool:
        return self.token(self.id(token)) == token

    def encode(self, text: str) -> list[int]:
        """Ids of the text, none of them special; half of a surrogate pair becomes U+FFFD."""
        return self.processor.encode(_well_formed(text))

    def split(self, text: str) -> list[str]:
        """The pieces behind the ids of `encode`."""
        return self.processor.encode(_well_formed(text), out_type=str)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids.

        A special token is written as it is spelled; `</s>` and `<s>` are empty, as sentencepiece has them, and an id
        outside the vocabulary is left out. Bytes that are no UTF-8 (yet) are U+FFFD each.
        """
        text, run = "", []
        for index in map(int, ids):
            if index in self.special_tokens:
                text += self.processor.decode(run) + self.special_tokens[index]
                run = []
            elif 0 <= index < self.pieces:
                run.append(index)
        return text + self.processor.decode(run)

    def join(self, tokens: Iterable[str]) -> str:
        """Text of pieces and special tokens, as `decode` gives it for their ids."""
        text, run = "", []
        for token in tokens:
            if token in self.special_ids:
                text += self.processor.decode(run) + token
                run = []
            else:
                run.append(token)
        return text + self.processor.decode(run)

    def token(self, index: int) -> str:
        """The piece or special token of an id; the unknown piece for an id that has none."""
        if index in self.special_tokens:
            return self.special_tokens[index]
        return self.processor.id_to_piece(index if 0 <= index < self.pieces else self.processor.unk_id())

    def id(self, token: str) -> int:
        """The id of a piece or special token; that of the unknown piece if there is none."""
        return self.special_ids.get(token, self.processor.piece_to_id(token))


def _well_formed(text: str) -> str:
    # Python strings may hold surrogates (from JSON escapes, from terminals); UTF-8, and so sentencepiece, may not.
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _why_unreadable(path: Path, error: Exception) -> str:
    if not path.is_file():
        return (
            f"{path} is missing. Put the tokenizer.model of the base there, or give the folder that has it: "
            "ChatGLM2, ChatGLM3 and chatglm-nano each come with one."
        )
    with path.open("rb") as file:
        start = file.read(4096)
    if start.startswith(b"version https://git-lfs"):
        return f"{path} is a git-lfs pointer, not the file itself. Run `git lfs pull` in its folder."
    if _TIKTOKEN_LINE.match(start):
        return (
            f"{path} is a tiktoken vocabulary (lines of base64 and rank), as GLM-4 has it. GLM-4's vocabulary is not "
            "of the sentencepiece family of ChatGLM2 and ChatGLM3, which this tokenizer reads: use the tokenizer.model "
            "of one of those bases."
        )
    return (
        f"{path} ({path.stat().st_size} bytes) is damaged or not a sentencepiece model: {error}. Copy or download the "
        "base's tokenizer.model again."
    )
