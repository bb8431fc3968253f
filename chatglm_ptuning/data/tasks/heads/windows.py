"""A text inside a prompt, in windows that fit: what tagging and question answering have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from string import Formatter
from typing import TypeVar

from chatglm_ptuning.data.tasks.examples import Example
from chatglm_ptuning.data.tasks.heads.head import Head

Mark = TypeVar("Mark")

_BETWEEN_COPIES = "\n"


@dataclass(frozen=True)
class Frame:
    """The ids around a window of a text.

    Attributes:
        before: in front of the window, with those that every sequence starts with.
        behind: behind the window.
        between: between the two copies of the window, if it is read twice (`Head.echo`); else None.
        room: ids of a window at most.
    """

    before: list[int]
    behind: list[int]
    between: list[int] | None
    room: int

    def fill(self, ids: Sequence[int], marks: Sequence[Mark]) -> tuple[list[int], list[Mark | None]]:
        """A row for the model.

        Args:
            ids: of the window.
            marks: what each of them stands for.

        Returns:
            `input_ids` `[seq_len]` and marks `[seq_len]`. The marks are on the last copy of the window, whose tokens
            have seen the whole of it if there are two; all other ids have None.
        """
        before = self.before if self.between is None else [*self.before, *ids, *self.between]
        return [*before, *ids, *self.behind], [None] * len(before) + [*marks] + [None] * len(self.behind)


class WindowHead(Head):
    """A linear head that reads a text inside the task's prompt, without the chat's roles."""

    echoes = True

    def frame_around(self, name: str, example: Example) -> Frame:
        """The prompt around the last `{name}` in it; an earlier one is text like any other.

        Raises:
            ValueError: if the prompt does not have it, or leaves no room for the text.
        """
        parts = [(text, field) for text, field, _, _ in Formatter().parse(self.task.prompt)]
        places = [place for place, (_, field) in enumerate(parts) if field == name]
        if not places:
            raise ValueError(f"{example.where}: the task's prompt has no {{{name}}} to read.")
        last = places[-1]
        values = example.placeholders(self.task) | {"labels": "、".join(self.task.labels.values())}
        filled = [text + (values[field] if field else "") for text, field in parts]
        encode = self.tokenizer.vocabulary.encode
        before = [*self.tokenizer.start_ids, *encode("".join(filled[:last]) + parts[last][0])]
        text_behind = "".join(filled[last + 1 :])
        behind = encode(text_behind) if text_behind else []
        between = encode(_BETWEEN_COPIES) if self.echo else None
        free = self.max_source_length - len(before) - len(behind)
        room = free if between is None else (free - len(between)) // 2
        if room < 1:
            twice = "" if between is None else " with the text twice (echo)"
            raise ValueError(
                f"{example.where}: the prompt{twice} does not fit into --max_source_length {self.max_source_length}."
            )
        return Frame(before, behind, between, room)


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
