"""What the official tokenization_chatglm.py of ChatGLM2, ChatGLM3 and GLM-4 offers beside transformers' own interface:
as it was where that is simple, else an error that names what replaces it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import BatchEncoding

from chatglm_ptuning.chat.chatglm2 import ChatGLM2Rounds
from chatglm_ptuning.chat.format import ChatFormat
from chatglm_ptuning.chat.formats import formats_of
from chatglm_ptuning.chat.message import Message
from chatglm_ptuning.chat.roles import RoleFormat
from chatglm_ptuning.chat.turn import ChatTurn, message_history, pair_history
from chatglm_ptuning.model.vocabulary import Vocabulary

RETIRED_ATTRIBUTES = {
    "mergeable_ranks": "vocabulary.ranks has the bytes of GLM-4's tokens and their ids",
    "decoder": "vocabulary.bytes_of has the ids of GLM-4's tokens and their bytes",
    "special_token_ids": "vocabulary.special_tokens has the ids of special tokens and the tokens",
    "n_words": "vocab_size is the number of ids",
    "encode_plus": "tokenizer(text) replaces it, as transformers has it",
    "batch_encode_plus": "tokenizer(texts) replaces it, as transformers has it",
    "pat_str": "SPLIT_PATTERN of chatglm_ptuning.model.vocabulary is the pattern",
}
"""Attributes of the official tokenizers, with what replaces them."""


class OfficialTokenizerSurface:
    """Attributes and methods of every official tokenizer class."""

    vocabulary: Vocabulary
    chat: ChatFormat

    def __getattr__(self, name: str) -> Any:
        if name in RETIRED_ATTRIBUTES:
            raise AttributeError(f"{name} of the official code is not in this kit: {RETIRED_ATTRIBUTES[name]}.")
        return super().__getattr__(name)

    @property
    def tokenizer(self) -> Any:
        """The official inner tokenizer, whose ids have no start tokens: see `Vocabulary.official_tokenizer`."""
        return self.vocabulary.official_tokenizer

    @property
    def special_tokens(self) -> dict[str, int]:
        """The tokens of `get_command` and their ids."""
        named = {"<bos>": self.bos_token_id, "<eos>": self.eos_token_id, "<unk>": self.unk_token_id,
                 "<pad>": self.pad_token_id}  # fmt: skip
        return {name: index for name, index in named.items() if index is not None} | self.vocabulary.special_ids

    def get_command(self, token: str) -> int:
        """The id of a special token, or of `<bos>`, `<eos>`, `<unk>` or `<pad>`.

        Raises:
            ValueError: if there is no such token.
        """
        ids = self.special_tokens
        if token not in ids:
            raise ValueError(f"{token!r} is no special token of this base; there are {', '.join(ids)}.")
        return ids[token]

    @property
    def vocab_file(self) -> str:
        """The path of the vocabulary."""
        return str(self.vocabulary.path)

    def get_prefix_tokens(self) -> list[int]:
        """The two ids with which every sequence starts, `[gMASK]` and `sop`."""
        return list(self.chat.start_ids)

    def build_prompt(self, query: str, history: Sequence[tuple[str, str]] | None = None) -> str:
        """The text of a chat in ChatGLM2's format, up to the last `答：`.

        Args:
            query: the new question.
            history: earlier rounds, each a pair of question and answer.

        Raises:
            ValueError: naming a round that is not a pair of strings.
        """
        messages = map(Message.from_dict, message_history(pair_history(history or (), ChatGLM2Rounds.name)))
        return ChatGLM2Rounds(self.vocabulary).prompt_text([*messages, Message("user", query)])

    def build_single_message(self, role: str, metadata: str, message: str, tokenize: bool = True) -> list[int] | str:
        """The ids of a message in ChatGLM3's or GLM-4's format: `<|role|>`, metadata and newline, the content.

        Args:
            tokenize: False for the text, which cannot distinguish special tokens that the message spells.

        Raises:
            ValueError: if the role is not system, user, assistant or observation.
        """
        if not tokenize:
            return f"<|{role}|>{metadata}\n{message}"
        return self._role_format().encode_message(Message(role, message, metadata))

    def build_chat_input(
        self, query: str, history: Sequence[Mapping[str, Any]] | None = None, role: str = "user"
    ) -> BatchEncoding:
        """A chat in ChatGLM3's format (or GLM-4's, with its vocabulary) that ends with `<|assistant|>`.

        Args:
            query: the newest message.
            history: earlier messages with `role`, `content` and optionally `metadata` and (system) `tools`.
            role: role of the newest message; "observation" for a tool's output.

        Returns:
            `input_ids`, `attention_mask` and `position_ids`, each a tensor `[1, seq_len]`.

        Raises:
            ValueError: for an unknown role, and naming an entry of the history that is not a message.
        """
        ids = ChatTurn(self._role_format(), query, history, role).input_ids()
        return self([ids], add_special_tokens=False, return_tensors="pt")

    def _role_format(self) -> RoleFormat:
        """The format with roles that the vocabulary supports, whatever the format of the base is."""
        known = formats_of(self.vocabulary).values()
        return next(found for found in known if issubclass(found, RoleFormat))(self.vocabulary)
