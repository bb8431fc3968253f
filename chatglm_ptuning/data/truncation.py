"""Cutting the source of a conversation to a number of tokens, where it hurts least."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace

from chatglm_ptuning.chat.format import ChatFormat
from chatglm_ptuning.chat.message import Conversation, Message, turn_starts


@dataclass(frozen=True)
class CutSource:
    """A conversation whose source fits, and what was cut off it.

    Attributes:
        history_cut: whether turns were left out.
        text_cut: whether the middle of a question, tool result or system message was left out.
    """

    conversation: Conversation
    history_cut: bool = False
    text_cut: bool = False


def cut_source(conversation: Conversation, room: int, chat_format: ChatFormat) -> CutSource | None:
    """Shortens what precedes the last answer until its prompt has at most `room` ids.

    First the oldest turns go, whole (see `turn_starts`); system messages in front and the last turn stay. If that is
    not enough, the longest of the remaining questions, tool results and system messages lose their middle, all down to
    the same number of characters, the shorter ones staying whole: what a text is about mostly stands at its beginning,
    what is asked of it at its beginning or end. Role headers, the source prefix and answers are never cut.

    Args:
        conversation: ends with the answer in question.

    Returns:
        None if it cannot be done.
    """

    def fits(candidate: Conversation) -> bool:
        return len(chat_format.encode_prompt(candidate.asked)) <= room

    if fits(conversation):
        return CutSource(conversation)
    messages = conversation.messages
    starts = turn_starts([message.role for message in messages])

    def without_oldest(count: int) -> Conversation:
        return replace(conversation, messages=[*messages[: starts[0]], *messages[starts[count] :]])

    last = len(starts) - 1
    dropped = 1 + bisect_left(range(1, last), True, key=lambda count: fits(without_oldest(count))) if last else 0
    shortened = without_oldest(dropped)
    if dropped and fits(shortened):
        return CutSource(shortened, history_cut=True)

    def with_texts_of(length: int) -> Conversation:
        return replace(shortened, messages=[_without_middle(message, length) for message in shortened.messages])

    longest = max((len(message.content) for message in shortened.messages if message.role != "assistant"), default=0)
    cut = with_texts_of(longest_that_fits(longest, lambda length: fits(with_texts_of(length))))
    return CutSource(cut, history_cut=dropped > 0, text_cut=True) if fits(cut) else None


def longest_that_fits(longest: int, fits: Callable[[int], bool]) -> int:
    """To how many characters texts have to be shortened.

    A new seam may cost a token more, so that this is not always the very largest number, but what bisection ends with
    was tried, or is no text at all.

    Args:
        longest: characters of the longest text, which is too long.
        fits: whether all fits with each text so long at most.
    """
    return longest - bisect_left(range(longest), True, key=lambda taken: fits(longest - taken))


def without_middle(text: str, length: int) -> str:
    """The text, if it has more than `length` characters without so much of its middle that it has as many."""
    if len(text) <= length:
        return text
    head, tail = (length + 1) // 2, length // 2
    return text[:head] + text[len(text) - tail :]


def _without_middle(message: Message, length: int) -> Message:
    if message.role == "assistant":
        return message
    return replace(message, content=without_middle(message.content, length))
