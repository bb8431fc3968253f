"""The vocabulary of GLM-4 and CodeGeeX4: byte-level BPE through tiktoken, from a tokenizer.model or tokenizer.json."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tiktoken
from transformers.convert_slow_tokenizer import bytes_to_unicode

from chatglm_ptuning.model.vocabulary import (
    ROLE_TOKENS,
    SentencePieceVocabulary,
    Vocabulary,
    original_places,
    well_formed,
    why_unreadable,
)

SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
"""Cuts text into what is merged separately (official file: tokenization_chatglm.py of GLM-4-9B-Chat)."""
END_OF_TEXT = "<|endoftext|>"
GLM4_SPECIAL_TOKENS = (
    END_OF_TEXT, "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", *ROLE_TOKENS,
    "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>",
)  # fmt: skip
"""In the order of their ids, which follow the last rank (official file as above)."""

_NEEDED = (END_OF_TEXT, "[gMASK]", "<sop>", *ROLE_TOKENS)
_LINE = re.compile(rb"([A-Za-z0-9+/]+={0,2}) (\d+)")
_BYTE_TO_CHARACTER = bytes_to_unicode()
_CHARACTER_TO_BYTE = {character: byte for byte, character in _BYTE_TO_CHARACTER.items()}


class BytePairVocabulary(Vocabulary):
    """Byte pairs merged by rank, the rank being the id; any Unicode text comes back byte for byte.

    As strings, tokens are spelled as in a tokenizer.json: every byte as one printable character ("Ġ" is a space).

    Args:
        path: a `tokenizer.model` of tiktoken's form (lines of base64 and rank), or a `tokenizer.json`.
        special_ids: special tokens to ids; those of the file, or GLM-4's behind the last rank, where not given.

    Raises:
        ValueError: if the file is missing, damaged or of another kind, naming the line where there is one.
    """

    start_tokens = ("[gMASK]", "<sop>")

    def __init__(self, path: str | Path, special_ids: Mapping[str, int] | None = None) -> None:
        path = Path(path)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ValueError(why_unreadable(path, "a vocabulary", str(error))) from error
        try:
            if path.suffix == ".json":
                ranks, found = _from_tokenizer_json(json.loads(content))
            else:
                ranks, found = _from_tiktoken_lines(content.splitlines(), path), {}
            _check_bytes(ranks)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(why_unreadable(path, "a byte-level BPE vocabulary", str(error))) from error
        special_ids = special_ids or found or default_special_ids(ranks)
        _check_special_tokens(path, special_ids, ranks)
        super().__init__(path, special_ids, {"eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT})
        self.ranks = ranks
        self.bytes_of = {rank: token for token, rank in ranks.items()}
        self._size = 1 + max(max(self.special_ids.values()), max(self.bytes_of))
        self._encoding = _encoding(ranks)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_encoding"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._encoding = _encoding(self.ranks)

    def __len__(self) -> int:
        return self._size

    @property
    def written_by_templates(self) -> re.Pattern[str]:
        """All special tokens: none of them is a part of a word."""
        return re.compile(f"({'|'.join(map(re.escape, self.special_ids))})")

    def encode(self, text: str) -> list[int]:
        """Ids of the text, none of them special; half of a surrogate pair becomes U+FFFD."""
        return self._encoding.encode_ordinary(text)

    def split(self, text: str) -> list[str]:
        """The pieces behind the ids of `encode`."""
        return [_spell(self.bytes_of[index]) for index in self.encode(text)]

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """As in `Vocabulary`."""
        places = original_places(text)
        character_of = [place for place, character in enumerate(well_formed(text)) for _ in character.encode()]
        spans, start = [], 0
        for index in self.encode(text):
            end = start + len(self.bytes_of[index])
            spans.append((places[character_of[start]], places[character_of[end - 1] + 1]))
            start = end
        return spans

    def token(self, index: int) -> str:
        """The piece or special token of an id; "" for an id that has none."""
        if index in self.special_tokens:
            return self.special_tokens[index]
        return _spell(self.bytes_of.get(index, b""))

    def id(self, token: str) -> int | None:
        """The id of a piece or special token; None if there is none."""
        if token in self.special_ids:
            return self.special_ids[token]
        piece = _unspell(token)
        return None if piece is None else self.ranks.get(piece)

    def content(self) -> bytes:
        """The vocabulary as a `tokenizer.model` of tiktoken's form holds it."""
        lines = (b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in sorted(self.bytes_of.items()))
        return b"".join(lines)

    def _decode_pieces(self, ids: list[int]) -> str:
        return b"".join(self.bytes_of.get(index, b"") for index in ids).decode("utf-8", "replace")

    def _join_pieces(self, pieces: list[str]) -> str:
        return b"".join(_unspell(piece) or b"" for piece in pieces).decode("utf-8", "replace")


def open_vocabulary(path: str | Path, special_ids: Mapping[str, int] | None = None) -> Vocabulary:
    """Reads the vocabulary of any base of the family.

    Args:
        path: a `tokenizer.model` (sentencepiece or tiktoken) or a `tokenizer.json`.
        special_ids: special tokens to ids of a byte-pair vocabulary, where the folder's files name them.

    Raises:
        ValueError: if the file is missing, damaged or of another kind.
    """
    path = Path(path)
    is_byte_pair = path.suffix == ".json"
    if not is_byte_pair and path.is_file():
        with path.open("rb") as file:
            is_byte_pair = _LINE.fullmatch(file.readline(4096).rstrip()) is not None
    return BytePairVocabulary(path, special_ids) if is_byte_pair else SentencePieceVocabulary(path)


def default_special_ids(ranks: Mapping[bytes, int]) -> dict[str, int]:
    """GLM-4's special tokens, with the ids that follow the last rank."""
    return {token: index for index, token in enumerate(GLM4_SPECIAL_TOKENS, start=max(ranks.values()) + 1)}


def _encoding(ranks: dict[bytes, int]) -> tiktoken.Encoding:
    return tiktoken.Encoding("glm4", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})


def _from_tiktoken_lines(lines: Iterable[bytes], path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    seen: set[int] = set()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        match = _LINE.fullmatch(line.strip())
        try:
            token, rank = base64.b64decode(match[1], validate=True), int(match[2])
        except (TypeError, binascii.Error) as error:
            raise ValueError(
                f"line {number} of {path.name} is not base64, a space and a rank: {line[:60]!r}"
            ) from error
        if token in ranks or rank in seen:
            raise ValueError(f"line {number} of {path.name} gives a token or a rank for the second time: {line[:60]!r}")
        ranks[token] = rank
        seen.add(rank)
    return ranks


def _from_tokenizer_json(content: Any) -> tuple[dict[bytes, int], dict[str, int]]:
    """Ranks and special tokens of a tokenizer.json that does what tiktoken does with GLM-4's pattern."""
    model = content["model"]
    if model.get("type") != "BPE" or content.get("normalizer") is not None:
        raise ValueError("its model is not plain BPE without a normalizer, as GLM-4 has it")
    steps = content.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    patterns = [step["pattern"].get("Regex") for step in steps if step.get("type") == "Split"]
    if patterns != [SPLIT_PATTERN] or not any(step.get("type") == "ByteLevel" for step in steps):
        raise ValueError("its pre-tokenizer does not cut text by GLM-4's pattern into bytes")
    special_ids = {token["content"]: token["id"] for token in content.get("added_tokens", ())}
    pieces = {token: index for token, index in model["vocab"].items() if token not in special_ids}
    ranks = {_unspell(token): index for token, index in pieces.items()}
    if None in ranks:
        raise ValueError("a token in it is not spelled byte by byte")
    merged = [ranks[_unspell("".join(pair))] for pair in _merges(model["merges"])]
    if merged != sorted(merged):
        raise ValueError("its merges are not in the order of the ids that they give")
    return ranks, special_ids


def _merges(merges: Iterable[str | list[str]]) -> Iterator[tuple[str, str]]:
    for merge in merges:
        first, second = merge.split(" ") if isinstance(merge, str) else merge
        yield first, second


def _check_bytes(ranks: Mapping[bytes, int]) -> None:
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(f"it has no token for {len(missing)} of the 256 bytes, such as {missing[0]}")


def _check_special_tokens(path: Path, special_ids: Mapping[str, int], ranks: Mapping[bytes, int]) -> None:
    missing = [token for token in _NEEDED if token not in special_ids]
    if missing:
        raise ValueError(f"{path} is not GLM-4's vocabulary: it has no special token {', '.join(missing)}.")
    pieces = set(ranks.values())
    shared = [token for token, index in special_ids.items() if index in pieces]
    if shared:
        raise ValueError(f"{path}: the special token {shared[0]} has the id {special_ids[shared[0]]} of a text token.")


def _spell(piece: bytes) -> str:
    return "".join(map(_BYTE_TO_CHARACTER.__getitem__, piece))


def _unspell(token: str) -> bytes | None:
    try:
        return bytes(_CHARACTER_TO_BYTE[character] for character in token)
    except KeyError:
        return None
