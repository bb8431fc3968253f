"""What rendering gives, and how every sequence starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer

ONE_ANSWER = (
    "in this chat format only the last answer of a conversation can be learned; use split_for_training to make one "
    "conversation of each"
)
"""What the formats say that have no end token behind earlier answers."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as ids.

    Attributes:
        input_ids: `[seq_len]`.
        loss_mask: `[seq_len]`; True where the id is to be learned, that is predicted from those before it. It is made
            by position, so that an id which serves as padding elsewhere is learned like any other.
        answer_start: index of the first id of the last answer; the ids before it are the prompt to generate it from.
            The length if there is no such answer.
        answer_header: how many ids of the last answer are not its text yet: its line of metadata.
    """

    input_ids: list[int]
    loss_mask: list[bool]
    answer_start: int
    answer_header: int = 0


def start_ids(tokenizer: ChatGLMTokenizer) -> list[int]:
    """The ids of `[gMASK]` and `sop`."""
    return list(tokenizer.build_inputs_with_special_tokens([]))


def text_ids(tokenizer: ChatGLMTokenizer, text: str) -> list[int]:
    """The ids of a text, none of them special."""
    # As `tokenizer.encode` without special tokens gives them, in a third of its time.
    return tokenizer.vocabulary.encode(text)
