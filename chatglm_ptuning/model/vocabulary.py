"""The sentencepiece vocabulary of ChatGLM2 and ChatGLM3 with the special tokens behind its pieces."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from sentencepiece import SentencePieceProcessor

ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
SPECIAL_TOKENS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", *ROLE_TOKENS)
"""In the order of their ids, which follow the last piece (official file: tokenization_chatglm.py of ChatGLM3-6B)."""


class SentencePieceVocabulary:
    """Text to ids and back; text never becomes a special token.

    Args:
        path: a `tokenizer.model`.

    Raises:
        ValueError: if the file is missing or not a sentencepiece model.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.processor = SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError, TypeError) as error:
            raise ValueError(f"{path} is missing or not a sentencepiece model: {error}") from error
        self.pieces = self.processor.vocab_size()
        self.special_ids = {token: self.pieces + index for index, token in enumerate(SPECIAL_TOKENS)}
        self.special_tokens = {index: token for token, index in self.special_ids.items()}

    def __len__(self) -> int:
        return self.pieces + len(SPECIAL_TOKENS)

    def encode(self, text: str) -> list[int]:
        """Ids of the text, none of them special."""
        return self.processor.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; a special token is written as it is spelled, an id outside the vocabulary is left out."""
        text, run = "", []
        for index in ids:
            if index in self.special_tokens:
                text += self.processor.decode(run) + self.special_tokens[index]
                run = []
            elif 0 <= index < self.pieces:
                run.append(int(index))
        return text + self.processor.decode(run)

    def token(self, index: int) -> str:
        """The piece or special token of an id; the unknown piece for an id that has none."""
        if index in self.special_tokens:
            return self.special_tokens[index]
        return self.processor.id_to_piece(index if 0 <= index < self.pieces else self.processor.unk_id())

    def id(self, token: str) -> int:
        """The id of a piece or special token; that of the unknown piece if there is none."""
        return self.special_ids.get(token, self.processor.piece_to_id(token))
