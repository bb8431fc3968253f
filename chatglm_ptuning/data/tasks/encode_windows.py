"""A text inside a prompt, in windows that fit: what tagging and question answering have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from string import Formatter
from typing import TYPE_CHECKING

from chatglm_ptuning.data.rendered import start_ids, text_ids

if TYPE_CHECKING:
    from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer


def around(template: str, name: str, values: Mapping[str, str], where: str) -> tuple[str, str]:
    """The prompt before and behind the last `{name}` of its template; an earlier one is text like any other.

    Raises:
        ValueError: if the template does not have it.
    """
    parts = [(text, field) for text, field, _, _ in Formatter().parse(template)]
    places = [place for place, (_, field) in enumerate(parts) if field == name]
    if not places:
        raise ValueError(f"{where}: the task's prompt has no {{{name}}} to read.")
    filled = [text + (values[field] if field else "") for text, field in parts]
    last = places[-1]
    return "".join(filled[:last]) + parts[last][0], "".join(filled[last + 1 :])


def frame_ids(tokenizer: ChatGLMTokenizer, before: str, behind: str) -> tuple[list[int], list[int]]:
    """The ids in front of the text, those that every sequence starts with included, and behind it."""
    return [*start_ids(tokenizer), *text_ids(tokenizer, before)], text_ids(tokenizer, behind) if behind else []


def window_starts(length: int, room: int, stride: int) -> list[int]:
    """Where windows of `room` tokens begin that cover `length` tokens and overlap by `stride`.

    The last one begins where the text's end comes to stand at its end.
    """
    if length <= room:
        return [0]
    step = room - min(stride, room - 1)
    starts = list(range(0, length - room, step))
    return [*starts, length - room]


def owner_of(place: int, starts: Sequence[int], room: int) -> int:
    """The window in which a token has most of the text around it: the greatest distance to the nearer edge."""
    inside = [window for window, start in enumerate(starts) if start <= place < start + room]
    return max(inside, key=lambda window: min(place - starts[window], starts[window] + room - 1 - place))


def room_for(frame: Sequence[Sequence[int]], max_source_length: int, where: str) -> int:
    """Tokens that the frame leaves free.

    Raises:
        ValueError: if it leaves none.
    """
    room = max_source_length - sum(map(len, frame))
    if room < 1:
        raise ValueError(f"{where}: the prompt does not fit into --max_source_length {max_source_length}.")
    return room
