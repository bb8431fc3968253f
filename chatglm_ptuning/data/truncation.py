"""Truncates the source of a conversation to a number of tokens."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace

from chatglm_ptuning.chat.format import ChatFormat
from chatglm_ptuning.chat.message import Conversation, turn_starts


def truncate_source(
    conversation: Conversation, room: int, chat_format: ChatFormat
) -> tuple[Conversation, list[str]] | None:
    """Shortens what precedes the last answer until its prompt has at most `room` ids.

    First, whole turns are dropped, oldest first (see `turn_starts`); leading system messages and the last turn stay. If
    that is not enough, the longest of the remaining questions, tool results and system messages lose their middle, all
    down to the same number of characters; shorter ones are not cut. Their ends are kept because the topic of
    a text is mostly at its beginning, and the question about it at its beginning or end. Role headers, the source
    prefix and answers are never truncated.

    Args:
        conversation: ends with the answer; its prompt has more than `room` ids.

    Returns:
        The shorter conversation, and the counters of `PreparationReport` that it adds to; None if it cannot be done.
    """

    def fits(candidate: Conversation) -> bool:
        return len(chat_format.encode_prompt(candidate.asked)) <= room

    messages = conversation.messages
    starts = turn_starts([message.role for message in messages])

    def without_oldest(count: int) -> Conversation:
        return replace(conversation, messages=[*messages[: starts[0]], *messages[starts[count] :]])

    last = len(starts) - 1
    dropped = 1 + bisect_left(range(1, last), True, key=lambda count: fits(without_oldest(count))) if last else 0
    shortened, counted = without_oldest(dropped), ["history_cut"] * (dropped > 0)
    if dropped and fits(shortened):
        return shortened, counted

    def with_texts_of(length: int) -> Conversation:
        kept = [
            message
            if message.role == "assistant"
            else replace(message, content=without_middle(message.content, length))
            for message in shortened.messages
        ]
        return replace(shortened, messages=kept)

    longest = max((len(message.content) for message in shortened.messages if message.role != "assistant"), default=0)
    cut = with_texts_of(longest_that_fits(longest, lambda length: fits(with_texts_of(length))))
    return (cut, [*counted, "source_cut"]) if fits(cut) else None


def longest_that_fits(longest: int, fits: Callable[[int], bool]) -> int:
    """The number of characters to which texts have to be shortened, by bisection.

    A text with its middle removed may take a token more than a longer one, so this is not always the very largest
    number; but it was tried, or it is 0.

    Args:
        longest: characters of the longest text, which is too long.
        fits: whether everything fits if each text has at most this number of characters.
    """
    return longest - bisect_left(range(longest), True, key=lambda taken: fits(longest - taken))


def without_middle(text: str, length: int) -> str:
    """A text of more than `length` characters without its middle, so that `length` are left; a shorter one as it is."""
    if len(text) <= length:
        return text
    head, tail = (length + 1) // 2, length // 2
    return text[:head] + text[len(text) - tail :]
