"""A row as the model sees it: its tokens, with those that are learned set apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from chatglm_ptuning.data.encoding import Encoded
from chatglm_ptuning.data.report import CUT, LEFT_OUT
from chatglm_ptuning.model.losses import IGNORED_LABEL

if TYPE_CHECKING:
    from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer

OPENING, CLOSING = "⟦", "⟧"
"""Around what is learned, where there are no colours."""
_LEARNED, _GIVEN = "bold green", "dim"


def print_example(
    tokenizer: ChatGLMTokenizer, input_ids: Sequence[int], labels: Sequence[int], console: Console
) -> None:
    """Prints an example as text, special tokens included; what is learned is green, or, without colours, in ⟦ ⟧."""
    shown = Text()
    for learned, ids in _runs(input_ids, labels):
        text = "".join(_readable(tokenizer, ids))
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


def describe(encoded: Encoded) -> str:
    """What was cut off a row, or why nothing was made of it."""
    meanings = {name: f"left out: {what}" for name, what in LEFT_OUT.items()}
    meanings |= {name: f"cut: {what}" for name, what in CUT.items()}
    return "; ".join(meanings[name] for name in dict.fromkeys(encoded.counted))


def _runs(input_ids: Sequence[int], labels: Sequence[int]) -> Iterator[tuple[bool, list[int]]]:
    run: list[int] = []
    before = False
    for index, label in zip(input_ids, labels, strict=True):
        learned = label != IGNORED_LABEL
        if run and learned != before:
            yield before, run
            run = []
        run.append(index)
        before = learned
    if run:
        yield before, run


def _readable(tokenizer: ChatGLMTokenizer, ids: Sequence[int]) -> Iterator[str]:
    """Texts between special tokens, and those tokens as they are spelled."""
    special = set(tokenizer.all_special_ids)
    run: list[int] = []
    for index in ids:
        if index in special:
            yield tokenizer.decode(run) if run else ""
            yield str(tokenizer.convert_ids_to_tokens(index))
            run = []
        else:
            run.append(index)
    if run:
        yield tokenizer.decode(run)
