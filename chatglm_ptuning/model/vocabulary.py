"""Vocabularies of the family: text to ids and back, with special tokens beside the pieces of text.

ChatGLM2 and ChatGLM3 have a sentencepiece vocabulary; GLM-4 and CodeGeeX4 have byte-level BPE, run by tiktoken.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import tiktoken
from sentencepiece import SentencePieceProcessor
from transformers.convert_slow_tokenizer import bytes_to_unicode

from chatglm_ptuning.chat.roles import ROLE_TOKENS
from chatglm_ptuning.files import check_content

SPECIAL_TOKENS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", *ROLE_TOKENS)
"""In the order of their ids, which follow the last piece (official file: tokenization_chatglm.py of ChatGLM3-6B)."""

SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
"""Cuts text into parts that are merged separately (official file: tokenization_chatglm.py of GLM-4-9B-Chat)."""
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


class Vocabulary(ABC):
    """Text to ids and back; text never becomes a special token.

    Attributes:
        path: the file it was read from.
        special_ids: special tokens to ids.
        special_tokens: ids to special tokens.
        named_tokens: transformers' `bos_token`, `eos_token`, `unk_token` and `pad_token`, as far as there are any.
        start_tokens: the special tokens with which every sequence starts.
        end_id: the id of `eos_token`.
    """

    start_tokens: ClassVar[tuple[str, str]]

    def __init__(
        self, path: Path, special_ids: Mapping[str, int], named_tokens: Mapping[str, str], spelled: str
    ) -> None:
        self.path = path
        self.special_ids = dict(sorted(special_ids.items(), key=lambda item: item[1]))
        self.special_tokens = {index: token for token, index in special_ids.items()}
        self.named_tokens = dict(named_tokens)
        self.end_id = self.id(named_tokens["eos_token"])
        self._spelled = re.compile(f"({spelled})")
        self._skipped = {*self.special_tokens, *map(self.id, self.named_tokens.values())}

    @abstractmethod
    def __len__(self) -> int:
        """One more than the highest id."""

    def __contains__(self, token: str) -> bool:
        index = self.id(token)
        return index is not None and self.token(index) == token

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of the text, none of them special; an unpaired surrogate becomes U+FFFD."""

    def parts(self, rendered: str) -> Iterator[tuple[str, bool]]:
        """The parts of a rendered prompt in order, each with whether it is a special token.

        In a sentencepiece vocabulary, `sop` counts only behind `[gMASK]`, and `eop` never: both occur in words.
        """
        for index, part in enumerate(self._spelled.split(rendered)):
            if part:
                yield part, index % 2 == 1

    def spells_special_tokens(self, text: str) -> bool:
        """Whether the text spells a token by which prompts set roles or begin; fast on texts without any."""
        return ("|>" in text or "MASK]" in text) and any(is_special for _, is_special in self.parts(text))

    @abstractmethod
    def split(self, text: str) -> list[str]:
        """The pieces behind the ids of `encode`."""

    @abstractmethod
    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Start and end of each id of `encode` in the text, in characters.

        A piece that holds some bytes of a character spans the whole character.
        """

    @abstractmethod
    def token(self, index: int) -> str:
        """The piece or special token of an id; for an unknown id the unknown piece, or "" where there is none."""

    @abstractmethod
    def id(self, token: str) -> int | None:
        """The id of a piece or special token; for an unknown one that of the unknown piece, or None without one."""

    def bytes_of_token(self, index: int) -> bytes:
        """The bytes that an id adds to a text, in UTF-8; of a special token its name."""
        return self.special_tokens[index].encode() if index in self.special_tokens else self._bytes_of_piece(index)

    @abstractmethod
    def _bytes_of_piece(self, index: int) -> bytes:
        """As `bytes_of_token`, of an id that is no special token; none for an id outside the vocabulary."""

    @abstractmethod
    def content(self) -> bytes:
        """The vocabulary as the content of a `tokenizer.model`."""

    @property
    @abstractmethod
    def official_tokenizer(self) -> Any:
        """What `tokenizer.tokenizer` of the official code is: a tokenizer without start tokens."""

    @abstractmethod
    def _decode_pieces(self, pieces: list[int] | list[str]) -> str:
        """Text of ids or pieces that are no special tokens."""

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Text of the ids.

        Special tokens are spelled out, and ids outside the vocabulary are left out. Bytes that are no UTF-8 (yet) are
        U+FFFD. In a sentencepiece vocabulary `</s>`, `<s>` and padding give no text.

        Args:
            skip_special_tokens: leave out special and named tokens.
        """
        skipped = self._skipped if skip_special_tokens else ()
        return self._join((index for index in map(int, ids) if index not in skipped), self.special_tokens)

    def join(self, tokens: Iterable[str]) -> str:
        """Text of pieces and special tokens, as `decode` gives it for their ids."""
        return self._join(tokens, {token: token for token in self.special_ids})

    def _join(self, parts: Iterable[Any], special_tokens: Mapping[Any, str]) -> str:
        text, run = "", []
        for part in parts:
            if part in special_tokens:
                text += self._decode_pieces(run) + special_tokens[part]
                run = []
            else:
                run.append(part)
        return text + self._decode_pieces(run)


class SentencePieceVocabulary(Vocabulary):
    """The vocabulary of ChatGLM2 and ChatGLM3.

    Args:
        path: a `tokenizer.model`.

    Raises:
        ValueError: if the file is missing or not a sentencepiece model; the message says what it is, if that is known.
    """

    start_tokens = ("[gMASK]", "sop")

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        try:
            self.processor = SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError, TypeError) as error:
            raise _unreadable(path, "a sentencepiece model", error) from error
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
            rf"\[[gs]?MASK\]|(?<=\[gMASK\])sop|</s>|{'|'.join(map(re.escape, ROLE_TOKENS))}",
        )

    def __len__(self) -> int:
        return self.pieces + len(SPECIAL_TOKENS)

    def encode(self, text: str) -> list[int]:
        """As in `Vocabulary`."""
        return self.processor.encode(_well_formed(text))

    def split(self, text: str) -> list[str]:
        """As in `Vocabulary`."""
        return self.processor.encode(_well_formed(text), out_type=str)

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """As in `Vocabulary`; the space that sentencepiece puts in front of a text has no character of it."""
        encoded = self.processor.encode(_well_formed(text), return_type="offset_mapping")
        places = _original_places(text)
        spans = []
        for index, (start, end) in zip(encoded["ids"], encoded["offsets"], strict=True):
            # All bytes of a character but the last come back empty.
            end = end + 1 if start == end and self.processor.is_byte(index) else end
            spans.append((places[start], places[end]))
        return spans

    def token(self, index: int) -> str:
        """As in `Vocabulary`."""
        if index in self.special_tokens:
            return self.special_tokens[index]
        return self.processor.id_to_piece(index if 0 <= index < self.pieces else self.processor.unk_id())

    def id(self, token: str) -> int:
        """As in `Vocabulary`."""
        return self.special_ids.get(token, self.processor.piece_to_id(token))

    def content(self) -> bytes:
        """As in `Vocabulary`."""
        return self.processor.serialized_model_proto()

    def _bytes_of_piece(self, index: int) -> bytes:
        if not 0 <= index < self.pieces:
            return b""
        piece = self.processor.id_to_piece(index)
        if self.processor.is_byte(index):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("\u2581", " ").encode()

    @property
    def official_tokenizer(self) -> SPTokenizer:
        """As in `Vocabulary`."""
        return SPTokenizer(self)

    def _decode_pieces(self, pieces: list[int] | list[str]) -> str:
        # Padding has no text, as in the official tokenizer; sentencepiece writes its id, that of <unk>, as " ⁇ ".
        padding = (self.processor.unk_id(), self.token(self.processor.unk_id()))
        return self.processor.decode(
            [piece for piece in pieces if piece not in padding and (isinstance(piece, str) or 0 <= piece < self.pieces)]
        )


class SPTokenizer:
    """The inner tokenizer of the official ChatGLM2 and ChatGLM3 tokenizers, with its official names."""

    def __init__(self, vocabulary: SentencePieceVocabulary) -> None:
        self.vocabulary = vocabulary
        self.sp_model = vocabulary.processor
        self.n_words = len(vocabulary)
        self.bos_id, self.eos_id = self.sp_model.bos_id(), self.sp_model.eos_id()
        self.pad_id = self.sp_model.unk_id()
        self.special_tokens, self.index_special_tokens = vocabulary.special_ids, vocabulary.special_tokens
        self.tokenize, self.decode, self.decode_tokens = vocabulary.split, vocabulary.decode, vocabulary.join
        self.convert_token_to_id, self.convert_id_to_token = vocabulary.id, vocabulary.token

    def encode(self, s: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of the text, none of them special, between `<s>` and `</s>` as asked."""
        return [self.bos_id] * bos + self.vocabulary.encode(s) + [self.eos_id] * eos


class BytePairVocabulary(Vocabulary):
    """Byte pairs merged by rank, the rank being the id; decoding returns any Unicode text byte for byte.

    As strings, tokens are spelled as in a tokenizer.json: every byte as one printable character ("Ġ" is a space).

    Args:
        path: a `tokenizer.model` of tiktoken's format (lines of base64 and rank), or a `tokenizer.json`.
        special_ids: special tokens to ids; by default those of the file, or GLM-4's after the last rank.

    Raises:
        ValueError: if the file is missing, damaged or of another kind, naming the line where there is one.
    """

    start_tokens = ("[gMASK]", "<sop>")

    def __init__(self, path: str | Path, special_ids: Mapping[str, int] | None = None) -> None:
        path = Path(path)
        try:
            content = path.read_bytes()
            if path.suffix == ".json":
                ranks, found = _from_tokenizer_json(json.loads(content))
            else:
                ranks, found = _from_tiktoken_lines(content.splitlines(), path), {}
            missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
            if missing:
                raise ValueError(f"it has no token for {len(missing)} of the 256 bytes, such as {missing[0]}")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise _unreadable(path, "a byte-level BPE vocabulary", error) from error
        self.ranks = ranks
        self.bytes_of = {rank: token for token, rank in ranks.items()}
        behind = max(self.bytes_of) + 1
        special_ids = special_ids or found or {token: behind + i for i, token in enumerate(GLM4_SPECIAL_TOKENS)}
        missing = [token for token in _NEEDED if token not in special_ids]
        if missing:
            raise ValueError(f"{path} is not GLM-4's vocabulary: it has no special token {', '.join(missing)}.")
        for token, index in special_ids.items():
            if index in self.bytes_of:
                raise ValueError(f"{path}: the special token {token} has the id {index} of a text token.")
        super().__init__(
            path,
            special_ids,
            {"eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT},
            "|".join(map(re.escape, special_ids)),
        )
        self._size = max(behind, 1 + max(special_ids.values()))
        self._encoding = tiktoken.Encoding(
            "glm4", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=self.special_ids
        )

    def __len__(self) -> int:
        return self._size

    def encode(self, text: str) -> list[int]:
        """As in `Vocabulary`.

        Raises:
            ValueError: for hundreds of thousands of spaces in a row, which tiktoken cannot split.
        """
        try:
            return self._encoding.encode_ordinary(text)
        except BaseException as error:
            # A panic of tiktoken's Rust code is no Exception, and would end the thread that called.
            if type(error).__name__ != "PanicException":
                raise
            raise ValueError("The text has too many spaces in a row for this vocabulary.") from None

    def split(self, text: str) -> list[str]:
        """As in `Vocabulary`."""
        return [_spell(self.bytes_of[index]) for index in self.encode(text)]

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """As in `Vocabulary`."""
        places = _original_places(text)
        character_of = [place for place, character in enumerate(_well_formed(text)) for _ in character.encode()]
        spans, start = [], 0
        for index in self.encode(text):
            end = start + len(self.bytes_of[index])
            spans.append((places[character_of[start]], places[character_of[end - 1] + 1]))
            start = end
        return spans

    def token(self, index: int) -> str:
        """As in `Vocabulary`."""
        return self.special_tokens.get(index) or _spell(self.bytes_of.get(index, b""))

    def id(self, token: str) -> int | None:
        """As in `Vocabulary`."""
        return self.special_ids.get(token, self.ranks.get(_unspell(token)))

    def content(self) -> bytes:
        """As in `Vocabulary`, in tiktoken's format."""
        lines = (b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in sorted(self.bytes_of.items()))
        return b"".join(lines)

    def _bytes_of_piece(self, index: int) -> bytes:
        return self.bytes_of.get(index, b"")

    @property
    def official_tokenizer(self) -> tiktoken.Encoding:
        """As in `Vocabulary`."""
        return self._encoding

    def _decode_pieces(self, pieces: list[int] | list[str]) -> str:
        found = (_unspell(piece) if isinstance(piece, str) else self.bytes_of.get(piece) for piece in pieces)
        return b"".join(piece or b"" for piece in found).decode("utf-8", "replace")


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
    """Ranks and special tokens of a tokenizer.json that is equivalent to tiktoken with GLM-4's pattern."""
    model = content["model"]
    if model.get("type") != "BPE" or content.get("normalizer") is not None:
        raise ValueError("its model is not plain BPE without a normalizer, as GLM-4 has it")
    steps = content.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    patterns = [step["pattern"].get("Regex") for step in steps if step.get("type") == "Split"]
    if patterns != [SPLIT_PATTERN] or not any(step.get("type") == "ByteLevel" for step in steps):
        raise ValueError("its pre-tokenizer does not cut text by GLM-4's pattern into bytes")
    special_ids = {token["content"]: token["id"] for token in content.get("added_tokens", ())}
    ranks = {_unspell(token): index for token, index in model["vocab"].items() if token not in special_ids}
    if None in ranks:
        raise ValueError("a token in it is not spelled byte by byte")
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    merged = [ranks[_unspell(first + second)] for first, second in pairs]
    if merged != sorted(merged):
        raise ValueError("its merges are not in the order of the ids that they give")
    return ranks, special_ids


def _spell(piece: bytes) -> str:
    return "".join(map(_BYTE_TO_CHARACTER.__getitem__, piece))


def _unspell(token: str) -> bytes | None:
    try:
        return bytes(_CHARACTER_TO_BYTE[character] for character in token)
    except KeyError:
        return None


def _well_formed(text: str) -> str:
    """The text with surrogate pairs replaced by their character, and other surrogates by U+FFFD."""
    # Python strings may hold surrogates (from JSON escapes, from terminals); UTF-8 may not.
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _original_places(text: str) -> list[int]:
    """For every place from 0 to its length in `_well_formed(text)`, the place in the text itself."""
    if len(_well_formed(text)) == len(text):
        return list(range(len(text) + 1))
    places = []
    for place, character in enumerate(text):
        follows_high = place > 0 and "\ud800" <= text[place - 1] <= "\udbff"
        if not (follows_high and "\udc00" <= character <= "\udfff"):
            places.append(place)
    return [*places, len(text)]


def _unreadable(path: Path, expected: str, reason: Exception) -> ValueError:
    """The error about a vocabulary file that cannot be read."""
    if not path.is_file():
        return ValueError(
            f"{path} is missing. Put the tokenizer.model of the base there, or give the folder that has it: every "
            "base of the family comes with one (those for transformers' own GlmForCausalLM with a tokenizer.json)."
        )
    try:
        check_content(path)
    except ValueError as error:
        return error
    return ValueError(
        f"{path} ({path.stat().st_size} bytes) is damaged or not {expected}: {reason}. Copy or download the base's "
        f"{path.name} again."
    )
