"""Prints a row as the model sees it, and lengths in tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from chatglm_ptuning.data.report import LEFT_OUT, TRUNCATED
from chatglm_ptuning.figures import drawing
from chatglm_ptuning.model.losses import IGNORED_LABEL

if TYPE_CHECKING:
    from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer

OPENING, CLOSING = "⟦", "⟧"
"""Around learned tokens, where there are no colours."""
_LEARNED, _GIVEN = "bold green", "dim"
_BINS = 60


def print_example(
    tokenizer: ChatGLMTokenizer, input_ids: Sequence[int], labels: Sequence[int], console: Console
) -> None:
    """Prints an example as text, special tokens included; learned tokens are green, or, without colours, in ⟦ ⟧."""
    shown = Text()
    pairs = zip(input_ids, labels, strict=True)
    for learned, run in groupby(pairs, key=lambda pair: pair[1] != IGNORED_LABEL):
        text = "".join(_readable(tokenizer, [index for index, _ in run]))
        if console.is_terminal:
            shown.append(text, style=_LEARNED if learned else _GIVEN)
        else:
            shown.append(f"{OPENING}{text}{CLOSING}" if learned else text)
    console.print(shown, soft_wrap=True)


def print_tokens(
    tokenizer: ChatGLMTokenizer, input_ids: Sequence[int], labels: Sequence[int], console: Console
) -> None:
    """Prints one token per line: its place, its id, `learned` or `-`, and the token."""
    tokens = tokenizer.convert_ids_to_tokens(list(input_ids))
    for place, (index, label, token) in enumerate(zip(input_ids, labels, tokens, strict=True)):
        learned = label != IGNORED_LABEL
        line = Text(f"{place:>6} {index:>7}  {'learned' if learned else '-      '}  {token!r}")
        if console.is_terminal:
            line.stylize(_LEARNED if learned else _GIVEN)
        console.print(line, soft_wrap=True)


def describe(counted: Sequence[str]) -> str:
    """What was truncated, or why nothing was made of a row, by the counters that it adds to."""
    meanings = {name: f"left out: {what}" for name, what in LEFT_OUT.items()}
    meanings |= {name: f"truncated: {what}" for name, what in TRUNCATED.items()}
    return "; ".join(meanings[name] for name in dict.fromkeys(counted))


def draw_lengths(lengths: Mapping[str, Sequence[int]], limits: Mapping[str, int], path: Path) -> None:
    """Draws histograms of lengths, with the limit and the share beyond it, side by side as a PNG.

    Args:
        lengths: tokens of every example before truncation, by part of the example.
        limits: of each.
    """
    with drawing(path, 10, 4, len(limits)) as axes:
        for axis, (name, limit) in zip(axes, limits.items(), strict=True):
            values = lengths[name]
            beyond = sum(value > limit for value in values)
            axis.hist(values, bins=_BINS, color="tab:blue")
            axis.axvline(
                limit, color="tab:red", linestyle="--", label=f"limit {limit}: {beyond} of {len(values)} beyond"
            )
            axis.set_xlabel(f"tokens of the {name}")
            axis.set_ylabel("examples")
            axis.set_yscale("log")
            axis.grid(alpha=0.3)
            axis.legend(loc="upper right")


def _readable(tokenizer: ChatGLMTokenizer, ids: Sequence[int]) -> Iterator[str]:
    """Special tokens as they are spelled, and the texts between them."""
    special = set(tokenizer.all_special_ids)
    for is_special, group in groupby(ids, key=special.__contains__):
        run = list(group)
        yield "".join(tokenizer.convert_ids_to_tokens(run)) if is_special else tokenizer.decode(run)
