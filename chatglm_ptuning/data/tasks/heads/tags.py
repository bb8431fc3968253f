"""Texts to tag: which token stands for which character of the file."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chatglm_ptuning.data.encoding import Encoded
from chatglm_ptuning.data.tasks.examples import TokenExample
from chatglm_ptuning.data.tasks.heads.head import Inference, Prediction
from chatglm_ptuning.data.tasks.heads.windows import WindowHead, owner_of, window_starts
from chatglm_ptuning.data.tasks.task import Task
from chatglm_ptuning.model.losses import IGNORED_LABEL
from chatglm_ptuning.model.modeling_heads import ChatGLMForTokenClassification

if TYPE_CHECKING:
    from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer

_NOTHING = " "
"""What is read in the place of a token of the file that has no ids, so that there is one to decide its tag."""


@dataclass(frozen=True)
class TagWindow:
    """A part of a text with the prompt around it.

    Attributes:
        input_ids: `[seq_len]`.
        spans: `[seq_len]`; (first, last + 1) of the file's tokens that this id's tag decides, None for ids without
            one. Over all windows of a text, every token of the file is decided once at most.
    """

    input_ids: list[int]
    spans: list[tuple[int, int] | None]

    def labels(self, example: TokenExample, tags: Sequence[str]) -> list[int]:
        """`[seq_len]`, the number of the tag of the first token that an id decides, -100 where it decides none."""
        gold = example.tags or ()
        return [IGNORED_LABEL if span is None else tags.index(gold[span[0]]) for span in self.spans]


@dataclass(frozen=True)
class TokenClassification(WindowHead):
    """A linear head on every token, which says the BIO tag of what the token stands for."""

    name = "token_classification"
    solves = (TokenExample,)
    model_class = ChatGLMForTokenClassification
    splits_tokens = True

    echo: bool = True

    @staticmethod
    def outputs(task: Task) -> list[str]:
        """The tags."""
        return list(task.tags)

    def windows(self, example: TokenExample) -> list[TagWindow]:
        """The windows of a text.

        Raises:
            ValueError: if the prompt leaves no room for the text.
        """
        frame = self.frame_around("text", example)
        split = _by_characters if self.token_unit == "characters" else _by_pieces
        ids, spans = split(self.tokenizer, example.tokens)
        starts = window_starts(len(ids), frame.room, self.doc_stride)
        windows = []
        for window, start in enumerate(starts):
            inside = range(start, min(start + frame.room, len(ids)))
            own = [spans[place] if owner_of(place, starts, frame.room) == window else None for place in inside]
            windows.append(TagWindow(*frame.fill([ids[place] for place in inside], own)))
        return windows

    def encode(self, example: TokenExample) -> Encoded:
        """A row for each window; `labels` `[seq_len]` are -100 where an id decides no tag."""
        return Encoded.of_sources(
            {"input_ids": window.input_ids, "labels": window.labels(example, self.task.tags)}
            for window in self.windows(example)
        )

    def predict(self, examples: Sequence[TokenExample], model: Inference) -> list[Prediction]:
        """The tag of the highest logit for every token of the file."""
        windows = [self.windows(example) for example in examples]
        rows = [window.input_ids for own in windows for window in own]
        found: list[tuple[list[str], list[float]]] = [([], [])] * len(rows)
        for places, output in model.outputs(rows, "tagging"):
            probabilities, best = output.logits.softmax(-1).max(-1)
            for place, numbers, sure in zip(places, best.tolist(), probabilities.tolist(), strict=True):
                found[place] = [self.task.tags[number] for number in numbers[: len(rows[place])]], sure
        predictions, of_windows = [], iter(found)
        for example, own in zip(examples, windows, strict=True):
            chosen, sure = zip(*itertools.islice(of_windows, len(own)), strict=True)
            decided = [
                value
                for window, values in zip(own, sure, strict=True)
                for span, value in zip(window.spans, values, strict=False)
                if span is not None
            ]
            tags = tags_of(own, chosen, len(example.tokens))
            predictions.append(Prediction(tags, min(decided, default=1.0)))
        return predictions


def tags_of(windows: Sequence[TagWindow], predicted: Sequence[Sequence[str]], number_of_tokens: int) -> list[str]:
    """Tags of all tokens of the file from those of all ids; `O` for a token that has no id of its own.

    Where one id stands for several tokens, an entity that begins in it goes on to its end.

    Args:
        predicted: for every window, a tag for each id.
    """
    tags = ["O"] * number_of_tokens
    for window, row in zip(windows, predicted, strict=True):
        for span, tag in zip(window.spans, row, strict=True):
            if span is not None:
                first, end = span
                inside = "O" if tag == "O" else "I-" + tag.partition("-")[2]
                tags[first:end] = [tag, *[inside] * (end - first - 1)]
    return tags


def _by_characters(
    tokenizer: ChatGLMTokenizer, tokens: Sequence[str]
) -> tuple[list[int], list[tuple[int, int] | None]]:
    """Every token of the file by itself; of several ids the last one decides, which has seen the whole token."""
    ids: list[int] = []
    spans: list[tuple[int, int] | None] = []
    for place, token in enumerate(tokens):
        own = _inner_ids(tokenizer, token) or _inner_ids(tokenizer, _NOTHING)
        ids += own
        spans += [None] * (len(own) - 1) + [(place, place + 1)] * bool(own)
    return ids, spans


def _inner_ids(tokenizer: ChatGLMTokenizer, token: str) -> list[int]:
    """The ids of a token as they stand inside a text: without what the tokenizer puts in front of every text."""
    vocabulary = tokenizer.vocabulary
    # A line feed is an id of its own in all vocabularies of the family, and never merged with a character behind it.
    line, both = vocabulary.encode("\n"), vocabulary.encode("\n" + token)
    return both[len(line) :] if both[: len(line)] == line else vocabulary.encode(token)


def _by_pieces(tokenizer: ChatGLMTokenizer, tokens: Sequence[str]) -> tuple[list[int], list[tuple[int, int] | None]]:
    """The tokenizer's own pieces; of several ids inside one token of the file the last one decides."""
    text = "".join(tokens)
    token_at = [place for place, token in enumerate(tokens) for _ in token]
    spans: list[tuple[int, int] | None] = []
    decided: dict[int, int] = {}
    for place, (start, end) in enumerate(tokenizer.vocabulary.offsets(text)):
        if end <= start:
            spans.append(None)
            continue
        first, last = token_at[start], token_at[end - 1]
        earlier = decided.get(first)
        if earlier is not None:
            # The token began in an earlier id. That one keeps what it has before it, this one decides from it on.
            begun = spans[earlier]
            spans[earlier] = (begun[0], first) if begun is not None and begun[0] < first else None
        behind = last + 1
        while behind < len(tokens) and not tokens[behind]:
            behind += 1  # a token without text belongs to the one before it
        spans.append((first, behind))
        decided |= dict.fromkeys(range(first, last + 1), place)
    return tokenizer.vocabulary.encode(text), spans
