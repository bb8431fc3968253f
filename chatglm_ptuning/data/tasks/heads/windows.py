"""Windows of a long text inside a prompt, for tagging and question answering."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from string import Formatter

from chatglm_ptuning.data.tasks.examples import Example
from chatglm_ptuning.data.tasks.heads.head import Head

Span = tuple[int, int]
"""First and last + 1, of characters or of the file's tokens."""

_BETWEEN_COPIES = "\n"


@dataclass(frozen=True)
class Window:
    """A part of a text with the prompt around it.

    Attributes:
        input_ids: `[seq_len]`.
        spans: `[seq_len]`; the span of the text that each id encodes, None for ids of the prompt and of a first copy.
    """

    input_ids: list[int]
    spans: list[Span | None]


class WindowHead(Head):
    """A linear head that reads a text inside the task's prompt, without the roles of a chat."""

    echoes = True

    def windows_in(
        self, name: str, example: Example, ids: Sequence[int], spans: Sequence[Span | None], *, are_disjoint: bool
    ) -> list[Window]:
        """The windows of a text, each in the place of the last `{name}` of the prompt.

        With `echo`, the prompt contains a window twice, and its spans are on the second copy.

        Args:
            ids: of the text.
            spans: the span of the text that each id encodes.
            are_disjoint: give each span to one window only, the one that shows most of the text around it.

        Raises:
            ValueError: if the prompt does not contain `{name}`, or leaves no room for the text.
        """
        parts = [(text, field) for text, field, _, _ in Formatter().parse(self.task.prompt)]
        places = [place for place, (_, field) in enumerate(parts) if field == name]
        if not places:
            raise ValueError(f"{example.where}: the task's prompt has no {{{name}}}.")
        last = places[-1]
        values = example.placeholders(self.task) | {"labels": self.task.label_list}
        filled = [text + (values[field] if field else "") for text, field in parts]
        encode = self.tokenizer.vocabulary.encode
        before = [*self.tokenizer.start_ids, *encode("".join(filled[:last]) + parts[last][0])]
        text_behind = "".join(filled[last + 1 :])
        behind = encode(text_behind) if text_behind else []
        between = encode(_BETWEEN_COPIES)
        room = self.max_source_length - len(before) - len(behind)
        if self.echo:
            room = (room - len(between)) // 2
        if room < 1:
            twice = " with the text twice (echo)" if self.echo else ""
            limit = f"max_source_length {self.max_source_length}"
            raise ValueError(f"{example.where}: the prompt{twice} does not fit into {limit}; increase it.")
        windows, starts = [], window_starts(len(ids), room, self.doc_stride)
        for number, start in enumerate(starts):
            inside = range(start, min(start + room, len(ids)))
            own = [ids[place] for place in inside]
            first = [*before, *own, *between] if self.echo else before
            shown = [
                None if are_disjoint and owner_of(place, starts, room) != number else spans[place] for place in inside
            ]
            windows.append(Window([*first, *own, *behind], [None] * len(first) + shown + [None] * len(behind)))
        return windows


def window_starts(length: int, room: int, stride: int) -> list[int]:
    """The starts of windows of `room` tokens that cover `length` tokens and overlap by `stride`.

    The last window ends where the text ends.
    """
    if length <= room:
        return [0]
    step = room - min(stride, room - 1)
    starts = list(range(0, length - room, step))
    return [*starts, length - room]


def owner_of(place: int, starts: Sequence[int], room: int) -> int:
    """The window that shows most of the text around a token: the greatest distance to the nearer edge."""
    inside = [window for window, start in enumerate(starts) if start <= place < start + room]
    return max(inside, key=lambda window: min(place - starts[window], starts[window] + room - 1 - place))
