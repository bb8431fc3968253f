"""The head for tags, and the mapping between token ids and the file's tokens."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chatglm_ptuning.data.encoding import EncodedExample
from chatglm_ptuning.data.tasks.examples import TokenExample
from chatglm_ptuning.data.tasks.heads.head import Inference, Prediction
from chatglm_ptuning.data.tasks.heads.windows import Span, Window, WindowHead
from chatglm_ptuning.data.tasks.task import Task
from chatglm_ptuning.model.losses import IGNORED_LABEL
from chatglm_ptuning.model.modeling_heads import ChatGLMForTokenClassification

if TYPE_CHECKING:
    from chatglm_ptuning.model.vocabulary import Vocabulary

_NOTHING = " "
"""EncodedExample in the place of a token of the file that has no ids, so that there is an id to decide its tag."""


@dataclass(frozen=True)
class TokenClassification(WindowHead):
    """A linear head on every token that predicts its BIO tag."""

    name = "token_classification"
    solves = (TokenExample,)
    model_class = ChatGLMForTokenClassification
    splits_tokens = True

    echo: bool = True

    @staticmethod
    def outputs(task: Task) -> list[str]:
        """The tags."""
        return list(task.tags)

    def windows(self, example: TokenExample) -> list[Window]:
        """The windows of a text. Their spans are the file's tokens whose tags an id decides.

        Over all windows, every token of the file is decided at most once.

        Raises:
            ValueError: if the prompt leaves no room for the text.
        """
        split = _by_characters if self.token_unit == "characters" else _by_pieces
        ids, spans = split(self.tokenizer.vocabulary, example.tokens)
        return self.windows_in("text", example, ids, spans, are_disjoint=True)

    def encode(self, example: TokenExample) -> EncodedExample:
        """A row for each window; `labels` `[seq_len]` are -100 where an id decides no tag."""
        return EncodedExample.of_sources(
            {"input_ids": window.input_ids, "labels": labels_of(window, example, self.task.tags)}
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


def labels_of(window: Window, example: TokenExample, tags: Sequence[str]) -> list[int]:
    """`[seq_len]`, the index of the tag of the first token that an id decides, -100 where it decides none."""
    gold = example.tags or ()
    return [IGNORED_LABEL if span is None else tags.index(gold[span[0]]) for span in window.spans]


def tags_of(windows: Sequence[Window], predicted: Sequence[Sequence[str]], number_of_tokens: int) -> list[str]:
    """The tags of all tokens of the file; `O` for a token without ids.

    If one id decides several tokens, an entity that begins in it continues to its end.

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


def _by_characters(vocabulary: Vocabulary, tokens: Sequence[str]) -> tuple[list[int], list[Span | None]]:
    """Encodes every token of the file by itself; its last id, which has seen the whole token, decides its tag."""
    ids: list[int] = []
    spans: list[Span | None] = []
    for place, token in enumerate(tokens):
        own = _inner_ids(vocabulary, token) or _inner_ids(vocabulary, _NOTHING)
        ids += own
        spans += [None] * (len(own) - 1) + [(place, place + 1)] * bool(own)
    return ids, spans


def _inner_ids(vocabulary: Vocabulary, token: str) -> list[int]:
    """The ids of a token inside a text: without what the tokenizer puts in front of every text."""
    # A line feed is an id of its own in all vocabularies of the family, and never merged with the next character.
    line, both = vocabulary.encode("\n"), vocabulary.encode("\n" + token)
    return both[len(line) :] if both[: len(line)] == line else vocabulary.encode(token)


def _by_pieces(vocabulary: Vocabulary, tokens: Sequence[str]) -> tuple[list[int], list[Span | None]]:
    """Encodes the text as the tokenizer does; the last id inside a token of the file decides its tag."""
    text = "".join(tokens)
    token_at = [place for place, token in enumerate(tokens) for _ in token]
    spans: list[Span | None] = []
    decided: dict[int, int] = {}
    for place, (start, end) in enumerate(vocabulary.offsets(text)):
        if end <= start:
            spans.append(None)
            continue
        first, last = token_at[start], token_at[end - 1]
        earlier = decided.get(first)
        if earlier is not None:
            # The token began in an earlier id, which keeps the tokens before it.
            begun = spans[earlier]
            spans[earlier] = (begun[0], first) if begun is not None and begun[0] < first else None
        behind = last + 1
        while behind < len(tokens) and not tokens[behind]:
            behind += 1  # a token without text belongs to the one before it
        spans.append((first, behind))
        decided |= dict.fromkeys(range(first, last + 1), place)
    return vocabulary.encode(text), spans
