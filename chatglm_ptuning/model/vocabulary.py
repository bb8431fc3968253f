"""Vocabularies of the family: text to ids and back, with the special tokens beside the pieces of text.

This module has what all of them share, and the sentencepiece vocabulary of ChatGLM2 and ChatGLM3. GLM-4's is in
`byte_pair_vocabulary.py`.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import ClassVar

from sentencepiece import SentencePieceProcessor

ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
SPECIAL_TOKENS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", *ROLE_TOKENS)
"""In the order of their ids, which follow the last piece (official file: tokenization_chatglm.py of ChatGLM3-6B)."""


class Vocabulary(ABC):
    """Text to ids and back; text never becomes a special token.

    Attributes:
        path: the file it was read from.
        special_ids: special tokens to ids.
        special_tokens: ids to special tokens.
        named_tokens: what transformers calls `bos_token`, `eos_token`, `unk_token` and `pad_token`, where there is one.
        start_tokens: the special tokens with which every sequence starts.
        end_id: the id of `eos_token`.
        written_by_templates: what of a template's text is a special token.
    """

    start_tokens: ClassVar[tuple[str, str]]

    def __init__(self, path: Path, special_ids: Mapping[str, int], named_tokens: Mapping[str, str]) -> None:
        self.path = path
        self.special_ids = dict(sorted(special_ids.items(), key=lambda item: item[1]))
        self.special_tokens = {index: token for token, index in special_ids.items()}
        self.named_tokens = dict(named_tokens)
        self.end_id = self.id(named_tokens["eos_token"])
        self._skipped = {*self.special_tokens, *map(self.id, self.named_tokens.values())}

    @abstractmethod
    def __len__(self) -> int:
        """One more than the highest id."""

    def __contains__(self, token: str) -> bool:
        index = self.id(token)
        return index is not None and self.token(index) == token

    @property
    @abstractmethod
    def written_by_templates(self) -> re.Pattern[str]:
        """Matches, in one group, the special tokens that a chat template writes."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of the text, none of them special; half of a surrogate pair becomes U+FFFD."""

    @abstractmethod
    def split(self, text: str) -> list[str]:
        """The pieces behind the ids of `encode`."""

    @abstractmethod
    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Where in the text, in characters from start to end, the pieces of `encode` stand.

        A piece that holds a part of a character's bytes has the whole character.
        """

    @abstractmethod
    def token(self, index: int) -> str:
        """The piece or special token of an id; the unknown piece, or "" where there is none, for an id without one."""

    @abstractmethod
    def id(self, token: str) -> int | None:
        """The id of a piece or special token; that of the unknown piece, or None where there is none, otherwise."""

    @abstractmethod
    def content(self) -> bytes:
        """The vocabulary as a `tokenizer.model` holds it."""

    @abstractmethod
    def _decode_pieces(self, ids: list[int]) -> str: ...

    @abstractmethod
    def _join_pieces(self, pieces: list[str]) -> str: ...

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Text of the ids.

        A special token is written as it is spelled, and an id outside the vocabulary is left out. Bytes that are no
        UTF-8 (yet) are U+FFFD. Of a sentencepiece vocabulary, `</s>` and `<s>` are empty.

        Args:
            skip_special_tokens: leave out special and named tokens.
        """
        text, run = "", []
        for index in map(int, ids):
            if skip_special_tokens and index in self._skipped:
                continue
            if index in self.special_tokens:
                text += self._decode_pieces(run) + self.special_tokens[index]
                run = []
            else:
                run.append(index)
        return text + self._decode_pieces(run)

    def join(self, tokens: Iterable[str]) -> str:
        """Text of pieces and special tokens, as `decode` gives it for their ids."""
        text, run = "", []
        for token in tokens:
            if token in self.special_ids:
                text += self._join_pieces(run) + token
                run = []
            else:
                run.append(token)
        return text + self._join_pieces(run)


class SentencePieceVocabulary(Vocabulary):
    """The vocabulary of ChatGLM2 and ChatGLM3.

    Args:
        path: a `tokenizer.model`.

    Raises:
        ValueError: if the file is missing or not a sentencepiece model, saying what it is instead where that shows.
    """

    start_tokens = ("[gMASK]", "sop")

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        try:
            self.processor = SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError, TypeError) as error:
            raise ValueError(why_unreadable(path, "a sentencepiece model", str(error))) from error
        self.pieces = self.processor.vocab_size()
        piece, unknown = self.processor.id_to_piece, self.processor.unk_id()
        super().__init__(
            path,
            {token: self.pieces + index for index, token in enumerate(SPECIAL_TOKENS)},
            {
                "bos_token": piece(self.processor.bos_id()),
                "eos_token": piece(self.processor.eos_id()),
                "unk_token": piece(unknown),
                "pad_token": piece(unknown),
            },
        )

    def __len__(self) -> int:
        return self.pieces + len(SPECIAL_TOKENS)

    @property
    def written_by_templates(self) -> re.Pattern[str]:
        """`sop` and `eop` are parts of words, too: `sop` counts only where every chat has it."""
        return re.compile(rf"(\[gMASK\]|(?<=\[gMASK\])sop|</s>|{'|'.join(map(re.escape, ROLE_TOKENS))})")

    def encode(self, text: str) -> list[int]:
        """Ids of the text, none of them special; half of a surrogate pair becomes U+FFFD."""
        return self.processor.encode(well_formed(text))

    def split(self, text: str) -> list[str]:
        """The pieces behind the ids of `encode`."""
        return self.processor.encode(well_formed(text), out_type=str)

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """As in `Vocabulary`; the space that sentencepiece puts in front of a text is no character of it."""
        encoded = self.processor.encode(well_formed(text), return_type="offset_mapping")
        places = original_places(text)
        spans = []
        for index, (start, end) in zip(encoded["ids"], encoded["offsets"], strict=True):
            # All bytes of a character but the last come back empty.
            end = end + 1 if start == end and self.processor.is_byte(index) else end
            spans.append((places[start], places[end]))
        return spans

    def token(self, index: int) -> str:
        """The piece or special token of an id; the unknown piece for an id that has none."""
        if index in self.special_tokens:
            return self.special_tokens[index]
        return self.processor.id_to_piece(index if 0 <= index < self.pieces else self.processor.unk_id())

    def id(self, token: str) -> int:
        """The id of a piece or special token; that of the unknown piece if there is none."""
        return self.special_ids.get(token, self.processor.piece_to_id(token))

    def content(self) -> bytes:
        """The vocabulary as a `tokenizer.model` holds it."""
        return self.processor.serialized_model_proto()

    def _decode_pieces(self, ids: list[int]) -> str:
        return self.processor.decode([index for index in ids if 0 <= index < self.pieces])

    def _join_pieces(self, pieces: list[str]) -> str:
        return self.processor.decode(pieces)


def well_formed(text: str) -> str:
    """The text with surrogate pairs as the character they mean, and other surrogates as U+FFFD."""
    # Python strings may hold surrogates (from JSON escapes, from terminals); UTF-8 may not.
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def original_places(text: str) -> list[int]:
    """For every place from 0 to its length in `well_formed(text)`, the place in the text itself."""
    if len(well_formed(text)) == len(text):
        return list(range(len(text) + 1))
    places = []
    for place, character in enumerate(text):
        follows_high = place > 0 and "\ud800" <= text[place - 1] <= "\udbff"
        if not (follows_high and "\udc00" <= character <= "\udfff"):
            places.append(place)
    return [*places, len(text)]


def write_if_changed(path: Path, content: bytes) -> None:
    """Writes a file, unless it is already the same: it may be the very file that is still being read from."""
    if not path.is_file() or path.read_bytes() != content:
        path.write_bytes(content)


def why_unreadable(path: Path, expected: str, reason: str) -> str:
    """A message about a vocabulary file that cannot be read."""
    if not path.is_file():
        return (
            f"{path} is missing. Put the tokenizer.model of the base there, or give the folder that has it: every "
            "base of the family comes with one (those for transformers' own GlmForCausalLM with a tokenizer.json)."
        )
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        return f"{path} is a git-lfs pointer, not the file itself. Run `git lfs pull` in its folder."
    return (
        f"{path} ({path.stat().st_size} bytes) is damaged or not {expected}: {reason}. Copy or download the "
        f"base's {path.name} again."
    )
